"""RMSNorm (Zhang and Sennrich, 2019): y = x / sqrt(mean(x^2) + eps) * weight."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import handle_torch_function, has_torch_function_variadic

from normext import _library
from normext._library import Op, compiling_or_transformed, is_dynamo_compiling, is_grad_enabled

_lean = Op.named("rms_norm").direct
_inference = Op.named("rms_norm_inference")
_forward = Op.named("rms_norm_forward")
_backward = Op.named("rms_norm_backward")
_add_lean = Op.named("add_rms_norm").direct
_add_inference = Op.named("add_rms_norm_inference")
_add_forward = Op.named("add_rms_norm_forward")
_fused = Op.named("fused_add_rms_norm_")
_export = Op.named("rms_norm_export")

# eps=None means the machine epsilon of the dtype in which is accumulated.
_EPS = {dtype: torch.finfo(torch.float32).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_EPS[torch.float64] = torch.finfo(torch.float64).eps


def reference(
    input: Tensor, weight: Tensor | None, normalized_ndim: int, eps: float, weight_offset: float, rounding: int
) -> Tensor:
    """In plain torch ops, for transforms, for derivatives of higher order and for mixes of dtypes that no kernel takes."""
    dims = tuple(range(-normalized_ndim, 0))
    x = input.to(_library.accumulate_dtype(input))
    y = x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)
    dtype = input.dtype
    if rounding == _library.ROUNDINGS["llama"]:
        y = y.to(dtype).to(x.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    if weight is not None:
        y = y * (weight.to(x.dtype) + weight_offset if weight_offset != 0.0 else weight.to(x.dtype))
    return y.to(dtype)


def _fake(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, normalized_ndim: int, rounding: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    _library.check_fake("rms_norm", input, normalized_ndim, (weight,), (residual,))
    dtype = input.dtype if weight is None or rounding != _library.ROUNDINGS["llama"] else weight.dtype
    stats = _library.stats_like(input, normalized_ndim, 1)
    if residual is None:
        return _library.channels_last_like(input, dtype), input.new_empty(0), stats
    return _library.contiguous_like(input, dtype), _library.contiguous_like(input), stats


def _fake_backward(
    grad_output: Tensor,
    grad_residual_out: Tensor | None,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    normalized_ndim: int,
    weight_offset: float,
    rounding: int,
    needs: int,
) -> tuple[Tensor, ...]:
    _library.check_fake("rms_norm_backward", input, normalized_ndim, (weight,), (grad_output, grad_residual_out))
    _library.check_fake_stats("rms_norm_backward", stats, _library.stats_like(input, normalized_ndim, 1))
    return _library.fake_gradients(needs, input, weight)


def _fake_fused(input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    _library.check_fake("fused_add_rms_norm_", input, weight.dim(), (weight,), (residual,))


_library.register_fakes(
    rms_norm=lambda x, w, eps: _fake(x, None, w, w.dim())[0],
    rms_norm_inference=lambda x, w, ndim, eps, offset, rounding: _fake(x, None, w, ndim, rounding)[0],
    rms_norm_forward=lambda x, w, ndim, eps, offset, rounding: _fake(x, None, w, ndim, rounding)[::2],
    rms_norm_backward=_fake_backward,
    rms_norm_export=lambda x, residual, w, ndim, eps, offset, rounding: _fake(x, residual, w, ndim, rounding),
    add_rms_norm=lambda x, residual, w, eps: _fake(x, residual, w, w.dim())[:2],
    add_rms_norm_inference=lambda x, residual, w, ndim, eps, offset, rounding: _fake(x, residual, w, ndim, rounding)[:2],
    add_rms_norm_forward=lambda x, residual, w, ndim, eps, offset, rounding: _fake(x, residual, w, ndim, rounding),
    fused_add_rms_norm_=_fake_fused,
)


class _RMSNorm(torch.autograd.Function):
    """`arguments`: normalized_ndim, eps, weight_offset and rounding. With a residual, two outputs: the norm and what was
    normalised."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        arguments: tuple[int, float, float, int],
    ) -> Any:
        ctx.arguments = arguments
        if residual is None:
            forward = _forward.overload if is_dynamo_compiling() else _forward.direct
            output, stats = forward(input, weight, *arguments)
            ctx.save_for_backward(input, stats, weight)
            return output
        forward = _add_forward.overload if is_dynamo_compiling() else _add_forward.direct
        output, summed, stats = forward(input, residual, weight, *arguments)
        ctx.save_for_backward(summed, stats, weight)
        ctx.set_materialize_grads(False)
        return output, summed

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_summed: Tensor | None = None, *_: Any) -> tuple[Any, ...]:
        needs_input, needs_residual, needs_weight = ctx.needs_input_grad[:3]
        grad: Tensor | None
        if grad_output is None:
            grad, grad_weight = grad_summed, None
        else:
            x, stats, weight = ctx.saved_tensors
            ndim, _, weight_offset, rounding = ctx.arguments
            needs = (needs_input or needs_residual) | needs_weight << 1
            if is_grad_enabled() or compiling_or_transformed():
                found = _library.gradients(
                    _backward,
                    reference,
                    needs,
                    (grad_output, grad_summed),
                    stats,
                    (x, weight),
                    (ndim, weight_offset, rounding),
                    ctx.arguments,
                )
            else:  # the same, without the calls that decide what is to be done [1.2 us of 31]
                try:
                    found = _backward.direct(grad_output, grad_summed, x, stats, weight, ndim, weight_offset, rounding, needs)
                except MemoryError:
                    raise _library.out_of_memory(grad_output) from None
            grad, grad_weight = found if needs == 3 else _library.present(found, needs)
        return grad if needs_input else None, grad if needs_residual else None, grad_weight, None


