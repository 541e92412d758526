"""What the channel norms share: activations, checks of their arguments, shapes of their results, running statistics."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normext import _library

_update = _library.Op.named("batch_norm_update_")
_contiguous = _library.Op.named("contiguous").direct

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# As numbered in csrc/core/types.h.
ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3, "leaky_relu": 4}
_FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (lambda z: z, F.relu, F.silu, F.gelu, F.leaky_relu)


class _Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        result: Tensor = _contiguous(input)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Tensor:
        return grad_output


_contiguous_with_grad = _library.direct_apply(_Contiguous)


def contiguous(input: Tensor) -> Tensor:
    """input.contiguous(), which takes torch several times as long where a CPU tensor of many channels is channels-last."""
    if _library.compiling_or_transformed() or input.layout != torch.strided or not input.is_cpu or input.is_contiguous():
        return input.contiguous()
    try:
        result: Tensor = (_contiguous_with_grad if _library.any_requires_grad(input) else _contiguous)(input)
    except (MemoryError, NotImplementedError):
        return input.contiguous()  # raises, in torch's words, or knows the kind of tensor
    return result


def activation_code(op: str, activation: str | None) -> int:
    try:
        return ACTIVATIONS[activation]
    except (KeyError, TypeError):
        raise ValueError(f"{op}: expected activation None, 'relu', 'silu', 'gelu' or 'leaky_relu', got {activation!r}") from None


def activate(activation: int, z: Tensor) -> Tensor:
    return _FUNCTIONS[activation](z)


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y * weight + bias per channel, in plain torch ops."""
    shape = [-1] + [1] * (y.dim() - 2)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y


def accepts(input: Tensor, *parameters: Tensor | None) -> bool:
    """The kernels take these arguments: asked where an op's exception could not be caught."""
    return (
        _library.accepts_dtypes(input, *parameters)
        and input.dim() >= 2
        and all(p is None or (p.shape == (input.shape[1],) and p.device == input.device) for p in parameters)
    )


def one_value_per_channel(input: Tensor) -> bool:
    """Statistics over a single value: torch refuses them."""
    return input.numel() == input.shape[1] and input.shape[0] * math.prod(input.shape[2:]) == 1


def copies(*running: Any) -> tuple[Any, ...]:
    """Running statistics for a call of torch's that must not write ours."""
    return tuple(r.clone() if isinstance(r, Tensor) else r for r in running)


def share_of_batch(momentum: float, num_batches_tracked: Tensor | None) -> float:
    """As a number, for torch's functions."""
    return momentum if num_batches_tracked is None else 1 / float(num_batches_tracked)


def check_fake(
    op: str, input: Tensor, groups: int, parameters: tuple[Tensor | None, ...], like_input: tuple[Tensor | None, ...]
) -> None:
    if input.dim() < 2:
        raise RuntimeError(f"{op}: expected input of at least 2 dimensions, got {list(input.shape)}")
    if groups < 0 or (groups > 0 and input.shape[1] % groups != 0):
        raise RuntimeError(f"{op}: expected num_groups that divide {input.shape[1]} channels, got {groups}")
    _library.check_fake_shapes(op, input, input.shape[1:2], parameters, like_input)


def output_like(input: Tensor) -> Tensor:
    """Channels-last where torch's batch norm calls the input so: not where it is both formats (one channel, or one position), and
    whatever the stride of a single image."""
    if input.is_contiguous():
        return _library.contiguous_like(input)
    if input.dim() in _CHANNELS_LAST and input.is_contiguous(memory_format=_CHANNELS_LAST[input.dim()]):
        return torch.empty_like(input, memory_format=_CHANNELS_LAST[input.dim()])
    return _library.channels_last_like(input)


def stats_like(input: Tensor, groups: int) -> Tensor:
    """Saved statistics of a channel norm: the mean, its rounding error, rstd and the unbiased variance of every slab."""
    slabs = input.shape[1] if groups == 0 else input.shape[0] * groups
    return input.new_empty((4, slabs), dtype=_library.accumulate_dtype(input))


def fake_gradients(needs: int, input: Tensor, residual: bool, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients in the format of the input, and those of the parameters; of shape [0] where not needed."""
    given = weight if weight is not None else bias
    parameter = input.new_empty(input.shape[1], dtype=input.dtype if given is None else given.dtype)
    like_input = [_library.channels_last_like(input)] * (2 if residual else 1)
    shapes = [*like_input, parameter, parameter]
    return tuple(torch.empty_like(shape) if needs >> i & 1 else input.new_empty(0) for i, shape in enumerate(shapes))


def update_running(
    input: Tensor,
    stats: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
) -> None:
    """Running statistics take those of the batch; an empty batch leaves them alone. With num_batches_tracked the momentum is its
    reciprocal, computed where it lies: replaying a CUDA graph stays right."""
    if running_mean is None or running_var is None or input.numel() == 0:
        return
    update = _update.overload if _library.is_compiling() else _update.direct
    update(stats, running_mean, running_var, num_batches_tracked, momentum)


def update_running_reference(
    mean: Tensor,
    unbiased_variance: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
) -> None:
    """The same in plain torch ops, for torch.export."""
    factor = momentum if num_batches_tracked is None else num_batches_tracked.to(mean.dtype).reciprocal()
    for running, found in ((running_mean, mean), (running_var, unbiased_variance)):
        if running is not None:
            running.copy_((1 - factor) * running + factor * found.detach())


def update_running_transformed(
    mean: Tensor, unbiased_variance: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float
) -> None:
    """The same under a transform, which lets only torch's batch norm write what it did not make itself: two batches of two values
    per channel, of which one has this mean and one, around 0, this variance."""
    deviation = (unbiased_variance.detach() / 2).sqrt().to(running_var.dtype)
    mean = mean.detach().to(running_mean.dtype)
    F.batch_norm(torch.stack((mean, mean)), running_mean, torch.ones_like(running_var), None, None, True, momentum)
    around_zero = torch.stack((deviation, -deviation))
    F.batch_norm(around_zero, torch.zeros_like(running_mean), running_var, None, None, True, momentum)


def _fake_update(stats: Tensor, mean: Tensor, var: Tensor, batches: Tensor | None, momentum: float) -> None:
    given = (stats, mean, var) if batches is None else (stats, mean, var, batches)
    if mean.shape != var.shape or mean.dtype != var.dtype or any(tensor.device != stats.device for tensor in given):
        raise RuntimeError("batch_norm_update_: expected running statistics of one shape and dtype, all tensors on one device")


_library.register_fakes(batch_norm_update_=_fake_update, contiguous=_library.contiguous_like)
