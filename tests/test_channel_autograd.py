"""Autograd of the channel norms: every subset of gradients, every order, and everything that hooks into the graph."""

import itertools
from dataclasses import replace

import channel_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import normext

# In float64, and few enough elements for finite differences.
DOUBLE = tuple(
    replace(
        case,
        dtype=torch.float64,
        running=case.running and torch.float64,
        batch=2,
        channels=4,
        spatial=(3,) * bool(case.spatial),
        groups=2,
    )
    for case in cases.VARIANTS
    if case.layout == "contiguous"
) + tuple(
    cases.ChannelCase(op, 2, 2, (2, 2), 1, dtype=torch.float64, layout="channels_last", activation="silu") for op in cases.OPS
)
DOUBLE = tuple(dict.fromkeys(DOUBLE))
FUSED = tuple(
    cases.ChannelCase("batch_norm", 3, 6, (4, 5), residual=True, activation=activation, layout=layout)
    for activation in (None, "relu", "gelu")
    for layout in cases.BOTH
)
ONE_EACH = (*cases.SMALL, *FUSED)


def function_of(case, t):
    """The case as a function of its leaves alone, for torch's checkers and transforms. Statistics are not kept."""
    if case.training:
        t = replace(t, running_mean=None, running_var=None)

    def function(*values):
        return case.call(replace(t, **dict(zip(t.names(), values, strict=True))))

    return function


