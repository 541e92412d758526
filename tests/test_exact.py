"""Zero tolerance: data on which every intermediate value is exact, and equalities the library promises bit for bit.

The exact data are oneDNN's idea: rows m +- 1 and m +- 3 in the proportion 10:6, so that the mean is m, the variance 4 and, with
eps = 0, rstd 1/2, in any order of summation. Every 16 columns hold the whole pattern, so that the segments of a long row have
that mean, too.
"""

from dataclasses import replace

import cases
import oracle
import pytest
import torch

import normext

PATTERN = torch.tensor([1, -1] * 5 + [3, -3] * 3, dtype=torch.float64)
WIDTHS = (16, 64, 112, 256, 1040, 2048, 4096, 4112, 16384, 65536)


def exact(case, backend):
    """Inputs whose results are exact: small integers everywhere, powers of two where something is divided."""
    rows = backend.rows(48, case.cols)
    generator = torch.Generator().manual_seed(7)

    def integers(*shape, low=-3, high=4):
        return torch.randint(low, high, shape, generator=generator).double()

    order = torch.rand(rows, case.cols // 16, 16, generator=generator).argsort(-1)
    x = PATTERN[order].view(rows, case.cols)
    mean = integers(rows, 1, low=-16, high=17) if case.centred else 0.0
    scale = torch.exp2(integers(rows, 1, low=-2, high=3))
    x = x * scale + mean
    residual = integers(rows, case.cols) if case.fused else None
    x = x - residual if case.fused else x
    tensors = {
        "x": x.to(case.dtype),
        "residual": residual,
        "weight": integers(case.cols) - case.weight_offset,
        "bias": integers(case.cols) if case.centred else None,
        "dy": integers(rows, case.cols, low=-2, high=3),
        "dres": integers(rows, case.cols) if case.fused else None,
    }
    types = {"weight": case.parameters, "bias": case.parameters}
    moved = {k: v if v is None else v.to(types.get(k, case.dtype)).to(backend.device) for k, v in tensors.items()}
    return cases.Tensors(**moved)


def exact_cases():
    for op in cases.OPS:
        for cols in WIDTHS:
            yield cases.Case(op, cols=cols, eps=0.0)
        for dtype, params in cases.MIXES[1:]:
            for cols in (112, 1024, 4112):
                yield cases.Case(op, cols=cols, eps=0.0, dtype=dtype, param_dtype=params)
        if "rms" in op:
            for rounding in ("torch", "llama"):
                yield cases.Case(op, cols=1024, eps=0.0, dtype=torch.bfloat16, weight_offset=1.0, rounding=rounding)


def rounded(values, dtype):
    return torch.from_numpy(values.astype("float64")).to(dtype)


@pytest.mark.parametrize("case", **cases.ids(tuple(exact_cases())))
def test_exact_data_give_exact_outputs(case, backend):
    t = exact(case, backend)
    outputs = case.call(t)
    assert outputs[0].cpu().equal(rounded(oracle.forward(case, t), outputs[0].dtype))


@pytest.mark.parametrize("case", **cases.ids(tuple(c for c in exact_cases() if c.cols in (64, 256, 1024, 2048))))
def test_exact_data_give_exact_gradients(case, backend):
    t = exact(case, backend)
    grads = cases.gradients(case, t)
    expected = oracle.backward(case, t)
    names = ["dx"] * (2 if case.fused else 1) + ["dweight"] + ["dbias"] * case.centred
    for name, gradient in zip(names, grads, strict=True):
        assert gradient.cpu().equal(rounded(expected[name][0], gradient.dtype)), name


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("cols", cases.WIDTHS)
def test_constant_rows_give_exactly_the_bias(cols, dtype, backend):
    """The mean of equal numbers is that number. dx stays finite."""
    case = cases.Case("layer_norm", cols=cols, dtype=dtype, data="constant")
    t = cases.make(case, backend)
    for variant in (t, replace(t, bias=None), replace(t, weight=None)):
        expected = variant.bias if variant.bias is not None else torch.zeros_like(t.bias)
        assert case.call(variant)[0].equal(expected.expand_as(t.x))
    assert cases.gradients(case, t)[0].isfinite().all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-30, 0.1, 65504.0, 1e19, -1e25, 1e30, 1e33])
