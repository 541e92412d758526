"""torch.func transforms of the channel norms, against the same transforms of a formula in plain torch ops."""

from dataclasses import replace

import channel_cases as cases
import channel_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from test_channel_autograd import DOUBLE, function_of, plain_of
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import normext

pytestmark = pytest.mark.python
CASES = tuple(case for case in DOUBLE if case.weight and case.bias)


def problem(case, backend):
    """(ours, plain, arguments): functions of the leaves."""
    t = cases.make(case, backend)
    return function_of(case, t), plain_of(case, t), tuple(t.leaves())


def scalar(function):
    return lambda *args: (function(*args).sin() * 1.5).sum()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def activations(case):
    """How many of the leaves are of x's shape."""
    return 2 if case.residual else 1


@pytest.mark.parametrize("case", **cases.ids(CASES))
def test_grad_vjp_jvp(case, backend):
    ours, plain, args = problem(case, backend)
    every = tuple(range(len(args)))
    close(grad(scalar(ours), every)(*args), grad(scalar(plain), every)(*args))
    tangents = tuple(torch.randn_like(a) for a in args)
    close(jvp(ours, args, tangents), jvp(plain, args, tangents))
    output, pull = vjp(ours, *args)
    close(pull(output), vjp(plain, *args)[1](output))
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
    batched = tuple(torch.stack([a, 2 * a, a - 1]) for a in args)
    first = activations(case)
    for in_dims in (
        (0,) * first + (None,) * (len(args) - first),
        (None,) * first + (0,) * (len(args) - first),
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
    every, first = tuple(range(len(args))), activations(case)
    batched = tuple(torch.stack([a, 2 * a, a - 1]) if i < first else a for i, a in enumerate(args))
    in_dims = tuple(0 if i < first else None for i in every)
    close(vmap(grad(scalar(ours), every), in_dims)(*batched), vmap(grad(scalar(plain), every), in_dims)(*batched))


@pytest.mark.parametrize("case", **cases.ids(CASES))
def test_vmap_over_backward(case, backend):
    """Batched vector-Jacobian products through a graph recorded outside vmap (is_grads_batched)."""
    ours, plain, args = problem(case, backend)
    results = []
    for function in (ours, plain):
        leaves = [a.detach().requires_grad_() for a in args]
        output = function(*leaves)
        directions = torch.linspace(-1, 1, 4 * output.numel(), dtype=output.dtype, device=output.device).view(4, *output.shape)
        results.append(torch.autograd.grad(output, leaves, directions, is_grads_batched=True))
    close(*results)


@pytest.mark.parametrize("op", cases.OPS)
def test_vmap_and_per_sample_gradients_as_torchs(op, device):
    """The way per-sample gradients are taken in practice: one image at a time, torch's own function beside ours."""
    args = {"batch_norm": (None, None), "group_norm": (2,), "instance_norm": (None, None)}[op]
    tail = (True,) if op != "group_norm" else ()
    x = torch.randn(5, 4, 3, 7, dtype=torch.float64, device=device)
    weight, bias = (torch.randn(4, dtype=torch.float64, device=device) for _ in range(2))
    results = []
    for library in (normext, F):

        def loss(weight, bias, image, library=library):
            return getattr(library, op)(image[None], *args, weight, bias, *tail).cos().sum()

        results.append(vmap(grad(loss, (0, 1, 2)), (None, None, 0))(weight, bias, x))
    close(*results)


def test_running_statistics_under_transforms(device):
    """grad and vjp leave in the statistics what eager training does; evaluation under vmap reads them."""
    x = torch.randn(5, 4, 3, dtype=torch.float64, device=device) + 10
    for op in ("batch_norm", "instance_norm"):
        eager, traced = ([x.new_zeros(4), x.new_ones(4)] for _ in range(2))
        norm = getattr(normext, op)
        norm(x, *eager, None, None, True)
        grad(lambda v, norm=norm, traced=traced: norm(v, *traced, None, None, True).sin().sum())(x)
        close(traced, eager)
        found = vmap(lambda v, norm=norm, traced=traced: norm(v[None], *traced, None, None, False)[0])(x)
        close(found, norm(x, *traced, None, None, False))


def test_vmap_over_shared_running_statistics_is_what_torch_makes_of_it(device):
    """A batched mean does not fit into an unbatched buffer: torch refuses, and so do we, before anything is written."""
    x = torch.randn(3, 5, 4, 6, device=device)
    for op in ("batch_norm", "instance_norm"):
        for library in (normext, F):
            buffers = [torch.zeros(4, device=device), torch.ones(4, device=device)]
            with pytest.raises(RuntimeError):
                vmap(lambda v, op=op, lib=library, b=buffers: getattr(lib, op)(v, *b, None, None, True))(x)
            assert library is F or (buffers[0].eq(0).all() and buffers[1].eq(1).all())


def test_vmap_over_batched_running_statistics(device):
    """Each model of an ensemble has its own."""
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64, device=device)
    for op in ("batch_norm", "instance_norm"):
        results = []
        for library in (normext, F):
            buffers = [x.new_zeros(3, 4), x.new_ones(3, 4)]
            y = vmap(lambda v, m, s, op=op, lib=library: getattr(lib, op)(v, m, s, None, None, True))(x, *buffers)
            results.append([y, *buffers])
        close(*results)


