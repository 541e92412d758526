"""What every norm shares: loading the ops, the state of torch that decides how a call is carried out, gradients of any order,
refusals in torch's words, and what fakes check. The only file that uses private names of torch."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad
from torch.fx import Tracer

BACKEND = "_C_emulated" if os.environ.get("NORMEXT_BACKEND", "") == "emulated" else "_C"

is_compiling = torch.compiler.is_compiling
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
is_exporting = torch.compiler.is_exporting
is_grad_enabled = torch.is_grad_enabled
_compiler = torch.compiler
_functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

# torch casts rms_norm to float32 under CUDA autocast from 2.12 on.
AUTOCASTS_RMS_NORM: bool = torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")

ROUNDINGS = {"torch": 0, "llama": 1}
_NARROW = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, torch.float64, *_NARROW)


def _load() -> Any:
    """Imports the compiled module, which registers the ops."""
    loaded = {"_C", "_C_emulated"} & {name.removeprefix("normext.") for name in sys.modules}
    if loaded - {BACKEND}:
        raise ImportError(
            f"normext.{loaded.pop()} is loaded already, and both back ends register the same ops: "
            "one process runs one, chosen by NORMEXT_BACKEND before the first import"
        )
    try:
        return importlib.import_module(f"normext.{BACKEND}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"normext.{BACKEND} is not built: run `pip install .` (or `make develop`) in the source tree, and import "
            "normext from elsewhere or from an editable install"
        ) from error


C = _load()


class Op(NamedTuple):
    """An op as Dynamo must see it, and the same without the Python frame of OpOverload.__call__ [0.15 us]."""

    overload: Any
    direct: Any

    @staticmethod
    def named(name: str) -> "Op":
        overload = getattr(torch.ops.normext, name).default
        return Op(overload, overload._op)


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Function.apply without its Python part, which serves setup_context and functorch [1.2 us]; and makes the engine call
    backward without the Python frames that look for it [0.5 us]."""
    function._backward_cls.apply = function.backward  # type: ignore[attr-defined]
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def transformed() -> bool:
    """A functorch transform or a forward-mode AD level is active: only plain torch ops know what to do."""
    return _functorch_active() or forward_ad._current_level >= 0


def compiling_or_transformed() -> bool:
    """transformed() or is_compiling(), as cheaply as can be asked [0.1 us]: every call of a norm asks."""
    return is_dynamo_compiling() or _compiler._is_compiling_flag or _functorch_active() or forward_ad._current_level >= 0


def traced_leaf(module: torch.nn.Module, input: Any) -> Tensor | None:
    """For symbolic tracing, which gives forward a Proxy and in which torch's own modules are leaves: the call of the module; None
    where the module is what is traced, or where no tracer knows its name."""
    tracer: Any = input.tracer
    if not isinstance(tracer, Tracer) or tracer.root is module:
        return None
    call: Any = tracer.create_proxy("call_module", tracer.path_of_module(module), (input,), {})
    return cast(Tensor, call)


def surely(condition: Any) -> bool:
    """A condition on sizes; False where, while compiling or exporting, a size is known only when the program runs."""
    if not is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy [0.3 s]

    return guard_or_false(condition)


