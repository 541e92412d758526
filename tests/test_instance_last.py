"""InstanceNorm of channels-last input without gradients: statistics as the input lies, output transposed into planes. It takes the
sums of GroupNorm of single channels in channels-last, so its bits, as planes, are the same. Below 32 channels or positions, in CUDA
code and on a CPU without fma the input is copied first and the bits are those of the copy."""

import itertools

import channel_cases as cases
import channel_oracle as oracle
import pytest
import torch
from oracle import FUSED_MULTIPLY_ADD

import normext

CHANNELS = (31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200)
SPATIAL = ((1, 31), (4, 8), (3, 11), (8, 8), (5, 13), (9, 15), (17, 20), (4, 4, 6))


def inputs(channels, spatial, dtype, params, images, backend, **extra):
    case = cases.ChannelCase("instance_norm", images, channels, spatial, channels, dtype=dtype, param_dtype=params, **extra)
    return case, cases.make(case, backend).laid_out(cases.channels_last)


def as_group_norm(t, activation, backend):
    """The same from GroupNorm, in planes."""
    positions = t.x[0, 0].numel()
    fma = not backend.runs_cuda_code and FUSED_MULTIPLY_ADD
    as_it_lies = fma and t.x.shape[1] >= 32 and positions >= 32
    x = t.x if as_it_lies else t.x.contiguous()
    return normext.group_norm(x, x.shape[1], t.weight, t.bias, activation=activation).contiguous()


@pytest.mark.parametrize("dtype, params", cases.MIXES, ids=str)
def test_every_tile_and_remainder(dtype, params, backend):
    shapes = itertools.product(CHANNELS, SPATIAL)
    for channels, spatial in itertools.islice(shapes, 0, None, 7 if backend.emulated else 1):
        for activation in (None, "silu"):
            _, t = inputs(channels, spatial, dtype, params, 2, backend)
            y = normext.instance_norm(t.x, None, None, t.weight, t.bias, activation=activation)
            assert y.is_contiguous() and y.equal(as_group_norm(t, activation, backend)), (channels, spatial, activation)


@pytest.mark.parametrize("layout", [cases.channels_last, cases.LAYOUTS["sliced_channels_last"]], ids=["dense", "sliced"])
def test_images_threads_and_neighbours(layout, backend):
    """Neither the other images, nor how the batch lies, nor the number of threads matter."""
    for channels, spatial in ((64, (40, 41)), (130, (33, 5)), (32, (96, 97))):
        if backend.emulated:
            spatial = tuple(min(size, 12) for size in spatial)
        _, t = inputs(channels, spatial, torch.float32, torch.float32, 5, backend)
        x = layout(t.x)
        whole = normext.instance_norm(x, None, None, t.weight, t.bias)
        for image in range(x.shape[0]):
            alone = x[image : image + 1], x[image].unsqueeze(0), x[image].unsqueeze(0).expand(2, -1, -1, -1)
            for lying in alone:
                y = normext.instance_norm(lying, None, None, t.weight, t.bias)
                assert all(found.equal(whole[image]) for found in y)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert normext.instance_norm(x, None, None, t.weight, t.bias).equal(whole)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_accuracy_and_running_statistics(dtype, mean, backend):
    mean = min(mean, 3e4) if dtype == torch.float16 else mean  # the largest float16 is 65504
    spatial = (9, 15) if backend.emulated else (33, 35)
    case, t = inputs(70, spatial, dtype, dtype, 3, backend, mean=mean, running=dtype)
    after = t.fresh()
    with torch.no_grad():
        assert oracle.forward_error(case, t, case.call(after)) <= oracle.LIMIT
    assert max(oracle.running_errors(case, t, after).values()) <= oracle.LIMIT


def test_constant_channels_give_the_bias(backend):
    for dtype in cases.DTYPES:
        x = torch.full((2, 48, 7, 9), 1e4, device=backend.device).to(dtype).contiguous(memory_format=torch.channels_last)
        bias = torch.randn(48, device=backend.device).to(dtype)
        y = normext.instance_norm(x, None, None, torch.full_like(bias, 3), bias)
        assert y.equal(bias.view(1, 48, 1, 1).expand_as(y))


def test_special_values_stay_in_their_channel(device):
    x = torch.randn(2, 64, 6, 8, device=device).contiguous(memory_format=torch.channels_last)
    plain = normext.instance_norm(x)
    x[1, 37, 2, 3] = float("nan")
    y = normext.instance_norm(x)
    assert y[1, 37].isnan().all()
    y[1, 37] = plain[1, 37]
    assert y.equal(plain)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_op(dtype, device):
    """As the raw ops are tested, on input that is channels-last: schema, fakes, bounds of what is read and written."""
    instance_norm = torch.ops.normext.instance_norm_forward.default
    for shape in ((2, 70, 6, 8), (1, 33, 5, 7), (2, 64, 3, 4, 4)):
        x = cases.channels_last(torch.randn(shape, device=device).to(dtype))
        weight, bias = (torch.randn(shape[1], device=device).to(dtype) for _ in range(2))
        torch.library.opcheck(instance_norm, (x, weight, bias, 1e-5, 2))
        torch.library.opcheck(instance_norm, (x, None, None, 1e-5, 0))
        guarded = torch.full((x.numel() + 256,), float("nan"), dtype=dtype, device=device)
        inside = guarded[128:-128].as_strided(x.shape, x.stride(), 128).copy_(x)
        cases.assert_same(instance_norm(inside, weight, bias, 1e-5, 2), instance_norm(x, weight, bias, 1e-5, 2))


def test_compiled_bits(device):
    """A graph without gradients takes the same kernels."""
    x = cases.channels_last(torch.randn(2, 64, 9, 7, device=device))
    compiled = torch.compile(lambda v: normext.instance_norm(v, activation="relu"), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y = compiled(x)
        assert y.is_contiguous() and y.equal(normext.instance_norm(x, activation="relu"))
