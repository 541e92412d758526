"""BatchNorm (Ioffe and Szegedy, 2015): y = (x - mean) / sqrt(var + eps) * weight + bias per channel, with the statistics of the
batch (training) or running ones (evaluation); fused with a residual sum and an activation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import handle_torch_function, has_torch_function_variadic

from normext import _channel, _library
from normext._channel import update_running, update_running_reference, update_running_transformed
from normext._library import Op, compiling_or_transformed, is_dynamo_compiling, is_grad_enabled

_lean = Op.named("batch_norm").direct
_inference = Op.named("batch_norm_inference")
_forward = Op.named("batch_norm_forward")
_train = Op.named("batch_norm_train_").direct
_backward = Op.named("batch_norm_backward")
_export = Op.named("batch_norm_export")


def reference(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    activation: int,
) -> Tensor:
    """In plain torch ops, for transforms and for derivatives of higher order. Given mean and rstd are those of evaluation;
    otherwise the batch is centred twice: the second mean is the rounding of the first, so the error does not grow with it."""
    x = input.to(_library.accumulate_dtype(input))
    shape = [-1] + [1] * (input.dim() - 2)
    if mean is not None and rstd is not None:
        y = (x - mean.view(shape)) * rstd.view(shape)
    else:
        dims = (0, *range(2, input.dim()))
        x = x - x.mean(dims, keepdim=True)
        x = x - x.mean(dims, keepdim=True)
        y = x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)
    y = _channel.affine(y, weight, bias)
    if residual is not None:
        y = y + residual
    return _channel.activate(activation, y).to(input.dtype)


def _fake(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _channel.check_fake("batch_norm", input, 0, (weight, bias, running_mean, running_var), (residual,))
    if num_batches_tracked is not None and num_batches_tracked.device != input.device:
        raise RuntimeError(f"batch_norm: expected num_batches_tracked on {input.device}, got {num_batches_tracked.device}")
    if (running_mean is None) != (running_var is None):
        raise RuntimeError("batch_norm: expected running_mean and running_var, got one of them")
    return _channel.output_like(input), _channel.stats_like(input, 0)


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    fixed_stats: int,
    activation: int,
    needs: int,
) -> tuple[Tensor, ...]:
    _channel.check_fake("batch_norm_backward", input, 0, (weight, bias), (grad_output, residual))
    _library.check_fake_stats("batch_norm_backward", stats, _channel.stats_like(input, 0))
    return _channel.fake_gradients(needs, input, True, weight, bias)


_library.register_fakes(
    batch_norm=lambda x, w, b, mean, var, eps: _fake(x, None, w, b, mean, var)[0],
    batch_norm_inference=lambda x, r, w, b, mean, var, eps, activation: _fake(x, r, w, b, mean, var)[0],
    batch_norm_forward=lambda x, r, w, b, mean, var, eps, activation: _fake(x, r, w, b, mean, var),
    batch_norm_train_=lambda x, r, w, b, mean, var, batches, momentum, eps, activation: _fake(x, r, w, b, mean, var, batches),
    batch_norm_backward=_fake_backward,
    batch_norm_export=lambda x, r, w, b, mean, var, eps, activation: _fake(x, r, w, b, mean, var),
)


def _save_for_backward(
    ctx: Any, input: Tensor, stats: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, activation: int
) -> None:
    """What the backward reads: without an activation no residual, and a bias only for its dtype where there is no weight. A None
    saved costs as much as a tensor [0.7 us]."""
    if activation != 0 or weight is None:
        ctx.save_for_backward(input, stats, weight, bias, residual if activation != 0 else None)
    else:
        ctx.save_for_backward(input, stats, weight)


def _graph_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """batch_norm_train_ for graphs: the ops that write are apart from those that compute."""
    given = (None, None) if training else (running_mean, running_var)
    output, stats = _forward.overload(input, residual, weight, bias, *given, eps, activation)
    if training:
        update_running(input, stats, running_mean, running_var, num_batches_tracked, momentum)
    return output, stats


_ALL_BUT_RESIDUAL = 0b1101  # gradients; what the kernel gives in the place of the residual's is not looked at


# running_mean, running_var, num_batches_tracked, training, momentum, eps, activation: in one argument, since autograd handles every
# argument of a function [2 us a step].
_Arguments = tuple[Tensor | None, Tensor | None, Tensor | None, bool, float, float, int]


class _BatchNorm(torch.autograd.Function):
    """In training running statistics, if there are any, are updated; otherwise they are used."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        arguments: _Arguments,
    ) -> Tensor:
        mean, var, batches, training, momentum, eps, activation = arguments
        ctx.arguments = training, eps, activation
        if is_dynamo_compiling():
            output, stats = _graph_forward(input, residual, weight, bias, *arguments)
        elif training:
            output, stats = _train(input, residual, weight, bias, mean, var, batches, momentum, eps, activation)
        else:
            output, stats = _forward.direct(input, residual, weight, bias, mean, var, eps, activation)
        _save_for_backward(ctx, input, stats, residual, weight, bias, activation)
        result: Tensor = output
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Any, ...]:
        needs_input, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        training, eps, activation = ctx.arguments
        saved = ctx.saved_tensors
        x, stats, weight, bias, residual = saved if len(saved) == 5 else (*saved, None, None)
        # Without an activation the residual's gradient is the output's.
        kernel_residual = needs_residual and activation != 0
        needs = needs_input | kernel_residual << 1 | needs_weight << 2 | needs_bias << 3
        found: Any = (None,) * 4
        if needs:
            if is_grad_enabled() or compiling_or_transformed():
                fixed = (None, None) if training else (stats[0], stats[2])
                found = _library.gradients(
                    _backward,
                    reference,
                    needs,
                    (grad_output,),
                    stats,
                    (x, residual, weight, bias),
                    (int(not training), activation),
                    (*fixed, eps, activation),
                )
            else:
                try:
                    found = _backward.direct(grad_output, x, stats, residual, weight, bias, int(not training), activation, needs)
                except MemoryError:
                    raise _library.out_of_memory(grad_output) from None
                if needs != _ALL_BUT_RESIDUAL:
                    found = _library.present(found, needs)
        grad_residual = found[1] if kernel_residual else (grad_output if needs_residual else None)
        return found[0], grad_residual, found[2], found[3], None


