"""What a model calls, for `fold_batch_norm`: `torch.fx` traces of the model and of those of its modules it cannot see into."""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear)
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d),
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_batch_norm(module: nn.Module) -> bool:
    scripted = isinstance(module, torch.jit.ScriptModule) and module.original_name in [kind.__name__ for kind in _NORMS]
    return scripted or isinstance(module, _NORMS)


class _Tracer(fx.Tracer):
    """Records the calls of leaf modules in one forward, also where the trace fails halfway."""

    proxy_buffer_attributes = True  # else an in-place update of a buffer would run

    def __init__(self, opaque: set[nn.Module]) -> None:
        super().__init__()
        self.opaque = opaque
        self.calls: dict[fx.Node, nn.Module] = {}
        self.read: set[int] = set()  # ids of tensors that code took from a module
        self.complete = True  # False: what follows in the forward is not known
        self.failed: nn.Module | None = None  # the innermost module whose forward could not be traced

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            m in self.opaque
            or isinstance(m, (*LAYERS, *_NORMS, torch.jit.ScriptModule))
            or type(m).__module__.startswith("normext.")
            or is_altered(m)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaf = self.is_leaf_module(m, "")
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None and not leaf:
                self.failed = m
            raise
        if leaf:
            self.calls[result.node] = m
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, Tensor):
            self.read.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def is_altered(module: nn.Module) -> bool:
    """Whether calling the module does more, or something else, than the forward of its class."""
    return "forward" in vars(module) or any(vars(module).get(hooks) for hooks in _HOOKS)


def trace_all(model: nn.Module, example: Any) -> tuple[list[_Tracer], dict[nn.Module, str]]:
    """Traces the model and, one by one, what is a leaf or untraceable. Also: why the code that holds a module failed."""
    traces: list[_Tracer] = []
    errors: dict[nn.Module, str] = {}
    opaque: set[nn.Module] = set()
    done: set[nn.Module] = set()
    pending = [model]
    with _unchanged(model):
        while pending:
            root = pending.pop(0)
            if root in done or is_batch_norm(root) or not any(is_batch_norm(m) for m in root.modules()):
                continue
            done.add(root)
            error = _trace(root, example if root is model else None, opaque, traces)
            if error is not None:
                errors.update(dict.fromkeys(root.modules(), error))
                pending.extend(root.children())
            pending.extend(m for trace in traces for m in trace.calls.values())
    return traces, errors


def _trace(root: nn.Module, example: Any, opaque: set[nn.Module], traces: list[_Tracer]) -> str | None:
    """Appends traces of the root's forward, one for each way to call it. Returns why it cannot be traced."""
    if isinstance(root, torch.jit.ScriptModule) or "forward" in vars(root):
        return f"the forward of a {type(root).__name__} is not that of its class"
    try:
        for fixed in _fixed_arguments(root, example):
            _record(root, fixed, opaque, traces)
    except Exception as error:  # foreign code ran, on proxies
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def _record(root: nn.Module, fixed: dict[str, Any], opaque: set[nn.Module], traces: list[_Tracer]) -> None:
    """Appends one trace. Submodules in which it fails become opaque; where the root's own code fails, so does this."""
    while True:
        tracer = _Tracer(opaque)
        try:
            tracer.trace(root, fixed or None)
        except Exception:
            if tracer.failed is not None and tracer.failed not in opaque:
                opaque.add(tracer.failed)
                continue
            tracer.complete = False
            traces.append(tracer)  # what it called before is known all the same
            raise
        traces.append(tracer)
        return


def _fixed_arguments(root: nn.Module, example: Any) -> list[dict[str, Any]]:
    """What not to replace by proxies, for each trace: as in the example, or all defaults and then all but one of them."""
    signature = inspect.signature(type(root).forward)
    values = {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}
    if example is None:
        return [values, *({name: value for name, value in values.items() if name != free} for free in values)]
    args, kwargs = arguments(example)
    values.update(signature.bind(root, *args, **kwargs).arguments)
    return [{name: v for name, v in values.items() if not any(isinstance(leaf, Tensor) for leaf in leaves(v))}]


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undoes what forwards on proxies leave behind: attributes set on modules, and the state of the CPU generator."""
    saved = [(m, dict(vars(m))) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, attributes in saved:
            vars(module).clear()
            vars(module).update(attributes)


def arguments(example: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(example, Mapping):
        return (), example
    return (example, {}) if isinstance(example, tuple | list) else ((example,), {})


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from leaves(item)
    else:
        yield value
