"""GroupNorm (Wu and He, 2018): y = (x - mean) / sqrt(var + eps) * weight + bias, with the statistics of a group of channels of one
image and the affine per channel; fused with an activation. InstanceNorm has one channel per group."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import handle_torch_function, has_torch_function_variadic

from normext import _channel, _library
from normext._library import Op, compiling_or_transformed, is_dynamo_compiling, is_grad_enabled

_lean = Op.named("group_norm").direct
_inference = Op.named("group_norm_inference")
_forward = Op.named("group_norm_forward")
_backward = Op.named("group_norm_backward")
_export = Op.named("group_norm_export")


def reference(input: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, activation: int) -> Tensor:
    """In plain torch ops, for transforms and for derivatives of higher order. Centred twice: the second mean is the rounding
    of the first, so the error does not grow with the mean."""
    x = input.to(_library.accumulate_dtype(input))
    x = x.reshape(input.shape[0], num_groups, input.shape[1] // num_groups * math.prod(input.shape[2:]))
    x = x - x.mean(-1, keepdim=True)
    x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    y = _channel.affine(y.reshape(input.shape), weight, bias)
    return _channel.activate(activation, y).to(input.dtype)


def _fake(input: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int) -> tuple[Tensor, Tensor]:
    _check_groups(num_groups)
    _channel.check_fake("group_norm", input, num_groups, (weight, bias), ())
    return _library.channels_last_like(input), _channel.stats_like(input, num_groups)


def _check_groups(num_groups: int) -> None:
    if num_groups < 1:
        raise RuntimeError(f"group_norm: expected num_groups of at least 1, got {num_groups}")


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    activation: int,
    needs: int,
) -> tuple[Tensor, ...]:
    _check_groups(num_groups)
    _channel.check_fake("group_norm_backward", input, num_groups, (weight, bias), (grad_output,))
    _library.check_fake_stats("group_norm_backward", stats, _channel.stats_like(input, num_groups))
    return _channel.fake_gradients(needs, input, False, weight, bias)


_library.register_fakes(
    group_norm=lambda x, w, b, groups, eps: _fake(x, w, b, groups)[0],
    group_norm_inference=lambda x, w, b, groups, eps, activation: _fake(x, w, b, groups)[0],
    group_norm_forward=lambda x, w, b, groups, eps, activation: _fake(x, w, b, groups),
    group_norm_backward=_fake_backward,
    group_norm_export=lambda x, w, b, groups, eps, activation: _fake(x, w, b, groups),
)


def _save_for_backward(ctx: Any, input: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, activation: int) -> None:
    """A bias for an activation, or for its dtype where there is no weight: a None saved costs as much as a tensor [0.7 us]."""
    if activation != 0 or weight is None:
        ctx.save_for_backward(input, stats, weight, bias)
    else:
        ctx.save_for_backward(input, stats, weight)


class _GroupNorm(torch.autograd.Function):
    """`arguments`: num_groups, eps and activation. The output and, if `stats_too`, the statistics, for whoever keeps running ones:
    a second output costs 4 us a step."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        arguments: tuple[int, float, int],
        stats_too: bool,
    ) -> Any:
        ctx.arguments = arguments
        forward = _forward.overload if is_dynamo_compiling() else _forward.direct
        output, stats = forward(input, weight, bias, *arguments)
        _save_for_backward(ctx, input, stats, weight, bias, arguments[2])
        if not stats_too:
            return output
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return output, stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_output is None:
            return (None,) * 5
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        num_groups, _, activation = ctx.arguments
        saved = ctx.saved_tensors
        x, stats, weight, bias = saved if len(saved) == 4 else (*saved, None)
        needs = needs_input | needs_weight << 1 | needs_bias << 2
        if is_grad_enabled() or compiling_or_transformed():
            found: Any = _library.gradients(
                _backward,
                reference,
                needs,
                (grad_output,),
                stats,
                (x, weight, bias),
                (num_groups, activation),
                ctx.arguments,
            )
        else:
            try:
                found = _backward.direct(grad_output, x, stats, weight, bias, num_groups, activation, needs)
            except MemoryError:
                raise _library.out_of_memory(grad_output) from None
        grad_input, grad_weight, grad_bias = found if needs == 7 else _library.present(found, needs)
        return grad_input, grad_weight, grad_bias, None, None


apply = _library.direct_apply(_GroupNorm)


