"""Zero tolerance for the channel norms: data on which every intermediate value is exact, and equalities promised bit for bit.

As in test_exact.py, values m +- 1 and m +- 3 in the proportion 10:6 give the mean m and the variance 4 in any order of summation.
Every 16 consecutive elements of a channel hold the whole pattern, so that whatever a slab is cut into has that mean, too.
"""

from dataclasses import replace

import channel_cases as cases
import channel_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from test_exact import PATTERN, rounded

import normext

# Lost in the sum with any variance here, also where the oracle's long double is of quadruple precision (aarch64). torch refuses
# 0 in training.
NO_EPS = 1e-37
# (batch, channels, spatial, groups). Powers of two: what is divided by the size of a slab stays exact, gradients included.
SHAPES = (
    (16, 4, (), 4),
    (32, 64, (), 64),
    (2, 4, (16,), 2),
    (1, 8, (16, 16), 4),
    (4, 8, (8, 4), 2),
    (2, 2, (4, 8, 4), 1),
    (2, 256, (4, 4), 32),
    (32, 64, (4, 4), 64),
    (2, 4, (64, 64), 1),
    (1, 2, (256, 256), 2),
)
# The mean and the variance are exact for any size, but not what is divided by it. Contiguous only: the runs of rows into which
# channels_last is cut need not be multiples of 16 here.
FORWARD_SHAPES = ((1, 6, (16, 7), 3), (3, 10, (16,), 5), (3, 5, (48, 3), 1), (48, 7, (), 7))


def exact(case, backend):
    """Inputs whose results are exact: small integers everywhere, powers of two where something is divided."""
    batch = case.batch
    generator = torch.Generator().manual_seed(7)
    along_batch = case.op == "batch_norm" and case.image == case.channels  # a channel's consecutive elements are of other images

    def integers(*shape, low=-3, high=4):
        return torch.randint(low, high, shape, generator=generator).double()

    runs = batch * case.image // 16
    x = PATTERN[torch.rand(runs, 16, generator=generator).argsort(-1)]
    x = x.view(case.channels, batch).t() if along_batch else x.view(batch, case.slab_groups, -1)
    slabs = (1 if case.op == "batch_norm" else batch, case.slab_groups, *[1] * (x.dim() - 2))
    x = x * torch.exp2(integers(*slabs, low=-2, high=3)) + integers(*slabs, low=-16, high=17)
    shape = (batch, case.channels, *case.spatial)
    residual = integers(*shape) if case.residual else None
    tensors = {
        "x": x.reshape(shape),
        "residual": residual,
        "weight": integers(case.channels) if case.weight else None,
        "bias": integers(case.channels) if case.bias else None,
        "running_mean": integers(case.channels) if case.buffers else None,
        "running_var": integers(case.channels, low=1, high=5) ** 2 if case.buffers else None,
        "dy": integers(*shape, low=-2, high=3),
    }
    types = {"weight": case.parameters, "bias": case.parameters, "running_mean": case.buffers, "running_var": case.buffers}
    moved = {k: v if v is None else v.to(types.get(k, case.dtype)).to(backend.device) for k, v in tensors.items()}
    return cases.Tensors(**moved).laid_out(cases.LAYOUTS[case.layout])


def fits(op, shape):
    """A run of 16 lies in one channel of one image; for batch norm, along the images where there is nothing else."""
    elements = torch.Size(shape[2]).numel()
    return elements % 16 == 0 or (op == "batch_norm" and elements == 1)


def exact_cases(shapes):
    for op in cases.OPS:
        for layout in cases.BOTH:
            for shape in shapes:
                if fits(op, shape) and (layout == "contiguous" or len(shape[2]) > 1):
                    yield cases.ChannelCase(op, *shape, eps=NO_EPS, layout=layout)
            for dtype, params in cases.MIXES[1:]:
                yield cases.ChannelCase(op, 2, 8, (16, 16), 2, eps=NO_EPS, layout=layout, dtype=dtype, param_dtype=params)
            yield cases.ChannelCase(op, 2, 8, (16, 16), 2, eps=NO_EPS, layout=layout, activation="relu")
            yield cases.ChannelCase(op, 2, 8, (16, 16), 2, eps=NO_EPS, layout=layout, weight=False, bias=False)
        for activation in (None, "relu"):
            yield cases.ChannelCase("batch_norm", 2, 8, (16, 16), eps=NO_EPS, layout=layout, residual=True, activation=activation)


