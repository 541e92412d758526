"""LayerNorm (Ba, Kiros and Hinton, 2016): y = (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import handle_torch_function, has_torch_function_variadic

from normext import _library
from normext._library import Op, compiling_or_transformed, is_dynamo_compiling, is_grad_enabled

_lean = Op.named("layer_norm").direct
_inference = Op.named("layer_norm_inference")
_forward = Op.named("layer_norm_forward")
_backward = Op.named("layer_norm_backward")
_add_lean = Op.named("add_layer_norm").direct
_add_inference = Op.named("add_layer_norm_inference")
_add_forward = Op.named("add_layer_norm_forward")
_export = Op.named("layer_norm_export")


def reference(input: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_ndim: int, eps: float) -> Tensor:
    """In plain torch ops, for transforms and for derivatives of higher order. Centred twice: the second mean is the rounding
    of the first, so the error does not grow with the mean."""
    dims = tuple(range(-normalized_ndim, 0))
    x = input.to(_library.accumulate_dtype(input))
    x = x - x.mean(dims, keepdim=True)
    x = x - x.mean(dims, keepdim=True)
    y = x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(input.dtype)


def _fake(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, normalized_ndim: int
) -> tuple[Tensor, Tensor, Tensor]:
    _library.check_fake("layer_norm", input, normalized_ndim, (weight, bias), (residual,))
    summed = input.new_empty(0) if residual is None else _library.contiguous_like(input)
    return _library.contiguous_like(input), summed, _library.stats_like(input, normalized_ndim, 3)


def _fake_backward(
    grad_output: Tensor,
    grad_residual_out: Tensor | None,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    needs: int,
) -> tuple[Tensor, ...]:
    _library.check_fake("layer_norm_backward", input, normalized_ndim, (weight, bias), (grad_output, grad_residual_out))
    _library.check_fake_stats("layer_norm_backward", stats, _library.stats_like(input, normalized_ndim, 3))
    return _library.fake_gradients(needs, input, weight, weight if bias is None else bias)


_library.register_fakes(
    layer_norm=lambda x, w, b, eps: _fake(x, None, w, b, w.dim())[0],
    layer_norm_inference=lambda x, w, b, ndim, eps: _fake(x, None, w, b, ndim)[0],
    layer_norm_forward=lambda x, w, b, ndim, eps: _fake(x, None, w, b, ndim)[::2],
    layer_norm_backward=_fake_backward,
    layer_norm_export=lambda x, residual, w, b, ndim, eps, alpha: _fake(x, residual, w, b, ndim),
    add_layer_norm=lambda x, residual, w, b, eps, alpha: _fake(x, residual, w, b, w.dim())[:2],
    add_layer_norm_inference=lambda x, residual, w, b, ndim, eps, alpha: _fake(x, residual, w, b, ndim)[:2],
    add_layer_norm_forward=lambda x, residual, w, b, ndim, eps, alpha: _fake(x, residual, w, b, ndim),
)


def _save_for_backward(ctx: Any, input: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """A bias only for its dtype, where there is no weight: a None saved costs as much as a tensor [0.7 us]."""
    if weight is None:
        ctx.save_for_backward(input, stats, None, bias)
    else:
        ctx.save_for_backward(input, stats, weight)


class _LayerNorm(torch.autograd.Function):
    """`arguments`: normalized_ndim, eps and alpha. With a residual, two outputs: the norm and what was normalised."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        arguments: tuple[int, float, float],
    ) -> Any:
        ctx.arguments = arguments
        if residual is None:
            forward = _forward.overload if is_dynamo_compiling() else _forward.direct
            output, stats = forward(input, weight, bias, *arguments[:2])
            _save_for_backward(ctx, input, stats, weight, bias)
            return output
        forward = _add_forward.overload if is_dynamo_compiling() else _add_forward.direct
        output, summed, stats = forward(input, residual, weight, bias, *arguments)
        _save_for_backward(ctx, summed, stats, weight, bias)
        ctx.set_materialize_grads(False)
        return output, summed

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_summed: Tensor | None = None, *_: Any) -> tuple[Any, ...]:
        needs_input, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        ndim, eps, alpha = ctx.arguments
        grad: Tensor | None
        if grad_output is None:
            grad, grad_weight, grad_bias = grad_summed, None, None
        else:
            saved = ctx.saved_tensors
            x, stats, weight, bias = saved if len(saved) == 4 else (*saved, None)
            needs = (needs_input or needs_residual) | needs_weight << 1 | needs_bias << 2
            if is_grad_enabled() or compiling_or_transformed():
                found = _library.gradients(
                    _backward, reference, needs, (grad_output, grad_summed), stats, (x, weight, bias), (ndim,), (ndim, eps)
                )
            else:  # the same, without the calls that decide what is to be done [1.2 us of 33]
                try:
                    found = _backward.direct(grad_output, grad_summed, x, stats, weight, bias, ndim, needs)
                except MemoryError:
                    raise _library.out_of_memory(grad_output) from None
            grad, grad_weight, grad_bias = found if needs == 7 else _library.present(found, needs)
        grad_residual = None
        if needs_residual and grad is not None:
            grad_residual = grad if alpha == 1.0 else grad * alpha
        return grad if needs_input else None, grad_residual, grad_weight, grad_bias, None