_apply = _library.direct_apply(_RMSNorm)


def _setup_export(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, residual, weight, *arguments = inputs
    _, summed, stats = output
    ctx.arguments = tuple(arguments)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((summed, stats) if residual is None else (stats,)))
    ctx.save_for_backward(input if residual is None else summed, stats, weight)


# Programs that torch.export wrote are trained through this op: only there does an op carry its gradient itself [7-10 us a call].
_library.register_autograd("rms_norm_export", _RMSNorm, _setup_export)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    rounding: str = "torch",
) -> Tensor:
    """Scales the last ``len(normalized_shape)`` dimensions to a root mean square of 1; a drop-in for
    :func:`torch.nn.functional.rms_norm`.

    Args:
        input: ``[*, *normalized_shape]``, float32, float64, float16 or bfloat16, any strides.
        normalized_shape: the sizes of the normalised dimensions.
        weight: ``normalized_shape`` or None, of input's dtype, or float32 with 16-bit input. Any other mix of dtypes, and
            complex input, is computed by torch's own function.
        eps: added to the mean square, so in squared units of the input. None: the machine epsilon of float32 (of float64
            for float64 input).
        weight_offset: the weight used is ``weight_offset + weight``, added in float32. Gemma stores ``weight - 1``: 1.0.
        rounding: "torch" rounds once, at the end. "llama" rounds the normalised value to input's dtype and then multiplies,
            in the dtype of weight and input promoted, as Hugging Face's Llama does.

    Returns:
        A tensor of input's shape and dtype (but see rounding; float32 under CUDA autocast from torch 2.12 on, as in torch),
        channels-last where a 4- or 5-dimensional input is, else contiguous, as in torch.

    Raises:
        What torch.nn.functional.rms_norm of the installed torch raises for the same arguments, in its words.
        ValueError: for an unknown rounding.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; roundings of Hugging Face transformers.
    """
    if has_torch_function_variadic(input, weight):
        # Nested tensors take a function of this name for torch's, with its arguments.
        ours: dict[str, Any] = (
            {} if weight_offset == 0.0 and rounding == "torch" else {"weight_offset": weight_offset, "rounding": rounding}
        )
        arguments = input, normalized_shape, weight, eps
        result: Tensor = handle_torch_function(rms_norm, (input, weight), *arguments, **ours)
        return result
    if compiling_or_transformed():
        return _rms_norm_special(input, normalized_shape, weight, eps, weight_offset, rounding)
    try:
        if input.is_cuda and _library.autocast_active(input) and _library.AUTOCASTS_RMS_NORM:
            input, weight = _library.autocast(input, weight)
        epsilon = _EPS[input.dtype] if eps is None else eps
        # (3.0,) equals (3,), and torch refuses it.
        known = weight is not None and weight.shape == normalized_shape and type(normalized_shape[-1]) is int
        if is_grad_enabled() and (input.requires_grad or (weight is not None and weight.requires_grad)):
            if input.is_inference():  # saved for backward only as a copy
                input = input.clone()
            ndim = len(normalized_shape) if known else _library.normalized_ndim(input, normalized_shape)
            result = _apply(input, None, weight, (ndim, epsilon, weight_offset, _library.ROUNDINGS[rounding]))
        elif known and rounding == "torch" and weight_offset == 0.0:
            result = _lean(input, weight, epsilon)
        else:
            ndim = _library.normalized_ndim(input, normalized_shape)
            result = _inference.direct(input, weight, ndim, epsilon, weight_offset, _library.ROUNDINGS[rounding])
    except _library.REFUSALS as error:
        return _refused(error, input, normalized_shape, weight, eps, weight_offset, rounding)
    return result