@pytest.mark.parametrize("cols", [64, 111, 769, 4097, 16384])
def test_constant_rows_of_any_size(cols, value, backend):
    """As long as their sum is finite: where the rounding of the mean, squared, is infinite, too."""
    case = cases.Case("layer_norm", rows=3, cols=cols)
    t = cases.make(case, backend)
    t.x.fill_(value)
    assert case.call(t)[0].equal(t.bias.expand_as(t.x))
    assert cases.gradients(case, t)[0].isfinite().all()


@pytest.mark.parametrize("cols", [40, 1024, 4096])
@pytest.mark.parametrize("place", [0, 39])
def test_one_huge_value_gives_the_bias(cols, place, backend):
    """As a mask's lowest number does: the mean is finite, the variance is not."""
    if cols == 4096 and backend.runs_cuda_code:
        pytest.skip("of several segments, whose merge overflows, and the row is NaN")
    case = cases.Case("layer_norm", rows=3, cols=cols)
    t = cases.make(case, backend)
    t.x[:, place] = torch.finfo(torch.float32).min
    assert case.call(t)[0].equal(t.bias.expand_as(t.x))


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5, 1e-3])
def test_constant_rows_at_every_eps(eps, backend):
    case = cases.Case("layer_norm", rows=256, cols=96, data="constant", eps=eps)
    t = cases.make(case, backend)
    assert case.call(t)[0].equal(t.bias.expand_as(t.x))


@pytest.mark.parametrize("dtype, params", cases.MIXES)
@pytest.mark.parametrize("cols", [40, 111, 768, 1025, 4096, 16384])
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_fused_equals_unfused(op, cols, dtype, params, backend):
    """The norm of the stored sum, and the gradients of the norm plus those of the sum, bit for bit where nothing is added."""
    case = cases.Case(op, rows=24, cols=cols, dtype=dtype, param_dtype=params, data="mixed")
    for variant in (case, replace(case, alpha=0.75)) if case.centred else (case, replace(case, rounding="llama")):
        t = cases.make(variant, backend)
        output, total = variant.call(t)
        assert total.equal(oracle.residual_sum(variant, t))
        alone = replace(t, x=total, residual=None, dres=None)
        assert output.equal(variant.unfused.call(alone)[0])
        fused = cases.gradients(variant, replace(t, dres=torch.zeros_like(t.x)))
        unfused = cases.gradients(variant.unfused, alone)
        assert fused[0].equal(unfused[0])
        for one, other in zip(fused[2:], unfused[1:], strict=True):
            assert one.equal(other)


@pytest.mark.parametrize("params", ["same", "float32"])
@pytest.mark.parametrize("dtype", cases.SIXTEEN_BIT)
@pytest.mark.parametrize("cols", [64, 256, 4096])
def test_llama_rounding_is_the_formula_of_hugging_face(cols, dtype, params, backend):
    """On exact data every order of summation gives the same rstd, so the formula must agree in every bit, dtype included."""
    param_dtype = torch.float32 if params == "float32" else dtype
    case = cases.Case("rms_norm", cols=cols, dtype=dtype, param_dtype=param_dtype, eps=0.0, rounding="llama")
    t = exact(case, backend)
    t.weight = torch.randn_like(t.weight)
    hidden = t.x.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + case.eps)
    expected = t.weight * hidden.to(dtype)
    output = case.call(t)[0]
    assert output.dtype == expected.dtype
    assert output.equal(expected)


@pytest.mark.parametrize("dtype", cases.SIXTEEN_BIT)
def test_llama_rounding_follows_from_the_saved_rstd(dtype, backend):
    """On any data: the normalised value is rounded to the activation dtype before it meets the weight."""
    case = cases.Case("rms_norm", rows=40, cols=768, dtype=dtype, rounding="llama")
    t = cases.make(case, backend)
    output, stats = torch.ops.normext.rms_norm_forward(t.x, t.weight, 1, case.eps, 0.0, 1)
    expected = t.weight * (t.x.float() * stats[0][:, None]).to(dtype)
    assert output.equal(expected)
    assert case.call(t)[0].equal(output)


