"""torch.compile, torch.export, FX, autocast and torch_function of the channel norms, running statistics included."""

import copy
import io
from dataclasses import replace

import cases as row_cases
import channel_cases as cases
import channel_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import normext

pytestmark = pytest.mark.python


class Block(nn.Module):
    """Every channel norm once, between convolutions."""

    def __init__(self, channels=8):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.batch, self.cumulative = normext.BatchNorm2d(channels), normext.BatchNorm2d(channels, momentum=None)
        self.group = normext.GroupNorm(2, channels)
        self.instance = normext.InstanceNorm2d(channels, affine=True, track_running_stats=True)

    def forward(self, x):
        y = torch.relu(self.batch(self.first(x)))
        y = self.cumulative(y + self.group(y))
        y = self.instance(self.second(y)) + x
        return normext.group_norm(y, 4, self.group.weight, self.group.bias, activation="silu")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(module, x):
    """Output, gradients and statistics after a training step; torch.export may drop the counter that nothing reads."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    output = module(x)
    output.square().sum().backward()
    grads = [p.grad.clone() for _, p in sorted(module.named_parameters())]
    buffers = [b.clone() for name, b in sorted(module.named_buffers()) if not name.endswith("instance.num_batches_tracked")]
    return [output.detach(), x.grad, *grads, *buffers]


def close(ours, theirs, tolerance=1e-4):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_an_empty_batch_changes_no_running_statistics_in_a_graph(device):
    module = normext.BatchNorm2d(4).to(device)
    module(torch.randn(2, 4, 3, 3).to(device))
    before = module.running_mean.clone(), module.running_var.clone()
    torch.compile(module, backend="aot_eager", fullgraph=True)(torch.empty(0, 4, 3, 3, device=device))
    assert module.num_batches_tracked == 2
    assert torch.equal(module.running_mean, before[0]) and torch.equal(module.running_var, before[1])


def compiled_and_eager(device, **options):
    torch.manual_seed(2)
    module = Block().to(device)
    twin = copy.deepcopy(module)
    return torch.compile(module, fullgraph=True, **options), module, twin


@pytest.mark.parametrize("case", **cases.ids(cases.VARIANTS))
def test_compiled_equals_eager(case, backend):
    """Whole graph, no breaks; forward, backward and running statistics bit for bit the eager ones."""
    t = cases.make(case, backend)
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    one, other = t.fresh(), t.fresh()
    with torch.no_grad():
        found, expected = compiled(one), case.call(other)
    cases.assert_same([found, *one.buffers()], [expected, *other.buffers()])
    assert found.stride() == expected.stride()
    one, other = t.requires_grad(), t.requires_grad()
    found = torch.autograd.grad(compiled(one), one.leaves(), t.dy)
    expected = torch.autograd.grad(case.call(other), other.leaves(), t.dy)
    cases.assert_same([*found, *one.buffers()], [*expected, *other.buffers()])
    assert [g.stride() for g in found] == [g.stride() for g in expected]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_training_and_evaluation_with_dynamic_shapes(memory_format, device):
    """One graph per mode serves every batch and image size; the statistics follow the eager twin."""
    count = CompileCounterWithBackend("aot_eager")
    compiled, module, twin = compiled_and_eager(device, backend=count, dynamic=True)
    frames = set()
    for shape in ((4, 8, 6, 7), (5, 8, 9, 6), (2, 8, 3, 5), (13, 8, 4, 11)):
        x = torch.randn(shape, device=device).contiguous(memory_format=memory_format)
        module.train(), twin.train()
        close(step(compiled, x), step(twin, x), 1e-3)
        module.eval(), twin.eval()
        with torch.no_grad():
            close([compiled(x)], [twin(x)], 1e-3)
        frames.add(count.frame_count)
    assert len(frames) == 1, frames


def test_inductor(device):
    """The default compiler, once per mode: it plans memory from the fakes' strides."""
    compiled, module, twin = compiled_and_eager(device)
    x = torch.randn(4, 8, 6, 5, device=device).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        close(step(compiled, x), step(twin, x), 1e-3)
    module.eval(), twin.eval()
    close([compiled(x)], [twin(x)], 1e-3)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_compiled_functions_update_their_buffers(op, device):
    """Mutations are functionalised and written back, and a graph that reads the old value first is not fooled."""

    def program(x, mean, var):
        before = mean.sum()
        y = getattr(normext, op)(x, mean, var, None, None, True)
        return before, y, mean.sum()

    x = torch.randn(5, 4, 6, device=device)
    eager, traced = ([torch.zeros(4, device=device), torch.ones(4, device=device)] for _ in range(2))
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        close(compiled(x, *traced), program(x, *eager), 1e-6)
        cases.assert_same(traced, eager)


