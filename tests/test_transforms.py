"""torch.func transforms and their compositions, against the same transforms of a formula in plain torch ops."""

import cases
import pytest
import torch
from test_autograd import DOUBLE, composed, function_of
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import normext

pytestmark = pytest.mark.python
CASES = tuple(case for case in DOUBLE if case.weight)


def problem(case, backend):
    """(ours, plain, arguments): scalar-free functions of the leaves."""
    t = cases.make(case, backend)
    names = [name for name in ("x", "residual", "weight", "bias") if getattr(t, name) is not None]

    def plain(*values):
        from dataclasses import replace

        return composed(case, replace(t, **dict(zip(names, values, strict=True))))

    return function_of(case, t), plain, tuple(t.leaves())


def scalar(function):
    def loss(*args):
        outputs = function(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((output.sin() * 1.5).sum() for output in outputs)

    return loss


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", **cases.ids(CASES))
def test_grad_vjp_jvp(case, backend):
    ours, plain, args = problem(case, backend)
    every = tuple(range(len(args)))
    close(grad(scalar(ours), every)(*args), grad(scalar(plain), every)(*args))
    tangents = tuple(torch.randn_like(a) for a in args)
    close(jvp(ours, args, tangents), jvp(plain, args, tangents))
    outputs, pull = vjp(ours, *args)
    close(pull(outputs), vjp(plain, *args)[1](outputs))
    close(linearize(ours, *args)[1](*tangents), jvp(plain, args, tangents)[1])


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
@pytest.mark.parametrize("case", **cases.ids(CASES))
def test_jacobians(case, transform, backend):
    ours, plain, args = problem(case, backend)
    every = tuple(range(len(args)))
    close(transform(ours, every)(*args), transform(plain, every)(*args))


@pytest.mark.parametrize("case", **cases.ids(CASES))
def test_hessian_and_grad_of_grad(case, backend):
    ours, plain, args = problem(case, backend)
    every = tuple(range(len(args)))
    close(hessian(scalar(ours), every)(*args), hessian(scalar(plain), every)(*args))

    def second(function):
        return grad(lambda *a: grad(scalar(function))(*a).square().sum(), every)

    close(second(ours)(*args), second(plain)(*args))


@pytest.mark.parametrize("case", **cases.ids(CASES))
def test_vmap(case, backend):
    """Over the activations, over the parameters, over both, along any dimension, and nested."""
    ours, plain, args = problem(case, backend)
    activations = 2 if case.fused else 1
    batched = tuple(torch.stack([a, 2 * a, a - 1]) for a in args)
    for in_dims in (
        (0,) * activations + (None,) * (len(args) - activations),
        (None,) * activations + (0,) * (len(args) - activations),
        (0,) * len(args),
    ):
        values = tuple(b if d == 0 else a for a, b, d in zip(args, batched, in_dims, strict=True))
        close(vmap(ours, in_dims)(*values), vmap(plain, in_dims)(*values))
    last = tuple(b.movedim(0, -1) for b in batched)
    close(vmap(ours, -1, out_dims=1)(*last), vmap(plain, -1, out_dims=1)(*last))
    twice = tuple(torch.stack([b, b + 1]) for b in batched)
    close(vmap(vmap(ours))(*twice), vmap(vmap(plain))(*twice))


@pytest.mark.parametrize("case", **cases.ids(CASES))
def test_per_sample_gradients(case, backend):
    """vmap(grad): gradients of shared parameters for every sample."""
    ours, plain, args = problem(case, backend)
    activations = 2 if case.fused else 1
    every = tuple(range(len(args)))
    batched = tuple(torch.stack([a, 2 * a, a - 1]) if i < activations else a for i, a in enumerate(args))
    in_dims = tuple(0 if i < activations else None for i in every)
    close(vmap(grad(scalar(ours), every), in_dims)(*batched), vmap(grad(scalar(plain), every), in_dims)(*batched))


@pytest.mark.parametrize("case", **cases.ids(CASES))
def test_vmap_over_backward(case, backend):
    """Batched vector-Jacobian products through a graph recorded outside vmap (is_grads_batched)."""
    ours, plain, args = problem(case, backend)
    results = []
    for function in (ours, plain):
        leaves = [a.detach().requires_grad_() for a in args]
        output = function(*leaves)
        output = output[0] if isinstance(output, tuple) else output
        directions = torch.linspace(-1, 1, 4 * output.numel(), dtype=output.dtype, device=output.device).view(4, *output.shape)
        results.append(torch.autograd.grad(output, leaves, directions, is_grads_batched=True))
    close(*results)


@pytest.mark.parametrize("case", **cases.ids(CASES[:1]))
def test_old_functional_api(case, backend):
    ours, plain, args = problem(case, backend)
    for vectorize in (False, True):
        found = torch.autograd.functional.hessian(scalar(ours), args, vectorize=vectorize)
        close(found, torch.autograd.functional.hessian(scalar(plain), args, vectorize=vectorize))


@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_ensembles_of_modules(norm, device):
    """functional_call with stacked parameters, as torch.func.stack_module_state prepares it."""
    modules = [getattr(normext, norm)(6, device=device) for _ in range(3)]
    for module in modules:
        torch.nn.init.normal_(module.weight)
    x = torch.randn(3, 4, 6, device=device)
    parameters, buffers = torch.func.stack_module_state(modules)
    out = vmap(lambda p, b, v: functional_call(modules[0], (p, b), (v,)))(parameters, buffers, x)
    torch.testing.assert_close(out, torch.stack([m(v) for m, v in zip(modules, x, strict=True)]))


def test_reference_path_meets_the_accuracy_contract_at_large_means(backend):
    """Under transforms plain torch ops do the work; they too must not lose the mean."""
    import oracle

    for op in ("layer_norm", "rms_norm"):
        for mean in (0.0, 1e3, 1e5):
            case = cases.Case(op, rows=16, cols=1024, mean=mean)
            t = cases.make(case, backend)
            output = vmap(
                lambda row, t=t, case=case: case.call(cases.Tensors(row[None], None, t.weight, t.bias, t.dy, None))[0][0]
            )(t.x)
            assert oracle.forward_error(case, t, output) <= oracle.LIMIT
