"""The tables that README shows: a column for each measured machine. What report.py writes beside the results has every shape."""

from functools import partial
from statistics import median

import channel_grid
import figures
import machine
import targets
from channel_grid import DTYPES
from figures import geomean, select, select_channel
from markdown import error, microseconds, table, times

ISAS = ("avx512_bf16", "avx512", "avx2", "neon", "scalar", None)  # None: a GPU's results
SECTIONS = {
    "cpu_fresh": "row norms",
    "cpu_warm": "warm pages",
    "channel": "channel norms",
    "overhead": "calls, networks",
    "accuracy": "errors",
    "fold": "folding",
    "sync": "SyncBatchNorm",
}


class Machine:
    def __init__(self, path):
        self.path = path
        results = machine.load(path)
        self.about, self.sections = results["machine"], results["sections"]

    @property
    def name(self):
        cpu = self.about["cpu"].replace("(R)", "").removesuffix(" Processor")
        return self.about.get("gpu", f"{cpu}, {self.about.get('isa')}")


def provenance(machines):
    """Which document and commits each column comes from."""

    def measured(section):
        return f"{section['commit'][:7]}, {section['date'][:10]}" if section else "-"

    rows = []
    for m in machines:
        dates = (measured(m.sections.get(name)) for name in SECTIONS)
        rows.append([f"[{m.name}](benchmarks/results/{m.path.stem}.md), torch {m.about['torch']}", *dates])
    return table(["column, all its figures", *SECTIONS.values()], rows)


def columns(machines, section, rows):
    """`rows`: label -> function that makes a cell of a section's raw results."""
    measured = [m for m in machines if section in m.sections]
    body = [[label, *(cell(m.sections[section]) for m in measured)] for label, cell in rows.items()]
    return table(["", *(m.name for m in measured)], body) if measured else "Not measured."


def newest(machines, section):
    measured = [m.sections[section] for m in machines if section in m.sections]
    return max(measured, key=lambda found: found["date"], default={"cases": []})


# Speed ------------------------------------------------------------------------------------------------------------
def speedups(choose, over, section):
    """Geometric means over the grid: of both dtypes, and of each."""
    found = [[f.speedup(over) for f in choose(section, dtype=dtype) if f.has(over)] for dtype in (None, *DTYPES)]
    both, *each = (times(geomean(speedups)) for speedups in found)
    return f"{both} ({', '.join(each)})" if found[0] else "-"


def at_copy_speed(choose, section):
    return times(geomean(f.speedup_at_copy_speed() for f in choose(section)))


def slower(choose, rival, section):
    chosen = [f for f in choose(section) if f.has(rival) and not f.small_step]
    found = figures.slower(chosen, rival) or []
    if not chosen:
        return "-"
    return f"{len(found)} of {len(chosen)}" + (f", from {times(min(f.speedup(rival) for f in found))}" if found else "")


def grid(machines, section, ops, choose):
    rows = {}
    for op in ops:
        forward = partial(choose, op=op, kind="forward")
        rows[f"{op}, forward"] = partial(speedups, forward, "eager")
        rows[f"{op}, forward, over torch.compile"] = partial(speedups, forward, "compiled")
        rows[f"{op}, forward, a kernel at copy speed"] = partial(at_copy_speed, forward)
        rows[f"{op}, forward+backward"] = partial(speedups, partial(choose, op=op, kind="train"), "eager")
    rows["slower than torch eager, forward"] = partial(slower, partial(choose, kind="forward"), "eager")
    rows["slower than torch.compile, forward"] = partial(slower, partial(choose, kind="forward"), "compiled")
    rows["slower than torch eager, forward+backward"] = partial(slower, partial(choose, kind="train"), "eager")
    return columns(machines, section, rows)


def copy_rate(section, op, dtype):
    """Least and largest share of the copy's rate, out of cache."""
    large = [f.share_of_copy_rate() for f in select(section, op, "forward", dtype) if f.out_of_cache]
    return f"{min(large):.0%} - {max(large):.0%}" if large else "-"


def copy_rates(machines):
    def cell(op, section):
        return ", ".join(copy_rate(section, op, dtype) for dtype in DTYPES)

    return columns(machines, "cpu_warm", {op: partial(cell, op) for op in figures.OPS})


# Calls and networks -----------------------------------------------------------------------------------------------
def calls(machines):
    def cell(what, function, section):
        (case,) = (case for case in section["cases"] if case["kind"] == "call" and case["what"] == what)
        return f"{median(case['us'][function]):.1f} us, {median(case['relative'][function]):.2f}x"

    rows = {}
    for case in newest(machines, "overhead")["cases"]:
        if case["kind"] == "call":
            for function in ("normext.layer_norm", "normext.rms_norm"):
                rows[f"{function}, {case['what']}"] = partial(cell, case["what"], function)
    return columns(machines, "overhead", rows)


def networks(machines):
    def cell(what, section):
        (case,) = (case for case in section["cases"] if case["what"] == what)
        return ", ".join(microseconds(median(us)) for us in case["us"].values())

    cases = [case for case in newest(machines, "overhead")["cases"] if case["kind"] != "call"]
    order = f"In this order: {', '.join(cases[0]['us'])}.\n\n" if cases else ""
    return order + columns(machines, "overhead", {case["what"]: partial(cell, case["what"]) for case in cases})