def _check_rounding(op: str, rounding: str) -> None:
    if not isinstance(rounding, str) or rounding not in _library.ROUNDINGS:
        raise ValueError(f"{op}: expected rounding 'torch' or 'llama', got {rounding!r}") from None


def _refused(
    error: Exception,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
    rounding: str,
) -> Tensor:
    """Mixes of dtypes that no kernel takes, and tensors that the ops do not know, are computed as torch does; anything else
    raises."""
    _check_rounding("rms_norm", rounding)
    tensors = isinstance(input, Tensor) and (weight is None or isinstance(weight, Tensor))
    if _library.only_torch_knows(error, input, weight) or (tensors and not _library.accepts_dtypes(input, weight)):
        if weight_offset == 0.0 and rounding == "torch":
            return F.rms_norm(input, normalized_shape, weight, eps)
        known = input.dtype in _EPS and (weight is None or weight.dtype in _EPS)
        if known and _library.accepts_shapes(input, normalized_shape, weight):
            epsilon = _EPS[input.dtype] if eps is None else eps
            ndim = len(normalized_shape)
            return reference(input, weight, ndim, epsilon, weight_offset, _library.ROUNDINGS[rounding])
    if isinstance(error, KeyError):  # of _EPS, from a dtype that torch's function may take
        error = TypeError(f"rms_norm: weight_offset and rounding are for real floating-point input, got {input.dtype}")
    raise _library.torchs_error(error, F.rms_norm, input, normalized_shape, weight, eps) from None


def _rms_norm_special(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
    rounding: str,
) -> Tensor:
    """While compiling, exporting or transforming, where an op's exception cannot be caught: arguments are checked first."""
    _check_rounding("rms_norm", rounding)
    if not _library.accepts(input, normalized_shape, weight):
        error = RuntimeError("rms_norm: expected weight and input with the dimensions normalized_shape, on one device")
        return _refused(error, input, normalized_shape, weight, eps, weight_offset, rounding)
    if _library.AUTOCASTS_RMS_NORM and _library.autocast_active(input):
        input, weight = _library.autocast(input, weight)
    epsilon = _EPS[input.dtype] if eps is None else eps
    arguments = len(normalized_shape), epsilon, weight_offset, _library.ROUNDINGS[rounding]
    if _library.transformed():
        return reference(input, weight, *arguments)
    return _compiled(input, None, weight, *arguments)[0]


def _compiled(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    normalized_ndim: int,
    eps: float,
    weight_offset: float,
    rounding: int,
) -> tuple[Tensor, Any]:
    """The call as Dynamo and torch.export see it."""
    found: Any
    if _library.is_exporting():
        found = _export.overload(input, residual, weight, normalized_ndim, eps, weight_offset, rounding)
    elif _library.any_requires_grad(input, residual, weight):
        found = _RMSNorm.apply(  # type: ignore[no-untyped-call]
            input, residual, weight, (normalized_ndim, eps, weight_offset, rounding)
        )
        found = found if residual is not None else (found, None)
    elif residual is None:
        found = _inference.overload(input, weight, normalized_ndim, eps, weight_offset, rounding), None
    else:
        found = _add_inference.overload(input, residual, weight, normalized_ndim, eps, weight_offset, rounding)
    return found[0], found[1]


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    rounding: str = "torch",
) -> tuple[Tensor, Tensor]:
    """``residual_out = input + residual`` and its :func:`rms_norm`, in one pass over memory.

    The sum is rounded once to input's dtype and the statistics are those of the rounded sum: the same bits as the two steps.

    Args:
        input: ``[*, *normalized_shape]``, float32, float64, float16 or bfloat16, any strides.
        residual: of input's shape, dtype and device, any strides.
        normalized_shape, weight, eps, weight_offset, rounding: as in rms_norm.

    Returns:
        ``(output, residual_out)``, both contiguous and of input's shape; residual_out has input's dtype, output that of
        rms_norm.

    Raises:
        RuntimeError: if residual does not match input; otherwise what rms_norm raises for the sum.

    Source: the fused residual norms of vLLM and FlashInfer, with the rounded sum of Hugging Face transformers.
    """
    if has_torch_function_variadic(input, residual, weight):
        result: tuple[Tensor, Tensor] = handle_torch_function(
            add_rms_norm,
            (input, residual, weight),
            input,
            residual,
            normalized_shape,
            weight=weight,
            eps=eps,
            weight_offset=weight_offset,
            rounding=rounding,
        )
        return result
    if compiling_or_transformed() or _library.autocast_active(input):
        _library.check_residual("add_rms_norm", input, residual)
        _check_rounding("add_rms_norm", rounding)
        fused = _library.is_compiling() and not (_library.transformed() or _library.autocast_active(input))
        if fused and _library.accepts(input, normalized_shape, weight):
            epsilon = _EPS[input.dtype] if eps is None else eps
            ndim = len(normalized_shape)
            return _compiled(input, residual, weight, ndim, epsilon, weight_offset, _library.ROUNDINGS[rounding])
        return _add_unfused(input, residual, normalized_shape, weight, eps, weight_offset, rounding)
    try:
        epsilon = _EPS[input.dtype] if eps is None else eps
        differentiated = _library.any_requires_grad(input, residual, weight)
        known = weight is not None and weight.shape == normalized_shape and type(normalized_shape[-1]) is int
        if known and rounding == "torch" and weight_offset == 0.0 and not differentiated:
            result = _add_lean(input, residual, weight, epsilon)
        else:
            arguments = _library.normalized_ndim(input, normalized_shape), epsilon, weight_offset, _library.ROUNDINGS[rounding]
            if differentiated:
                result = _apply(input, residual, weight, arguments)
            else:
                result = _add_inference.direct(input, residual, weight, *arguments)
    except _library.REFUSALS as error:
        _check_rounding("add_rms_norm", rounding)
        _library.check_residual("add_rms_norm", input, residual)
        _library.raise_if_out_of_memory(error, input)
        foreign = _library.only_torch_knows(error, input, residual, weight)
        if not foreign and _library.accepts(input, normalized_shape, weight):
            raise
        return _add_unfused(input, residual, normalized_shape, weight, eps, weight_offset, rounding)
    return result