@pytest.mark.parametrize("dtype", cases.SIXTEEN_BIT)
def test_llama_weight_gradient_is_that_of_the_rounded_value(dtype, backend):
    """With one row the sum has one term: dy times the rounded value that the weight multiplied."""
    case = cases.Case("rms_norm", rows=1, cols=768, dtype=dtype, param_dtype=torch.float32, rounding="llama")
    t = cases.make(case, backend)
    stats = torch.ops.normext.rms_norm_forward(t.x, t.weight, 1, case.eps, 0.0, 1)[1]
    rounded_value = (t.x.float() * stats[0][:, None]).to(dtype).float()
    assert cases.gradients(case, t)[1].equal((t.dy * rounded_value)[0])


def test_weight_offset_is_added_in_float32(backend):
    """1 + w in bfloat16 would lose these weights altogether (Gemma)."""
    t = cases.make(cases.Case("rms_norm", rows=4, cols=64, dtype=torch.bfloat16, weight_offset=1.0), backend)
    t.weight.fill_(0.00390625)
    output = normext.rms_norm(t.x, (64,), t.weight, 1e-6, weight_offset=1.0)
    wide = normext.rms_norm(t.x, (64,), (1 + t.weight.float()), 1e-6)
    assert output.equal(wide)
    assert not output.equal(normext.rms_norm(t.x, (64,), None, 1e-6))


def test_weight_offset_equals_the_shifted_weight(backend):
    t = cases.make(cases.Case("rms_norm", rows=8, cols=257), backend)
    shifted = normext.rms_norm(t.x, (257,), t.weight + 1.0, 1e-5)
    assert normext.rms_norm(t.x, (257,), t.weight, 1e-5, weight_offset=1.0).equal(shifted)


def test_weight_offset_without_a_weight_changes_nothing(backend):
    t = cases.make(cases.Case("rms_norm", rows=8, cols=257), backend)
    plain = normext.rms_norm(t.x, (257,), None, 1e-5)
    assert normext.rms_norm(t.x, (257,), None, 1e-5, weight_offset=1.0).equal(plain)
    assert normext.add_rms_norm(t.x, torch.zeros_like(t.x), (257,), None, 1e-5, weight_offset=1.0)[0].equal(plain)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_default_eps_is_that_of_the_accumulation_type(dtype, backend):
    t = cases.make(cases.Case("rms_norm", rows=8, cols=64, dtype=dtype, data="tiny"), backend)
    expected = normext.rms_norm(t.x, (64,), t.weight, cases.default_eps(dtype))
    assert normext.rms_norm(t.x, (64,), t.weight).equal(expected)
    assert normext.rms_norm(t.x, (64,), t.weight, eps=None).equal(expected)
    assert normext.add_rms_norm(t.x, torch.zeros_like(t.x), (64,), t.weight)[0].equal(expected)


def test_alpha_one_is_a_plain_sum(backend):
    t = cases.make(cases.Case("add_layer_norm", rows=8, cols=64, dtype=torch.bfloat16), backend)
    plain = normext.add_layer_norm(t.x, t.residual, (64,), t.weight, t.bias)
    for one, other in zip(plain, normext.add_layer_norm(t.x, t.residual, (64,), t.weight, t.bias, alpha=1.0), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("dtype, params", cases.MIXES)
def test_in_place_add_rms_norm(dtype, params, backend):
    """fused_add_rms_norm_ leaves the same bits in its two arguments as add_rms_norm returns."""
    for cols in (40, 111, 768, 4097, 16384):
        t = cases.make(cases.Case("add_rms_norm", rows=16, cols=cols, dtype=dtype, param_dtype=params), backend)
        expected = normext.add_rms_norm(t.x, t.residual, (cols,), t.weight, 1e-6)
        x, residual = t.x.clone(), t.residual.clone()
        assert normext.fused_add_rms_norm_(x, residual, t.weight, 1e-6) is None
        assert x.equal(expected[0]) and residual.equal(expected[1])


def test_negative_zero_weight_keeps_its_sign(backend):
    """xhat * -0.0 is -0.0 for positive xhat, as in torch: no offset is added where there is none."""
    x = torch.ones(2, 8, device=backend.device)
    y = normext.rms_norm(x, (8,), torch.full((8,), -0.0, device=backend.device))
    assert y.eq(0).all() and y.signbit().all()
