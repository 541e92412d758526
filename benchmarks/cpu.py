"""One run over the CPU grid, in one memory regime, printed as JSON lines. `run.py` starts it, several times.

Regimes, which differ in what the allocator does with outputs:
  fresh  glibc's defaults, as users have it: large outputs are new pages, and page faults are part of everybody's time
  warm   memory is never given back to the system (run.WARM_ENVIRONMENT, set by whoever starts this): kernels only
Contenders: normext, torch eager, the same torch function under torch.compile(dynamic=False), and `y.copy_(x)` into memory
that is mapped already.
"""

import argparse
import itertools
import json
import resource
import sys

import grid
import machine
import ops
import timing
import torch


def compiled(fn, *arguments):
    """fn under torch.compile, compiled for these shapes; None where that fails (no C++ compiler)."""
    torch.compiler.reset()
    compiled_fn = torch.compile(fn, dynamic=False, fullgraph=True)
    try:
        compiled_fn(*arguments)
    except Exception as error:
        print(f"torch.compile left out: {type(error).__name__}", file=sys.stderr)
        return None
    return compiled_fn


def copier(x):
    """Copies x to one of two tensors and to the other by turns: contenders that allocate get two blocks by turns, too."""
    targets = itertools.cycle((torch.empty_like(x), torch.empty_like(x)))
    return lambda: next(targets).copy_(x)


def forward_contenders(ours, eager, inputs, with_compile):
    arguments = inputs.arguments()
    contenders = {
        "normext": lambda: ours(*arguments),
        "eager": lambda: eager(*arguments),
        "copy": copier(inputs.x),
    }
    fast = compiled(eager, *arguments) if with_compile else None
    if fast:
        contenders["compiled"] = lambda: fast(*arguments)
    return contenders


def train_contenders(ours, eager, inputs):
    return {
        "normext": lambda: inputs.gradients(ours),
        "eager": lambda: inputs.gradients(eager),
        "copy": copier(inputs.x.detach()),
    }


def measured(bench, label, functions, inputs, with_compile):
    """The row of one case: its label and figures. `functions` are normext's and torch's."""
    train = label["pass"] == "train"
    with torch.set_grad_enabled(train):
        contenders = train_contenders(*functions, inputs) if train else forward_contenders(*functions, inputs, with_compile)
        found = bench.measure(contenders)
    return label | {
        "us": {name: seconds * 1e6 for name, seconds in found.seconds.items()},
        "speedup": found.speedup,
        "other_load": found.other_load,
    }


def measure(bench, op, rows, cols, dtype, kind, with_compile):
    inputs = ops.make_inputs(op, rows, cols, getattr(torch, dtype), requires_grad=kind == "train")
    label = {"op": op.name, "pass": kind, "dtype": dtype, "rows": rows, "cols": cols}
    return measured(bench, label, (ops.function("normext", op), ops.function("torch", op)), inputs, with_compile)


def page_faults_per_mb():
    """Minor faults per MB written to a new 64 MB tensor in the steady state: 256 means fresh pages, 0 warm ones."""
    source = torch.ones(16 << 20)
    for _ in range(4):
        source.clone()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    source.clone()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 64


def add_common_arguments(parser):
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--budget", type=float, default=0.15, help="seconds per case, more where a call is slow")
    parser.add_argument("--patience", type=float, default=60, help="seconds for repeating what other load disturbed")


def prepare(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", default="forward,train")
    parser.add_argument("--ops", default=",".join(ops.OPS))
    parser.add_argument("--dtypes", default=",".join(grid.CPU_DTYPES))
    parser.add_argument("--shapes", help="rows x cols, comma separated, e.g. 32x4096,1x64; default: the grid")
    add_common_arguments(parser)
    args = parser.parse_args()

    prepare(args)
    shapes = grid.CPU_QUICK if args.quick else grid.CPU_SHAPES
    if args.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    print(json.dumps({"machine": machine.describe(), "page_faults_per_mb": page_faults_per_mb()}), flush=True)

    bench = timing.Bench(args.budget, args.patience, min_rounds=4 if args.quick else 6)
    for rows, cols in shapes:
        for kind in args.passes.split(","):
            for name in args.ops.split(","):
                for dtype in args.dtypes.split(","):
                    with_compile = not args.no_compile
                    row = measure(bench, ops.OPS[name], rows, cols, dtype, kind, with_compile)
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
