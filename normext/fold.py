"""`normext.fold_batch_norm`: makes a convolution or Linear and the BatchNorm behind it one layer, for deployment."""

import copy
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normext._fold_trace import LAYERS, TRANSPOSED, arguments, is_altered, is_batch_norm, leaves, trace_all
from normext.convert import Refused

_STATE = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
# Of float64 sums, relative to the sum of the magnitudes. Anything but an affine layer and norm misses it by far.
_EXACT = 1e-12


@dataclass(frozen=True)
class Folded:
    """A pair that is one layer now: where the layer is, where the norm was, and how exact the folded parameters are.

    error: the largest difference from layer + norm on a random batch, both computed in float64, as a fraction of the
        sum of the magnitudes that make up the output: the rounding of the parameters, about eps / 2 of their dtype.
    """

    layer: str
    norm: str
    error: float


@dataclass(frozen=True)
class FoldReport:
    """What `fold_batch_norm` did. `str(report)` is a summary for people.

    folded: the pairs folded by this call, in the model's order.
    refused: the batch norms left as they were, each with the reason.
    error: the largest change of an output of the whole model on the example inputs, relative to that output's largest
        element, computed as the model computes; None if no example was given.
    """

    folded: tuple[Folded, ...]
    refused: tuple[Refused, ...]
    error: float | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} batch norms folded, {len(self.refused)} refused"]
        lines += [f"  folded {f.norm} into {f.layer} (error {f.error:.1e})" for f in self.folded]
        lines += [f"  refused {r.kind} at {r.name or 'the root'}: {r.reason}" for r in self.refused]
        if self.error is not None:
            lines.append(f"  the model's output on the example changed by {self.error:.1e}")
        return "\n".join(lines)


class _Unfoldable(Exception):
    """Why a batch norm stays."""


def fold_batch_norm(model: nn.Module, example: Any = None) -> FoldReport:
    """Folds every BatchNorm that follows a convolution or Linear into that layer, in place. For models in eval mode.

    With scale = weight / sqrt(running_var + eps) the layer's weight becomes weight * scale per output channel, its bias
    (bias - running_mean) * scale + norm.bias, made where there was none; `nn.Identity` takes the norm's place (Jacob et
    al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section
    3.2). Computed in float64 and rounded to the dtype of the layer's weight; device, memory format and requires_grad
    stay. Layers are Conv1d/2d/3d and ConvTranspose1d/2d/3d, in any configuration, and Linear; norms are BatchNorm1d/2d/3d
    and SyncBatchNorm; of torch or subclasses, ours included. Folding again changes nothing more. The layers get new
    `nn.Parameter`s, which no optimizer holds yet. Fold before compiling, scripting or quantising the model.

    What the model calls is found with `torch.fx`. A submodule that cannot be traced is a leaf of its parent's graph, and
    its children are traced by themselves, down to an `nn.Sequential`. What code that cannot be traced does besides calling
    such children as a whole, for instance walk through one and keep an intermediate result, only an example can
    tell. With an example the model is taken to be called like that later on, with the same arguments and the same values
    of those that hold no tensor; without one, each argument with a default may be given or not.

    Refused, with a reason in the report: a layer whose output anything but the norm uses, a norm whose input is not the
    output of a layer, modules that are called more than once, shared, hooked, parametrised, scripted, lazy or with state
    of their own, tied parameters and such that other code uses, norms without running statistics, and results that the
    dtype cannot hold. Linear + BatchNorm1d needs an example: of a 3-D input the norm's channels are not the
    Linear's outputs. Convolutions without an example are taken to be called with a batch dimension.

    Each pair is tried out on a random batch in float64, and the whole model on the example inputs. What does not give
    the same result stays unfolded and is reported. For the whole model "the same" is: in half the digits of the coarsest
    dtype among its parameters and outputs.

    Args:
        model: any module in eval mode.
        example: what the model is run on, without gradients, before and after: a mapping is passed as keyword
            arguments, a tuple or list as positional ones, anything else as the one argument; always a copy. If the model
            raises on it, the exception passes through and nothing has changed.

    Returns:
        A `FoldReport`.

    Raises:
        ValueError: a batch norm is in training mode, or the model returns no tensor for the example.
    """
    norms = {name: module for name, module in model.named_modules() if is_batch_norm(module)}
    for name, norm in norms.items():
        if norm.training:
            at = name or "the root"
            raise ValueError(f"fold_batch_norm: expected eval mode, got {at} in training mode: call model.eval() first")
    if not norms:
        return FoldReport((), ())
    with torch.no_grad():
        return _fold(model, norms, example)


