"""Shapes, strides and dtypes of results: those of torch, and the same whether real, fake or compiled."""

from dataclasses import replace

import cases
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import normext

LAYOUTS = {"contiguous": lambda x: x, **cases.LAYOUTS}
EMPTY = [(0, 8), (3, 0), (0, 0), (2, 0, 5, 8), (0, 3, 8)]


def outputs_of(op, x, **options):
    """Every public function on one activation tensor, with parameters of its last dimension."""
    cols = x.shape[-1]
    weight, bias = x.new_ones(cols), x.new_zeros(cols)
    if op == "layer_norm":
        return (normext.layer_norm(x, (cols,), weight, bias),)
    if op == "rms_norm":
        return (normext.rms_norm(x, (cols,), weight, **options),)
    if op == "add_layer_norm":
        return normext.add_layer_norm(x, x, (cols,), weight, bias)
    return normext.add_rms_norm(x, x, (cols,), weight, **options)


def describe(tensors):
    return [(t.dtype, tuple(t.shape), t.stride(), t.storage_offset(), t.device.type) for t in tensors]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_strides_and_dtype_are_those_of_torch(op, layout, device):
    for dtype in cases.DTYPES:
        x = layout(torch.randn(8, 16).to(dtype).to(device))
        ours = outputs_of(op, x)[0]
        theirs = getattr(F, op)(x, (16,), x.new_ones(16))
        assert describe([ours]) == describe([theirs])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_fused_outputs_are_fresh_tensors_of_the_input_shape(op, layout, device):
    x = layout(torch.randn(8, 16, device=device))
    for result in outputs_of(op, x):
        assert result.shape == x.shape and result.dtype == x.dtype
        assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert result.untyped_storage().nbytes() == x.numel() * x.element_size()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("op", cases.OPS)
def test_fake_tensors_look_like_real_ones(op, layout, device):
    for grad in (False, True):
        x = layout(torch.randn(8, 16, device=device)).detach().requires_grad_(grad)
        expected = describe(outputs_of(op, x))
        with FakeTensorMode() as mode:
            assert describe(outputs_of(op, mode.from_tensor(x))) == expected


@pytest.mark.parametrize("op", cases.OPS)
def test_fake_gradients_look_like_real_ones(op, device):
    def grads(x):
        outputs = outputs_of(op, x)
        return torch.autograd.grad(outputs, [x], [torch.ones_like(t) for t in outputs])

    x = torch.randn(4, 6, 16, device=device).transpose(0, 1).requires_grad_()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        found = describe(grads(fake))
    assert found == describe(grads(x))


@pytest.mark.parametrize("op", cases.OPS)
def test_meta_tensors(op):
    x = torch.empty(4, 16, device="meta")
    assert all(t.shape == x.shape and t.device.type == "meta" for t in outputs_of(op, x))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("op", cases.OPS)
def test_empty_tensors(op, shape, device):
    """No rows, no columns or neither: empty outputs, zero parameter gradients."""
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.ones(shape[-1], device=device, requires_grad=True)
    bias = torch.ones(shape[-1], device=device, requires_grad=True)
    inputs = (x, torch.zeros_like(x)) if op.startswith("add") else (x,)
    parameters = (weight, bias) if "layer" in op else (weight,)
    result = getattr(normext, op)(*inputs, shape[-1:], *parameters)
    output = result[0] if isinstance(result, tuple) else result
    assert output.shape == x.shape and output.dtype == x.dtype
    grads = torch.autograd.grad(output.sum(), [x, *parameters])
    assert grads[0].shape == x.shape
    assert all(g.shape == p.shape and (g == 0).all() for g, p in zip(grads[1:], parameters, strict=True))


def test_empty_in_place(device):
    x, residual = torch.empty(0, 8, device=device), torch.empty(0, 8, device=device)
    normext.fused_add_rms_norm_(x, residual, torch.ones(8, device=device), 1e-6)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_one_element_and_one_dimension(op, device):
    for shape in ((1,), (7,), (1, 1), (1, 1, 1, 7)):
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(outputs_of(op, x)[0], getattr(F, op)(x, shape[-1:], x.new_ones(shape[-1])))
    x = torch.randn(2, 3, 4, device=device)
    torch.testing.assert_close(getattr(normext, op)(x, (2, 3, 4)), getattr(F, op)(x, (2, 3, 4)))


@pytest.mark.parametrize("stride", [2**31, 2**31 + 8])
def test_row_strides_beyond_32_bits(stride, device, backend):
    """One row claims a stride that needs 64 bits; it takes no memory."""
    buffer = torch.randn(64, device=device)
    x = buffer.as_strided((1, 64), (stride, 1))
    case = cases.Case("layer_norm", rows=1, cols=64)
    t = replace(cases.make(case, backend), x=x)
    assert case.call(t)[0].equal(case.call(replace(t, x=buffer[None]))[0])


