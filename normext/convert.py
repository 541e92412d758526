"""`normext.convert`: swaps the norms of an existing model for ours, in place, by changing their class alone."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from normext._converted import Converted, Recipe, converted_class
from normext._recognise import Unrecognised, configuration, recognise
from normext.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from normext.group_norm import GroupNorm
from normext.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from normext.layer_norm import LayerNorm
from normext.rms_norm import RMSNorm
from normext.sync_batch_norm import SyncBatchNorm

# Each torch class, what replaces it, and the function that calls.
_TORCH_CLASSES: dict[type[nn.Module], tuple[type[nn.Module], str]] = {
    nn.LayerNorm: (LayerNorm, "layer_norm"),
    nn.RMSNorm: (RMSNorm, "rms_norm(rounding='torch')"),
    nn.BatchNorm1d: (BatchNorm1d, "batch_norm"),
    nn.BatchNorm2d: (BatchNorm2d, "batch_norm"),
    nn.BatchNorm3d: (BatchNorm3d, "batch_norm"),
    nn.SyncBatchNorm: (SyncBatchNorm, "batch_norm"),
    nn.GroupNorm: (GroupNorm, "group_norm"),
    nn.InstanceNorm1d: (InstanceNorm1d, "instance_norm"),
    nn.InstanceNorm2d: (InstanceNorm2d, "instance_norm"),
    nn.InstanceNorm3d: (InstanceNorm3d, "instance_norm"),
}
_OURS: tuple[type[nn.Module], ...] = (*(ours for ours, _ in _TORCH_CLASSES.values()), Converted)
# transformers, and model code that it downloads: subclasses of LayerNorm and RMSNorm are tried like their other norms.
_HUGGING_FACE = ("transformers.", "transformers_modules.")
_ROW_NORMS = (nn.LayerNorm, nn.RMSNorm)
# Norms of other kinds, which convert leaves alone and does not list.
_OTHER_KINDS = (nn.LocalResponseNorm, nn.CrossMapLRN2d)


@dataclass(frozen=True)
class Swapped:
    """A module that convert changed: where it is, the class it had, and the function it calls now."""

    name: str
    kind: str
    now: str


@dataclass(frozen=True)
class Refused:
    """A module that looks like a norm and was left alone, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `convert` did. `str(report)` is a summary for people.

    swapped: the modules changed by this call, in the model's order.
    refused: the norms left as they were, each with the reason.
    never_called: the names of converted norms (by this call or an earlier one) that the example forward did not run,
        for instance because the model computes them elsewhere; None if no example was given.
    """

    swapped: tuple[Swapped, ...]
    refused: tuple[Refused, ...]
    never_called: tuple[str, ...] | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} norms swapped, {len(self.refused)} refused"]
        groups: dict[tuple[str, str, str], list[str]] = {}
        for s in self.swapped:
            groups.setdefault(("swapped", s.kind, f"now normext.{s.now}"), []).append(s.name)
        for r in self.refused:
            groups.setdefault(("refused", r.kind, r.reason), []).append(r.name)
        for (what, kind, text), names in groups.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  {what} {kind} at {names[0] or 'the root'}{more}: {text}")
        if self.never_called:
            names = [name or "the root" for name in self.never_called]
            lines.append(f"  never called by the example: {', '.join(names)}")
        return "\n".join(lines)


def convert(model: nn.Module, example: Any = None) -> Report:
    """Makes the norms of a model compute with normext, in place. Prints nothing.

    Only the class of a module changes: parameters and their tying, buffers, hooks, the training mode, optimizers that
    hold the parameters and the state_dict stay as they are. Swapped are modules whose type is exactly the LayerNorm,
    RMSNorm, BatchNorm1d/2d/3d, SyncBatchNorm, GroupNorm or InstanceNorm1d/2d/3d of `torch.nn`, and modules of other
    classes with "norm" in their name, as in Hugging Face `transformers`, that are found to compute `rms_norm` (with some
    rounding and weight_offset) or `layer_norm`: the same dtype and bits as the plain torch formula in float32, bfloat16,
    float16 and the mixes of float32 and bfloat16, at three scales and with NaN. Their new class is a subclass of their own,
    so isinstance, pickle and deepcopy go on to work. What such a module reads of its attributes is taken as it is now: later
    changes have no effect but in weight, bias and epsilon. In float64 ours computes in float64, where such classes often
    compute in float32.

    Refused, with a reason in the report: subclasses of the torch classes, parametrised and scripted modules, modules
    whose forward was replaced on the instance by anything but accelerate's hooks, and norms that compute something
    else. Converting again changes nothing more.

    Args:
        model: any module, a norm itself included.
        example: if given, the model is run on it once, without gradients and in its present mode, to find converted
            norms that never run: a mapping is passed as keyword arguments, a tuple or list as positional ones, anything
            else as the one argument. (In training mode such a run updates running statistics, as any forward does. If
            it raises, the exception passes through; the model is converted all the same.)

    Returns:
        A `Report`.
    """
    swapped: list[Swapped] = []
    refused: list[Refused] = []
    known: dict[object, Recipe | str] = {}
    for name, module in model.named_modules():
        if not _looks_like_norm(module):
            continue
        kind = _kind(module)
        try:
            new_class, now = _replacement(module, known)
            _swap(module, new_class)
        except Unrecognised as reason:
            refused.append(Refused(name, kind, str(reason)))
        else:
            swapped.append(Swapped(name, kind, now))
    never_called = None if example is None else _never_called(model, example)
    return Report(tuple(swapped), tuple(refused), never_called)


def _kind(module: nn.Module) -> str:
    kind = type(module)
    scripted = f" of {module.original_name}" if isinstance(module, torch.jit.ScriptModule) else ""
    return f"{kind.__module__}.{kind.__qualname__}{scripted}"


def _looks_like_norm(module: nn.Module) -> bool:
    if isinstance(module, _OURS + _OTHER_KINDS):
        return False
    if isinstance(module, tuple(_TORCH_CLASSES)):
        return True
    name = module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__
    # A norm that contains modules is converted through them.
    return name in ("LayerNorm", "RMSNorm") or ("norm" in name.lower() and next(module.children(), None) is None)


def _replacement(module: nn.Module, known: dict[object, Recipe | str]) -> tuple[type[nn.Module], str]:
    """The class the module shall have, and the function that class calls. Raises Unrecognised."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise Unrecognised("scripted: its forward is compiled code; convert the model before scripting it")
    if parametrize.is_parametrized(module):
        raise Unrecognised("parametrised: remove the parametrisation first")
    if kind in _TORCH_CLASSES:
        return _TORCH_CLASSES[kind]
    tried = isinstance(module, _ROW_NORMS) and kind.__module__.startswith(_HUGGING_FACE)
    if isinstance(module, tuple(_TORCH_CLASSES)) and not tried:
        raise Unrecognised("a subclass of the torch class, which may be meant to do something else")
    if isinstance(module, LazyModuleMixin):
        raise Unrecognised("lazy: run the model once, so that its parameters exist")
    try:
        key = configuration(module)
    except Exception as error:
        raise Unrecognised(f"could not be looked at: {error!r}") from error
    if key not in known:
        try:
            known[key] = recognise(module)
        except Unrecognised as reason:
            known[key] = str(reason)
        except Exception as error:  # foreign code ran: whatever went wrong, the module stays as it is
            known[key] = f"could not be tried out: {error!r}"
    recipe = known[key]
    if isinstance(recipe, str):
        raise Unrecognised(recipe)
    return converted_class(kind, recipe), str(recipe)


