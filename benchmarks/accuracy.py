"""Largest error per op and quantity of one back end or of torch, in units of the accuracy contract, whose limit is 4.

The inputs and the float64 oracle are those of the test suite. Without `--backend` the back ends of this machine are
listed. Printed as one JSON line per figure; `run.py` starts it once per back end, in that back end's environment.
"""

import argparse
import json
import sys
import warnings

import machine

machine.import_normext()
sys.path.insert(0, str(machine.ROOT / "tests"))

import backends  # noqa: E402
import cases  # noqa: E402
import channel_cases  # noqa: E402
import channel_oracle  # noqa: E402
import oracle  # noqa: E402
import torch  # noqa: E402


def selected(quick):
    """Every kind of data, dtype and width of the test tables; torch has no counterpart of the "llama" rounding."""
    chosen = [case for case in cases.ACCURACY + cases.PARAM_GRADS if case.rounding == "torch"]
    channel = [*channel_cases.ACCURACY, *channel_cases.PARAM_GRADS]
    return [*chosen[::7], *channel[::11]] if quick else [*chosen, *channel]


def figures(case, backend, with_torch):
    call = case.torch if with_torch else case.call
    if isinstance(case, channel_cases.ChannelCase):
        return channel_figures(case, channel_oracle.settled(case, channel_cases.make(case, backend)), call)
    tensors = cases.make(case, backend)
    gradients = cases.gradients(case, tensors, call)
    return {"y": oracle.forward_error(case, tensors, call(tensors)[0])} | oracle.backward_errors(case, tensors, gradients)


def channel_figures(case, tensors, call):
    after = tensors.fresh()
    found = {"y": channel_oracle.forward_error(case, tensors, call(after))}
    found |= channel_oracle.backward_errors(case, tensors, channel_cases.gradients(case, tensors, call))
    if case.buffers is not None and case.training:
        found |= channel_oracle.running_errors(case, tensors, after)
    return found


def op_name(case):
    """Channel norms by layout, and fused ones apart: torch rounds between norm, sum and activation."""
    if not isinstance(case, channel_cases.ChannelCase):
        return case.op
    return f"{case.op}, {case.layout}" + (", fused" if case.residual or case.activation else "")


def kind(case):
    """The class of inputs a figure stands for."""
    if case.dtype in cases.SIXTEEN_BIT:
        return "16-bit" if case.parameters == case.dtype else "16-bit, float32 parameters"
    if case.data == "mixed":
        return "means of their own"
    return f"mean {case.mean:.0f}" if case.mean < 1000 else f"mean {case.mean:.0e}".replace("e+0", "e")


def largest(backend, quick, with_torch):
    """{(op, quantity, class of inputs): largest figure}, and the cases that torch refuses."""
    found, refused = {}, []
    for case in selected(quick):
        try:
            measured = figures(case, backend, with_torch)
        except RuntimeError:
            if not with_torch:
                raise
            refused.append(case.id)
            continue
        for quantity, figure in measured.items():
            key = (op_name(case), quantity, kind(case))
            found[key] = max(found.get(key, 0.0), figure)
    return found, refused


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", help='a name that the list gives, or "torch"')
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if not args.backend:
        # The host back end is one of the CPU ones: what a process gets by default.
        listed = [backend for backend in backends.available() if backend != backends.HOST]
        print(json.dumps([{"name": backend.name, "env": backend.env} for backend in listed]))
        return
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    backend = backends.HOST if args.backend == "torch" else backends.named(args.backend)
    found, refused = largest(backend, args.quick, with_torch=args.backend == "torch")
    if refused:
        print(f"refused by torch: {', '.join(refused)}", file=sys.stderr)
    for (op, quantity, inputs), figure in found.items():
        # A division by a bound of zero gives infinity, which JSON does not have.
        row = {"backend": args.backend, "op": op, "quantity": quantity, "inputs": inputs, "figure": min(figure, 1e30)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
