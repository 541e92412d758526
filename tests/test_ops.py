"""The registered ops: opcheck, the catalogue, memory safety of every argument, and what they write."""

import os
import subprocess
import sys

import cases
import pytest
import raw_ops
import torch

NAMES = sorted(raw_ops.arguments())
# Ops without autograd registration: the autograd.Function above them is their gradient.
TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def test_catalogue_is_complete(backend):
    import normext  # noqa: F401  (registers)

    assert raw_ops.registered() == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    """Schema (aliases and mutations), fake results and dynamic shapes, for each combination of optional arguments."""
    for args in raw_ops.arguments(device=device)[name]:
        torch.library.opcheck(raw_ops.op(name), args, test_utils=TESTS)
    for args in raw_ops.arguments(torch.bfloat16, torch.float32, device=device, rounding=1)[name]:
        torch.library.opcheck(raw_ops.op(name), args, test_utils=TESTS[:2])


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_export")])
def test_opcheck_of_differentiable_ops(name, device):
    for args in raw_ops.arguments(device=device, requires_grad=True)[name]:
        torch.library.opcheck(raw_ops.op(name), args)


@pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=list(cases.LAYOUTS))
@pytest.mark.parametrize("name", NAMES)
def test_fake_results_of_every_layout(name, layout, device):
    for args in raw_ops.arguments(rows=8, layout=layout, device=device)[name]:
        torch.library.opcheck(raw_ops.op(name), args, test_utils=("test_schema", "test_faketensor"))


def canary_argument(x, guard=4096):
    """The same tensor inside a larger buffer of NaN, so that reading outside shows."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    buffer = torch.full((x.numel() + 2 * guard,), float("nan"), dtype=x.dtype, device=x.device)
    return buffer[guard : guard + x.numel()].copy_(x.detach().reshape(-1)).view(x.shape)


@pytest.mark.parametrize("dtype, params", cases.MIXES)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_the_inputs_matters(name, dtype, params, device):
    """NaN on both sides of every input changes no result: no kernel reads out of bounds and uses it."""
    for rows, cols in ((6, 40), (3, 111), (5, 769), (2, 4097)):
        for args in raw_ops.arguments(dtype, params, rows, cols, device=device)[name]:
            expected, found = run(name, args), run(name, tuple(map(canary_argument, args)))
            assert all(one.equal(other) and not one.isnan().any() for one, other in zip(found, expected, strict=True))


def run(name, args):
    """Results of a copy of the arguments; for the in-place op, what it wrote."""
    args = tuple(a.clone() if isinstance(a, torch.Tensor) and name.endswith("_") else a for a in args)
    results = raw_ops.op(name)(*args)
    if results is None:
        return [a for a in args[:3] if isinstance(a, torch.Tensor)]
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("cols", [1, 3, 40, 111, 768, 4097])
def test_in_place_writes_stay_inside(cols, dtype, device):
    """Targets are columns and rows of a larger matrix; everything around them keeps its bits."""
    pattern = torch.randn(9, cols + 16).to(dtype).to(device)
    x, residual = pattern.clone(), pattern.clone().flip(0)
    before = x.clone(), residual.clone()
    weight = torch.ones(cols, dtype=dtype, device=device)
    raw_ops.op("fused_add_rms_norm_")(x[2:7, 8 : 8 + cols], residual[2:7, 8 : 8 + cols], weight, 1e-6)
    for now, then in zip((x, residual), before, strict=True):
        inside = torch.zeros_like(now, dtype=torch.bool)
        inside[2:7, 8 : 8 + cols] = True
        assert now[~inside].equal(then[~inside])
        assert not now[inside].equal(then[inside])


@pytest.mark.parametrize("name", NAMES)
def test_inputs_keep_their_bits(name, device):
    for args in raw_ops.arguments(device=device)[name]:
        if name.endswith("_"):
            continue
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        raw_ops.op(name)(*args)
        assert all(a.equal(b) for a, b in zip(args, before, strict=True) if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("name", NAMES)
def test_results_alias_nothing(name, device):
    """Every result owns its storage, the empty ones of what was not asked for included."""
    for args in raw_ops.arguments(device=device)[name]:
        results = [] if name.endswith("_") else run(name, args)
        storages = [r.untyped_storage().data_ptr() for r in results if r.numel()]
        given = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
        assert len(set(storages)) == len(storages) and not set(storages) & set(given)


def test_backward_returns_only_what_was_asked_for(device):
    table = raw_ops.arguments(device=device)
    for name in ("layer_norm_backward", "rms_norm_backward"):
        full = None
        for args in reversed(table[name][: 8 if name[0] == "l" else 4]):
            found = run(name, args)
            full = full or found
            for bit, (one, other) in enumerate(zip(found, full, strict=True)):
                assert one.equal(other) if args[-1] >> bit & 1 else one.numel() == 0


POISON_PROBE = """
import sys, torch
sys.path.insert(0, {tests!r})
import normext, raw_ops
torch.empty(1 << 16).fill_(7.0)
nan = 0
for dtype in (torch.float32, torch.bfloat16):
    for rows, cols in ((6, 40), (1, 1), (35, 111), (3, 4097), (1, 16400)):
        for name, calls in raw_ops.arguments(dtype, rows=rows, cols=cols, device={device!r}).items():
            for args in calls:
                results = raw_ops.op(name)(*args)
                for result in results if isinstance(results, tuple) else (results,) if results is not None else args[:2]:
                    nan += int(result.isnan().sum())
