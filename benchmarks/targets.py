"""Speed and accuracy targets of the project, checked against results: `python benchmarks/targets.py [results.json]`."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import figures
import machine

FORWARD = {  # (op, dtype; None: both together): geometric mean over the grid, times torch eager
    ("layer_norm", None): 1.9,
    ("rms_norm", None): 6.0,
    ("rms_norm", "float32"): 4.5,
    ("add_rms_norm", None): 5.0,
    ("add_rms_norm", "float32"): 4.0,
}
COPY_RATE = {"float32": 0.9, "bfloat16": 0.7}  # of y.copy_(x), warm pages, out of cache
SMALL_TRAIN_US = 40  # most extra time of a training step on less than figures.SMALL_INPUT
CALL = 1.1  # times F.layer_norm's time, without gradients
TRAIN_CALL = 1.4  # the same, forward and backward
ACCURACY = 4.0
# The channel norms, forward and forward+backward together; None: all ops. In evaluation float32 BatchNorm of torch is as fast
# as a copy: there parity is enough, and it is what "no case slower" says.
CHANNEL = {None: 2.0, "group_norm_silu": 3.0, "instance_norm": 3.0}
PASSES = {"forward": "forward", "train": "forward+backward"}


@dataclass(frozen=True)
class Target:
    """`what` and `aim` are the same for every machine, `reached` is one's figure."""

    met: bool
    what: str
    aim: str
    reached: str
    remark: str = ""


def without_statistics(bounds, op, kind=None, dtype=None):
    """Of our kernels without them, as bounds.py measured it."""
    chosen = figures.of_bounds(bounds, op, kind, dtype) if bounds else []
    reached = figures.geomean(f.speedup("no statistics") for f in chosen)
    return f"; without any statistics: {reached:.2f}x" if chosen else ""


def cpu_fresh(section, bounds):
    for (op, dtype), wanted in FORWARD.items():
        chosen = figures.select(section, op, "forward", dtype)
        reached = figures.geomean(figure.speedup() for figure in chosen)
        bound = figures.speedup_at_copy_speed_and_call(chosen)
        remark = f"a kernel at copy speed with our time per call: {bound:.2f}x"
        remark += without_statistics(bounds, op, "forward", dtype)
        yield Target(reached >= wanted, f"{op}, forward, {dtype or 'both dtypes'}", f"{wanted}x", f"{reached:.2f}x", remark)
    for rival in ("eager", "compiled"):
        yield none_slower("row norms, forward", figures.select(section, kind="forward"), rival)
    yield from training("row norms, forward+backward", figures.select(section, kind="train"))


def none_slower(what, chosen, rival):
    slower = figures.slower(chosen, rival)
    compared = sum(figure.has(rival) and not figure.small_step for figure in chosen)
    what = f"{what}, slower than torch {rival}"
    if slower is None:
        return Target(False, what, "0", "-", "not measured")
    worst = f" (from {min(f.speedup(rival) for f in slower):.2f}x)" if slower else ""
    names = ", ".join(f"{f.op} {f.dtype} {f.name} {f.speedup(rival):.2f}x" for f in slower)
    return Target(not slower, what, "0", f"{len(slower)} of {compared}{worst}", names)


def training(what, chosen):
    yield none_slower(f"{what} from 128 KB", chosen, "eager")
    small = [figure.extra_us() for figure in chosen if figure.small_step and figure.has("eager")]
    reached = f"{max(small):.1f} us" if small else "-"
    met = bool(small) and max(small) <= SMALL_TRAIN_US
    yield Target(met, f"{what} below 128 KB, most time above torch", f"{SMALL_TRAIN_US} us", reached)


def cpu_warm(section):
    for op in figures.OPS:
        for dtype, wanted in COPY_RATE.items():
            chosen = [figure for figure in figures.select(section, op, "forward", dtype) if figure.out_of_cache]
            if chosen:
                worst = min(chosen, key=figures.Figure.share_of_copy_rate)
                share = worst.share_of_copy_rate()
                what = f"{op} {dtype}, warm pages, share of the copy's rate"
                yield Target(share >= wanted, what, f"{wanted:.0%}", f"{share:.0%}", worst.shape)


def channel(section, bounds):
    for op, wanted in CHANNEL.items():
        by_pass = [figures.geomean(f.speedup() for f in figures.select_channel(section, op, kind)) for kind in PASSES]
        chosen = figures.select_channel(section, op)
        reached = figures.geomean(f.speedup() for f in chosen)
        bound = figures.geomean(f.speedup_at_copy_speed() for f in chosen)
        what = f"{op or 'channel norms'} ({', '.join(PASSES.values())})"
        passes = ", ".join(f"{figure:.2f}x" for figure in by_pass)
        remark = f"a kernel at copy speed: {bound:.2f}x" + without_statistics(bounds, op)
        yield Target(reached >= wanted, what, f"{wanted}x", f"{reached:.2f}x ({passes})", remark)
    forward, train = (figures.select_channel(section, kind=kind) for kind in PASSES)
    for rival in ("eager", "compiled"):
        yield none_slower("channel norms, forward", forward, rival)
    yield from training("channel norms, forward+backward", train)
    parity = figures.select_channel(section, "batch_norm_eval", dtype="float32")
    reached = figures.geomean(figure.speedup() for figure in parity)
    yield Target(reached >= figures.SLOWER, "batch_norm_eval, float32", "parity", f"{reached:.2f}x")


def overhead(section):
    for case in section["cases"]:
        if case["kind"] == "call":
            train = case["what"] == "forward+backward"
            for name in ("normext.layer_norm",) if train else ("normext.layer_norm", "normext.rms_norm"):
                runs, wanted = case["relative"][name], TRAIN_CALL if train else CALL
                figure = sorted(runs)[len(runs) // 2]
                what = f"{name} 1x64, {case['what']}, times F.layer_norm's time"
                yield Target(figure <= wanted, what, f"{wanted}x", f"{figure:.2f}x")


def accuracy(section):
    for backend in sorted({case["backend"] for case in section["cases"]} - {"torch"}):
        worst = max((case for case in section["cases"] if case["backend"] == backend), key=lambda case: case["figure"])
        remark = f"{worst['op']} {worst['quantity']}, {worst['inputs']}"
        met = worst["figure"] <= ACCURACY
        yield Target(met, f"{backend}, largest error", f"{ACCURACY:.0f}", f"{worst['figure']:.2f}", remark)


def check(results):
    """Every target that the results speak about."""
    bounds = results["sections"].get("bounds")
    for name, test in (
        ("cpu_fresh", partial(cpu_fresh, bounds=bounds)),
        ("cpu_warm", cpu_warm),
        ("channel", partial(channel, bounds=bounds)),
        ("overhead", overhead),
        ("accuracy", accuracy),
    ):
        if name in results["sections"]:
            yield from test(results["sections"][name])


def main():
    paths = [Path(argument) for argument in sys.argv[1:]] or sorted(machine.RESULTS.glob("*.json"))
    missed = 0
    for path in paths:
        print(path.name)
        for target in check(machine.load(path)):
            missed += not target.met
            remark = f"; {target.remark}" if target.remark else ""
            print(f"  {'met   ' if target.met else 'MISSED'}  {target.what}: {target.reached}, aim {target.aim}{remark}")
    sys.exit(missed != 0)


if __name__ == "__main__":
    main()