def _setup_export(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, bias, num_groups, eps, activation = inputs
    ctx.arguments = num_groups, eps, activation
    ctx.mark_non_differentiable(output[1])
    _save_for_backward(ctx, input, output[1], weight, bias, activation)


_library.register_autograd("group_norm_export", _GroupNorm, _setup_export)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> Tensor:
    """Normalises groups of channels of every image; a drop-in for :func:`torch.nn.functional.group_norm`.

    Computes ``output = activation(norm(input) * weight + bias)`` in float32 (float64 for float64 input), rounded once.

    Args:
        input: ``[N, C, *]``, float32, float64, float16 or bfloat16, any strides; channels-last is computed as it lies.
        num_groups: how many groups of consecutive channels there are; divides ``C``.
        weight: ``[C]`` or None, of input's dtype, or float32 with 16-bit input.
        bias: like weight and of its dtype; each may be given without the other.
        eps: added to the variance, so in squared units of the input.
        activation: None, "relu", "silu", "gelu" (the exact one) or "leaky_relu" (slope 0.01).

    Returns:
        A tensor of input's shape and dtype (float32 under CUDA autocast, as in torch), channels-last where the input is,
        otherwise contiguous. An image's result does not depend on the others, and is accurate at any mean.

    Raises:
        What torch.nn.functional.group_norm of the installed torch raises for the same arguments, in its words; ValueError
        for another activation.

    Source: Wu and He, "Group Normalization", 2018.
    """
    if has_torch_function_variadic(input, weight, bias):
        result: Tensor = handle_torch_function(
            group_norm, (input, weight, bias), input, num_groups, weight=weight, bias=bias, eps=eps, activation=activation
        )
        return result
    code = _channel.activation_code("group_norm", activation) if activation is not None else 0
    if compiling_or_transformed():
        return _special(input, num_groups, weight, bias, eps, code)
    try:
        if input.is_cuda and _library.autocast_active(input):
            input, weight, bias = _library.autocast(input, weight, bias)
        if type(num_groups) is bool:
            raise TypeError(f"group_norm: expected num_groups to be an int, got {num_groups}")
        if (input.shape[0] == 1 and input.numel() == num_groups) or input.numel() == 0:
            _ask_torch(input, num_groups, weight, bias, eps)
        if is_grad_enabled() and _library.any_requires_grad(input, weight, bias):
            result = apply(input, weight, bias, (num_groups, eps, code), False)
        elif code == 0 and weight is not None and bias is not None:
            result = _lean(input, weight, bias, num_groups, eps)
        else:
            result = _inference.direct(input, weight, bias, num_groups, eps, code)
    except _library.REFUSALS as error:
        if _library.only_torch_knows(error, input, weight, bias):
            return _channel.activate(code, F.group_norm(input, num_groups, weight, bias, eps))
        raise _library.torchs_error(error, F.group_norm, input, num_groups, weight, bias, eps) from None
    return result


def _ask_torch(input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """One value per group in a single image, or nothing at all: what torch makes of that depends on its version."""
    theirs = _library.what_torch_raises(F.group_norm, input, num_groups, weight, bias, eps)
    if theirs is not None:
        raise theirs


def _special(input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: int) -> Tensor:
    """While compiling, exporting or transforming, where an op's exception cannot be caught: arguments are checked first."""
    if (
        not _channel.accepts(input, weight, bias)
        or num_groups < 1
        or input.shape[1] % num_groups != 0
        or _library.surely(input.numel() == 0)
        or (_library.surely(input.shape[0] == 1) and _library.surely(input.numel() == num_groups))
    ):
        return _channel.activate(activation, F.group_norm(input, num_groups, weight, bias, eps))
    if _library.autocast_active(input):
        input, weight, bias = _library.autocast(input, weight, bias)
    if _library.transformed():
        return reference(input, weight, bias, num_groups, eps, activation)
    return compiled(input, weight, bias, num_groups, eps, activation)[0]


def compiled(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, activation: int
) -> tuple[Tensor, Tensor]:
    """The call as Dynamo and torch.export see it: the output and the statistics."""
    if _library.is_exporting():
        found = _export.overload(input, weight, bias, num_groups, eps, activation)
    elif _library.any_requires_grad(input, weight, bias):
        found = _GroupNorm.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, (num_groups, eps, activation), True
        )
    else:
        found = _forward.overload(input, weight, bias, num_groups, eps, activation)
    return found[0], found[1]


class GroupNorm(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm`, computed by :func:`normext.group_norm`: same arguments, parameters and state_dict.

    Input ``[N, C, *]``, contiguous or channels-last; output of the same shape, dtype (float32 under CUDA autocast) and
    format.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (leaf := _library.traced_leaf(self, input)) is not None:
            return leaf
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