def _fold(model: nn.Module, norms: dict[str, nn.Module], example: Any) -> FoldReport:
    before, dims = (None, {}) if example is None else _run(model, example, norms.values())
    if before == []:
        raise ValueError("fold_batch_norm: expected the model to return tensors for the example, got none")
    context = _Context(model, example, dims)
    pairs: dict[str, _Pair] = {}
    reasons: dict[str, str] = {}
    for name, norm in norms.items():
        try:
            pairs[name] = _pair(norm, context)
        except _Unfoldable as reason:
            reasons[name] = str(reason)
    for pair in pairs.values():
        pair.fold()
    error = None
    if before is not None:
        dtypes = {t.dtype for t in (*model.parameters(), *before) if t.is_floating_point()}
        limit = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0) ** 0.5
        error = _error(model, example, before)
        if not error <= limit:  # unfold everything, then try pair by pair
            for pair in pairs.values():
                pair.restore()
            error = 0.0
            for name, pair in list(pairs.items()):
                pair.fold()
                found = _error(model, example, before)
                if found <= limit:
                    error = found
                else:
                    pairs.pop(name).restore()
                    reasons[name] = f"folded it changes the model's output on the example by {found:.1e}"
    folded = tuple(Folded(p.layer_name, name, p.error) for name, p in pairs.items())
    refused = tuple(Refused(name, torch.typename(norm), reasons[name]) for name, norm in norms.items() if name in reasons)
    return FoldReport(folded, refused, error)


class _Context:
    """What must be known of the whole model to judge a pair."""

    def __init__(self, model: nn.Module, example: Any, dims: dict[nn.Module, set[int]]) -> None:
        self.dims = dims
        self.names = {module: name for name, module in model.named_modules()}
        self.owners: dict[nn.Module | None, list[tuple[nn.Module, str]]] = {}
        self.aside: set[nn.Module] = set()
        for module in self.names:
            for name, child in module._modules.items():
                self.owners.setdefault(child, []).append((module, name))
            # A list of modules, say, which would go on to call a norm that is an Identity elsewhere.
            others = (value for name, value in vars(module).items() if name != "_modules")
            self.aside.update(leaf for leaf in leaves(list(others)) if isinstance(leaf, nn.Module))
        self.uses = Counter(t.data_ptr() for module in self.names for t in _tensors(module) if _is_plain(t))
        self.traces, self.errors = trace_all(model, example)


@dataclass
class _Pair:
    layer_name: str
    layer: nn.Module
    norm: nn.Module
    place: tuple[nn.Module, str]  # the module that holds the norm, and under what name
    weight: Tensor  # folded, on the CPU
    bias: Tensor
    error: float

    def fold(self) -> None:
        self.unfolded = self.layer.weight, self.layer.bias
        _set(self.layer, self.weight, self.bias)
        setattr(*self.place, nn.Identity().train(self.norm.training))

    def restore(self) -> None:
        self.layer.weight, self.layer.bias = self.unfolded
        setattr(*self.place, self.norm)


def _pair(norm: Any, context: _Context) -> _Pair:
    """The pair that the norm belongs to, tried out. Raises _Unfoldable."""
    if isinstance(norm, torch.jit.ScriptModule):
        raise _Unfoldable("scripted: fold the model before scripting it")
    layer = _layer(norm, context)
    _check(norm, context)
    _check(layer, context)
    if norm.running_mean is None or norm.running_var is None:
        raise _Unfoldable("without running statistics it normalizes with those of the batch")
    dims = context.dims.get(norm, set())
    if isinstance(layer, nn.Linear) and not dims:
        raise _Unfoldable("after Linear its channels depend on the input's dimensions: pass an example that runs it")
    if not dims <= {layer.weight.dim()}:
        raise _Unfoldable(f"with a {max(dims)}-D input its channels are not its layer's outputs")
    try:
        weight, bias, error = _tried_out(layer, norm)
    except _Unfoldable:
        raise
    except Exception as problem:  # foreign code may have run: whatever went wrong, the pair stays as it is
        raise _Unfoldable(f"could not be tried out: {problem!r}") from problem
    return _Pair(context.names[layer], layer, norm, context.owners[norm][0], weight, bias, error)