def any_requires_grad(*tensors: Tensor | None) -> bool:
    if is_grad_enabled():
        for tensor in tensors:  # any(...) takes a generator [0.3 us]
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def autocast_active(input: Tensor) -> bool:
    """CUDA autocast only: that of the CPU leaves norms alone."""
    return isinstance(input, Tensor) and input.is_cuda and torch.is_autocast_enabled("cuda")


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The arguments as torch's float32 cast policy makes them."""
    return tuple(
        tensor.float()
        if tensor is not None and tensor.is_cuda and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def accepts_dtypes(input: Tensor, *parameters: Tensor | None) -> bool:
    """Parameters of the input's dtype, or float32 with 16-bit input, and all alike. Not subclasses that wrap tensors, such as
    DTensor; the question is one that Dynamo answers for them, too."""
    for tensor in (input, *parameters):
        if tensor is not None and (not isinstance(tensor, Tensor) or hasattr(type(tensor), "__tensor_flatten__")):
            return False
    given = {parameter.dtype for parameter in parameters if parameter is not None}
    allowed = ({input.dtype}, {torch.float32}) if input.dtype in _NARROW else ({input.dtype},)
    return input.dtype in _DTYPES and (not given or given in allowed)


def accepts_shapes(input: Tensor, normalized_shape: Sequence[int], *parameters: Tensor | None) -> bool:
    if not isinstance(normalized_shape, list | tuple) or any(isinstance(size, float) for size in normalized_shape):
        return False  # (3.0,) equals (3,), and torch refuses it
    shape = tuple(normalized_shape)
    return (
        len(shape) > 0
        and input.shape[-len(shape) :] == shape
        and all(p is None or (p.shape == shape and p.device == input.device) for p in parameters)
    )


def accepts(input: Tensor, normalized_shape: Sequence[int], *parameters: Tensor | None) -> bool:
    """The kernels take these arguments. Asked before a call where an op's exception could not be caught."""
    return accepts_dtypes(input, *parameters) and accepts_shapes(input, normalized_shape, *parameters)


def normalized_ndim(input: Tensor, normalized_shape: Sequence[int]) -> int:
    """What the ops take in place of normalized_shape, where no weight of that shape tells it."""
    shape = tuple(normalized_shape)
    if not isinstance(normalized_shape, list | tuple) or any(isinstance(size, float) for size in shape):
        raise TypeError(f"expected a tuple of ints, got {shape}")
    if not shape or input.shape[-len(shape) :] != shape:
        raise RuntimeError(f"expected input of shape [*, {str(list(shape))[1:-1]}], got {list(input.shape)}")
    return len(shape)


def check_residual(op: str, input: Tensor, residual: Tensor) -> None:
    if not isinstance(input, Tensor) or not isinstance(residual, Tensor):
        raise TypeError(f"{op}: expected tensors, got {type(input).__name__} and {type(residual).__name__}")
    for name in ("dtype", "device", "layout") if input.is_nested else ("shape", "dtype", "device", "layout"):
        expected, got = getattr(input, name), getattr(residual, name)
        if expected != got:
            texts = (str(list(value)) if name == "shape" else str(value) for value in (expected, got))
            raise RuntimeError(f"{op}: expected residual of input's {name}, {', got '.join(texts)}")


# What an op or the preparation of its call raises on bad arguments. Not Exception: checkpointing, for one, stops a recomputation
# by an exception of its own.
REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, MemoryError)


def only_torch_knows(error: Exception, *tensors: Any) -> bool:
    """An op met a tensor subclass, or a nested or MKL-DNN tensor, that has rules for torch's ops alone, a DTensor for one: torch's
    norms serve it."""
    given = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if any(tensor.is_nested for tensor in given):
        return True  # its shape cannot even be asked for
    others = (tensor for tensor in given if tensor.is_mkldnn or type(tensor) not in (Tensor, torch.nn.Parameter))
    return isinstance(error, NotImplementedError) and next(others, None) is not None


def torchs_error(error: Exception, function: Callable[..., Any], *args: Any) -> Exception:
    """torch's own error for arguments an op refused, so that its class and text are those of the installed version; ours if
    torch accepts the arguments."""
    if "has no memory" in str(error):  # csrc/ops/tensor.cpp; some of torch's norms crash on such a tensor
        return error
    theirs = what_torch_raises(function, *args)
    if theirs is not None:
        return theirs
    return out_of_memory(args[0]) if isinstance(error, MemoryError) else error


def what_torch_raises(function: Callable[..., Any], *args: Any) -> Exception | None:
    try:
        with torch.no_grad():
            function(*args)
    except Exception as theirs:
        return theirs
    return None


def out_of_memory(input: Tensor) -> Exception:
    """What torch raises where it cannot allocate as much, or where a kernel of someone else has failed before."""
    theirs = what_torch_raises(torch.empty_like, input)
    if theirs is not None:
        return theirs
    text = f"normext: no memory for a result of shape {list(input.shape)} on {input.device}"
    return torch.OutOfMemoryError(text) if input.is_cuda else RuntimeError(text)


