"""One run over the grid of the channel norms, printed as JSON lines. `run.py` starts it, several times.

The rules are those of cpu.py, in its fresh regime: glibc's defaults, as users have it.
"""

import argparse
import json

import channel_grid as grid
import channel_ops as ops
import cpu
import machine
import timing
import torch


def measure(bench, op, shape, kind, dtype, layout, with_compile):
    inputs = ops.make_inputs(op, shape.shape, getattr(torch, dtype), layout, requires_grad=kind == "train")
    label = {"op": op.name, "pass": kind, "dtype": dtype, "layout": layout, "shape": shape.name}
    functions = ops.function("normext", op), ops.function("torch", op)
    return cpu.measured(bench, label, functions, inputs, with_compile and shape.compiled)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", default="forward,train")
    parser.add_argument("--ops", default=",".join(grid.OPS))
    parser.add_argument("--dtypes", default=",".join(grid.DTYPES))
    parser.add_argument("--layouts", default=",".join(grid.LAYOUTS))
    parser.add_argument("--shapes", help="of the grid, comma separated, e.g. 8x64x56x56; default: all")
    cpu.add_common_arguments(parser)
    args = parser.parse_args()

    cpu.prepare(args)
    shapes = grid.QUICK if args.quick else grid.SHAPES
    if args.shapes:
        shapes = [shape for shape in grid.SHAPES if shape.name in args.shapes.split(",")]
    print(json.dumps({"machine": machine.describe(), "page_faults_per_mb": cpu.page_faults_per_mb()}), flush=True)

    bench = timing.Bench(args.budget, args.patience, min_rounds=4 if args.quick else 6)
    for shape in shapes:
        for op in (grid.OPS[name] for name in args.ops.split(",")):
            if op.norm != shape.norm:
                continue
            for kind in args.passes.split(","):
                for layout in args.layouts.split(","):
                    for dtype in args.dtypes.split(","):
                        row = measure(bench, op, shape, kind, dtype, layout, not args.no_compile)
                        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