def test_compiled_and_checkpointed(device):
    """Recomputation in the backward must not count a batch twice when compiled, as it does not count less when eager."""
    from torch.utils.checkpoint import checkpoint

    norm, x = normext.GroupNorm(2, 4).to(device), torch.randn(3, 4, 5, device=device, requires_grad=True)
    compiled = torch.compile(lambda v: checkpoint(norm, v, use_reentrant=False).sin().sum(), backend="aot_eager")
    found = torch.autograd.grad(compiled(x), x)[0]
    assert found.equal(torch.autograd.grad(norm(x).sin().sum(), x)[0])


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "jvp"])
def test_compiled_transforms(transform, device):
    """compile(func.grad(f)) and its kin."""
    weight, x = torch.randn(4, device=device), torch.randn(3, 4, 5, device=device)
    tails = {"batch_norm": (None, None), "group_norm": (2,), "instance_norm": (None, None)}
    for op, tail in tails.items():
        more = () if op == "group_norm" else (True,)

        def loss(library, weight, op=op, tail=tail, more=more):
            bias = torch.zeros_like(weight)  # without one, torch's own group_norm fails
            return getattr(library, op)(x, *tail, weight, bias, *more).square().sum()

        def apply(library, loss=loss, op=op, tail=tail, more=more):
            if transform == "vmap":
                return torch.vmap(lambda v: getattr(library, op)(v[None], *tail, weight, weight, *more))(x)
            if transform == "jvp":
                return torch.func.jvp(lambda w: loss(library, w), (weight,), (weight.cos(),))[1]
            return getattr(torch.func, transform)(lambda w: loss(library, w))(weight)

        compiled = torch.compile(lambda a=apply: a(normext), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(), apply(F), rtol=1e-4, atol=1e-4)


def test_errors_while_compiling(device):
    """Fakes refuse what kernels refuse."""
    x, weight = torch.randn(4, 6, 5, device=device), torch.ones(5, device=device)
    for call in (
        lambda: normext.group_norm(x, 4),
        lambda: normext.group_norm(x, 2, weight),
        lambda: normext.batch_norm(x, None, None, weight, None, True),
        lambda: normext.batch_norm(x, None, None, training=True, residual=x[:, :5]),
        lambda: normext.batch_norm(x, None, None),
        lambda: normext.instance_norm(x[:, :, :1]),
    ):
        with pytest.raises(Exception, match=r"xpected|should contain|divi|shape|must be defined"):
            torch.compile(call, backend="aot_eager", fullgraph=True)()


def test_unknown_activations_while_compiling(device):
    x = torch.randn(4, 6, 5, device=device)
    with pytest.raises(Exception, match="activation"):
        torch.compile(lambda: normext.group_norm(x, 2, activation="tanh"), backend="aot_eager", fullgraph=True)()