EXACT = tuple(dict.fromkeys(exact_cases(SHAPES)))


FORWARD = tuple(case for case in exact_cases(FORWARD_SHAPES) if case.layout == "contiguous")


@pytest.mark.parametrize("case", **cases.ids(tuple(dict.fromkeys((*EXACT, *FORWARD)))))
def test_exact_data_give_exact_outputs(case, backend):
    t = exact(case, backend)
    assert case.call(t).cpu().equal(rounded(oracle.forward(case, t), case.dtype))


@pytest.mark.parametrize("case", **cases.ids(EXACT))
def test_exact_data_give_exact_gradients(case, backend):
    t = exact(case, backend)
    expected = oracle.backward(case, t)
    for name, gradient in zip(t.names(), cases.gradients(case, t), strict=True):
        assert gradient.cpu().equal(rounded(expected["d" + name][0], gradient.dtype)), name


@pytest.mark.parametrize("layout", cases.BOTH)
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_exact_data_give_exact_running_means(op, layout, backend):
    """The mean in every digit; of the variance, what n/(n-1) leaves: 4 * scale^2 * n/(n-1), rounded once or twice."""
    case = cases.ChannelCase(op, 4, 8, (16, 16), eps=NO_EPS, layout=layout, running=torch.float32, momentum=0.25)
    t = exact(case, backend)
    after, expected = t.fresh(), oracle.running(case, t)
    case.call(after)
    assert after.running_mean.cpu().equal(rounded(expected["running_mean"][0], torch.float32))
    assert oracle.running_errors(case, t, after)["running_var"] <= 2
    last = replace(t.fresh(), running_mean=t.running_mean.clone())
    full = replace(case, momentum=1.0)
    full.call(last)
    assert last.running_mean.cpu().equal(rounded(oracle.running(full, t)["running_mean"][0], torch.float32))


@pytest.mark.parametrize("layout", cases.BOTH)
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_exact_evaluation(op, layout, backend):
    """Statistics that are squares of integers, and no eps: powers of two are chosen, so that rstd is exact."""
    case = cases.ChannelCase(op, 2, 8, (16, 16), eps=NO_EPS, layout=layout, training=False)
    t = exact(case, backend)
    t.running_var.copy_(torch.tensor([0.25, 1, 4, 16, 0.0625, 64, 1, 4]))
    assert case.call(t).cpu().equal(rounded(oracle.forward(case, t), case.dtype))
    expected = oracle.backward(case, t)
    for name, gradient in zip(t.names(), cases.gradients(case, t), strict=True):
        assert gradient.cpu().equal(rounded(expected["d" + name][0], gradient.dtype)), name


TWO_VALUED = (
    (2, 3, (6,), 3),
    (2, 10, (3, 6), 5),
    (10, 7, (), 7),
    (2, 6, (22, 46), 2),
    (6, 1, (2, 3, 5), 1),
    (1, 64, (28, 28), 16),
    (2, 4, (64, 128), 1),
)