def raise_if_out_of_memory(error: Exception, input: Tensor) -> None:
    """An op without a torch namesake reports a failed allocation itself."""
    if isinstance(error, MemoryError):
        raise out_of_memory(input) from None


Gradients = tuple[Tensor | None, ...]


def gradients(
    kernel: Op,
    reference: Callable[..., Tensor],
    needs: int,
    incoming: tuple[Tensor | None, ...],
    stats: Tensor,
    primals: tuple[Tensor | None, ...],
    kernel_arguments: tuple[Any, ...],
    reference_arguments: tuple[Any, ...],
) -> Gradients:
    """Gradients of the primals (what was normalised, then the parameters), None where the bit of `needs` is 0.

    `incoming` is the gradient of the output and, from a fused op, that of the residual sum.
    The kernel's values whether or not they must be differentiable, so create_graph changes no bit; derivatives of higher
    order are the reference's. Under a transform everything is the reference's."""
    if not (is_grad_enabled() or transformed()) or is_compiling():
        if not is_dynamo_compiling():
            return _kernel_gradients(kernel.direct, needs, stats, kernel_arguments, len(incoming), *incoming, *primals)
        input, *parameters = primals
        return present(kernel.overload(*incoming, input, stats, *parameters, *kernel_arguments, needs), needs)
    # A needed parameter that was not saved is like the one before it, and no gradient depends on its value.
    primals = tuple(
        torch.zeros_like(cast(Tensor, primals[i - 1])).requires_grad_() if primal is None and needs >> i & 1 else primal
        for i, primal in enumerate(primals)
    )
    from_reference = partial(_reference_gradients, reference, needs, reference_arguments, len(incoming))
    if transformed():
        return from_reference(is_grad_enabled(), *incoming, *primals)
    from_kernel = partial(_kernel_gradients, kernel.direct, needs, stats, kernel_arguments, len(incoming))
    return cast(Gradients, _apply_again(from_kernel, from_reference, *incoming, *primals))


def _kernel_gradients(
    kernel: Callable[..., Gradients],
    needs: int,
    stats: Tensor,
    kernel_arguments: tuple[Any, ...],
    incoming: int,
    *tensors: Tensor | None,
) -> Gradients:
    """`tensors` are the incoming gradients, of which there are `incoming`, then the primals."""
    try:
        found = kernel(*tensors[: incoming + 1], stats, *tensors[incoming + 1 :], *kernel_arguments, needs)
    except MemoryError:
        raise out_of_memory(cast(Tensor, tensors[0])) from None
    return present(found, needs)


def present(found: Gradients, needs: int) -> Gradients:
    """A kernel's gradients with None for those not asked for."""
    if needs + 1 == 1 << len(found):
        return found
    return tuple([gradient if needs >> i & 1 else None for i, gradient in enumerate(found)])


def _reference_gradients(
    reference: Callable[..., Tensor],
    needs: int,
    reference_arguments: tuple[Any, ...],
    incoming: int,
    create_graph: bool,
    *tensors: Tensor | None,
) -> Gradients:
    grad_output, *grad_residual_out = tensors[:incoming]
    with torch.enable_grad():
        aliases = _aliases(tensors[incoming:])
        output = reference(*aliases, *reference_arguments)
        needed = [needs >> i & 1 for i in range(len(aliases))]
        found = _grad([output], aliases, needed, [cast(Tensor, grad_output)], create_graph)
        for grad in grad_residual_out:
            if found[0] is not None and grad is not None:
                found[0] = found[0] + grad
    return tuple(found)


def _aliases(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """New nodes of the graph in place of tensors: a path from one argument to another upstream of it is not followed."""
    return [tensor.view_as(tensor) if tensor is not None and tensor.requires_grad else tensor for tensor in tensors]


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    needs: Sequence[int],
    grad_outputs: Sequence[Tensor],
    create_graph: bool,
) -> list[Tensor | None]:
    """torch.autograd.grad with None for the inputs that need none."""
    wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need and tensor is not None]
    found = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