_apply = _library.direct_apply(_LayerNorm)


def _setup_export(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, residual, weight, bias, *arguments = inputs
    _, summed, stats = output
    ctx.arguments = tuple(arguments)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((summed, stats) if residual is None else (stats,)))
    _save_for_backward(ctx, input if residual is None else summed, stats, weight, bias)


# Programs that torch.export wrote are trained through this op: only there does an op carry its gradient itself [7-10 us a call].
_library.register_autograd("layer_norm_export", _LayerNorm, _setup_export)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalises over the last ``len(normalized_shape)`` dimensions; a drop-in for :func:`torch.nn.functional.layer_norm`.

    Args:
        input: ``[*, *normalized_shape]``, float32, float64, float16 or bfloat16, any strides.
        normalized_shape: the sizes of the normalised dimensions.
        weight: ``normalized_shape`` or None, of input's dtype, or float32 with 16-bit input.
        bias: like weight and of its dtype; each may be given without the other.
        eps: added to the variance, so in squared units of the input.

    Returns:
        A contiguous tensor of input's shape and dtype (float32 under CUDA autocast, as in torch). Statistics are taken in
        float32 (float64 for float64 input) and are accurate at any mean.

    Raises:
        What torch.nn.functional.layer_norm of the installed torch raises for the same arguments, in its words.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    if has_torch_function_variadic(input, weight, bias):
        result: Tensor = handle_torch_function(
            layer_norm, (input, weight, bias), input, normalized_shape, weight=weight, bias=bias, eps=eps
        )
        return result
    if compiling_or_transformed():
        return _layer_norm_special(input, normalized_shape, weight, bias, eps)
    try:
        if input.is_cuda and _library.autocast_active(input):
            input, weight, bias = _library.autocast(input, weight, bias)
        # (3.0,) equals (3,), and torch refuses it.
        known = weight is not None and weight.shape == normalized_shape and type(normalized_shape[-1]) is int
        if is_grad_enabled() and (
            input.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
        ):
            ndim = len(normalized_shape) if known else _library.normalized_ndim(input, normalized_shape)
            result = _apply(input, None, weight, bias, (ndim, eps, 1.0))
        elif known and bias is not None:
            result = _lean(input, weight, bias, eps)
        else:
            result = _inference.direct(input, weight, bias, _library.normalized_ndim(input, normalized_shape), eps)
    except _library.REFUSALS as error:
        if _library.only_torch_knows(error, input, weight, bias):
            return F.layer_norm(input, normalized_shape, weight, bias, eps)
        raise _library.torchs_error(error, F.layer_norm, input, normalized_shape, weight, bias, eps) from None
    return result