def composed(case, t):
    """The formula in elementary operations, which torch differentiates by itself to any order."""
    shape = (t.x.shape[0], case.slab_groups, case.channels // case.slab_groups, -1)
    per_channel = [-1] + [1] * (t.x.dim() - 2)
    x = t.x.reshape(shape)
    if case.training:
        axes = (0, 2, 3) if case.op == "batch_norm" else (2, 3)
        mean = x.mean(axes, keepdim=True)
        var = (x - mean).square().mean(axes, keepdim=True)
    else:
        mean, var = (b.view(1, case.channels, 1, 1) for b in (t.running_mean, t.running_var))
    y = ((x - mean) * torch.rsqrt(var + case.eps)).reshape(t.x.shape)
    y = y if t.weight is None else y * t.weight.view(per_channel)
    y = y if t.bias is None else y + t.bias.view(per_channel)
    y = y if t.residual is None else y + t.residual
    return getattr(F, case.activation)(y) if case.activation else y


def plain_of(case, t):
    return lambda *values: composed(case, replace(t, **dict(zip(t.names(), values, strict=True))))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", **cases.ids(ONE_EACH))
def test_every_subset_of_gradients(case, compiled, backend):
    """What is needed does not change what is computed, and what is not needed is None."""
    t = cases.make(case, backend)
    everything = dict(zip(t.names(), cases.gradients(case, t), strict=True))
    torch.compiler.reset()
    call = torch.compile(case.call, backend="aot_eager", fullgraph=True) if compiled else case.call
    subsets = [s for k in range(1, len(t.names()) + 1) for s in itertools.combinations(t.names(), k)]
    for wanted in subsets if not compiled else subsets[:1] + subsets[-1:]:
        s = t.requires_grad(wanted)
        call(s).backward(s.dy)
        for name in t.names():
            gradient = getattr(s, name).grad
            assert gradient.equal(everything[name]) if name in wanted else gradient is None, (wanted, name)


@pytest.mark.parametrize("weight, bias", [(True, False), (False, True)])
@pytest.mark.parametrize("op", cases.OPS)
def test_weight_and_bias_without_each_other(op, weight, bias, backend):
    """torch's group_norm cannot differentiate a bias without a weight; the gradients are those of weight one and bias zero."""
    for layout in cases.BOTH:
        both = cases.ChannelCase(op, 3, 6, (4, 5), 2, layout=layout, activation="silu")
        case = replace(both, weight=weight, bias=bias)
        t = cases.make(case, backend)
        neutral = {"weight": torch.ones_like, "bias": torch.zeros_like}
        missing = "bias" if weight else "weight"
        full = replace(t, **{missing: neutral[missing](t.weight if weight else t.bias)})
        expected = dict(zip(full.names(), cases.gradients(both, full), strict=True))
        for name, gradient in zip(t.names(), cases.gradients(case, t), strict=True):
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", **cases.ids(DOUBLE))
def test_gradcheck(case, backend):
    """First order against finite differences; nondet_tol 0 demands bitwise repeatable backwards."""
    t = cases.make(case, backend).requires_grad()
    assert torch.autograd.gradcheck(function_of(case, t), t.leaves(), nondet_tol=0.0, check_forward_ad=True)


@pytest.mark.parametrize("case", **cases.ids(DOUBLE))
def test_gradgradcheck(case, backend):
    t = cases.make(case, backend).requires_grad()
    assert torch.autograd.gradgradcheck(function_of(case, t), t.leaves(), nondet_tol=0.0)


def nth_order(function, inputs, order):
    """Repeated gradients of a scalar that mixes all outputs non-linearly."""
    output = function(*inputs)
    scalar = (output * output.detach().cos() + output.sin()).sum()
    for _ in range(order):
        grads = torch.autograd.grad(scalar, inputs, create_graph=True)
        scalar = sum((g * g).sum() for g in grads)
    return grads


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("case", **cases.ids(DOUBLE))
def test_orders_agree_with_a_composition_of_plain_ops(case, order, backend):
    t = cases.make(case, backend).requires_grad()
    ours = nth_order(function_of(case, t), t.leaves(), order)
    theirs = nth_order(plain_of(case, t), t.leaves(), order)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", **cases.ids(cases.VARIANTS))
def test_create_graph_changes_no_bit(case, dtype, backend):
    case = replace(case, dtype=dtype, running=case.running and dtype)
    t = cases.make(case, backend)
    grads = []
    for create_graph in (False, True):
        s = t.requires_grad()
        dy = t.dy.clone().requires_grad_()
        grads.append(torch.autograd.grad(case.call(s), s.leaves(), dy, create_graph=create_graph))
    for name, one, other in zip(t.names(), *grads, strict=True):
        assert one.equal(other) and other.requires_grad and one.stride() == other.stride(), name
        if name != "residual" or case.activation:  # whose gradient is dy itself
            assert not one.requires_grad, name


@pytest.mark.parametrize("case", **cases.ids(cases.VARIANTS))
def test_grad_mode_changes_no_bit(case, backend):
    """Training and inference ops give the same output and the same statistics."""
    t = cases.make(case, backend)
    recorded = t.requires_grad()
    found = case.call(recorded)
    assert found.requires_grad
    with torch.no_grad():
        silent = t.requires_grad()
        second = case.call(silent)
        assert not second.requires_grad
    with torch.inference_mode():
        inference = cases.make(case, backend)
        third = case.call(inference)
    cases.assert_same([found, found], [second, third])
    cases.assert_same(recorded.buffers(), silent.buffers())
    cases.assert_same(recorded.buffers(), inference.buffers())


@pytest.mark.parametrize("case", **cases.ids(DOUBLE))
def test_forward_mode(case, backend):
    t = cases.make(case, backend)
    tangents = {name: torch.randn_like(getattr(t, name)) for name in t.names()}
    results = []
    for function in (case.call, lambda s: composed(case, s)):
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(getattr(t, name), tangents[name]) for name in t.names()}
            results.append(forward_ad.unpack_dual(function(replace(t.fresh(), **duals))))
    ours, theirs = results
    torch.testing.assert_close(ours.primal, theirs.primal)
    torch.testing.assert_close(ours.tangent, theirs.tangent)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", **cases.ids(ONE_EACH))
def test_checkpointing(case, reentrant, backend):
    t = cases.make(case, backend)
    s = t.requires_grad()
    output = checkpoint(lambda *values: function_of(case, s)(*values), *s.leaves(), use_reentrant=reentrant)
    output.backward(s.dy)
    for leaf, expected in zip(s.leaves(), cases.gradients(case, t), strict=True):
        assert leaf.grad.equal(expected)