_apply = _library.direct_apply(_BatchNorm)


def _setup_export(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, residual, weight, bias, running_mean, _, eps, activation = inputs
    ctx.arguments = running_mean is None, eps, activation
    ctx.mark_non_differentiable(output[1])
    _save_for_backward(ctx, input, output[1], residual, weight, bias, activation)


_library.register_autograd("batch_norm_export", _BatchNorm, _setup_export)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Normalises every channel over the batch and all positions; a drop-in for :func:`torch.nn.functional.batch_norm`.

    Computes ``output = activation(norm(input) * weight + bias + residual)`` in float32 (float64 for float64 input), rounded once.

    Args:
        input: ``[N, C, *]``, float32, float64, float16 or bfloat16, any strides; channels-last is computed as it lies.
        running_mean: ``[C]`` or None. With ``training`` it becomes ``(1 - momentum) * running_mean + momentum * mean``; without,
            it is what is subtracted.
        running_var: likewise, of the unbiased variance.
        weight: ``[C]`` or None, of input's dtype, or float32 with 16-bit input; the running statistics too.
        bias: like weight; each may be given without the other. Parameters and running statistics are of one dtype.
        training: whether the statistics are those of the batch.
        momentum: the share of the batch in the running statistics.
        eps: added to the variance, so in squared units of the input.
        residual: of input's shape, dtype and device, or None.
        activation: None, "relu", "silu", "gelu" (the exact one) or "leaky_relu" (slope 0.01).

    Returns:
        A tensor of input's shape and dtype, channels-last where the input is, otherwise contiguous.

    Raises:
        What torch.nn.functional.batch_norm of the installed torch raises for the same arguments, in its words; RuntimeError
        if residual does not match input; ValueError for another activation.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015; residual and activation as in He et al., 2016.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual):
        result: Tensor = handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias, residual),
            input,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            activation=activation,
        )
        return result
    return tracked_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation, None)


def tracked_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """batch_norm() whose momentum is 1/num_batches_tracked where that is given: a cumulative average."""
    code = _channel.activation_code("batch_norm", activation) if activation is not None else 0
    if residual is not None:
        _library.check_residual("batch_norm", input, residual)
    if compiling_or_transformed():
        return _special(
            input, running_mean, running_var, weight, bias, training, momentum, eps, residual, code, num_batches_tracked
        )
    try:
        if type(momentum) is not float:  # torch's own parser says what is a number
            momentum = torch.full((), momentum, dtype=torch.float64).item()
        _check(input, running_mean, running_var, weight, bias, training, momentum, eps)
        result: Tensor
        if is_grad_enabled() and _library.any_requires_grad(input, residual, weight, bias):
            arguments = running_mean, running_var, num_batches_tracked, training, momentum, eps, code
            result = _apply(input, residual, weight, bias, arguments)
        elif training:
            if running_mean is None and running_var is None:
                result = _inference.direct(input, residual, weight, bias, None, None, eps, code)
            else:
                result = _train(
                    *(input, residual, weight, bias, running_mean, running_var, num_batches_tracked), momentum, eps, code
                )[0]
        elif weight is not None and bias is not None and residual is None and code == 0:
            result = _lean(input, weight, bias, running_mean, running_var, eps)
        else:
            result = _inference.direct(input, residual, weight, bias, running_mean, running_var, eps, code)
    except _library.REFUSALS as error:
        if _library.only_torch_knows(error, input, residual, weight, bias):
            return _as_torch(
                input, running_mean, running_var, weight, bias, training, momentum, eps, residual, code, num_batches_tracked
            )
        running = _channel.copies(running_mean, running_var)
        raise _library.torchs_error(error, F.batch_norm, input, *running, weight, bias, training, momentum, eps) from None
    return result