@pytest.mark.parametrize("layout", cases.BOTH)
@pytest.mark.parametrize("shape", TWO_VALUED, ids=str)
@pytest.mark.parametrize("op", cases.OPS)
def test_two_values_give_plus_and_minus_one(op, shape, layout, backend):
    """Half of a slab m + d, half m - d, d a power of two, in alternation: y is b + w and b - w, at any mean."""
    if (op == "instance_norm" and not shape[2]) or (op != "batch_norm" and torch.Size(shape[2]).numel() % 2):
        pytest.skip("no such slab")
    for mean, spread in ((0.0, 1.0), (1000.0, 0.5), (1e5, 0.0625), (-4096.0, 4.0), (3.0, 2.0**-20)):
        case = cases.ChannelCase(op, *shape, eps=NO_EPS, layout=layout)
        t = cases.make(case, backend, batch=case.batch)
        index = torch.arange(case.batch * case.image // case.channels).view(case.batch, 1, *case.spatial)
        sign = (1 - 2 * (index % 2)).expand(t.x.shape).to(t.x)
        t.x.copy_(sign * spread + mean)
        assert case.call(t).equal(torch.addcmul(per_channel(t.bias, t.x), sign, per_channel(t.weight, t.x)))


def per_channel(parameter, x):
    return parameter.view(1, -1, *[1] * (x.dim() - 2)).expand(x.shape)


@pytest.mark.parametrize("layout", cases.BOTH)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("op", cases.OPS)
def test_constant_slabs_give_exactly_the_bias(op, dtype, layout, backend):
    """The mean of equal numbers is that number, whatever their count. dx stays finite."""
    for shape in cases.SHAPES:
        if (op == "instance_norm" and torch.Size(shape[2]).numel() == 1) or (layout != "contiguous" and len(shape[2]) < 2):
            continue
        case = cases.ChannelCase(op, *shape, dtype=dtype, data="constant", layout=layout)
        t = cases.make(case, backend)
        for variant in (t, replace(t, bias=None), replace(t, weight=None)) if dtype == torch.float32 else (t,):
            expected = variant.bias if variant.bias is not None else torch.zeros_like(t.bias)
            assert case.call(variant).equal(per_channel(expected, t.x)), shape
        assert cases.gradients(case, t)[0].isfinite().all(), shape


@pytest.mark.parametrize("layout", cases.BOTH)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-30, 0.1, 65504.0, 1e7, 1e10, 1e19, -1e25, 1e30, 1e33])
@pytest.mark.parametrize("op", cases.OPS)
def test_constant_slabs_of_any_size(op, value, layout, backend):
    """As long as their sum is finite: where the rounding of the mean, squared, is infinite, too."""
    for shape in ((2, 6, (7, 9), 2), (3, 5, (31, 33), 1), (2, 4, (64, 128), 2), (1, 2, (90, 101), 1)):
        case = cases.ChannelCase(op, *shape, layout=layout, running=torch.float32 if op != "group_norm" else None)
        t = cases.make(case, backend)
        t.x.fill_(value)
        after = t.fresh()
        assert case.call(after).equal(per_channel(t.bias, t.x)), shape
        assert cases.gradients(case, t)[0].isfinite().all(), shape
        if case.running:
            errors = oracle.running_errors(case, t, after)
            assert errors["running_mean"] <= oracle.LIMIT
            assert errors["running_var"] <= oracle.LIMIT or abs(value) > 1e19  # the rounding of the mean, squared, is infinite


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("op", cases.OPS)
def test_constant_slabs_at_every_eps(op, eps, backend):
    for layout in cases.BOTH:
        case = cases.ChannelCase(op, 8, 60, (3, 5), 12, layout=layout, data="constant", eps=eps)
        t = cases.make(case, backend)
        assert case.call(t).equal(per_channel(t.bias, t.x))


@pytest.mark.parametrize("activation", [None, *cases.ACTIVATIONS])
def test_constant_slabs_with_residual_and_activation(activation, backend):
    """What is left is act(bias + residual), rounded once."""
    for layout in cases.BOTH:
        for dtype in cases.DTYPES:
            case = cases.ChannelCase(
                "batch_norm", 3, 10, (9, 7), layout=layout, dtype=dtype, data="constant", residual=True, activation=activation
            )
            t = cases.make(case, backend)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            total = per_channel(t.bias, t.x).to(wide) + t.residual.to(wide)
            expected = getattr(F, activation)(total) if activation else total
            found = case.call(t)
            if activation in ("silu", "gelu"):  # not torch's polynomials
                assert oracle.forward_error(case, t, found) <= oracle.LIMIT
            else:
                assert found.equal(expected.to(dtype))


@pytest.mark.parametrize("layout", cases.BOTH)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("op", cases.OPS)
def test_fused_activations_are_those_of_the_unfused_output(op, training, layout, backend):
    """Where rounding before or after makes no difference: relu for any dtype, leaky_relu for those computed in themselves."""
    for dtype in cases.DTYPES:
        case = cases.ChannelCase(op, 4, 12, (9, 7), 3, dtype=dtype, layout=layout, training=training)
        t = cases.make(case, backend)
        plain = case.call(t.fresh())
        assert replace(case, activation="relu").call(t.fresh()).equal(plain.relu())
        if dtype not in cases.SIXTEEN_BIT:
            assert replace(case, activation="leaky_relu").call(t.fresh()).equal(F.leaky_relu(plain))


