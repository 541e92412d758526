"""Which of our norms a Python module computes, found by running it.

Libraries spell RMSNorm and LayerNorm in dozens of ways that differ in rounding, in `1 + weight` and in the name of
epsilon, and class names do not tell them apart. So a private copy of the module, with random parameters, is run on
several dtypes, scales and shapes, and it is recognised only if one formula below gives the same dtype and the same bits
every time, and the same gradient.
"""

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normext._converted import Recipe

# Attributes of every module, and those that replace a module's forward: none of them belongs to its configuration.
_MODULE_STATE = frozenset(nn.Module().__dict__) | {"forward", "_old_forward", "_hf_hook"}

# Epsilon is shown to be read from an attribute by changing it to this value.
_OTHER_EPS = 0.3


class Unrecognised(Exception):
    """The module is not one of our norms; the text says why."""


# ---- The formulas, in plain torch


def _rms(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _rms_rounded_last(offset: float, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y = _rms(x, eps)
    return (y if weight is None else y * (offset + weight.float())).to(x.dtype)


def _rms_rounded_first(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y = _rms(x, eps).to(x.dtype)
    return y if weight is None else weight * y


def _layer_norm_native(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _layer_norm_in_float(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    w, b = (None if p is None else p.float() for p in (weight, bias))
    return _layer_norm_native(x.float(), w, b, eps).to(x.dtype)


def _layer_norm_two_pass(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    centred = x.float() - x.float().mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


class _Formula(NamedTuple):
    op: str
    weight_offset: float
    rounding: str
    compute: Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]


_FORMULAS = (
    _Formula("rms_norm", 0.0, "torch", functools.partial(_rms_rounded_last, 0.0)),
    _Formula("rms_norm", 1.0, "torch", functools.partial(_rms_rounded_last, 1.0)),
    _Formula("rms_norm", 0.0, "llama", _rms_rounded_first),
    # Three spellings whose last float bits differ; all are LayerNorm with one rounding at the end.
    _Formula("layer_norm", 0.0, "torch", _layer_norm_native),
    _Formula("layer_norm", 0.0, "torch", _layer_norm_in_float),
    _Formula("layer_norm", 0.0, "torch", _layer_norm_two_pass),
)


class _Candidate(NamedTuple):
    formula: _Formula
    recipe: Recipe

    def compute(self, twin: "_Twin", x: Tensor, eps: float) -> Tensor:
        weight, bias = (None if name is None else twin.tensors[name] for name in (self.recipe.weight, self.recipe.bias))
        return self.formula.compute(x, weight, bias, eps)


# ---- Running a private copy


class _Twin:
    """A copy of a module that shares nothing with it: no hooks, random parameters and buffers, all on the CPU."""

    def __init__(self, module: nn.Module) -> None:
        self.argument = _only_argument(type(module))
        own = {name: value for name, value in module.__dict__.items() if name not in _MODULE_STATE}
        if any(isinstance(value, Tensor) for value in own.values()):
            raise Unrecognised("keeps a tensor that is neither a parameter nor a buffer")
        try:
            own = copy.deepcopy(own)
        except Exception as error:
            raise Unrecognised(f"its attributes cannot be copied to try it out: {error}") from error
        self.module = object.__new__(type(module))
        nn.Module.__init__(self.module)
        self.module.__dict__.update(own)
        self.floats = [name for name, value in own.items() if type(value) is float]
        for kind in ("_parameters", "_buffers"):
            self.module.__dict__[kind].update(module.__dict__[kind])
        self.tensors: dict[str, Tensor] = {name: t for name, t in self._registered() if t is not None}
        self.width = self._width(own)

    def _registered(self) -> Iterator[tuple[str, Tensor | None]]:
        return itertools.chain(self.module._parameters.items(), self.module._buffers.items())

    def _width(self, own: dict[str, Any]) -> int:
        """The row width: the length of the parameters, or, without any, a width that forward accepts."""
        shapes = {tuple(t.shape) for t in self.tensors.values()}
        if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes) or len(self.tensors) > 2:
            described = ", ".join(f"{name} {list(t.shape)}" for name, t in self.tensors.items())
            raise Unrecognised(f"expected a weight, and perhaps a bias, of one dimension, got {described}")
        if any(not t.is_floating_point() for t in self.tensors.values()):
            raise Unrecognised("has a parameter or buffer that is not floating point")
        for (width,) in shapes:
            return int(width)
        sizes = [size for value in own.values() for size in (value if isinstance(value, tuple | list) else (value,))]
        for width in [*(size for size in sizes if type(size) is int and size > 0), 64]:
            if self.run(torch.ones(2, 3, width)) is not None:
                return width
        raise Unrecognised("fails on every input it was tried with")

    def randomise(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        for store in (self.module._parameters, self.module._buffers):
            for name, old in store.items():
                if old is not None:
                    value = torch.randn(self.width, device="cpu", dtype=torch.float32, generator=generator).to(dtype)
                    self.tensors[name] = nn.Parameter(value) if isinstance(old, nn.Parameter) else value
                    store[name] = self.tensors[name]  # type: ignore[assignment]

    def run(self, x: Tensor) -> Tensor | None:
        """What forward returns, or None if it raises."""
        before, contents = dict(self.module.__dict__), self._contents()
        try:
            y = type(self.module).forward(self.module, x)
        except Exception:  # whatever a foreign forward raises, it does not compute a norm of this input
            return None
        after = self.module.__dict__
        same = before.keys() == after.keys() and all(before[name] is value for name, value in after.items())
        if not same or contents != self._contents():
            raise Unrecognised("its forward writes to its attributes")
        if not isinstance(y, Tensor):
            raise Unrecognised("does not return one tensor")
        return y

    def _contents(self) -> list[tuple[int, ...]]:
        """Which objects its lists, dicts and sets hold."""
        values = (v for name, v in self.module.__dict__.items() if name not in _MODULE_STATE)
        containers = (v for v in values if isinstance(v, list | dict | set))
        return [tuple(map(id, itertools.chain(v, v.values() if isinstance(v, dict) else ()))) for v in containers]


def _only_argument(kind: type[nn.Module]) -> str:
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    if [p.kind for p in parameters] != [inspect.Parameter.POSITIONAL_OR_KEYWORD]:
        raise Unrecognised(f"forward takes ({', '.join(p.name for p in parameters)}), a norm takes its input alone")
    return parameters[0].name


class _Case(NamedTuple):
    dtype: torch.dtype
    weight_dtype: torch.dtype
    scale: float
    leading: tuple[int, ...]
    finite: bool = True  # else values that some norms clamp or replace are among the input

    def __str__(self) -> str:
        dtype, weight = (str(d).removeprefix("torch.") for d in (self.dtype, self.weight_dtype))
        return f"{dtype} input {f'of scale {self.scale:g}' if self.finite else 'with NaN or infinities'} and {weight} parameters"


def _cases(width: int) -> list[_Case]:
    full, half, bfloat = torch.float32, torch.float16, torch.bfloat16
    rows = max(4, 256 // width)  # enough elements that no two formulas round alike by chance
    dtypes = [(full, full), (bfloat, bfloat), (half, half), (bfloat, full), (full, bfloat)]
    shapes = [(rows,), (2, rows), (1, 2, rows)]
    usual = [_Case(*pair, scale, shape) for pair in dtypes for scale in (1.0, 1e-3, 1e3) for shape in shapes]
    return [*usual, *(_Case(*pair, 1.0, (rows,), finite=False) for pair in dtypes)]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b  # raising where the formula raises is agreement
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _value(candidate: _Candidate, twin: _Twin, x: Tensor, eps: float) -> Tensor | None:
    try:
        return candidate.compute(twin, x, eps)
    except RuntimeError:  # torch's layer_norm refuses some mixes of dtypes
        return None


def _filter(twin: _Twin, candidates: list[_Candidate], eps: float) -> list[_Candidate]:
    """The candidates that equal the module, bit for bit, in every case."""
    generator = torch.Generator(device="cpu").manual_seed(1729)
    agreed = False
    for index, case in enumerate(_cases(twin.width)):
        twin.randomise(case.weight_dtype, generator)
        twin.module.training = index % 2 == 0
        shape = (*case.leading, twin.width)
        x = (torch.randn(shape, device="cpu", dtype=torch.float32, generator=generator) * case.scale).to(case.dtype)
        if not case.finite:
            x[..., 0, 0], x[..., 1, -1], x[..., 2, 0] = float("inf"), float("nan"), -float("inf")
        given = x.clone()
        y = twin.run(given)
        if not _same(given, x):
            raise Unrecognised("changes its input in place")
        survivors = [candidate for candidate in candidates if _same(y, _value(candidate, twin, x, eps))]
        if not survivors and agreed:
            raise Unrecognised(f"differs from {candidates[0].recipe} for {case}")
        if not survivors:
            return []
        candidates, agreed = survivors, True
    return candidates


def _same_gradient(twin: _Twin, candidate: _Candidate, eps: float) -> bool:
    """Whether backward agrees: a forward that detaches part of its formula has the same bits and another gradient."""
    generator = torch.Generator(device="cpu").manual_seed(1729)
    twin.randomise(torch.float32, generator)
    x, dy = (torch.randn(4, twin.width, device="cpu", dtype=torch.float32, generator=generator) for _ in range(2))
    inputs = [x.requires_grad_(), *(t for t in twin.tensors.values() if t.requires_grad)]
    with torch.enable_grad():
        y, expected = twin.run(x), candidate.compute(twin, x, eps)
        if y is None or not y.requires_grad:
            return False
        gradients, wanted = (torch.autograd.grad(out, inputs, dy, allow_unused=True) for out in (y, expected))
    return all(
        (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4))
        for a, b in zip(gradients, wanted, strict=True)
    )


def _candidates(twin: _Twin, eps: str | float) -> list[_Candidate]:
    names = list(twin.tensors)
    # A lone tensor may be the weight, or a left-over that forward ignores.
    pairs: list[tuple[str | None, str | None]] = [(first, second) for first, second in itertools.permutations(names, 2)]
    pairs = pairs or [*((name, None) for name in names), (None, None)]
    return [
        _Candidate(formula, Recipe(*formula[:3], twin.argument, weight, bias, eps))
        for formula in _FORMULAS
        for weight, bias in pairs
        if formula.op == "layer_norm" or bias is None
    ]


def recognise(module: nn.Module) -> Recipe:
    """The call of ours that equals `type(module).forward`. Raises Unrecognised. Touches neither module nor RNG."""
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        twin = _Twin(module)
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        constants = [value for value in code.co_consts if type(value) is float] if code else []
        sources: list[str | float] = [*twin.floats, *constants]
        reason = "computes no RMSNorm or LayerNorm over the last dimension that this library has"
        for eps in sources:
            try:
                recipe = _with_epsilon(twin, eps)
            except Unrecognised as near_miss:
                reason = str(near_miss)
                twin = _Twin(module)
                continue
            if recipe is not None:
                return recipe
    raise Unrecognised(reason)


def _with_epsilon(twin: _Twin, eps: str | float) -> Recipe | None:
    """The recipe that holds with epsilon in this attribute, shown for two values of it, or with this constant."""
    candidates = _candidates(twin, eps)
    if isinstance(eps, float):
        candidates, value = _filter(twin, candidates, eps), eps
    else:
        value = twin.module.__dict__[eps]
        twin.module.__dict__[eps] = _OTHER_EPS
        candidates = _filter(twin, candidates, _OTHER_EPS)
        twin.module.__dict__[eps] = value
        candidates = _filter(twin, candidates, value)
    # Without a weight the rounding orders are one and the same; the first is the plainest.
    recipe = next((c.recipe for c in candidates if _same_gradient(twin, c, value)), None)
    return recipe and replace(recipe, autocast=_follows_autocast(twin, recipe))


class _Autocast(TorchFunctionMode):
    """What CUDA autocast does to torch's own norms, where there is no GPU: their tensors are cast to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (nn.functional.layer_norm, torch.layer_norm, nn.functional.rms_norm, torch.rms_norm):
            args = [a.float() if isinstance(a, Tensor) else a for a in args]
            kwargs = {name: a.float() if isinstance(a, Tensor) else a for name, a in kwargs.items()}
        return func(*args, **kwargs)


def _follows_autocast(twin: _Twin, recipe: Recipe) -> bool:
    """Norms spelled out in arithmetic, and those that cast their result, return the same dtype with and without it."""
    generator = torch.Generator(device="cpu")
    dtypes = []
    for weight_dtype in (torch.bfloat16, torch.float32):
        twin.randomise(weight_dtype, generator)
        x = torch.ones(2, twin.width, device="cpu", dtype=torch.bfloat16)
        plain = torch.promote_types(x.dtype, weight_dtype) if recipe.rounding == "llama" else x.dtype
        with _Autocast():
            y = twin.run(x)
        dtypes.append((plain, None if y is None else y.dtype))
    if all(under == plain for plain, under in dtypes):
        return False
    if all(under == torch.float32 for _, under in dtypes):
        return True
    raise Unrecognised("returns a dtype of its own under autocast")


def configuration(module: nn.Module) -> object:
    """A key that modules share only if they compute the same: class, attributes (by value or identity), shapes."""
    plain = (int, float, str, bool, type(None))
    own = [(name, value) for name, value in module.__dict__.items() if name not in _MODULE_STATE]
    attributes = tuple((name, type(v), v if isinstance(v, plain) else id(v)) for name, v in own)
    stores = (module._parameters, module._buffers)
    shapes = tuple(tuple((name, None if t is None else t.shape) for name, t in store.items()) for store in stores)
    return type(module), attributes, shapes
