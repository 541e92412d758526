"""torch.compile, torch.export, FX, autocast and torch_function: normext under the machinery that rewrites programs."""

import io

import cases
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import normext

pytestmark = pytest.mark.python


class Block(nn.Module):
    """Every public function once, between matrix products."""

    def __init__(self, cols=32):
        super().__init__()
        self.first, self.second = nn.Linear(cols, cols), nn.Linear(cols, cols)
        self.layer, self.rms = normext.LayerNorm(cols), normext.RMSNorm(cols, eps=1e-6)
        self.cols = (cols,)

    def forward(self, x):
        hidden, residual = normext.add_layer_norm(self.first(self.layer(x)), x, self.cols, self.layer.weight, self.layer.bias)
        hidden, residual = normext.add_rms_norm(self.second(hidden), residual, self.cols, self.rms.weight)
        return self.rms(hidden) + residual


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def grads_of(module, x):
    module.zero_grad()
    x = x.detach().requires_grad_()
    output = module(x)
    output.square().sum().backward()
    return [output, x.grad, *(p.grad.clone() for _, p in sorted(module.named_parameters()))]


@pytest.mark.parametrize("case", **cases.ids(cases.VARIANTS))
def test_compiled_equals_eager(case, backend):
    """Whole graph, no breaks; forward and backward bit for bit the eager ones."""
    t = cases.make(case, backend)
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(t), case.call(t), strict=True):
        assert one.equal(other)
    for one, other in zip(cases.gradients(case, t, compiled), cases.gradients(case, t), strict=True):
        assert one.equal(other)


