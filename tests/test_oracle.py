"""A test that cannot fail is a defect: the oracle must reject what is known to be wrong, and accept what is right."""

import backends
import cases
import mpmath
import oracle
import pytest
import torch

pytestmark = pytest.mark.once

CASE = cases.Case("layer_norm", rows=16, cols=1024)


def reference(case, t, *, one_pass=False, eps_outside=False, eps_dropped=False, unbiased=False, params_rounded=False):
    """LayerNorm or RMSNorm in float32 with one thing wrong."""
    x = t.x.float()
    mean = x.mean(-1, keepdim=True) if case.centred else 0.0
    if one_pass:
        variance = (x * x).mean(-1, keepdim=True) - mean * mean
    else:
        variance = ((x - mean) ** 2).sum(-1, keepdim=True) / (case.cols - (1 if unbiased else 0))
    eps = 0.0 if eps_dropped else case.eps
    rstd = 1 / (variance.sqrt() + eps) if eps_outside else torch.rsqrt(variance + eps)
    weight, bias = t.weight.float(), t.bias.float() if case.centred else 0.0
    if params_rounded:
        weight = weight.bfloat16().float()
    return ((x - mean) * rstd * weight + bias).to(t.x.dtype)


def figure(case, **wrong):
    t = cases.make(case, backends.HOST)
    return oracle.forward_error(case, t, reference(case, t, **wrong))


@pytest.mark.parametrize("wrong", ["one_pass", "eps_outside", "eps_dropped", "unbiased", "params_rounded"])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_wrong_formulas_are_rejected(op, wrong):
    case = cases.Case(
        op, rows=16, cols=1024, mean=10.0 if wrong == "one_pass" else 0.0, data="tiny" if "eps" in wrong else "normal"
    )
    if op == "rms_norm" and wrong == "one_pass":
        pytest.skip("RMSNorm has one pass")
    assert figure(case, **{wrong: True}) > 10 * oracle.LIMIT


def test_correct_formula_is_accepted():
    assert figure(CASE) <= oracle.LIMIT


@pytest.mark.parametrize("mean, at_least", [(1e3, 100), (1e5, 1e4)])
def test_torch_misses_the_contract_at_large_means(mean, at_least):
    case = cases.Case("layer_norm", rows=64, cols=4096, mean=mean)
    t = cases.make(case, backends.HOST)
    assert oracle.forward_error(case, t, case.torch(t)[0]) > at_least
    errors = oracle.backward_errors(case, t, cases.gradients(case, t, case.torch))
    assert errors["dx"] > oracle.LIMIT


def test_torch_meets_the_contract_at_mean_zero():
    for op in ("layer_norm", "rms_norm"):
        case = cases.Case(op, rows=64, cols=768)
        t = cases.make(case, backends.HOST)
        assert oracle.forward_error(case, t, case.torch(t)[0]) <= oracle.LIMIT
        errors = oracle.backward_errors(case, t, cases.gradients(case, t, case.torch))
        assert max(errors.values()) <= oracle.LIMIT, errors


def test_long_accumulation_chains_are_rejected():
    """dbias of a constant gradient summed one row after another, as a naive kernel does."""
    case = cases.Case("layer_norm", rows=65536, cols=4, grad="tenth")
    t = cases.make(case, backends.HOST)
    grads = list(cases.gradients(case, t, case.torch))
    grads[2] = torch.from_numpy(t.dy.numpy().cumsum(0)[-1])
    assert oracle.backward_errors(case, t, grads)["dbias"] > 10 * oracle.LIMIT


@pytest.mark.parametrize("quantity", ["dx", "dweight", "dbias"])
def test_one_wrong_gradient_element_is_rejected(quantity):
    t = cases.make(CASE, backends.HOST)
    grads = dict(zip(("dx", "dweight", "dbias"), cases.gradients(CASE, t, CASE.torch), strict=True))
    grads[quantity].view(-1)[5] *= 1 + 1e-4
    grads[quantity].view(-1)[5] += 1e-5
    assert oracle.backward_errors(CASE, t, list(grads.values()))[quantity] > oracle.LIMIT


def test_not_a_number_is_rejected():
    t = cases.make(CASE, backends.HOST)
    output = CASE.torch(t)[0]
    output[3, 7] = float("nan")
    assert oracle.forward_error(CASE, t, output) == float("inf")


@pytest.mark.parametrize("dtype", cases.SIXTEEN_BIT)
def test_sixteen_bit_outputs_may_miss_by_half_a_unit_only(dtype):
    case = cases.Case("layer_norm", rows=16, cols=1024, dtype=dtype)
    t = cases.make(case, backends.HOST)
    right = torch.from_numpy(oracle.forward(case, t)).to(dtype)
    assert oracle.forward_error(case, t, right) <= 1.0  # torch rounds through float32
    wrong = right.clone().view(torch.int16)
    wrong[0, 0] += 1  # the neighbouring value
    assert oracle.forward_error(case, t, wrong.view(dtype)) > oracle.LIMIT


def test_gradient_formulas_are_those_of_autograd():
    for op in cases.OPS:
        case = cases.Case(op, rows=5, cols=24, dtype=torch.float64, alpha=0.5 if op == "add_layer_norm" else 1.0)
        t = cases.make(case, backends.HOST)
        grads = cases.gradients(case, t, case.torch)
        assert max(oracle.backward_errors(case, t, grads).values()) < 100  # in units of float64


def test_oracle_agrees_with_arbitrary_precision():
    case = cases.Case("layer_norm", rows=2, cols=37, mean=1e5)
    t = cases.make(case, backends.HOST)
    with mpmath.workdps(60):
        for r, row in enumerate(t.x.tolist()):
            mean = mpmath.fsum(row) / len(row)
            rstd = 1 / mpmath.sqrt(mpmath.fsum((x - mean) ** 2 for x in row) / len(row) + mpmath.mpf(case.eps))
            exact = [float((x - mean) * rstd * w + b) for x, w, b in zip(row, t.weight.tolist(), t.bias.tolist(), strict=True)]
            assert abs(oracle.forward(case, t)[r] - exact).max() < 1e-9


def test_layouts_keep_the_values():
    x = torch.randn(8, 12)
    for name, layout in cases.LAYOUTS.items():
        view = layout(x)
        assert view.shape[-1] == 12 and view.dim() >= 2, name
        rows = view.reshape(-1, 12)
        assert all(any(torch.equal(row, other) for other in x) for row in rows), name