@pytest.mark.parametrize("case", **cases.ids(ONE_EACH))
def test_saved_tensor_hooks(case, backend):
    """Everything saved passes through the hooks, so it can be moved to the CPU or compressed."""
    t = cases.make(case, backend)
    s = t.requires_grad()
    packed = []
    with saved_tensors_hooks(lambda x: packed.append(x.shape) or x.clone(), lambda x: x):
        output = case.call(s)
    assert s.x.shape in packed
    with save_on_cpu():
        moved = case.call(s)
    for result in (output, moved):
        cases.assert_same(torch.autograd.grad(result, s.leaves(), s.dy), cases.gradients(case, t))


@pytest.mark.parametrize("case", **cases.ids(ONE_EACH))
def test_modified_saved_tensors_are_detected(case, backend):
    """What the backward reads. The residual matters to an activation only, the output not at all."""
    t = cases.make(case, backend)
    for name in t.names():
        s = t.requires_grad()
        output = case.call(s)
        with torch.no_grad():
            getattr(s, name).add_(1)
        if name == "x" and case.op == "instance_norm" and case.layout != "contiguous":
            # A contiguous copy was saved.
            cases.assert_same(torch.autograd.grad(output, s.leaves(), s.dy), cases.gradients(case, t))
        elif name in ("x", "weight") or (name == "residual" and case.activation):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.backward(s.dy)
        elif name == "residual":
            output.backward(s.dy)
            cases.assert_same([leaf.grad for leaf in s.leaves()], cases.gradients(case, t))
    s = t.requires_grad()
    output = case.call(s)
    output.detach().add_(1)  # so that output.relu_() is allowed after a norm
    cases.assert_same(torch.autograd.grad(output, s.leaves(), s.dy), cases.gradients(case, t))


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_statistics_may_change_between_forward_and_backward(op, backend):
    """Two forwards, then two backwards, as in gradient accumulation and GANs: training does not read the running statistics."""
    case = cases.ChannelCase(op, 3, 6, (4, 5), running=torch.float32)
    t = cases.make(case, backend)
    s = t.requires_grad()
    outputs = [case.call(s), case.call(s)]
    for buffer in s.buffers():
        buffer.fill_(float("nan"))
    for output in outputs:
        cases.assert_same(torch.autograd.grad(output, s.leaves(), s.dy), cases.gradients(case, t))


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_evaluation_statistics_changed_before_backward(op, backend):
    """A gradient of evaluation uses the statistics of its forward, or says that they were modified."""
    case = cases.ChannelCase(op, 3, 6, (4, 5), training=False)
    t = cases.make(case, backend)
    s = t.requires_grad()
    output = case.call(s)
    s.running_var.add_(1)
    try:
        found = torch.autograd.grad(output, s.leaves(), s.dy)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        cases.assert_same(found, cases.gradients(case, t))


def test_backward_twice_needs_retain_graph(backend):
    for case in cases.SMALL:
        s = cases.make(case, backend).requires_grad()
        output = case.call(s)
        first = torch.autograd.grad(output, s.leaves(), s.dy, retain_graph=True)
        cases.assert_same(torch.autograd.grad(output, s.leaves(), s.dy), first)
        with pytest.raises(RuntimeError, match="a second time"):
            torch.autograd.grad(output, s.leaves(), s.dy)