# Errors and folding -----------------------------------------------------------------------------------------------
def largest(section, key):
    """Largest figure of each op, fused calls included, and each `key(case)`."""
    rows = {}
    for case in section["cases"]:
        row = rows.setdefault(case["op"].removesuffix(", fused"), {})
        row[key(case)] = max(row.get(key(case), 0.0), case["figure"])
    return rows


def accuracy(section):
    """Of every back end; then of the worst of them beside torch's, by kind of inputs."""
    by_backend = largest(section, lambda case: case["backend"])
    names = list(dict.fromkeys(name for row in by_backend.values() for name in row))
    first = table(["op", *names], [[op, *(error(row.get(name)) for name in names)] for op, row in by_backend.items()])
    by_inputs = largest(section, lambda case: (case["inputs"].removesuffix(", float32 parameters"), case["backend"] == "torch"))
    kinds = list(dict.fromkeys(inputs for row in by_inputs.values() for inputs, _ in row))
    rows = [
        [op, *(f"{error(row.get((inputs, False)))}, {error(row.get((inputs, True)))}" for inputs in kinds)]
        for op, row in by_inputs.items()
    ]
    return f"{first}\n\n{table(['normext, torch', *kinds], rows)}"


# GPU --------------------------------------------------------------------------------------------------------------
def gpu(section, groups=None):
    """Device times; the others' as multiples of normext's."""
    chosen = [case for case in section["cases"] if case["group"] in (groups or case["group"]) and "normext" in case["us"]]
    others = list(dict.fromkeys(name for case in chosen for name in case["us"] if name not in ("normext", "copy")))
    rows = []
    for case in chosen:
        us = case["us"]
        shape = case["shape"] + ("" if case["layout"] == "contiguous" else f" {case['layout']}")
        rates = [f"{case['bytes'] / us['normext'] * 1e-6:.2f}", f"{us['copy'] / us['normext']:.0%} ({case['l2']})"]
        relative = [times(us[name] / us["normext"] if name in us else None) for name in others]
        host = microseconds(case["host_us"]["normext"]) if "normext" in case["host_us"] else "-"
        rows.append([case["op"], case["pass"], case["dtype"], shape, microseconds(us["normext"]), *rates, *relative, host])
    header = ["op", "pass", "dtype", "shape", "us", "TB/s", "of copy", *(f"{name} takes" for name in others), "host us"]
    return table(header, rows)


# What README shows ------------------------------------------------------------------------------------------------
def headline(machines):
    """Forward over torch eager."""

    def cell(section, choose, m):
        found = m.sections.get(section, {"cases": []})
        return ", ".join(times(geomean(f.speedup() for f in choose(found, dtype=dtype))) for dtype in DTYPES)

    rows = []
    for section, ops, choose in GRIDS:
        for op in ops:
            forward = partial(choose, op=op, kind="forward")
            rows.append([f"`{op}`", *(cell(section, forward, m) for m in machines)])
    return table([f"forward, times torch eager: {', '.join(DTYPES)}", *(m.name for m in machines)], rows)


def missed(machines):
    """The targets that some machine does not reach."""
    rows = {}
    for m in machines:
        for target in targets.check({"sections": m.sections}):
            rows.setdefault((target.what, target.aim), {})[m.name] = target
    short = {key: row for key, row in rows.items() if not all(target.met for target in row.values())}
    body = [[*key, *(row[m.name].reached if m.name in row else "-" for m in machines)] for key, row in short.items()]
    return table(["not reached", "aim", *(m.name for m in machines)], body)


GRIDS = (("cpu_fresh", figures.OPS, select), ("channel", tuple(channel_grid.OPS), select_channel))


def blocks(paths):
    """What stands between README's markers, by the markers' names."""
    every = sorted(map(Machine, paths), key=lambda m: ISAS.index(m.about.get("isa")))
    machines = [m for m in every if "gpu" not in m.about]
    parts = [provenance(every)]
    for m in every:
        if "gpu" in m.sections:
            parts.append(f"### Device time, {m.name}\n\n{gpu(m.sections['gpu'], groups=('llm', 'decode', 'resnet', 'diffusion'))}")
    for title, body in (
        ("Row norms, times torch, geometric means over the grid (float32, bfloat16)", grid(machines, *GRIDS[0])),
        ("Row norms, warm pages, from 32 MB: share of the rate of `y.copy_(x)` (float32, bfloat16)", copy_rates(machines)),
        ("Channel norms, times torch, geometric means over the grid (float32, bfloat16)", grid(machines, *GRIDS[1])),
        ("Calls of 1x64 in float32, and times the time of `F.layer_norm`", calls(machines)),
        ("Networks, us", networks(machines)),
        ("Largest error, in units of the accuracy contract (limit 4)", accuracy(newest(machines, "accuracy"))),
    ):
        parts.append(f"### {title}\n\n{body}")
    return {"headline": headline(machines), "tables": "\n\n".join(parts), "missed": missed(machines)}