def _add_unfused(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
    rounding: str,
) -> tuple[Tensor, Tensor]:
    """What add_rms_norm is defined to be. Raises what rms_norm raises."""
    summed = input + residual
    return rms_norm(summed, normalized_shape, weight, eps, weight_offset=weight_offset, rounding=rounding), summed


def fused_add_rms_norm_(input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """In place on both: ``residual += input``, then ``input = rms_norm(residual)``. The contract of vLLM and FlashInfer.

    Args:
        input: ``[*, *weight.shape]``, float32, float64, float16 or bfloat16; overwritten with the norm.
        residual: of input's shape, dtype and device; overwritten with the sum, rounded once.
        weight: of input's dtype, or float32 with 16-bit input.
        eps: added to the mean square, so in squared units of the input.

    Raises:
        RuntimeError: if grad mode is on and an argument requires grad (use add_rms_norm); if input or residual overlaps
            itself, the other or weight; if shapes, dtypes or devices do not match.

    Source: vLLM's fused_add_rms_norm, with the statistics of the rounded sum, as in Hugging Face transformers, and one rounding at
    the end: where those libraries round at other places, bits differ.
    """
    if has_torch_function_variadic(input, residual, weight):
        handle_torch_function(fused_add_rms_norm_, (input, residual, weight), input, residual, weight, eps)
        return
    if _library.any_requires_grad(input, residual, weight):
        raise RuntimeError(
            "fused_add_rms_norm_: expected arguments that do not require grad, because it overwrites input and residual; "
            "use add_rms_norm, or torch.no_grad()"
        )
    if _library.transformed():
        _library.check_residual("fused_add_rms_norm_", input, residual)
        if input is residual:
            raise RuntimeError("fused_add_rms_norm_: expected input and residual to be different tensors, got the same")
        output, summed = _add_unfused(input, residual, weight.shape, weight, eps, 0.0, "torch")
        residual.copy_(summed)
        input.copy_(output)
        return
    try:
        (_fused.overload if is_dynamo_compiling() else _fused.direct)(input, residual, weight, eps)
    except MemoryError as error:
        _library.raise_if_out_of_memory(error, input)
    if not _library.is_compiling():
        torch.autograd.graph.increment_version((input, residual))


class RMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm`, computed by :func:`normext.rms_norm`: same arguments, parameters and state_dict.

    Input ``[*, *normalized_shape]``, output of the same shape, dtype as in rms_norm. The keyword-only extras are those of rms_norm;
    the weight starts at ``1 - weight_offset``, so that a new layer scales by 1. Raises ValueError for an unknown rounding.
    """

    weight_offset: float = 0.0
    rounding: str = "torch"

    def __init__(self, *args: Any, weight_offset: float = 0.0, rounding: str = "torch", **kwargs: Any) -> None:
        _check_rounding("RMSNorm", rounding)
        self.weight_offset = weight_offset
        self.rounding = rounding
        super().__init__(*args, **kwargs)

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy) and (leaf := _library.traced_leaf(self, x)) is not None:
            return leaf
        return rms_norm(x, self.normalized_shape, self.weight, self.eps, weight_offset=self.weight_offset, rounding=self.rounding)

    def extra_repr(self) -> str:
        extras = f", weight_offset={self.weight_offset}" if self.weight_offset != 0.0 else ""
        extras += f", rounding={self.rounding}" if self.rounding != "torch" else ""
        return super().extra_repr() + extras
