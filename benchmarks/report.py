"""Tables and a plot from results files, so that every published figure comes from a committed result.

python benchmarks/report.py                          writes <machine>.md and <machine>.png beside each results file
python benchmarks/report.py --readme README.md       and puts overview.py's tables between README's markers
python benchmarks/report.py --readme README.md --check   fails if that would change README
"""

import argparse
import sys
from pathlib import Path
from statistics import median

import bounds_changes
import channel_grid
import figures
import machine
import overview
import targets
from channel_grid import DTYPES
from figures import geomean, select, select_channel
from markdown import error, microseconds, table, times

AT_COPY_SPEED = (
    "A kernel at copy speed would only move the op's bytes, at the rate of `y.copy_(x)` into mapped memory: no call, no sums."
)


def provenance(section):
    load = figures.other_load(section)
    busy = f"; other load at most {load:.0%} of the processors" if load == load else ""
    made = f"Commit {section['commit']}, {section['date']}, `{section['command']}`"
    return f"{made}, {section['runs']} run{'s' * (section['runs'] > 1)}{busy}."


# CPU grid ---------------------------------------------------------------------------------------------------------
def speedups(section, op, kind, over):
    """Geometric means over the grid: both dtypes, then each."""
    for dtype in (None, *DTYPES):
        yield times(geomean(f.speedup(over) for f in select(section, op, kind, dtype) if f.has(over)))


def summary(section):
    header = [
        "op",
        "forward / eager",
        "float32",
        "bfloat16",
        "a kernel at copy speed",
        "forward / compiled",
        "forward+backward / eager",
    ]
    rows = []
    for op in figures.OPS:
        bound = times(geomean(f.speedup_at_copy_speed() for f in select(section, op, "forward")))
        compiled, train = (
            next(speedups(section, op, "forward", "compiled")),
            next(speedups(section, op, "train", "eager")),
        )
        rows.append([op, *speedups(section, op, "forward", "eager"), bound, compiled, train])
    return "\n\n".join([table(header, rows), AT_COPY_SPEED, slower_cases(select(section, kind="forward"), "forward cases")])


def slower_cases(chosen, what):
    """How many; each rival is compared on the cases it took part in."""
    counts = []
    for rival in ("eager", "compiled"):
        slower = figures.slower(chosen, rival)
        compared = sum(figure.has(rival) for figure in chosen)
        counts.append(f"torch {rival} was not measured" if slower is None else f"{len(slower)} of {compared} against torch {rival}")
    return f"Slower in every run, of the {what}: {', '.join(counts)}."


def by_shape(chosen):
    header = ["shape"]
    for dtype in DTYPES:
        header += [f"{dtype} us", "eager", "compiled", "copy speed", "forward+backward us", "eager", "copy speed"]
    rows = {}
    for figure in chosen:
        row = rows.setdefault(figure.shape, {})
        cells = [microseconds(figure.us()), times(figure.speedup())]
        if figure.kind == "forward":
            cells.append(times(figure.speedup("compiled") if figure.has("compiled") else None))
        row[figure.dtype, figure.kind] = [*cells, times(figure.speedup_at_copy_speed())]

    def cells(row):
        for dtype in DTYPES:
            yield from row.get((dtype, "forward"), ["-"] * 4)
            yield from row.get((dtype, "train"), ["-"] * 3)

    return table(header, [[shape, *cells(row)] for shape, row in rows.items()])


def copy_rates(section, op=None):
    """Share of the copy's rate by shape, warm pages."""
    ops = figures.OPS if op is None else (op,)
    rows = {}
    for figure in select(section, kind="forward"):
        if figure.op in ops:
            mark = " *" if figure.out_of_cache else ""
            rows.setdefault(figure.shape, {})[figure.op, figure.dtype] = f"{figure.share_of_copy_rate():.0%}{mark}"
    header = ["shape", *(f"{name} {dtype}" for name in ops for dtype in DTYPES)]
    return table(header, [[shape, *(row.get((n, d), "-") for n in ops for d in DTYPES)] for shape, row in rows.items()])


def copy_rate_summary(section):
    rows = []
    for op in figures.OPS:
        shares = (overview.copy_rate(section, op, dtype) for dtype in DTYPES)
        rows.append([op, *shares, *speedups(section, op, "forward", "eager")])
    header = ["op", *(f"share, {dtype}" for dtype in DTYPES), "whole grid: forward / eager", *DTYPES]
    return table(header, rows)