def test_compiled_block_with_dynamic_shapes(device):
    """One graph serves every batch size and sequence length."""
    module = Block().to(device)
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=count, fullgraph=True, dynamic=True)
    frames = set()
    for shape in ((4, 7, 32), (5, 9, 32), (2, 3, 32), (16, 2, 32)):
        x = torch.randn(shape, device=device)
        for one, other in zip(grads_of(compiled, x), grads_of(module, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
        frames.add(count.frame_count)
    assert len(frames) == 1  # all graphs, with and without gradients, come from the first shape


def test_dynamic_columns(device):
    compiled = torch.compile(lambda x: normext.rms_norm(x, x.shape[-1:]), backend="aot_eager", fullgraph=True, dynamic=True)
    for cols in (8, 12, 33):
        x = torch.randn(3, cols, device=device)
        assert compiled(x).equal(normext.rms_norm(x, (cols,)))


def test_inductor(device):
    """The default compiler, once: it plans memory from the fakes' strides."""
    module = Block().to(device)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(5, 6, 32, device=device).transpose(0, 1)
    for one, other in zip(grads_of(compiled, x), grads_of(module, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_compiled_in_place_op(device):
    """Mutations are functionalised and written back; a graph that reads the old value first is not fooled."""

    def step(x, residual, weight):
        before = x.sum()
        normext.fused_add_rms_norm_(x, residual, weight, 1e-6)
        return before + x.sum() + residual.sum()

    weight = torch.randn(24, device=device)
    x, residual = torch.randn(6, 24, device=device), torch.randn(6, 24, device=device)
    with torch.no_grad():
        eager, fused = [x.clone(), residual.clone()], [x.clone(), residual.clone()]
        expected = step(*eager, weight)
        found = torch.compile(step, backend="aot_eager", fullgraph=True)(*fused, weight)
    torch.testing.assert_close(found, expected)
    assert all(one.equal(other) for one, other in zip(fused, eager, strict=True))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "jvp"])
def test_compiled_transforms(transform, device):
    """compile(func.grad(f)) and its kin."""
    weight, x = torch.randn(6, device=device), torch.randn(4, 6, device=device)

    def loss(function, weight):
        return function(x, (6,), weight).square().sum()

    for ours, theirs in ((normext.layer_norm, F.layer_norm), (normext.rms_norm, F.rms_norm)):

        def apply(function):
            if transform == "vmap":
                return torch.vmap(lambda row: function(row, (6,), weight))(x)
            if transform == "jvp":
                return torch.func.jvp(lambda w: loss(function, w), (weight,), (weight.cos(),))[1]
            return getattr(torch.func, transform)(lambda w: loss(function, w))(weight)

        compiled = torch.compile(lambda f=ours, a=apply: a(f), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(), apply(theirs), rtol=1e-4, atol=1e-5)


def test_errors_while_compiling(device):
    """Fakes refuse what kernels refuse."""
    x = torch.randn(4, 8, device=device)
    for call in (lambda: normext.layer_norm(x, (7,)), lambda: normext.add_rms_norm(x, x[:2], (8,))):
        with pytest.raises(Exception, match=r"expected|Expected|shape"):
            torch.compile(call, backend="aot_eager", fullgraph=True)()


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_run_and_train(strict, device):
    """torch.export with a dynamic batch, saved and loaded, gives the same output and the same gradients."""
    module = Block().to(device)
    x = torch.randn(5, 32, device=device)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for rows in (5, 11):
        x = torch.randn(rows, 32, device=device)
        assert loaded(x).equal(module(x))
        for one, other in zip(grads_of(loaded, x), grads_of(module, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_exported_program_decomposes(device):
    """run_decompositions gives the inference form, with opaque normext ops inside."""
    module = Block().to(device).requires_grad_(False)
    x = torch.randn(5, 32, device=device)
    program = torch.export.export(module, (x,)).run_decompositions()
    torch.testing.assert_close(program.module()(x), module(x))
    assert any("normext" in str(node.target) for node in program.graph.nodes)


def test_symbolic_trace(device):
    """FX records calls of normext's functions, not of what is inside them."""

    def program(x, residual, weight):
        hidden, total = normext.add_rms_norm(x, residual, (8,), weight)
        return normext.layer_norm(hidden, (8,), weight) + normext.rms_norm(total, (8,), weight=weight, eps=1e-6)

    traced = torch.fx.symbolic_trace(program)
    targets = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert {normext.layer_norm, normext.rms_norm, normext.add_rms_norm} <= targets
    args = [torch.randn(3, 8, device=device), torch.randn(3, 8, device=device), torch.randn(8, device=device)]
    assert traced(*args).equal(program(*args))


def test_symbolic_trace_of_modules(device):
    """Leaves, as torch's own are; traced by itself, a module is a call of its function."""
    module = nn.Sequential(nn.Linear(8, 8), normext.LayerNorm(8), normext.RMSNorm(8, weight_offset=1.0)).to(device)
    x = torch.randn(3, 8, device=device)
    traced = torch.fx.symbolic_trace(module)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 3
    assert traced(x).equal(module(x))
    graph = torch.fx.Graph()
    for norm in module[1:]:
        norm(torch.fx.Proxy(graph.placeholder("x")))  # of no tracer that knows modules by name
        assert torch.fx.symbolic_trace(norm)(x).equal(norm(x))


def test_symbolic_trace_of_converted_modules(device):
    """What FX can trace it can trace afterwards."""
    norm = LlamaRMSNorm(8).to(device)
    assert len(normext.convert(norm).swapped) == 1
    x = torch.randn(3, 8, device=device)
    traced = torch.fx.symbolic_trace(norm)
    assert normext.rms_norm in {node.target for node in traced.graph.nodes}
    assert traced(x).equal(norm(x))


def test_tensor_subclasses(device):
    """__torch_function__ is honoured: a subclass sees the call and keeps its type."""
    seen = []

    class Tagged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(3, 8, device=device)
    tagged = x.as_subclass(Tagged)
    assert isinstance(normext.layer_norm(tagged, (8,)), Tagged) and normext.layer_norm in seen
    assert isinstance(normext.add_rms_norm(x, tagged, (8,))[0], Tagged)
    assert isinstance(normext.LayerNorm(8, device=device)(tagged), Tagged)
    assert normext.layer_norm(tagged, (8,)).as_subclass(torch.Tensor).equal(normext.layer_norm(x, (8,)))


def test_cpu_autocast_leaves_dtypes_alone(backend):
    if backend.device != "cpu":
        pytest.skip("CPU autocast")
    x, weight = torch.randn(3, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert normext.layer_norm(x, (8,), weight, weight).dtype == F.layer_norm(x, (8,), weight, weight).dtype
        assert normext.rms_norm(x, (8,), weight).dtype == F.rms_norm(x, (8,), weight).dtype
        linear = nn.Linear(8, 8)(torch.randn(3, 8))
        assert normext.LayerNorm(8)(linear).dtype == nn.LayerNorm(8)(linear).dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("grad", [False, True])
def test_cuda_autocast_as_the_installed_torch_does(dtype, grad):
    """On fake CUDA tensors, so that a machine without a GPU can check it: the dtypes of outputs and gradients."""
    if grad and not torch.cuda.is_available():
        pytest.skip("a CPU build of torch aborts where a fake CUDA tensor enters the graph, whatever the function")
    with FakeTensorMode(allow_non_fake_inputs=True), cases.cuda_autocast():
        x = torch.empty(3, 8, device="cuda", dtype=dtype, requires_grad=grad)
        weight = torch.empty(8, device="cuda", dtype=dtype, requires_grad=grad)
        pairs = [
            (normext.layer_norm(x, (8,), weight, weight), F.layer_norm(x, (8,), weight, weight)),
            (normext.rms_norm(x, (8,), weight), F.rms_norm(x, (8,), weight)),
        ]
        for ours, theirs in pairs:
            assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
            if grad:
                found = torch.autograd.grad(ours.sum(), (x, weight))
                assert [g.dtype for g in found] == [dtype, dtype]
        output, total = normext.add_layer_norm(x, x, (8,), weight, weight)
        assert output.dtype == pairs[0][1].dtype and total.dtype == dtype
        output, total = normext.add_rms_norm(x, x, (8,), weight)
        assert output.dtype == pairs[1][1].dtype and total.dtype == dtype
        assert pairs[0][1].dtype == torch.float32 or dtype == torch.float64  # autocast was on


def test_fake_cuda_tensors_compile():
    """Tracing a model for another machine's GPU needs no GPU."""
    with FakeTensorMode():
        x = torch.empty(4, 16, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(16, device="cuda", dtype=torch.bfloat16)
        for result in (normext.layer_norm(x, (16,), weight, weight), *normext.add_rms_norm(x, x, (16,), weight)):
            assert result.device.type == "cuda" and result.dtype == torch.bfloat16


def test_compiled_accuracy_at_large_means(backend):
    """Compiling does not replace the kernel by a decomposition."""
    case = cases.Case("layer_norm", rows=8, cols=1024, mean=1e5)
    t = cases.make(case, backend)
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    assert oracle.forward_error(case, t, compiled(t)[0]) <= oracle.LIMIT
    assert oracle.backward_errors(case, t, cases.gradients(case, t, compiled))["dx"] <= oracle.LIMIT
