"""Norms on a GPU: device time, share of a copy's speed, host time; against torch eager, torch.compile and peers.

    python benchmarks/gpu.py                        core shapes; writes benchmarks/results/<gpu>.json, table last
    python benchmarks/gpu.py --full --time-limit 0  the whole grid
    python benchmarks/gpu.py --dry-run              every code path but the device's, on a machine without a GPU

Backward means the gradients of all inputs from saved statistics; its device time has no forward in it. The copy is
`y.copy_(x)` of as many bytes as the op must move (traffic.py), in the same rotation of buffers.
"""

import argparse
import sys
import time
from pathlib import Path

import gpu_cases
import gpu_timing
import machine
import peers
import torch
import torch._functorch.config as functorch_config

PASSES = ("forward", "backward")


def functions(case, op, found_peers, with_compile):
    """{contender: function of Inputs.arguments()}"""
    table = {"normext": case.function("normext", op), "eager": case.function("torch", op)}
    if with_compile:
        torch.compiler.reset()
        table["compiled"] = torch.compile(case.function("torch", op), dynamic=False, fullgraph=True)
    return table | {name: peer[op.name] for name, peer in found_peers.items() if op.name in peer}


def copy_calls(nbytes, sets, device):
    """Copies that read nbytes / 2 and write nbytes / 2."""
    pairs = [torch.empty(2, max(1, nbytes // 4), dtype=torch.bfloat16, device=device).normal_() for _ in range(sets)]
    return [lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs]


def calls(function, inputs, kind, timer):
    if kind == "forward":
        return [lambda each=each: function(*each.arguments()) for each in inputs]
    with timer.scope():
        graphs = [(function(*each.arguments()), each) for each in inputs]
    return [
        lambda y=y, each=each: torch.autograd.grad(y, each.leaves(), each.output_grads, retain_graph=True) for y, each in graphs
    ]


def check(function, case, op, inputs):
    """Refuses to time what is wrong: the output against torch's in float32. Running statistics are those of copies."""
    wanted = case.function("torch", op)(*(tensor.detach().clone().float() for tensor in inputs.arguments()))
    found = function(*inputs.arguments())
    pairs = zip(*((both if isinstance(both, tuple) else (both,)) for both in (found, wanted)), strict=True)
    limit = 1e-4 if inputs.x.dtype == torch.float32 else 2e-2
    for ours, theirs in pairs:
        error = ((ours.detach().float() - theirs).norm() / theirs.norm()).item()
        if not error <= limit:
            raise ValueError(f"wrong output: relative error {error:.2g}")


def host_call(function, inputs, kind):
    if kind == "forward":
        return lambda: function(*inputs.arguments())
    return lambda: inputs.gradients(function)


def measure(case, op, kind, table, timer, options):
    device, train = options.device, kind == "backward"
    nbytes = case.floor_bytes(op, kind)
    sets, cold = gpu_timing.sets_needed(nbytes, options.l2_bytes)
    inputs = [case.inputs(op, device, train) for _ in range(sets)]
    row = case.described(op) | {"pass": kind, "l2": "cold" if cold else "warm", "bytes": nbytes, "host_us": {}, "failed": {}}
    prepared = {"copy": timer.prepare(copy_calls(nbytes, sets, device))}
    with torch.set_grad_enabled(train):
        for name, function in table.items():
            try:
                check(function, case, op, inputs[0])
                prepared[name] = timer.prepare(calls(function, inputs, kind, timer))
                if case.group in ("decode", "image"):
                    call = host_call(function, inputs[0], kind)
                    row["host_us"][name] = gpu_timing.host_seconds(call, device) * 1e6
            except Exception as error:  # one contender's failure must not cost the others their figures
                row["failed"][name] = f"{type(error).__name__}: {str(error)[:200]}"
        row["us"] = {name: seconds * 1e6 for name, seconds in timer.time(prepared, options.rounds).items()}
    return row


def line(row):
    """One short line per measurement; figures of the others are their time over normext's."""
    us = row["us"]
    what = f"{row['op']:<19} {row['pass']:<8} {row['dtype']:<8} {row['shape']}"
    what += "" if row["layout"] == "contiguous" else f" {row['layout']}"
    if "normext" not in us:
        return f"{what:<66} FAILED {row['failed']['normext']}"
    others = " ".join(f"{name} {us[name] / us['normext']:.2f}x" for name in us if name not in ("normext", "copy"))
    host = f" host {row['host_us']['normext']:.1f} us" if "normext" in row["host_us"] else ""
    rate = row["bytes"] / us["normext"] * 1e-6
    share = us["copy"] / us["normext"]
    return f"{what:<66} {us['normext']:8.2f} us {rate:5.2f} TB/s {share:4.0%} of copy ({row['l2']})  {others}{host}"


def describe(options):
    described = machine.describe()
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described |= {"gpu": properties.name, "sm_count": properties.multi_processor_count}
        described |= {"l2_mb": options.l2_bytes >> 20, "cuda": torch.version.cuda}
    return described


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=machine.RESULTS, help="folder of the results file")
    parser.add_argument("--full", action="store_true", help="the whole grid")
    parser.add_argument("--groups", help="of the grid, comma separated")
    parser.add_argument("--ops", help="comma separated; default: all")
    parser.add_argument("--compile", default="llm", help='groups with torch.compile, comma separated, or "all", "none"')
    parser.add_argument("--time-limit", type=float, default=480, help="seconds after which no case is begun; 0: none")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    options.device = "cpu" if options.dry_run else "cuda"
    if options.dry_run:
        options.l2_bytes, options.rounds, options.compile = 1 << 12, 2, "none"
    elif not torch.cuda.is_available():
        raise SystemExit("gpu.py needs a GPU that torch can use; --dry-run does without")
    else:
        options.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return options


def main():
    options = arguments()
    torch.manual_seed(0)
    # A forward's backward is run more than once; inductor would otherwise reuse the buffers that it needs.
    functorch_config.donated_buffer = False
    timer = gpu_timing.HostTimer() if options.dry_run else gpu_timing.GraphTimer()
    found_peers, missing = ({}, {}) if options.dry_run else peers.installed()
    for name, reason in missing.items():
        print(f"peer {name} left out: {reason}", file=sys.stderr)
    cases = gpu_cases.cases(options.full, options.dry_run)
    if options.groups:
        cases = [case for case in cases if case.group in options.groups.split(",")]

    rows, skipped, start = [], 0, time.time()
    for case in cases:
        if options.time_limit and time.time() - start > options.time_limit:
            skipped += 1
            continue
        with_compile = options.compile == "all" or case.group in options.compile.split(",")
        for op in case.ops():
            for kind in PASSES:
                if not options.ops or op.name in options.ops.split(","):
                    table = functions(case, op, found_peers, with_compile)
                    rows.append(measure(case, op, kind, table, timer, options))

    described = describe(options)
    section = {"cases": rows, "runs": 1, "skipped_cases": skipped, "peers_missing": missing}
    command = "python benchmarks/gpu.py " + " ".join(sys.argv[1:])
    results = {"machine": described, "sections": {"gpu": section | machine.stamp(command.strip())}}
    if not options.dry_run:
        path = options.output / f"{machine.file_name(described)}.json"
        machine.save(path, results)
        print(f"wrote {path}")
    print(f"{len(rows)} measurements in {time.time() - start:.0f} s; {skipped} cases skipped for time")
    print("\n".join(line(row) for row in rows))
    failures = {f"{name}: {reason}" for row in rows for name, reason in row["failed"].items()}
    print("\n".join(sorted(failures)))
    sys.exit(any("normext" in row["failed"] for row in rows))


if __name__ == "__main__":
    main()