def _layer(norm: Any, context: _Context) -> Any:
    """The layer whose only use is to feed the norm, in each trace that calls either. A trace that broke off proves nothing."""
    error = context.errors.get(norm)
    missing = f"called by code that cannot be traced ({error})" if error else "there is code that does not call it"
    indirect = "its input is not directly the output of a convolution or Linear"
    calls = [(trace, node) for trace in context.traces for node, module in trace.calls.items() if module is norm]
    if not calls:
        raise _Unfoldable(missing)
    trace, node = calls[0]
    layer = next((trace.calls.get(source) for source in node.all_input_nodes), None)
    if not isinstance(layer, LAYERS):
        raise _Unfoldable(indirect)
    proven = False
    for trace in context.traces:
        made, used = ([node for node, called in trace.calls.items() if called is m] for m in (layer, norm))
        if not made and not used:
            continue
        if len(made) > 1 or len(used) > 1:
            raise _Unfoldable(f"the {type(layer if len(made) > 1 else norm).__name__} is called more than once")
        if not used:
            raise _Unfoldable(missing)
        if used[0].all_input_nodes != made:
            raise _Unfoldable(indirect)
        if list(made[0].users) != used:
            raise _Unfoldable("the layer's output is used elsewhere, too")
        proven = proven or trace.complete
    if not proven:
        raise _Unfoldable(missing)
    return layer


