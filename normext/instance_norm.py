"""InstanceNorm (Ulyanov, Vedaldi and Lempitsky, 2016): GroupNorm with one channel per group, with optional running statistics."""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import handle_torch_function, has_torch_function_variadic

from normext import _channel, _library
from normext._channel import update_running, update_running_reference, update_running_transformed
from normext._library import Op, compiling_or_transformed
from normext.batch_norm import tracked_batch_norm
from normext.group_norm import apply, compiled, reference

_forward = Op.named("instance_norm_forward")


def _fake(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    _channel.check_fake("instance_norm", input, 0, (weight, bias), ())
    return _library.contiguous_like(input), _channel.stats_like(input, input.shape[1])


_library.register_fakes(instance_norm_forward=lambda x, w, b, eps, activation: _fake(x, w, b))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> Tensor:
    """Normalises every channel of every image; a drop-in for :func:`torch.nn.functional.instance_norm`.

    Computes ``output = activation(norm(input) * weight + bias)`` in float32 (float64 for float64 input), rounded once.

    Args:
        input: ``[N, C, *]``, float32, float64, float16 or bfloat16, any strides. Channels-last is copied, as in torch; on the
            CPU (with fma), without gradients and from 32 channels and positions on, it is read as it lies, in sums of another
            order: the last bits then differ from those that a call with gradients gives.
        running_mean: ``[C]`` or None. With ``use_input_stats`` it becomes ``(1 - momentum) * running_mean + momentum * mean``,
            where mean is averaged over the images; without, it is what is subtracted.
        running_var: likewise, of the unbiased variance.
        weight: ``[C]`` or None, of input's dtype, or float32 with 16-bit input; the running statistics too.
        bias: like weight; each may be given without the other. Parameters and running statistics are of one dtype.
        use_input_stats: whether the statistics are those of the image.
        momentum: the share of the input in the running statistics.
        eps: added to the variance, so in squared units of the input.
        activation: None, "relu", "silu", "gelu" (the exact one) or "leaky_relu" (slope 0.01).

    Returns:
        A contiguous tensor of input's shape and dtype, as in torch. An image's result does not depend on the others.

    Raises:
        What torch.nn.functional.instance_norm of the installed torch raises for the same arguments, in its words; ValueError
        for another activation.

    Source: Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        result: Tensor = handle_torch_function(
            instance_norm,
            (input, running_mean, running_var, weight, bias),
            input,
            running_mean=running_mean,
            running_var=running_var,
            weight=weight,
            bias=bias,
            use_input_stats=use_input_stats,
            momentum=momentum,
            eps=eps,
            activation=activation,
        )
        return result
    code = _channel.activation_code("instance_norm", activation) if activation is not None else 0
    try:
        refused = _refused(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    except _library.REFUSALS:
        refused = True
    if refused:  # torch's answer, or its exception
        y = F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        return _channel.activate(code, y)
    graph = compiling_or_transformed()
    if (
        use_input_stats
        and not _library.any_requires_grad(input, weight, bias)
        and not (graph and (_library.is_exporting() or _library.transformed()))
    ):
        try:
            forward = _forward.overload if graph else _forward.direct
            found: tuple[Tensor, Tensor] = forward(input, weight, bias, eps, code)
            update_running(input, found[1], running_mean, running_var, None, momentum)
        except _library.REFUSALS as error:
            arguments = input, running_mean, running_var, weight, bias, momentum, eps
            return _channel.activate(code, _torchs_answer(error, *arguments))
        return found[0]
    x = _channel.contiguous(input)
    if x.shape[1] == 1 or x.stride(1) == 1:  # the strides may still be those of channels-last
        x = x.reshape(-1).view(x.shape)
    if not use_input_stats:
        return tracked_batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps, None, activation, None)
    if _library.transformed():
        return _transformed(x, running_mean, running_var, weight, bias, momentum, eps, code)
    try:
        if graph:
            output, stats = compiled(x, weight, bias, x.shape[1], eps, code)
        elif running_mean is not None:
            output, stats = apply(x, weight, bias, (x.shape[1], eps, code), True)
        else:
            return cast(Tensor, apply(x, weight, bias, (x.shape[1], eps, code), False))
        if _library.is_exporting():
            images = stats.view(4, x.shape[0], x.shape[1]).mean(1)
            update_running_reference(images[0] + images[1], images[3], running_mean, running_var, None, momentum)
        else:
            update_running(x, stats, running_mean, running_var, None, momentum)
    except _library.REFUSALS as error:
        return _channel.activate(code, _torchs_answer(error, input, running_mean, running_var, weight, bias, momentum, eps))
    return output


def _torchs_answer(
    error: Exception,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """To an op's refusal: torch's result for tensors that only torch knows, otherwise its exception."""
    if _library.only_torch_knows(error, input, weight, bias):
        return F.instance_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
    running = _channel.copies(running_mean, running_var)
    raise _library.torchs_error(error, F.instance_norm, input, *running, weight, bias, True, momentum, eps) from None


def _refused(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
) -> bool:
    return (
        (use_input_stats is not True and use_input_stats is not False)
        or not isinstance(momentum, float | int)
        or _library.any_requires_grad(running_mean, running_var)
        or not _channel.accepts(input, weight, bias, running_mean, running_var)
        or input.dim() < 3
        or input.numel() == 0
        or (running_mean is None) != (running_var is None)
        or (use_input_stats and input.numel() == input.shape[0] * input.shape[1])
        or (not use_input_stats and (running_mean is None or eps <= 0))
    )


def _transformed(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    activation: int,
) -> Tensor:
    if running_mean is not None and running_var is not None:
        x = input.detach().to(_library.accumulate_dtype(input)).flatten(2)
        variance = x.var(2, unbiased=True).mean(0)
        update_running_transformed(x.mean((0, 2)), variance, running_mean, running_var, momentum)
    return reference(input, weight, bias, input.shape[1], eps, activation)


class _InstanceForward(nn.Module):
    """The forward of InstanceNorm1d, 2d and 3d."""

    _dims: int

    def forward(self: Any, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (leaf := _library.traced_leaf(self, input)) is not None:
            return leaf
        batched = input.dim() == self._dims
        if not (batched or input.dim() == self._dims - 1) or input.shape[1 if batched else 0] != self.num_features:
            theirs: Tensor = super().forward(input)  # raises or warns, in torch's words
            return theirs
        output = instance_norm(
            input if batched else input.unsqueeze(0),
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
        )
        return output if batched else output.squeeze(0)


class InstanceNorm1d(_InstanceForward, nn.InstanceNorm1d):
    """:class:`torch.nn.InstanceNorm1d`, computed by :func:`normext.instance_norm`: same arguments, buffers and state_dict.

    Input ``[N, C, L]`` or ``[C, L]``, output contiguous and of the same shape and dtype.
    """

    _dims = 3


class InstanceNorm2d(_InstanceForward, nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d`, computed by :func:`normext.instance_norm`: same arguments, buffers and state_dict.

    Input ``[N, C, H, W]`` or ``[C, H, W]``, output contiguous and of the same shape and dtype.
    """

    _dims = 4


class InstanceNorm3d(_InstanceForward, nn.InstanceNorm3d):
    """:class:`torch.nn.InstanceNorm3d`, computed by :func:`normext.instance_norm`: same arguments, buffers and state_dict.

    Input ``[N, C, D, H, W]`` or ``[C, D, H, W]``, output contiguous and of the same shape and dtype.
    """

    _dims = 5