# Channel norms ----------------------------------------------------------------------------------------------------
def channel_summary(section):
    """Geometric means over the grid, forward and forward+backward."""
    halves = [{}, *({"layout": layout} for layout in channel_grid.LAYOUTS), *({"dtype": dtype} for dtype in DTYPES)]
    header = ["op", "pass", "/ eager", *channel_grid.LAYOUTS, *DTYPES, "a kernel at copy speed", "/ compiled"]
    rows = []
    for op in channel_grid.OPS:
        for kind, name in targets.PASSES.items():
            chosen = select_channel(section, op, kind)
            means = [times(geomean(f.speedup() for f in select_channel(section, op, kind, **half))) for half in halves]
            bound = times(geomean(f.speedup_at_copy_speed() for f in chosen))
            compiled = times(geomean(f.speedup("compiled") for f in chosen if f.has("compiled")))
            rows.append([op, name, *means, bound, compiled])
    cases = [f for f in select_channel(section) if not f.small_step]
    return table(header, rows) + "\n\n" + slower_cases(cases, "cases (training steps from 128 KB of input)")


# Bounds -----------------------------------------------------------------------------------------------------------
def bounds(section):
    """Geometric means for each build of bounds.py; then the cases slower than torch eager in the median of its runs."""
    names = list(bounds_changes.BUILDS)

    def cells(op, kind):
        for name in names:
            chosen = figures.of_bounds(section, op, kind)
            if not all(f.has(name) for f in chosen):
                yield "-"
                continue
            both, *each = (
                times(geomean(f.speedup(name) for f in figures.of_bounds(section, op, kind, d))) for d in (None, *DTYPES)
            )
            yield f"{both} ({', '.join(each)})"

    ops = [*dict.fromkeys(case["op"] for case in section["row_cases"] + section["channel_cases"]), None]
    passes = {**targets.PASSES, None: "both"}
    rows = [
        [op or "all channel norms", name, *cells(op, kind)]
        for op in ops
        for kind, name in passes.items()
        if figures.of_bounds(section, op, kind) and not (kind is None and op in figures.OPS)
    ]
    chosen = [f for op in ops[:-1] for f in figures.of_bounds(section, op)]
    slower = [f for f in chosen if f.has(names[0]) and f.speedup(names[0]) < figures.SLOWER and not f.small_step]
    of_cases = [
        [f"{f.op} {f.dtype} {f.name}" + ("" if f.op not in figures.OPS else f" {f.kind}")]
        + [f"{times(f.speedup(name))}, {microseconds(f.us(name))} us" if f.has(name) else "-" for name in names]
        for f in slower
    ]
    tables = table(["op", "pass", *names], rows), table([f"below {figures.SLOWER}x", *names], of_cases)
    return "\n\n".join([f"```\n{bounds_changes.__doc__.strip()}\n```", *tables])


# Calls, blocks, accuracy ------------------------------------------------------------------------------------------
def calls(section):
    names = ("normext.layer_norm", "normext.rms_norm", "F.layer_norm", "F.rms_norm")
    rows = []
    for case in section["cases"]:
        if case["kind"] == "call":
            relative = {"F.layer_norm": [1.0], **case["relative"]}
            rows.append([case["what"], *(f"{median(case['us'][n]):.2f} ({median(relative[n]):.2f}x)" for n in names)])
    return table(["1x64 float32, us per call", *names], rows)


def blocks(section):
    tables = []
    for kind, title in (("block", "transformer block"), ("network", "CNN")):
        chosen = [case for case in section["cases"] if case["kind"] == kind]
        if chosen:
            names = list(chosen[0]["us"])
            rows = [[case["what"], *(microseconds(median(case["us"][name])) for name in names)] for case in chosen]
            tables.append(table([f"{title}, us", *names], rows))
    return "\n\n".join(tables)


def accuracy(section):
    """Largest figure per op, class of inputs and quantity, of every back end and of torch."""
    names = list(dict.fromkeys(case["backend"] for case in section["cases"]))
    rows = {}
    for case in section["cases"]:
        key = (case["op"], case["inputs"], case["quantity"])
        row = rows.setdefault(key, {})
        row[case["backend"]] = max(row.get(case["backend"], 0.0), case["figure"])
    header = ["op", "inputs", "quantity", *names]
    return table(header, [[*key, *(error(row.get(name)) for name in names)] for key, row in rows.items()])