@pytest.mark.parametrize("norm", ["BatchNorm2d", "GroupNorm", "InstanceNorm2d"])
def test_ensembles_of_modules(norm, device):
    """functional_call with stacked parameters and buffers, as torch.func.stack_module_state prepares them."""
    arguments = {"BatchNorm2d": (4,), "GroupNorm": (2, 4), "InstanceNorm2d": (4, 1e-5, 0.1, True, True)}[norm]
    modules = [getattr(normext, norm)(*arguments, device=device).eval() for _ in range(3)]
    for module in modules:
        torch.nn.init.normal_(module.weight)
    x = torch.randn(3, 5, 4, 3, 2, device=device)
    parameters, buffers = torch.func.stack_module_state(modules)
    out = vmap(lambda p, b, v: functional_call(modules[0], (p, b), (v,)))(parameters, buffers, x)
    torch.testing.assert_close(out, torch.stack([m(v) for m, v in zip(modules, x, strict=True)]))


def test_reference_path_meets_the_accuracy_contract_at_large_means(backend):
    """Under transforms plain torch ops do the work; they too must not lose the mean, in the running statistics neither."""
    for op in cases.OPS:
        for mean in (0.0, 1e3, 1e5):
            case = cases.ChannelCase(op, 4, 8, (16, 16), 2, mean=mean, running=None if op == "group_norm" else torch.float32)
            t = cases.make(case, backend)
            alone = replace(case, running=None)
            bare = replace(t, running_mean=None, running_var=None)
            output = vmap(lambda x, case=alone, t=bare: case.call(replace(t, x=x)))(t.x[None])[0]
            assert oracle.forward_error(alone, bare, output) <= oracle.LIMIT
            if case.running:
                after = t.fresh()
                grad(lambda x, case=case, t=after: case.call(replace(t, x=x)).sum())(t.x)
                assert max(oracle.running_errors(case, t, after).values()) <= oracle.LIMIT


def test_forward_mode_through_running_statistics_is_refused_as_in_torch(device):
    """Running statistics are not differentiable."""
    x = torch.randn(3, 4, 5, device=device)
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    for training in (False, True):
        messages = []
        for library in (normext, F):
            try:
                jvp(lambda m, lib=library, t=training: lib.batch_norm(x, m, var.clone(), None, None, t), (mean,), (mean,))
                messages.append(None)
            except RuntimeError as error:
                messages.append(str(error).split("\n")[0])
        assert (messages[0] is None) == (messages[1] is None)
