"""Autograd: every subset of gradients, every order, and everything that hooks into the graph."""

import itertools
from dataclasses import replace

import cases
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import normext

NAMES = ("x", "residual", "weight", "bias")
DOUBLE = tuple(replace(case, dtype=torch.float64, rows=3, cols=5) for case in cases.VARIANTS if case.rounding == "torch")


def leaves(case, t, wanted=NAMES):
    """Fresh leaves, of which only the wanted ones need gradients."""
    given = {name: getattr(t, name) for name in NAMES if getattr(t, name) is not None}
    return replace(t, **{k: v.detach().clone().requires_grad_(k in wanted) for k, v in given.items()})


def function_of(case, t):
    """The case as a function of its leaves alone, for torch's checkers and transforms."""
    names = [name for name in NAMES if getattr(t, name) is not None]

    def function(*values):
        outputs = case.call(replace(t, **dict(zip(names, values, strict=True))))
        return outputs if len(outputs) > 1 else outputs[0]

    return function


def small(case, backend, **more):
    return cases.make(replace(case, **more), backend).requires_grad()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", **cases.ids(cases.SMALL))
def test_every_subset_of_gradients(case, compiled, backend):
    """What is needed does not change what is computed, and what is not needed is None."""
    t = cases.make(case, backend)
    names = [name for name in NAMES if getattr(t, name) is not None]
    everything = dict(zip(names, cases.gradients(case, t), strict=True))
    torch.compiler.reset()
    call = torch.compile(case.call, backend="aot_eager", fullgraph=True) if compiled else case.call
    subsets = [s for k in range(1, len(names) + 1) for s in itertools.combinations(names, k)]
    for wanted in subsets if not compiled else subsets[:3] + subsets[-2:]:
        s = leaves(case, t, wanted)
        outputs = call(s)
        torch.autograd.backward(outputs[0] if not case.fused else outputs, s.dy if not case.fused else [s.dy, s.dres])
        for name in names:
            gradient = getattr(s, name).grad
            assert gradient.equal(everything[name]) if name in wanted else gradient is None