def fold(section):
    """Errors of the first run, all of which have the same inputs; median times."""
    rows = []
    for case in section["cases"]:
        us, speedup = ({name: median(values) for name, values in case[what].items()} for what in ("us", "speedup"))
        error, answers = ({name: values[0] for name, values in case[what].items()} for what in ("error", "answers_of_float64"))
        rows.append(
            [f"{case['model']}, {case['folded'][0]} folded"]
            + [f"{error[name]:.1e}, {answers[name]}" for name in ("unfolded", "folded")]
            + [f"{microseconds(us[name])} ({speedup.get(name, 1.0):.2f}x)" for name in ("torch", "normext", "folded")]
        )
    measured = ("relative error, answers of float64's: unfolded", "folded")
    return table(["CNN", *measured, "us, torch's BatchNorm", "normext's", "folded"], rows)


def sync(section):
    return "\n".join(["```", *section["printed"], "```"])


# Documents --------------------------------------------------------------------------------------------------------
def heading(results):
    about = results["machine"]
    isa = f" ({about['isa']})" if about.get("isa") else ""
    device = f"{about['gpu']}, CUDA {about['cuda']}" if "gpu" in about else f"{about['cpu']}, {about['threads']} threads{isa}"
    return f"{device}, torch {about['torch']}, {about['system']}."


def render(results):
    """Markdown of everything in a results file."""
    sections, parts = results["sections"], [heading(results)]

    def part(title, name, *bodies):
        if name in sections:
            texts = [body(sections[name]) for body in bodies]
            parts.append("\n\n".join([f"### {title}", *texts, provenance(sections[name])]))

    part("Speed: times torch eager and torch.compile, geometric means over the grid", "cpu_fresh", summary)
    part(f"Share of the rate of `y.copy_(x)`, warm pages, from {figures.OUT_OF_CACHE >> 20} MB", "cpu_warm", copy_rate_summary)
    part("Channel norms: times torch eager and torch.compile, geometric means over the grid", "channel", channel_summary)
    part("What norms that leave work out reach: times torch eager, both dtypes (float32, bfloat16)", "bounds", bounds)
    part("Call overhead and compiled blocks", "overhead", calls, blocks)
    part("Largest error, in units of the accuracy contract (limit 4)", "accuracy", accuracy)
    part("Deployment: BatchNorm folded into convolutions", "fold", fold)
    part("SyncBatchNorm, processes over gloo", "sync", sync)
    part("Device time", "gpu", overview.gpu)
    if "cpu_fresh" in sections:
        for op in figures.OPS:
            parts.append(f"### {op} by shape, times torch\n\n" + by_shape(select(sections["cpu_fresh"], op)))
    if "channel" in sections:
        for op in channel_grid.OPS:
            for layout in channel_grid.LAYOUTS:
                rows = by_shape(select_channel(sections["channel"], op, layout=layout))
                parts.append(f"### {op} {layout} by shape, times torch\n\n" + rows)
    if "cpu_warm" in sections:
        note = "Bytes per second as a share of the copy's; * marks cases out of cache.\n\n"
        parts.append("### Share of the copy's rate by shape, warm pages\n\n" + note + copy_rates(sections["cpu_warm"]))
    return "\n\n".join(parts) + "\n"


def write(path):
    """The tables and the plot of one results file, beside it."""
    results = machine.load(path)
    path.with_suffix(".md").write_text(f"# Results: {path.stem}\n\nWritten by report.py from {path.name}.\n\n" + render(results))
    if "cpu_fresh" in results["sections"]:
        try:
            import plot
        except ImportError:
            print("matplotlib is not installed: no plot", file=sys.stderr)
        else:
            plot.save(results, path.with_suffix(".png"))


def readme(path, blocks, check):
    """Each block goes between the two markers with its name."""
    text = path.read_text()
    updated = text
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: begin (written by benchmarks/report.py) -->", f"<!-- {name}: end -->"
        if begin not in updated or end not in updated:
            raise SystemExit(f"{path} needs the two lines that mark where the {name} go:\n{begin}\n{end}")
        before, after = updated.split(begin)[0], updated.split(end)[1]
        updated = "\n".join([before + begin, block, end + after])
    if check and updated != text:
        raise SystemExit(f"{path} does not show the committed results; run `python benchmarks/report.py --readme {path}`")
    path.write_text(updated)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="default: every file in benchmarks/results")
    parser.add_argument("--readme", type=Path, help="file to put the summaries into, between its two markers")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    paths = args.results or sorted(machine.RESULTS.glob("*.json"))
    if not args.check:
        for path in paths:
            write(path)
    if args.readme:
        readme(args.readme, overview.blocks(paths), args.check)


if __name__ == "__main__":
    main()