def _check(module: nn.Module, context: _Context) -> None:
    """Raises _Unfoldable for a module that is not what its torch class is, or not used by the model in one place."""
    who, tensors = f"the {type(module).__name__}", _tensors(module)
    if not all(_is_plain(tensor) for tensor in tensors):
        raise _Unfoldable(f"{who} has no plain tensors: lazy, on the meta device, sparse or of a subclass")
    if parametrize.is_parametrized(module):
        raise _Unfoldable(f"{who} is parametrised: remove the parametrisation first")
    if is_altered(module):
        raise _Unfoldable(f"{who} has hooks, or a forward of its own on the instance")
    if module._modules or not {*module._parameters, *module._buffers} <= _STATE:
        raise _Unfoldable(f"{who} has more parameters, buffers or children than torch's")
    if len(context.owners.get(module, ())) != 1 or module in context.aside:
        raise _Unfoldable(f"{who} is shared: the model holds it in several places")
    if any(context.uses[tensor.data_ptr()] > 1 for tensor in tensors if tensor.numel()):
        raise _Unfoldable(f"{who} has parameters tied to another module's")
    if any(id(tensor) in trace.read for trace in context.traces for tensor in tensors):
        raise _Unfoldable(f"{who} has parameters that other code uses")


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (nn.Parameter, Tensor) and tensor.layout == torch.strided and not tensor.is_meta


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of the folded layer in float64 on the CPU, and the magnitudes of what the bias is the sum of."""

    def exact(tensor: Tensor | None, default: float = 0.0) -> Tensor:
        if tensor is None:
            return torch.full_like(mean, default)
        return tensor.detach().to("cpu", torch.float64)

    mean = norm.running_mean.to("cpu", torch.float64)
    scale = exact(norm.weight, 1.0) / (exact(norm.running_var) + norm.eps).sqrt()
    bias, shift, weight = exact(layer.bias), exact(norm.bias), exact(layer.weight)
    if isinstance(layer, TRANSPOSED):  # [in, out / groups, ...], the input channels of one group after those of another
        factor = scale.view(layer.groups, -1).repeat_interleave(weight.shape[0] // layer.groups, 0)
    else:  # [out, in / groups, ...]
        factor = scale[:, None]
    weight = weight * factor.reshape(*factor.shape, *[1] * (weight.dim() - 2))
    return weight, (bias - mean) * scale + shift, (bias.abs() + mean.abs()) * scale.abs() + shift.abs()


def _set(layer: Any, weight: Tensor, bias: Tensor) -> None:
    """Gives the layer new parameters, of the dtype and on the device of its weight."""
    old, trains = layer.weight, (layer.weight if layer.bias is None else layer.bias).requires_grad
    layer.weight = nn.Parameter(torch.empty_like(old.detach()).copy_(weight), old.requires_grad)
    layer.bias = nn.Parameter(bias.to(old.device, old.dtype), trains)


def _tried_out(layer: Any, norm: Any) -> tuple[Tensor, Tensor, float]:
    """The folded weight and bias, and their error on a random batch. Raises _Unfoldable where it is more than rounding."""
    weight, bias, magnitude = _folded(layer, norm)
    rounded = weight.to(layer.weight.dtype), bias.to(layer.weight.dtype)
    layer, norm = (copy.deepcopy(module).to("cpu", torch.float64) for module in (layer, norm))
    x = _batch(layer)
    expected = norm(layer(x))
    _set(layer, weight.abs(), magnitude)
    size = layer(x.abs()).clamp_min(torch.finfo(torch.float64).tiny)

    def error(weight: Tensor, bias: Tensor) -> float:
        _set(layer, weight, bias)
        return float(((layer(x) - expected).abs() / size).max())

    if not (found := error(weight, bias)) <= _EXACT:
        raise _Unfoldable(f"folded it computes something else on a random batch (error {found:.1e})")
    if not (found := error(*rounded)) <= max(torch.finfo(rounded[0].dtype).eps, _EXACT):
        raise _Unfoldable(f"the folded parameters do not fit {rounded[0].dtype} (error {found:.1e})")
    return *rounded, found


def _batch(layer: Any) -> Tensor:
    """A random input, as small as gives the layer an interior. Half is so large that no fused activation stays unseen."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        shape = [layer.in_features]
    else:
        padding = [0] * len(layer.stride) if isinstance(layer.padding, str) else layer.padding
        extents = zip(layer.kernel_size, layer.dilation, layer.stride, padding, strict=True)
        shape = [layer.in_channels, *(d * (k - 1) + 1 + s + 2 * p for k, d, s, p in extents)]
    x = torch.randn(4, *shape, dtype=torch.float64, generator=generator)
    x[2:] *= 1e3
    return x


def _run(model: nn.Module, example: Any, norms: Iterable[nn.Module] = ()) -> tuple[list[Tensor], dict[nn.Module, set[int]]]:
    """The outputs for the example, and with how many dimensions each of the norms was called."""
    dims: dict[nn.Module, set[int]] = {}

    def note(norm: nn.Module, args: Any, output: Tensor) -> None:
        if isinstance(output, Tensor):
            dims.setdefault(norm, set()).add(output.dim())

    args, kwargs = arguments(copy.deepcopy(example))
    with ExitStack() as hooks:
        for norm in norms:
            if not isinstance(norm, torch.jit.ScriptModule):
                hooks.enter_context(norm.register_forward_hook(note))
        return [leaf for leaf in leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)], dims


def _error(model: nn.Module, example: Any, before: list[Tensor]) -> float:
    """The largest change of an output: relative to its largest element, or for integers the share that changed."""
    try:
        after, _ = _run(model, example)
    except Exception:  # the model's code misses something about the norms
        return float("inf")
    if [t.shape for t in after] != [t.shape for t in before]:
        return float("inf")
    return max((_change(old, new) for old, new in zip(before, after, strict=True)), default=0.0)


def _change(old: Tensor, new: Tensor) -> float:
    differs = old != new
    if not differs.any():
        return 0.0
    if not old.is_floating_point():
        return float(differs.double().mean())
    old, new = old.to("cpu", torch.float64), new.to("cpu", torch.float64)
    change = (new - old)[differs.cpu()].abs().max() / old.where(old.isfinite(), 0.0).abs().max()
    return float("inf") if change.isnan() else float(change)