def _check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> None:
    """What torch refuses and the ops do not look at, before anything is written."""
    if training is not True and training is not False:
        raise TypeError(f"batch_norm: expected training to be a bool, got {training!r}")
    if _library.any_requires_grad(running_mean, running_var):
        raise RuntimeError("batch_norm: expected running statistics that do not require grad")
    if training:
        if _channel.one_value_per_channel(input):
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
    elif running_mean is None or running_var is None:
        raise RuntimeError("batch_norm: expected running_mean and running_var in evaluation")
    if eps <= 0:  # refused by some versions of torch
        running = _channel.copies(running_mean, running_var)
        theirs = _library.what_torch_raises(F.batch_norm, input, *running, weight, bias, training, momentum, eps)
        if theirs is not None:
            raise theirs


def _as_torch(*arguments: Any) -> Tensor:
    """_special's arguments to torch's function, which raises where they are wrong."""
    input, mean, var, weight, bias, training, momentum, eps, residual, activation, batches = arguments
    y = F.batch_norm(input, mean, var, weight, bias, training, _channel.share_of_batch(momentum, batches), eps)
    return _channel.activate(activation, y if residual is None else y + residual)


def _special(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: int,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """While compiling, exporting or transforming, where an op's exception cannot be caught: arguments are checked first."""
    refused = (
        not _channel.accepts(input, weight, bias, running_mean, running_var)
        or (running_mean is None) != (running_var is None)
        or (not training and running_mean is None)
        or (training and _channel.one_value_per_channel(input))
        or eps <= 0
    )
    if refused:
        return _as_torch(
            input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation, num_batches_tracked
        )
    if _library.transformed():
        dtype = _library.accumulate_dtype(input)
        fixed: tuple[Tensor | None, Tensor | None] = None, None
        if training and running_mean is not None and running_var is not None and input.numel() > 0:
            x, dims = input.detach().to(dtype), (0, *range(2, input.dim()))
            share = _channel.share_of_batch(momentum, num_batches_tracked)
            update_running_transformed(x.mean(dims), x.var(dims, unbiased=True), running_mean, running_var, share)
        elif not training and running_mean is not None and running_var is not None:
            fixed = running_mean.to(dtype), torch.rsqrt(running_var.to(dtype) + eps)
        return reference(input, residual, weight, bias, *fixed, eps, activation)
    given = (None, None) if training else (running_mean, running_var)
    result: Tensor
    if _library.is_exporting():
        result, stats = _export.overload(input, residual, weight, bias, *given, eps, activation)
        if training and input.numel() > 0:
            update_running_reference(stats[0] + stats[1], stats[3], running_mean, running_var, num_batches_tracked, momentum)
    elif _library.any_requires_grad(input, residual, weight, bias):
        arguments = running_mean, running_var, num_batches_tracked, bool(training), momentum, eps, activation
        result = _BatchNorm.apply(input, residual, weight, bias, arguments)  # type: ignore[no-untyped-call]
    else:
        result = _graph_forward(
            *(input, residual, weight, bias, running_mean, running_var, num_batches_tracked),
            *(training, momentum, eps, activation),
        )[0]
    return result


class _TrackedForward(nn.Module):
    """The forward of BatchNorm1d, 2d and 3d."""

    _dims: tuple[int, ...]

    def forward(self: Any, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (leaf := _library.traced_leaf(self, input)) is not None:
            return leaf
        if input.dim() not in self._dims:
            refused: Tensor = super().forward(input)  # raises, in torch's words
            return refused
        return module_forward(self, input)


def module_forward(module: Any, input: Tensor) -> Tensor:
    """A batch norm module's arguments to tracked_batch_norm(), as torch's modules choose them. The batch is counted before the
    call, as in torch, but not where it is refused for having one value per channel."""
    mean, var, batches = module.running_mean, module.running_var, module.num_batches_tracked
    training = module.training
    counted = training and module.track_running_stats and batches is not None
    if training and not module.track_running_stats:
        mean = var = None
    training = training or (mean is None and var is None)
    cumulative = counted and module.momentum is None
    if counted and not (training and _channel.one_value_per_channel(input)):
        batches.add_(1)
    return tracked_batch_norm(
        *(input, mean, var, module.weight, module.bias, training),
        *(0.0 if module.momentum is None else module.momentum, module.eps, None, None),
        batches if cumulative else None,
    )


class BatchNorm1d(_TrackedForward, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d`, computed by :func:`normext.batch_norm`: same arguments, buffers and state_dict.

    Input ``[N, C]`` or ``[N, C, L]``, output of the same shape and dtype. A batch of one value per channel is refused before
    anything is counted or written.
    """

    _dims = (2, 3)


class BatchNorm2d(_TrackedForward, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d`, computed by :func:`normext.batch_norm`: same arguments, buffers and state_dict.

    Input ``[N, C, H, W]``, contiguous or channels-last; output of the same shape, dtype and format.
    """

    _dims = (4,)


class BatchNorm3d(_TrackedForward, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d`, computed by :func:`normext.batch_norm`: same arguments, buffers and state_dict.

    Input ``[N, C, D, H, W]``, contiguous or channels-last; output of the same shape, dtype and format.
    """

    _dims = (5,)