print(nan)
"""


def test_poisoned_outputs_are_overwritten(backend):
    """NORMEXT_POISON=1 fills every output with NaN first: an element that no kernel writes shows. (Workers of cpu and the
    emulator run all other tests with it, too.)"""
    script = POISON_PROBE.format(tests=os.path.dirname(__file__), device=backend.device)
    run = subprocess.run(
        [sys.executable, "-c", script], env=backend.environment(NORMEXT_POISON="1"), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "0"


@pytest.mark.parametrize("name", NAMES)
def test_every_inconsistent_companion_is_refused(name, device):
    """Each tensor in turn gets another shape, dtype or device: too small is an out-of-bounds read if it is not refused."""
    for args in raw_ops.arguments(device=device)[name]:
        for place, argument in enumerate(args):
            if not isinstance(argument, torch.Tensor) or place == 0 or not argument.is_floating_point():
                continue
            flat = argument.detach().reshape(-1)
            smaller, longer = argument.detach()[:-1], torch.cat([argument.detach(), argument.detach()])
            for wrong in (flat[:1], flat[:0], smaller, longer, argument.detach()[None], argument.detach().to(torch.int64)):
                if (wrong.shape, wrong.dtype) == (argument.shape, argument.dtype):
                    continue
                with pytest.raises(RuntimeError, match="expected"):
                    raw_ops.op(name)(*args[:place], wrong, *args[place + 1 :])
            wrong_type = argument.detach().to(torch.float32 if argument.dtype == torch.float64 else torch.float64)
            for wrong in (wrong_type, argument.detach().to("meta")):
                with pytest.raises((RuntimeError, NotImplementedError)):
                    raw_ops.op(name)(*args[:place], wrong, *args[place + 1 :])


def test_wrong_counts_of_batches_are_refused(device):
    args = raw_ops.arguments(device=device)["batch_norm_update_"][1]
    for wrong in (torch.ones(2), torch.ones(0), torch.ones(1, 1), torch.ones(1, dtype=torch.int32)):
        wrong = wrong.to(device) if wrong.dtype == torch.int32 else wrong.to(device, torch.int64)
        with pytest.raises(RuntimeError, match="num_batches_tracked"):
            raw_ops.op("batch_norm_update_")(*args[:3], wrong, args[4])
    args = raw_ops.arguments(device=device)["batch_norm_train_"][0]
    for wrong in (torch.ones(2, device=device, dtype=torch.int64), args[6].to("meta")):
        with pytest.raises(RuntimeError, match="num_batches_tracked"):
            raw_ops.op("batch_norm_train_")(*args[:6], wrong, *args[7:])


def test_bad_numbers_are_refused(device):
    """normalized_ndim, rounding and needs outside their range."""
    table = raw_ops.arguments(device=device)
    for name in ("layer_norm_inference", "rms_norm_inference", "add_layer_norm_inference", "add_rms_norm_forward"):
        args = list(table[name][0])
        place = next(i for i, a in enumerate(args) if isinstance(a, int))
        for ndim in (0, -1, 3, 2**40):
            with pytest.raises(RuntimeError, match="normalized"):
                raw_ops.op(name)(*args[:place], ndim, *args[place + 1 :])
    for name in ("layer_norm_backward", "rms_norm_backward"):
        *args, _ = table[name][0]
        for needs in (-1, 8, 16):
            with pytest.raises(RuntimeError, match="needs"):
                raw_ops.op(name)(*args, needs)
    for name in ("batch_norm_inference", "batch_norm_forward", "batch_norm_train_", "group_norm_inference", "batch_norm_apply"):
        for activation in (-1, 5, 2**40):
            with pytest.raises(RuntimeError, match="activation"):
                raw_ops.op(name)(*table[name][0][:-1], activation)
    for name in ("batch_norm_backward", "group_norm_backward", "batch_norm_backward_apply"):
        for needs in (-1, 16, 2**40):
            with pytest.raises(RuntimeError, match="needs"):
                raw_ops.op(name)(*table[name][0][:-1], needs)
    for groups in (0, -1, 3, 2**40):
        with pytest.raises(RuntimeError, match="num_groups"):
            raw_ops.op("group_norm")(*table["group_norm"][0][:3], groups, 1e-5)
    with pytest.raises(RuntimeError, match="rounding"):
        raw_ops.op("rms_norm_inference")(*table["rms_norm_inference"][0][:-1], 2)