@pytest.mark.parametrize("op", cases.OPS)
def test_the_same_tensor_in_several_places(op, device):
    """x as residual, and one parameter as weight and bias: gradients of the uses add up, at first and second order."""
    x = torch.randn(3, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, device=device, requires_grad=True)

    def ours(x, weight):
        if op == "batch_norm":
            return normext.batch_norm(x, None, None, weight, weight, True, residual=x, activation="silu")
        if op == "group_norm":
            return normext.group_norm(x, 2, weight, weight)
        return normext.instance_norm(x, None, None, weight, weight)

    assert torch.autograd.gradcheck(ours, (x, weight), nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(ours, (x, weight), nondet_tol=0.0)


@pytest.mark.parametrize("op", cases.OPS)
def test_gradients_that_are_views_or_broadcasts(op, device):
    """sum() sends back an expanded scalar, a transposed use a transposed gradient."""
    args = {"batch_norm": (None, None, None, None, True), "group_norm": (2,), "instance_norm": ()}[op]
    for x in (torch.randn(6, 4, 5, device=device), cases.channels_last(torch.randn(3, 4, 5, 2, device=device))):
        for loss in (
            lambda y: y.sum(),
            lambda y: (y.transpose(0, 1) * torch.arange(4.0, device=device).view(-1, *[1] * (y.dim() - 1))).sum(),
            lambda y: y[:, ::2].sum(),
            lambda y: y[1:2].square().sum(),
            lambda y: y.mean((0, 2)).square().sum(),
        ):
            a, b = x.clone().requires_grad_(), x.double().contiguous().requires_grad_()
            loss(getattr(normext, op)(a, *args)).backward()
            loss(getattr(F, op)(b, *args).float()).backward()
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


def test_hooks_accumulation_and_anomaly_mode(device):
    """Tensor hooks see the gradient once; .grad accumulates; nothing writes over grad_output."""
    x = torch.randn(4, 6, 5, device=device, requires_grad=True)
    seen = []
    x.register_hook(lambda g: seen.append(g.clone()))
    dy = torch.randn(4, 6, 5, device=device)
    kept = dy.clone()
    for output in (normext.group_norm(x, 2), normext.batch_norm(x, None, None, training=True, residual=dy)):
        seen.clear()
        x.grad = None
        output.backward(dy, retain_graph=True)
        output.backward(dy)
        assert len(seen) == 2 and seen[0].equal(seen[1]) and x.grad.equal(seen[0] + seen[1]) and dy.equal(kept)
    with torch.autograd.detect_anomaly(check_nan=True):
        normext.instance_norm(x, activation="gelu").sum().backward()


def test_the_residuals_gradient_may_be_changed(device):
    """Without an activation it may share memory with the incoming gradient, never with the input's gradient."""
    x, residual = (torch.randn(4, 6, 5, device=device, requires_grad=True) for _ in range(2))
    dy = torch.randn(4, 6, 5, device=device)
    y = normext.batch_norm(x, None, None, training=True, residual=residual)
    dx, dresidual = torch.autograd.grad(y, [x, residual], dy)
    before = dx.clone()
    dresidual.add_(1)
    assert dx.equal(before)
    y = normext.batch_norm(x, None, None, training=True, residual=residual)
    y.backward(dy)
    y = normext.batch_norm(x, None, None, training=True, residual=residual)
    expected = residual.grad.clone()
    y.backward(dy)  # accumulates in place into what the first backward left
    assert residual.grad.equal(2 * expected)


def test_bad_grad_outputs_are_refused(device):
    x = torch.randn(4, 6, 5, device=device, requires_grad=True)
    for output in (normext.group_norm(x, 2), normext.batch_norm(x, None, None, training=True), normext.instance_norm(x)):
        with pytest.raises(RuntimeError):
            torch.autograd.grad(output, x, torch.ones(3, 6, 5, device=device), retain_graph=True)
        assert torch.autograd.grad(output, x, torch.ones_like(output))[0].isfinite().all()


class Stop(torch.autograd.Function):
    """Hands no gradient on."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return None


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("running", [None, torch.float32])
@pytest.mark.parametrize("op", cases.OPS)
def test_no_gradient_of_the_output_is_none_or_zero(op, running, create_graph, backend):
    """As in torch: nobody is stopped by a node behind that gives nothing."""
    case = cases.ChannelCase(op, running=None if op == "group_norm" else running)
    t = cases.make(case, backend)
    y = Stop.apply(case.call(replace(t, **{name: getattr(t, name).detach().requires_grad_() for name in t.names()})))
    y.sum().backward(create_graph=create_graph)
    leaf = t.x.detach().requires_grad_()
    Stop.apply(case.call(replace(t, x=leaf))).sum().backward()
    assert leaf.grad is None or not leaf.grad.any()
