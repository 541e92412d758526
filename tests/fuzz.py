"""Fuzzing, as a program of its own so that a crash is an exit status:  python tests/fuzz.py public|raw [seed [device]]

public: random but often valid calls of the public functions; each must raise an ordinary exception or agree with torch in
        wider arithmetic.
raw:    every registered op with one or two companions replaced by something inconsistent; it must refuse or compute, never
        crash. Inputs are surrounded by guards that may not change.
"""

import random
import sys

import cases
import raw_ops
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import normext

ORDINARY = (ValueError, RuntimeError, TypeError, NotImplementedError, IndexError)
SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 31, 32, 33, 64, 255, 256, 257, 1023])
DTYPES = st.sampled_from([*cases.DTYPES, torch.int32, torch.bool, torch.complex64])
EPS = st.sampled_from([-1.0, 0.0, 1e-45, 1e-5, 1.0, float("inf"), float("nan"), None])


def transform(x, how):
    if how == "transpose" and x.dim() > 1:
        return x.transpose(0, -1)
    if how == "slice" and x.dim() > 0:
        return x[..., ::2]
    if how == "expand":
        return x.unsqueeze(0).expand(3, *x.shape)
    if how == "offset":
        return torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape) if x.numel() else x
    if how == "channels_last" and x.dim() == 4:
        return x.to(memory_format=torch.channels_last)
    return x


LAYOUTS = st.sampled_from(["none", "transpose", "slice", "expand", "offset", "channels_last"])


@st.composite
def public_calls(draw):
    shape = draw(st.lists(SIZES, min_size=0, max_size=5))
    while len(shape) > 1 and torch.Size(shape).numel() > 1 << 16:
        shape[max(range(len(shape)), key=shape.__getitem__)] = 2
    dtype = draw(DTYPES)
    x = transform(torch.randn(shape).to(dtype), draw(LAYOUTS))
    normalized = list(x.shape[-draw(st.integers(1, 3)) :]) if draw(st.integers(0, 9)) else [draw(SIZES)]
    parameter = dtype if draw(st.integers(0, 3)) else draw(DTYPES)

    def maybe():
        kind = draw(st.integers(0, 9))
        if kind < 4 or torch.Size(normalized).numel() > 1 << 20:
            return None
        return torch.randn(normalized if kind < 9 else [3]).to(parameter)

    op = draw(st.sampled_from(["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"]))
    residual = torch.randn(x.shape).to(dtype) if draw(st.integers(0, 9)) else torch.randn(2, 3)
    return op, x, residual, normalized, maybe(), maybe(), draw(EPS), draw(st.booleans())


def public(call):
    op, x, residual, normalized, weight, bias, eps, grad = call
    inputs = (x, residual) if op.startswith("add") else (x,)
    tail = (weight, bias, eps) if "layer" in op else (weight, eps)
    leaves = [t for t in (*inputs, weight, bias) if t is not None and t.is_floating_point() and grad]
    for leaf in leaves:
        leaf.requires_grad_()
    try:
        result = getattr(normext, op)(*inputs, normalized, *tail)
    except ORDINARY:
        return
    output = result[0] if isinstance(result, tuple) else result
    if leaves and output.requires_grad:
        torch.autograd.grad(output.sum(), leaves, allow_unused=True)
    if x.is_complex():
        return
    wide = [t.detach().double() if t is not None else None for t in (x, residual, weight, bias)]
    total = (x.detach() + residual.detach()).double() if op.startswith("add") else wide[0]
    if "layer" in op:
        expected = F.layer_norm(total, normalized, wide[2], wide[3], eps)
    else:
        eps = cases.default_eps(x.dtype) if eps is None else eps
        expected = F.rms_norm(total, normalized, wide[2], eps)
    precise = x.dtype in (torch.float32, torch.float64)
    if eps is not None and eps > 0:  # others amplify every rounding
        # A row whose spread is only rounding noise (constant, or nearly) has no well-defined result with a tiny eps.
        tolerance = 1e-3 if precise else 3e-2
        if eps >= 1e-5:
            torch.testing.assert_close(output.detach().double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def inconsistent(generator, argument):
    """Something of the same kind that does not fit, or something else altogether."""
    if isinstance(argument, torch.Tensor):
        if argument.layout != torch.strided:
            return argument  # made so in an earlier round, and wrong enough
        x = argument.detach()
        flat = x.reshape(-1)
        choices = [
            lambda: x[..., :-1],
            lambda: x.new_empty(0),
            lambda: flat[:1],
            lambda: x.new_zeros([*x.shape, 1]),
            lambda: x.new_zeros([s + 1 for s in x.shape]),
            lambda: x.new_zeros(()),
            lambda: x.double() if x.dtype != torch.float64 else x.float(),
            lambda: x.half(),
            lambda: x.to(torch.int32),
            lambda: x.to("meta"),
            lambda: x.t() if x.dim() == 2 else x.flip(0),
            lambda: x[..., ::2],
            lambda: x[:1].expand_as(x) if x.dim() else x,
            lambda: x.to_sparse() if x.dim() and not x.is_meta else x,
            lambda: x.conj(),
            lambda: x._neg_view(),
            lambda: None,
        ]
        return generator.choice(choices)()
    if isinstance(argument, bool) or argument is None:
        return torch.zeros(3)
    if isinstance(argument, int):
        return generator.choice([-(2**63), -1, 0, 1, 2, 3, 7, 99, 2**31, 2**63 - 1])
    return generator.choice([-1.0, 0.0, float("nan"), float("inf"), 1e300])


def guarded(argument, kept):
    if not isinstance(argument, torch.Tensor) or not argument.is_floating_point():
        return argument
    guard = 64
    buffer = argument.new_full((argument.numel() + 2 * guard,), 12345.0)
    kept.append((buffer, guard, argument.numel()))
    return buffer[guard : guard + argument.numel()].copy_(argument.detach().reshape(-1)).view(argument.shape)


def raw(rounds, seed, device):
    generator = random.Random(seed)
    torch.manual_seed(seed)
    refused = computed = 0
    for _ in range(rounds):
        rows, cols = generator.choice([(6, 40), (1, 1), (3, 111), (0, 8), (2, 0), (5, 1040)])
        dtype, params = generator.choice(cases.MIXES)
        table = raw_ops.arguments(dtype, params, rows, cols, rounding=generator.choice([0, 1]), device=device)
        for name, calls in table.items():
            for args in calls:
                kept = []
                args = [guarded(a, kept) for a in args]
                for _ in range(generator.choice([1, 1, 2])):
                    place = generator.randrange(len(args))
                    args[place] = inconsistent(generator, args[place])
                try:
                    with torch.no_grad():
                        raw_ops.op(name)(*args)
                    computed += 1
                except (*ORDINARY, OverflowError, AttributeError, MemoryError):  # statistics of 2^31 groups of no channels
                    refused += 1
                for buffer, guard, count in kept:
                    assert (buffer[:guard] == 12345.0).all() and (buffer[guard + count :] == 12345.0).all(), name
    print(f"{refused} refused, {computed} computed")
    assert refused > computed // 4  # the generator does produce bad calls


def main():
    mode, start = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    device = sys.argv[3] if len(sys.argv) > 3 else "cpu"
    if mode == "raw":
        raw(12, start, device)
        return
    torch.set_default_device(device)
    phases = (Phase.generate, Phase.shrink)
    options = settings(max_examples=400, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck))
    seed(start)(options(given(public_calls())(public)))()


if __name__ == "__main__":
    main()