@pytest.mark.parametrize("layout", cases.BOTH)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fused_residual_is_a_sum_of_the_unfused_output(training, layout, backend):
    """In dtypes that are computed in themselves; gradients of the sum pass through unchanged."""
    for dtype in (torch.float32, torch.float64):
        case = cases.ChannelCase("batch_norm", 4, 12, (9, 7), dtype=dtype, layout=layout, training=training, residual=True)
        t = cases.make(case, backend)
        plain = replace(case, residual=False)
        alone = replace(t, residual=None)
        assert case.call(t.fresh()).equal(plain.call(alone.fresh()) + t.residual)
        fused, unfused = cases.gradients(case, t), cases.gradients(plain, alone)
        assert fused[1].equal(t.dy)
        cases.assert_same([fused[0], *fused[2:]], unfused)


def test_instance_norm_is_group_norm_of_single_channels(backend):
    for dtype, params in cases.MIXES:
        for spatial in ((5,), (9, 7), (64, 70), (3, 4, 5)):
            case = cases.ChannelCase("instance_norm", 3, 10, spatial, 10, dtype=dtype, param_dtype=params)
            t = cases.make(case, backend)
            cases.assert_same(cases.everything(case, t), cases.everything(replace(case, op="group_norm"), t), spatial)


def test_evaluation_is_the_same_for_both_norms(backend):
    """With given statistics InstanceNorm is BatchNorm."""
    for dtype, params in cases.MIXES:
        case = cases.ChannelCase("batch_norm", 3, 10, (9, 7), dtype=dtype, param_dtype=params, running=params, training=False)
        t = cases.make(case, backend)
        cases.assert_same(cases.everything(case, t), cases.everything(replace(case, op="instance_norm"), t))


def test_one_value_per_group_gives_the_bias(backend):
    """The variance of a single value is zero."""
    for layout in cases.BOTH:
        case = cases.ChannelCase("group_norm", 5, 8, (1, 1), 8, layout=layout, mean=7.0)
        t = cases.make(case, backend, batch=5)
        assert case.call(t).equal(per_channel(t.bias, t.x))
        grads = cases.gradients(case, t)
        assert grads[0].eq(0).all() and grads[1].eq(0).all()


def test_float_parameters_are_not_rounded_to_the_activation_dtype(backend):
    """1 + 2^-12 in float32 would be 1 in either 16-bit dtype: visible at xhat = 1 with bias -1."""
    for dtype in cases.SIXTEEN_BIT:
        for op in cases.OPS:
            case = cases.ChannelCase(op, 2, 4, (8, 8), 2, dtype=dtype, param_dtype=torch.float32, eps=NO_EPS)
            t = exact(case, backend)
            t.x.copy_(torch.arange(t.x.numel(), device=t.x.device).view(t.x.shape) % 2 * 2 - 1)
            t.weight.fill_(1 + 2**-12)
            t.bias.fill_(-1.0)
            assert case.call(t).amax().item() == 2**-12


def test_functions_default_to_torchs_defaults(backend):
    """eps 1e-5, momentum 0.1, evaluation for batch_norm and the input's statistics for instance_norm."""
    x = torch.randn(3, 4, 5, 6, device=backend.device)
    buffers = [torch.randn(4, device=backend.device), torch.rand(4, device=backend.device) + 0.5]
    assert normext.batch_norm(x, *buffers).equal(normext.batch_norm(x, *buffers, None, None, False, 0.1, 1e-5))
    assert normext.group_norm(x, 2).equal(normext.group_norm(x, 2, None, None, 1e-5))
    one, other = [b.clone() for b in buffers], [b.clone() for b in buffers]
    found, expected = normext.instance_norm(x, *one), normext.instance_norm(x, *other, None, None, True, 0.1, 1e-5)
    cases.assert_same([found, *one], [expected, *other])
    assert normext.instance_norm(x).equal(found) and not one[0].equal(buffers[0])