def _swap(module: nn.Module, new_class: type[nn.Module]) -> None:
    """Changes the class, and rebinds the forwards that are stored on the instance."""
    original = type(module).forward
    bound = {name for name in ("forward", "_old_forward") if _is_bound(module.__dict__.get(name), module, original)}
    stored = {name for name in ("forward", "_old_forward") if name in module.__dict__}
    # accelerate keeps the original in _old_forward, and in forward a partial that calls it.
    if "_old_forward" in bound and _is_accelerate_hook(module):
        stored.discard("forward")
    if stored - bound:
        raise Unrecognised("its forward was replaced on the instance")
    try:
        module.__class__ = new_class
    except TypeError as error:
        raise Unrecognised(f"its class cannot be changed: {error}") from error
    for name in bound:
        module.__dict__[name] = new_class.forward.__get__(module)


def _is_bound(function: object, module: nn.Module, original: object) -> bool:
    return getattr(function, "__self__", None) is module and getattr(function, "__func__", None) is original


def _is_accelerate_hook(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return "_hf_hook" in module.__dict__ and isinstance(forward, functools.partial) and forward.args == (module,)


def _never_called(model: nn.Module, example: Any) -> tuple[str, ...]:
    norms: dict[str, nn.Module] = {name: module for name, module in model.named_modules() if isinstance(module, _OURS)}
    with _recorded(norms) as called, torch.no_grad():
        if isinstance(example, Mapping):
            model(**example)
        elif isinstance(example, tuple | list):
            model(*example)
        else:
            model(example)
    return tuple(name for name in norms if name not in called)


@contextmanager
def _recorded(norms: dict[str, nn.Module]) -> Iterator[set[str]]:
    """Collects the names of the norms whose forward runs. Not by hooks, which turn torch's fused encoder layer off."""
    called: set[str] = set()
    saved: list[tuple[nn.Module, str, Any]] = []

    def record(name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        called.add(name)
        return forward(*args, **kwargs)

    try:
        for name, module in norms.items():
            slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
            saved.append((module, slot, module.__dict__.get(slot)))
            module.__dict__[slot] = functools.partial(record, name, getattr(module, slot))
        yield called
    finally:
        for module, slot, forward in saved:
            if forward is None:
                del module.__dict__[slot]
            else:
                module.__dict__[slot] = forward