def test_second_row_beyond_32_bits(device, backend):
    """Rows 2^31 elements apart, in 4 GB of which only two pages are touched (on a GPU, the memory is really taken)."""
    buffer = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    x = buffer.as_strided((2, 64), (2**31, 1))
    t = cases.make(cases.Case("layer_norm", rows=2, cols=64, dtype=torch.float16), backend)
    x.copy_(t.x)
    for op in ("layer_norm", "rms_norm"):
        case = cases.Case(op, rows=2, cols=64, dtype=torch.float16)
        assert case.call(replace(t, x=x))[0].equal(case.call(t)[0])
    stats = torch.ops.normext.layer_norm_forward(t.x, t.weight, t.bias, 1, 1e-5)[1]
    wide, plain = (torch.ops.normext.layer_norm_backward(v, None, v, stats, t.weight, t.bias, 1, 7) for v in (x, t.x))
    assert all(one.equal(other) for one, other in zip(wide, plain, strict=True))


def test_parameters_of_any_layout(device):
    """Strided, expanded and misaligned weights."""
    x = torch.randn(5, 48, device=device)
    plain = torch.randn(48, device=device)
    variants = [
        torch.stack([plain, plain], 1)[:, 0],
        torch.cat([plain[:1], plain])[1:],
        plain.view(6, 8).t().contiguous().t().reshape(48),
    ]
    for weight in variants:
        assert normext.layer_norm(x, (48,), weight, weight).equal(normext.layer_norm(x, (48,), plain, plain))
        assert normext.rms_norm(x, (48,), weight).equal(normext.rms_norm(x, (48,), plain))
        a, b = x.clone(), x.clone()
        normext.fused_add_rms_norm_(a, b, weight, 1e-6)
        assert a.equal(normext.add_rms_norm(x, x, (48,), plain, 1e-6)[0])
    scalar = torch.tensor(1.5, device=device).expand(48)
    assert normext.rms_norm(x, (48,), scalar).equal(normext.rms_norm(x, (48,), scalar.clone()))


def test_normalized_shape_may_be_int_list_size_or_tuple(device):
    x = torch.randn(3, 8, device=device)
    expected = normext.layer_norm(x, (8,))
    for shape in ([8], torch.Size([8])):
        assert normext.layer_norm(x, shape).equal(expected)
    assert normext.LayerNorm(8, device=device)(x).equal(expected)


def test_special_values_spread_as_in_torch(device):
    """A NaN or infinity spoils its own row and no other, in every dtype."""
    for op in ("layer_norm", "rms_norm"):
        for dtype in cases.DTYPES:
            for value in (float("nan"), float("inf"), -float("inf")):
                for cols, place in ((40, 7), (1500, 7), (1500, 100)):
                    x = torch.randn(5, cols, device=device).to(dtype)
                    x[2, place] = value
                    ours, theirs = getattr(normext, op)(x, (cols,)), getattr(F, op)(x, (cols,))
                    assert ours.isnan().equal(theirs.isnan())
                    assert not ours[[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_passes_through(dtype, device):
    """Conversions: all 65536 bit patterns, subnormals and NaN included, as residual_out of x + 0."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1024, 64).to(device)
    total = normext.add_rms_norm(x, torch.zeros_like(x), (64,))[1]
    number = ~x.isnan()
    assert torch.equal(total[number].view(torch.int16), (x + 0)[number].view(torch.int16)) and total.isnan().equal(x.isnan())
    # One subnormal number or NaN among others: what is done for it may be done for its neighbours, too, and must not show.
    for value in (torch.finfo(dtype).smallest_normal / 4, torch.nan):
        for column in (0, 1, 30, 33, 63):
            lone = torch.randn(3, 64, device=device).to(dtype)
            lone[1, column] = value
            found = normext.add_rms_norm(lone, torch.zeros_like(lone), (64,))[1]
            assert torch.equal(found.nan_to_num(nan=1.0), lone.nan_to_num(nan=1.0)) and found.isnan().equal(lone.isnan())
            if dtype == torch.bfloat16:
                quiet = 0x7FFF if device == "cuda" else 0x7FC0  # what GPUs make of any NaN
                assert found[1, column].item() == value or found.view(torch.int16)[1, column].item() == quiet


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_to_nearest_even(dtype, device):
    """x plus half a unit and neighbours of it, over all magnitudes, ties included: the same as torch's rounding."""
    x = torch.arange(0, 2**15, 7, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite() & (x.float().abs() < 1e4)][: 64 * 64].view(-1)
    x = x[: x.numel() // 64 * 64].view(-1, 64).to(device)
    unit = torch.finfo(dtype).eps
    for part in (0.25, 0.5, 0.75, 1.5, -0.25, -0.5):
        residual = (x.float() * unit * part).to(dtype)
        for a in (x, -x):
            assert normext.add_layer_norm(a, residual, (64,))[1].equal(a + residual)
