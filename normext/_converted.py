"""The classes that stand in for recognised norms: subclasses of the original whose forward is one call of ours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normext.functional import layer_norm, rms_norm


@dataclass(frozen=True)
class Recipe:
    """A call of ours that does what a module's forward does, in terms of the module's attributes."""

    op: str
    weight_offset: float
    rounding: str
    argument: str  # the name of forward's parameter: callers may pass it by keyword
    weight: str | None
    bias: str | None
    eps: str | float  # an attribute, or the constant in the module's code
    autocast: bool = False  # under CUDA autocast it follows torch's float32 policy; else autocast leaves it alone

    def __str__(self) -> str:
        if self.op == "layer_norm":
            return self.op
        offset = f"weight_offset={self.weight_offset}, " if self.weight_offset else ""
        return f"{self.op}({offset}rounding={self.rounding!r})"


class Converted(nn.Module):
    """Base of the classes that stand in for recognised ones. Made at run time, so their instances pickle by recipe."""

    _original: ClassVar[type[nn.Module]]
    _recipe: ClassVar[Recipe]
    _absent: ClassVar[None] = None  # what a recipe without weight or bias reads
    _constant_eps: ClassVar[float]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(2, protocol))
        return (_new_converted, (self._original, self._recipe), *reduced[2:])


def _new_converted(original: type[nn.Module], recipe: Recipe) -> nn.Module:
    kind = converted_class(original, recipe)
    return kind.__new__(kind)


def _forward(recipe: Recipe) -> Callable[[Any, Tensor], Tensor]:
    weight, bias = recipe.weight or "_absent", recipe.bias or "_absent"
    eps = recipe.eps if isinstance(recipe.eps, str) else "_constant_eps"
    layer, autocast = recipe.op == "layer_norm", recipe.autocast
    offset, rounding = recipe.weight_offset, recipe.rounding

    def call(norm: Any, input: Tensor) -> Tensor:
        w, e = getattr(norm, weight), getattr(norm, eps)
        shape = input.shape[-1:] if w is None else w.shape
        if layer:
            return layer_norm(input, shape, w, getattr(norm, bias), e)
        return rms_norm(input, shape, w, e, weight_offset=offset, rounding=rounding)

    def forward(self: Any, input: Tensor) -> Tensor:
        if autocast or not torch.is_autocast_enabled("cuda") or not input.is_cuda:
            return call(self, input)
        with torch.autocast("cuda", enabled=False):
            return call(self, input)

    # Callers that name the argument must still be understood.
    names = tuple(recipe.argument if name == "input" else name for name in forward.__code__.co_varnames)
    forward.__code__ = forward.__code__.replace(co_varnames=names)
    forward.__annotations__ = {}
    return forward


_classes: dict[tuple[type[nn.Module], Recipe], type[nn.Module]] = {}


def converted_class(original: type[nn.Module], recipe: Recipe) -> type[nn.Module]:
    """A subclass of `original` whose forward is the recipe. One per pair, so converted modules share their type."""
    return _classes.get((original, recipe)) or _classes.setdefault((original, recipe), _new_class(original, recipe))


def _new_class(original: type[nn.Module], recipe: Recipe) -> type[nn.Module]:
    body = {
        "__module__": __name__,
        "__doc__": f"{original.__qualname__}, computed by normext.{recipe}.",
        "forward": _forward(recipe),
        "_original": original,
        "_recipe": recipe,
    }
    if isinstance(recipe.eps, float):
        body["_constant_eps"] = recipe.eps
    # The name stays: libraries look for "RMSNorm" or "LayerNorm" in it.
    return type(original.__name__, (Converted, original), body)