def _layer_norm_special(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """While compiling, exporting or transforming, where an op's exception cannot be caught: arguments are checked first."""
    if not _library.accepts(input, normalized_shape, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    if _library.autocast_active(input):
        input, weight, bias = _library.autocast(input, weight, bias)
    if _library.transformed():
        return reference(input, weight, bias, len(normalized_shape), eps)
    return _compiled(input, None, weight, bias, len(normalized_shape), eps, 1.0)[0]


def _compiled(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    eps: float,
    alpha: float,
) -> tuple[Tensor, Any]:
    """The call as Dynamo and torch.export see it."""
    found: Any
    if _library.is_exporting():
        found = _export.overload(input, residual, weight, bias, normalized_ndim, eps, alpha)[:2]
    elif _library.any_requires_grad(input, residual, weight, bias):
        found = _LayerNorm.apply(  # type: ignore[no-untyped-call]
            input, residual, weight, bias, (normalized_ndim, eps, alpha)
        )
        found = found if residual is not None else (found, None)
    elif residual is None:
        found = _inference.overload(input, weight, bias, normalized_ndim, eps), None
    else:
        found = _add_inference.overload(input, residual, weight, bias, normalized_ndim, eps, alpha)
    return found[0], found[1]


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``residual_out = input + alpha * residual`` and its :func:`layer_norm`, in one pass over memory.

    The sum is rounded once to input's dtype and the statistics are those of the rounded sum: the same bits as the two steps.

    Args:
        input: ``[*, *normalized_shape]``, float32, float64, float16 or bfloat16, any strides.
        residual: of input's shape, dtype and device, any strides.
        normalized_shape, weight, bias, eps: as in layer_norm.
        alpha: scale of the residual; DeepNorm's alpha.

    Returns:
        ``(output, residual_out)``, both contiguous and of input's shape and dtype (under CUDA autocast output is float32).

    Raises:
        RuntimeError: if residual does not match input; otherwise what layer_norm raises for the sum.

    Source: pre-norm and post-norm Transformer blocks; Wang et al., "DeepNet", 2022, for alpha.
    """
    if has_torch_function_variadic(input, residual, weight, bias):
        result: tuple[Tensor, Tensor] = handle_torch_function(
            add_layer_norm,
            (input, residual, weight, bias),
            input,
            residual,
            normalized_shape,
            weight=weight,
            bias=bias,
            eps=eps,
            alpha=alpha,
        )
        return result
    if compiling_or_transformed() or _library.autocast_active(input):
        _library.check_residual("add_layer_norm", input, residual)
        fused = _library.is_compiling() and not (_library.transformed() or _library.autocast_active(input))
        if fused and _library.accepts(input, normalized_shape, weight, bias):
            return _compiled(input, residual, weight, bias, len(normalized_shape), eps, alpha)
        return _add_unfused(input, residual, normalized_shape, weight, bias, eps, alpha)
    try:
        differentiated = _library.any_requires_grad(input, residual, weight, bias)
        known = weight is not None and weight.shape == normalized_shape and type(normalized_shape[-1]) is int
        if known and bias is not None and not differentiated:
            result = _add_lean(input, residual, weight, bias, eps, alpha)
        else:
            ndim = _library.normalized_ndim(input, normalized_shape)
            if differentiated:
                result = _apply(input, residual, weight, bias, (ndim, eps, alpha))
            else:
                result = _add_inference.direct(input, residual, weight, bias, ndim, eps, alpha)
    except _library.REFUSALS as error:
        _library.check_residual("add_layer_norm", input, residual)
        _library.raise_if_out_of_memory(error, input)
        foreign = _library.only_torch_knows(error, input, residual, weight, bias)
        if not foreign and _library.accepts(input, normalized_shape, weight, bias):
            raise
        return _add_unfused(input, residual, normalized_shape, weight, bias, eps, alpha)
    return result


def _add_unfused(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """What add_layer_norm is defined to be. Raises what layer_norm raises."""
    summed = torch.add(input, residual, alpha=alpha)
    return layer_norm(summed, normalized_shape, weight, bias, eps), summed


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm`, computed by :func:`normext.layer_norm`: same arguments, parameters and state_dict.

    Input ``[*, *normalized_shape]``, output contiguous and of the same shape and dtype (float32 under CUDA autocast).
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (leaf := _library.traced_leaf(self, input)) is not None:
            return leaf
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
