"""The copy between channels-last and contiguous: torch's values, bit by bit, in every tile and remainder."""

import pytest
import torch

import normext
from normext import _channel

SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 49, 127, 128, 129, 300)
DTYPES = {torch.float32: torch.int32, torch.float64: torch.int64, torch.float16: torch.int16, torch.bfloat16: torch.int16}
contiguous = torch.ops.normext.contiguous


def random_bits(shape, dtype):
    """Every pattern of bits, NaN payloads included."""
    span = torch.iinfo(DTYPES[dtype])
    return torch.randint(span.min, span.max, shape, dtype=DTYPES[dtype])


def same(found, bits):
    return found.is_contiguous() and found.view(bits.dtype).equal(bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits(dtype, device):
    for channels in SIZES:
        for positions in SIZES:
            bits = random_bits((2, channels, positions), dtype).to(device)
            lying = bits.transpose(1, 2).contiguous().transpose(1, 2)
            assert same(contiguous(lying.view(dtype)), bits), (channels, positions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype, device):
    """What is dense in that format goes one way, anything else the other, with the same result."""
    bits = random_bits((3, 33, 5, 20), dtype).to(device)
    values = bits.view(dtype)
    last = values.contiguous(memory_format=torch.channels_last)
    shifted = torch.empty(values.numel() + 1, dtype=dtype, device=device)[1:].as_strided(values.shape, last.stride())
    shifted.copy_(values)
    wide = torch.empty(3, 5, 20, 40, dtype=dtype, device=device)[..., :33].permute(0, 3, 1, 2)
    wide.copy_(values)
    volume = values.view(3, 33, 5, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    for lying in (values, last, shifted, wide, volume, values.transpose(2, 3).contiguous().transpose(2, 3)):
        assert same(contiguous(lying), bits.view(lying.shape))
    assert same(contiguous(last[1:]), bits[1:])
    assert same(contiguous(last[..., :7]), bits[..., :7].contiguous())
    assert contiguous(last[:0]).shape == (0, 33, 5, 20)
    assert contiguous(values).data_ptr() != values.data_ptr()


def test_derivatives(device):
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(_channel.contiguous, (x,)) and torch.autograd.gradgradcheck(_channel.contiguous, (x,))
    y = normext.instance_norm(x, None, None)
    assert y.is_contiguous()
    (gradient,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert gradient.shape == x.shape