@pytest.mark.parametrize("case", **cases.ids([c for c in cases.VARIANTS if c.fused]))
def test_either_output_alone(case, backend):
    """Gradients through the norm only and through the sum only add up to those of both."""
    t = cases.make(replace(case, dtype=torch.float64, rounding="torch"), backend)
    case = replace(case, dtype=torch.float64, rounding="torch")
    parts = [
        cases.gradients(case, replace(t, dres=torch.zeros_like(t.x))),
        cases.gradients(case, replace(t, dy=torch.zeros_like(t.dy))),
    ]
    for both, one, other in zip(cases.gradients(case, t), *parts, strict=True):
        torch.testing.assert_close(both, one + other)
    s = t.requires_grad()
    alone = torch.autograd.grad(case.call(s)[0], s.leaves(), s.dy)
    for one, other in zip(alone, parts[0], strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("case", **cases.ids(DOUBLE))
def test_gradcheck(case, backend):
    """First order against finite differences; nondet_tol 0 demands bitwise repeatable backwards."""
    t = small(case, backend)
    assert torch.autograd.gradcheck(function_of(case, t), t.leaves(), nondet_tol=0.0, check_forward_ad=True)


@pytest.mark.parametrize("case", **cases.ids(DOUBLE))
def test_gradgradcheck(case, backend):
    t = small(case, backend)
    assert torch.autograd.gradgradcheck(function_of(case, t), t.leaves(), nondet_tol=0.0)


def nth_order(function, inputs, order):
    """Repeated gradients of a scalar that mixes all outputs non-linearly."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    scalar = sum((o * o.detach().cos() + o.sin()).sum() for o in outputs)
    for _ in range(order):
        grads = torch.autograd.grad(scalar, inputs, create_graph=True)
        scalar = sum((g * g).sum() for g in grads)
    return grads


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("case", **cases.ids(DOUBLE))
def test_orders_agree_with_a_composition_of_plain_ops(case, order, backend):
    t = small(case, backend)
    names = [name for name in NAMES if getattr(t, name) is not None]

    def plain(*values):
        return composed(case, replace(t, **dict(zip(names, values, strict=True))))

    ours, theirs = nth_order(function_of(case, t), t.leaves(), order), nth_order(plain, t.leaves(), order)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * other.abs().max().item())


def composed(case, t):
    """The formula in elementary operations, which torch differentiates by itself to any order."""
    x = t.x + case.alpha * t.residual if case.fused else t.x
    centred = x - x.mean(-1, keepdim=True) if case.centred else x
    eps = cases.default_eps(case.dtype) if case.eps is None else case.eps
    output = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    if t.weight is not None:
        output = output * (t.weight + case.weight_offset)
    if t.bias is not None:
        output = output + t.bias
    return (output, x) if case.fused else output


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", **cases.ids(cases.VARIANTS))
def test_create_graph_changes_no_bit(case, dtype, backend):
    case = replace(case, dtype=dtype)
    s = small(case, backend)
    grads = []
    for create_graph in (False, True):
        outputs = case.call(s)
        grads.append(torch.autograd.grad(outputs, s.leaves(), [s.dy, s.dres][: len(outputs)], create_graph=create_graph))
    for one, other in zip(*grads, strict=True):
        assert one.equal(other) and other.requires_grad and not one.requires_grad


@pytest.mark.parametrize("case", **cases.ids(cases.VARIANTS))
def test_grad_mode_changes_no_bit(case, backend):
    """Training and inference ops give the same output."""
    t = cases.make(case, backend)
    with torch.no_grad():
        expected = case.call(t.requires_grad())
    with torch.inference_mode():
        inference = case.call(cases.make(case, backend))
    for one, two, three in zip(case.call(t.requires_grad()), expected, inference, strict=True):
        assert one.equal(two) and two.equal(three)
        assert one.requires_grad and not two.requires_grad


@pytest.mark.parametrize("case", **cases.ids(DOUBLE))
def test_forward_mode(case, backend):
    t = cases.make(case, backend)
    names = [name for name in NAMES if getattr(t, name) is not None]
    tangents = {name: torch.randn_like(getattr(t, name)) for name in names}
    results = []
    for function in (case.call, lambda s: composed(case, s)):
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(getattr(t, name), tangents[name]) for name in names}
            outputs = function(replace(t, **duals))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            results.append([forward_ad.unpack_dual(output) for output in outputs])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.primal, theirs.primal)
        torch.testing.assert_close(ours.tangent, theirs.tangent)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", **cases.ids(cases.SMALL))
def test_checkpointing(case, reentrant, backend):
    t = cases.make(case, backend)
    s = t.requires_grad()
    outputs = checkpoint(lambda *values: function_of(case, s)(*values), *s.leaves(), use_reentrant=reentrant)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [s.dy, s.dres][: len(outputs)])
    for leaf, expected in zip(s.leaves(), cases.gradients(case, t), strict=True):
        assert leaf.grad.equal(expected)


@pytest.mark.parametrize("case", **cases.ids(cases.SMALL))
def test_saved_tensor_hooks(case, backend):
    """Everything saved passes through the hooks, so it can be moved to the CPU or compressed."""
    t = cases.make(case, backend)
    s = t.requires_grad()
    packed = []
    with saved_tensors_hooks(lambda x: packed.append(x.shape) or x.clone(), lambda x: x):
        outputs = case.call(s)
    assert s.x.shape in packed
    with save_on_cpu():
        moved = case.call(s)
    for result in (outputs, moved):
        grads = torch.autograd.grad(result, s.leaves(), [s.dy, s.dres][: len(result)])
        assert all(one.equal(other) for one, other in zip(grads, cases.gradients(case, t), strict=True))


@pytest.mark.parametrize("case", **cases.ids(cases.SMALL))
def test_modified_saved_tensors_are_detected(case, backend):
    t = cases.make(case, backend)
    for name in ("x", "weight"):
        if case.fused and name == "x":
            continue  # the stored sum is saved, see below
        s = t.requires_grad()
        outputs = case.call(s)
        with torch.no_grad():
            getattr(s, name).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(outputs, [s.dy, s.dres][: len(outputs)])
    if case.fused:
        s = t.requires_grad()
        output, total = case.call(s)
        total.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward(s.dy)


def test_in_place_norm_invalidates_what_autograd_saved(device):
    """fused_add_rms_norm_ bumps version counters, as every in-place op must."""
    x, weight = torch.randn(4, 8, device=device), torch.ones(8, device=device)
    factor = torch.randn(4, 8, device=device, requires_grad=True)
    product = factor * x
    with torch.no_grad():
        normext.fused_add_rms_norm_(x, torch.randn_like(x), weight, 1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_backward_twice_needs_retain_graph(backend):
    case = cases.SMALL[0]
    s = small(case, backend)
    output = case.call(s)[0]
    first = torch.autograd.grad(output, s.leaves(), s.dy, retain_graph=True)
    second = torch.autograd.grad(output, s.leaves(), s.dy)
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(output, s.leaves(), s.dy)


@pytest.mark.parametrize("op", cases.OPS)
def test_the_same_tensor_in_several_places(op, device):
    """x as residual, and one parameter as weight and bias: gradients of the uses add up, at first and second order."""
    x = torch.randn(3, 6, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, device=device, requires_grad=True)

    def ours(x, weight):
        inputs = (x, x) if op.startswith("add") else (x,)
        parameters = (weight, weight) if "layer" in op else (weight,)
        result = getattr(normext, op)(*inputs, (6,), *parameters, 1e-5)
        return result[0] if isinstance(result, tuple) else result

    assert torch.autograd.gradcheck(ours, (x, weight), nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(ours, (x, weight), nondet_tol=0.0)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_gradients_that_are_views_or_broadcasts(op, device):
    """sum() sends back an expanded scalar, a transposed use a transposed gradient."""
    x = torch.randn(6, 40, device=device)
    for loss in (
        lambda y: y.sum(),
        lambda y: (y.t() * torch.arange(6.0, device=device)).sum(),
        lambda y: y[:, ::2].sum(),
        lambda y: y[2:3].sum(),
    ):
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        loss(getattr(normext, op)(a, (40,))).backward()
        loss(getattr(F, op)(b, (40,)).float()).backward()
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


def test_hooks_and_accumulation(device):
    """Tensor hooks see the gradient once; .grad accumulates; nothing writes over grad_output."""
    x = torch.randn(4, 16, device=device, requires_grad=True)
    seen = []
    x.register_hook(lambda g: seen.append(g.clone()))
    dy = torch.randn(4, 16, device=device)
    kept = dy.clone()
    output = normext.layer_norm(x, (16,))
    output.backward(dy, retain_graph=True)
    output.backward(dy)
    assert len(seen) == 2 and seen[0].equal(seen[1]) and x.grad.equal(seen[0] + seen[1]) and dy.equal(kept)


def test_anomaly_mode_and_grad_fn_names(device):
    x = torch.randn(4, 16, device=device, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        normext.rms_norm(x, (16,)).sum().backward()
    assert normext.rms_norm(x, (16,)).grad_fn is not None


def test_multi_dimensional_weights_get_gradients_of_their_shape(device):
    x = torch.randn(3, 4, 5, device=device, requires_grad=True)
    weight = torch.randn(4, 5, device=device, requires_grad=True)
    bias = torch.randn(4, 5, device=device, requires_grad=True)
    normext.layer_norm(x, (4, 5), weight, bias).square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    w, b = weight.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    F.layer_norm(expected, (4, 5), w, b).square().sum().backward()
    for one, other in ((x, expected), (weight, w), (bias, b)):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