@pytest.mark.parametrize("strict", [False, True])
def test_exported_evaluation(strict, device):
    """torch.export with a dynamic batch, saved and loaded, gives the same output and writes nothing."""
    module = Block().to(device).eval()
    module(torch.randn(4, 8, 6, 5, device=device))
    batch = torch.export.Dim("batch", min=2, max=64)
    example = (torch.randn(5, 8, 6, 5, device=device),)
    program = torch.export.export(module, example, dynamic_shapes=({0: batch},), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    state = {k: v.clone() for k, v in loaded.state_dict().items()}
    for images in (5, 11):
        x = torch.randn(images, 8, 6, 5, device=device)
        torch.testing.assert_close(loaded(x), module(x), rtol=1e-5, atol=1e-5)
    assert all(v.equal(state[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("strict", [False, True])
def test_exported_training_step(strict, device):
    """An exported training graph updates its buffers and gives the gradients of the eager module."""
    torch.manual_seed(2)
    module = Block().to(device)
    twin = copy.deepcopy(module)
    example = (torch.randn(5, 8, 6, 5, device=device),)
    loaded = torch.export.export(module, example, strict=strict).module()
    for _ in range(3):
        x = torch.randn(5, 8, 6, 5, device=device)
        close(step(loaded, x), step(twin, x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d"])
def test_exported_programs_are_saved_and_loaded(name, strict, device):
    """In training, where they update running statistics."""
    module = getattr(normext, name)(4, track_running_stats=True, device=device)
    x = torch.randn(3, 4, 5, device=device)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module, (x,), strict=strict), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    torch.testing.assert_close(loaded(x), module(x))
    torch.testing.assert_close(loaded.running_mean, module.running_mean)
    torch.testing.assert_close(loaded.running_var, module.running_var)
    assert not module.running_var.equal(torch.ones_like(x[0, :, 0]))


class Selected(torch.nn.Module):
    """A batch whose size is known only when the program runs."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x[torch.nonzero(x[:, 0, 0] > 0).squeeze(1)])


def test_sizes_that_only_the_run_knows(device):
    x = torch.randn(6, 4, 5, device=device)
    x[0] = 1.0
    for norm in (normext.GroupNorm(2, 4, device=device), normext.BatchNorm1d(4, device=device).eval()):
        for strict in (False, True):
            exported = torch.export.export(Selected(norm), (x,), strict=strict).module()
            torch.testing.assert_close(exported(x), Selected(norm)(x))


def test_exported_program_decomposes(device):
    """run_decompositions gives the inference form, with opaque normext ops inside."""
    module = Block().to(device).eval().requires_grad_(False)
    x = torch.randn(5, 8, 6, 5, device=device)
    program = torch.export.export(module, (x,)).run_decompositions()
    torch.testing.assert_close(program.module()(x), module(x))
    assert any("normext" in str(node.target) for node in program.graph.nodes)


def test_symbolic_trace(device):
    """FX records calls of normext's functions, not of what is inside them."""

    def program(x, residual, weight):
        y = normext.batch_norm(x, None, None, weight, None, True, residual=residual, activation="relu")
        return normext.group_norm(y, 2, weight) + normext.instance_norm(y, weight=weight)

    traced = torch.fx.symbolic_trace(program)
    targets = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert {normext.batch_norm, normext.group_norm, normext.instance_norm} <= targets
    args = [torch.randn(3, 8, 5, device=device), torch.randn(3, 8, 5, device=device), torch.randn(8, device=device)]
    assert traced(*args).equal(program(*args))
    norm = normext.GroupNorm(2, 8).to(device)  # traced by itself it is a call of its function
    assert torch.fx.symbolic_trace(norm)(args[0]).equal(norm(args[0]))


@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d", "SyncBatchNorm", "GroupNorm"])
def test_modules_are_leaves_of_a_symbolic_trace(name, device):
    """As torch's own are: what they count and keep goes on to work in the traced program."""
    norm = normext.GroupNorm(2, 4) if name == "GroupNorm" else getattr(normext, name)(4, track_running_stats=True)
    model = nn.Sequential(nn.Linear(5, 5), norm).to(device)
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(3, 4, 5, device=device)
    assert traced(x).shape == x.shape
    assert name == "GroupNorm" or model[1].running_mean.any()
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2


def test_tensor_subclasses(device):
    """__torch_function__ is honoured: a subclass sees the call and keeps its type."""
    seen = []

    class Tagged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(3, 8, 5, device=device)
    tagged = x.as_subclass(Tagged)
    assert isinstance(normext.group_norm(tagged, 2), Tagged) and normext.group_norm in seen
    assert isinstance(normext.batch_norm(x, None, None, training=True, residual=tagged), Tagged) and normext.batch_norm in seen
    assert isinstance(normext.instance_norm(tagged), Tagged) and normext.instance_norm in seen
    assert isinstance(normext.BatchNorm1d(8).to(device)(tagged), Tagged)


def fake_cuda(dtype, **more):
    return torch.empty(3, 8, 4, 4, device="cuda", dtype=dtype, **more)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_cuda_autocast_as_the_installed_torch_does(dtype):
    """On fake CUDA tensors, so that a machine without a GPU can check it. Only group_norm is on torch's float32 list."""
    with FakeTensorMode(allow_non_fake_inputs=True), row_cases.cuda_autocast():
        x, weight = fake_cuda(dtype), torch.empty(8, device="cuda", dtype=dtype)
        ours, theirs = normext.group_norm(x, 2, weight, weight), F.group_norm(x, 2, weight, weight)
        assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
        assert ours.dtype == torch.float32 or dtype == torch.float64  # autocast was on
        for op in ("batch_norm", "instance_norm"):
            args = (x, None, None, weight, weight, True)
            assert getattr(normext, op)(*args).dtype == getattr(F, op)(*args).dtype == dtype


def test_cpu_autocast_leaves_the_dtype(device):
    if device != "cpu":
        pytest.skip("of the CPU")
    x = torch.randn(3, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            for ours, theirs in (
                (normext.group_norm(x.to(dtype), 2), F.group_norm(x.to(dtype), 2)),
                (
                    normext.batch_norm(x.to(dtype), None, None, None, None, True),
                    F.batch_norm(x.to(dtype), None, None, None, None, True),
                ),
                (normext.instance_norm(x.to(dtype)), F.instance_norm(x.to(dtype))),
            ):
                assert ours.dtype == theirs.dtype


def test_fake_cuda_tensors_compile():
    """Tracing a model for another machine's GPU needs no GPU."""
    with FakeTensorMode():
        x = fake_cuda(torch.bfloat16, memory_format=torch.channels_last)
        weight, mean = torch.empty(8, device="cuda", dtype=torch.bfloat16), torch.empty(8, device="cuda", dtype=torch.bfloat16)
        for result in (
            normext.group_norm(x, 2, weight, weight),
            normext.batch_norm(x, mean, mean.clone(), weight, weight, True, residual=x, activation="relu"),
            normext.batch_norm(x, mean, mean.clone(), weight, weight),
            normext.instance_norm(fake_cuda(torch.bfloat16), weight=weight),  # without a GPU, a fake cannot change its format
        ):
            assert result.device.type == "cuda" and result.dtype == torch.bfloat16


def test_compiled_accuracy_at_large_means(backend):
    """Compiling does not replace the kernel by a decomposition."""
    for op in cases.OPS:
        case = cases.ChannelCase(op, 4, 8, (16, 16), 2, mean=1e5, running=None if op == "group_norm" else torch.float32)
        t = cases.make(case, backend)
        compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
        after = t.fresh()
        assert oracle.forward_error(case, t, compiled(after)) <= oracle.LIMIT
        assert not case.running or max(oracle.running_errors(case, t, after).values()) <= oracle.LIMIT
        assert oracle.backward_errors(case, t, cases.gradients(case, t, compiled))["dx"] <= oracle.LIMIT


def test_strides_of_compiled_results(device):
    """A graph that views the result after a compiled norm relies on the strides that the fake promised."""
    x = torch.randn(3, 8, 4, 5, device=device)
    for layout in cases.LAYOUTS.values():
        given = layout(x)
        for call in (
            lambda v: normext.batch_norm(v, None, None, training=True),
            lambda v: normext.group_norm(v, 2),
            lambda v: normext.instance_norm(v, activation="relu"),
        ):
            compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
            assert compiled(given).stride() == call(given).stride(), layout


def test_replaced_cases_are_not_cached(backend):
    """The same function with another activation, momentum or mode compiles anew and gives its own result."""
    case = cases.ChannelCase("batch_norm", 3, 6, (4, 5), running=torch.float32)
    t = cases.make(case, backend)
    compiled = torch.compile(lambda c, s: c.call(s), backend="aot_eager", fullgraph=True)
    for other in (case, replace(case, activation="gelu"), replace(case, momentum=0.5), replace(case, training=False)):
        one, two = t.fresh(), t.fresh()
        cases.assert_same([compiled(other, one), *one.buffers()], [other.call(two), *two.buffers()], other.id)