class _Again(torch.autograd.Function):
    """gradients() as a function that can be differentiated, any number of times."""

    @staticmethod
    def forward(
        ctx: Any,
        from_kernel: Callable[..., Gradients],
        from_reference: Callable[..., Gradients],
        *tensors: Tensor | None,
    ) -> Gradients:
        ctx.from_reference = from_reference
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return from_kernel(*tensors)

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[2:]
        create_graph = is_grad_enabled()
        with torch.enable_grad():
            aliases = _aliases(ctx.saved_tensors)
            firsts = ctx.from_reference(True, *aliases)
            # A gradient may depend on no leaf: that of the bias is the sum of an incoming gradient that needs none.
            found = zip(firsts, seconds, strict=True)
            pairs = [(first, second) for first, second in found if second is not None and first.requires_grad]
            if not pairs:
                return (None,) * len(ctx.needs_input_grad)
            outputs, grad_outputs = zip(*pairs, strict=True)
            return None, None, *_grad(outputs, aliases, needs, grad_outputs, create_graph)


_apply_again = direct_apply(_Again)


def register_fakes(**fakes: Callable[..., Any]) -> None:
    for name, fake in fakes.items():
        torch.library.register_fake(f"normext::{name}", fake)


def register_autograd(name: str, function: type[torch.autograd.Function], setup_context: Callable[..., Any]) -> None:
    """The gradient of an op whose first arguments are the function's; those that need no gradient are more than the function's."""

    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        found: tuple[Any, ...] = function.backward(ctx, *grad_outputs)
        return found + (None,) * (len(ctx.needs_input_grad) - len(found))

    torch.library.register_autograd(f"normext::{name}", backward, setup_context=setup_context)


def check_fake(
    op: str,
    input: Tensor,
    normalized_ndim: int,
    parameters: Sequence[Tensor | None],
    like_input: Sequence[Tensor | None],
) -> None:
    if not 1 <= normalized_ndim <= input.dim():
        raise RuntimeError(f"{op}: expected 1 to input.dim() normalized dimensions, got {normalized_ndim}")
    normalized_shape = input.shape[input.dim() - normalized_ndim :]
    check_fake_shapes(op, input, normalized_shape, parameters, like_input)


def check_fake_shapes(
    op: str, input: Tensor, shape: Sequence[int], parameters: Sequence[Tensor | None], like_input: Sequence[Tensor | None]
) -> None:
    """Parameters have this shape, the others the input's; all are on its device, and of dtypes that the kernels take."""
    expected = [(tensor, shape) for tensor in parameters] + [(tensor, input.shape) for tensor in like_input]
    for tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise RuntimeError(f"{op}: expected a tensor of shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != input.device:
            raise RuntimeError(f"{op}: expected all tensors on {input.device} like input, got {tensor.device}")
    if not accepts_dtypes(input, *parameters):
        raise RuntimeError(f"{op}: expected parameters of input's dtype {input.dtype}, or float32 with 16-bit input")


def check_fake_stats(op: str, stats: Tensor, expected: Tensor) -> None:
    """`expected` is stats_like() of the input."""
    if stats.shape != expected.shape or stats.dtype != expected.dtype or stats.device != expected.device:
        raise RuntimeError(
            f"{op}: expected stats of shape {list(expected.shape)}, {expected.dtype} on {expected.device}, "
            f"got {list(stats.shape)}, {stats.dtype} on {stats.device}"
        )


def contiguous_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def channels_last_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Channels-last where torch would call the tensor so, else contiguous."""
    return torch.empty_like(tensor, dtype=dtype, memory_format=suggest_memory_format(tensor))


def stats_like(input: Tensor, normalized_ndim: int, planes: int) -> Tensor:
    rows = 1
    for size in input.shape[: input.dim() - normalized_ndim]:
        rows = rows * size
    return input.new_empty((planes, rows), dtype=accumulate_dtype(input))


def accumulate_dtype(input: Tensor) -> torch.dtype:
    """The dtype in which values are summed and normalised."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def fake_gradients(needs: int, input: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
    """Contiguous gradients of the input and of what has the parameters' shapes; of shape [0] where not needed."""
    return tuple(
        contiguous_like(tensor) if tensor is not None and needs >> i & 1 else input.new_empty(0)
        for i, tensor in enumerate((input, *parameters))
    )
