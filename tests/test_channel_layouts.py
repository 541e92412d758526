"""Shapes, strides and dtypes of what the channel norms return: those of torch, and the same whether real or fake."""

import itertools
from dataclasses import replace
from pathlib import Path

import channel_cases as cases
import numpy
import pytest
import torch
import torch.nn.functional as F
from test_channel_invariance import canonical
from torch._subclasses import FakeTensorMode

import normext

SHAPES = [
    (4, 6, 5, 7),
    (4, 6, 5),
    (4, 6),
    (2, 6, 3, 4, 5),
    (4, 1, 5, 7),
    (1, 6, 5, 7),
    (4, 6, 1, 1),
    (1, 1, 5, 1),
    (4, 6, 1, 7),
    (4, 6, 5, 1),
    (2, 6, 3, 1, 2),
]
EMPTY = [(0, 6, 5, 7), (0, 6), (0, 6, 5), (3, 6, 0, 7), (3, 6, 0), (3, 0, 5, 7), (0, 6, 0, 7), (0, 0, 2)]
MODES = [("batch_norm", True), ("batch_norm", False), ("group_norm", True), ("instance_norm", True), ("instance_norm", False)]
by_mode = pytest.mark.parametrize("op, training", MODES, ids=[f"{op}-{'train' if t else 'eval'}" for op, t in MODES])


def run(library, op, x, training=True, weight=None, bias=None, **extra):
    """A channel norm of any shape, with running statistics."""
    channels = x.shape[1]
    if op == "group_norm":
        return library.group_norm(x, 2 if channels % 2 == 0 and channels else 1, weight, bias, **extra)
    mean, var = x.new_zeros(channels), x.new_ones(channels)
    return getattr(library, op)(x, mean.detach(), var.detach(), weight, bias, training, **extra)


def refused(op, training, shape):
    return op == "instance_norm" and training and torch.Size(shape[2:]).numel() == 1


def describe(tensors):
    return [(t.dtype, tuple(t.shape), t.stride(), t.storage_offset()) for t in tensors]


def with_gradients(library, op, x, training, dy_layout=None):
    """Output and all gradients."""
    x = x.detach().requires_grad_()
    weight, bias = (torch.ones(x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True) for _ in range(2))
    y = run(library, op, x, training, weight, bias)
    dy = torch.ones_like(y) if dy_layout is None else dy_layout(torch.ones(y.shape, dtype=y.dtype, device=y.device))
    return [y, *torch.autograd.grad(y, [x, weight, bias], dy)]


@pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=list(cases.LAYOUTS))
@by_mode
def test_strides_and_dtypes_are_those_of_torch(op, training, layout, device):
    """Of outputs and gradients, whatever the layout of the incoming gradient. On a GPU, too, those of torch on the CPU: there its
    group norm makes channels-last contiguous, and its batch norm keeps permuted strides."""
    for shape in SHAPES:
        if refused(op, training, shape):
            continue
        for dtype in cases.DTYPES if shape == SHAPES[0] else (torch.float32,):
            x = torch.randn(shape).to(dtype)
            ours, theirs = (run(library, op, layout(x.to(on)), training) for library, on in ((normext, device), (F, "cpu")))
            assert ours.device.type == device
            assert describe([ours]) == describe([theirs]), shape
        for dy_layout in (
            (None, cases.contiguous, cases.channels_last, cases.permuted) if shape == SHAPES[0] else (None, cases.permuted)
        ):
            expected = describe(with_gradients(F, op, layout(x), training, dy_layout))
            assert describe(with_gradients(normext, op, layout(x.to(device)), training, dy_layout)) == expected, (shape, dy_layout)


@by_mode
def test_a_single_image_is_channels_last_whatever_its_stride(op, training, device):
    """As batch norm of torch sees it: an image of [height, width, channels], permuted, then unsqueezed."""
    for shape, order in (((16, 12, 8), (2, 0, 1)), ((5, 4, 6, 8), (3, 0, 1, 2))):
        values = torch.randn(shape).permute(order)[None]
        x = values.to(device)
        assert x.stride() == values.stride()
        found = with_gradients(normext, op, x, training)
        assert describe(found) == describe(with_gradients(F, op, values, training))
        dense = with_gradients(normext, op, x.contiguous(), training)
        for a, b in zip(found, dense, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", [None, "relu"], ids=["", "relu"])
@pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=list(cases.LAYOUTS))
@pytest.mark.parametrize("op", cases.OPS)
def test_every_combination_of_layouts(op, layout, activation, backend):
    """x, the incoming gradient and the residual lie as they like: the bits are those of copies in the layout of the result."""
    for shape in ((3, 6, (4, 5), 2), (3, 6, (5,), 2), (2, 4, (2, 3, 4), 2)):
        case = cases.ChannelCase(op, *shape, activation=activation, residual=op == "batch_norm")
        t = cases.make(case, backend)
        x = layout(t.x)
        plain = canonical(op, x)
        for dy_layout, residual_layout in itertools.product(cases.LAYOUTS.values(), repeat=2):
            if not case.residual and residual_layout is not cases.contiguous:
                continue
            mixed = replace(t, x=x, dy=dy_layout(t.dy), residual=residual_layout(t.residual) if case.residual else None)
            found = cases.everything(case, mixed)
            cases.assert_same(found, cases.everything(case, mixed.laid_out(plain)), shape, dy_layout, residual_layout)
            assert found[0].stride() == found[1].stride() == plain(x).stride()


@pytest.mark.parametrize("op", ["batch_norm"])
def test_the_residuals_gradient_is_like_the_residual(op, backend):
    """Of its shape and dtype; without an activation it is the incoming gradient."""
    for activation in (None, "relu", "silu"):
        for layout in (cases.contiguous, cases.channels_last, cases.expanded):
            case = cases.ChannelCase(op, 3, 6, (4, 5), residual=True, activation=activation)
            t = cases.make(case, backend)
            t = replace(t, residual=layout(t.residual))
            gradient = cases.strided_gradients(case, t)[1]
            assert gradient.shape == t.residual.shape and gradient.dtype == t.residual.dtype
            assert activation or gradient.equal(t.dy)


@pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=list(cases.LAYOUTS))
@by_mode
def test_fake_tensors_look_like_real_ones(op, training, layout, device):
    for shape in SHAPES[:5]:
        if refused(op, training, shape):
            continue
        for activation in (None, "gelu"):
            x = layout(torch.randn(shape, device=device)).detach()
            extra = {"activation": activation} | ({"residual": x.contiguous()} if op == "batch_norm" else {})
            expected = describe([run(normext, op, x, training, **extra)])
            with FakeTensorMode() as mode:
                extra |= {"residual": mode.from_tensor(extra["residual"])} if op == "batch_norm" else {}
                assert describe([run(normext, op, mode.from_tensor(x), training, **extra)]) == expected, shape
        expected = describe(with_gradients(normext, op, x, training, cases.contiguous))
        with FakeTensorMode() as mode:
            assert describe(with_gradients(normext, op, mode.from_tensor(x), training, cases.contiguous)) == expected, shape


@by_mode
def test_meta_tensors(op, training):
    x = torch.empty(4, 6, 5, 7, device="meta", memory_format=torch.channels_last)
    y = run(normext, op, x, training)
    assert y.device.type == "meta" and y.shape == x.shape
    assert y.stride() == (x.contiguous() if op == "instance_norm" else x).stride()


def attempt(function, *args, **kwargs):
    try:
        return describe(function(*args, **kwargs))
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@by_mode
def test_empty_tensors(op, training, shape, device):
    """No images, no channels or no positions: what torch makes of it. Where it can differentiate that, parameters get zeros."""
    x = torch.randn(shape, device=device)
    expected = attempt(lambda: [run(F, op, x, training)])
    assert attempt(lambda: [run(normext, op, x, training)]) == expected
    if isinstance(expected, list):
        theirs = attempt(with_gradients, F, op, x, training)
        if isinstance(theirs, list):
            found = with_gradients(normext, op, x, training)
            assert describe(found) == theirs and all((g == 0).all() for g in found[2:])


def test_empty_with_everything(device):
    """Residual, activation and all gradients of nothing."""
    x, residual = (torch.empty(0, 6, 4, device=device, requires_grad=True) for _ in range(2))
    weight = torch.ones(6, device=device, requires_grad=True)
    y = normext.batch_norm(x, None, None, weight, None, True, residual=residual, activation="gelu")
    grads = torch.autograd.grad(y.sum(), [x, residual, weight])
    assert y.shape == grads[0].shape == grads[1].shape == x.shape and grads[2].eq(0).all()


@pytest.mark.parametrize("op", cases.OPS)
def test_strides_beyond_32_bits(op, device, backend):
    """A single image claims a stride that needs 64 bits; it takes no memory."""
    case = cases.ChannelCase(op, 1, 4, (4, 4), 2)
    t = cases.make(case, backend, batch=1)
    for stride in (2**31, 2**31 + 8):
        x = t.x.as_strided(t.x.shape, (stride, *t.x.stride()[1:]))
        assert case.call(replace(t, x=x)).equal(case.call(t))


@pytest.mark.parametrize("op", cases.OPS)
def test_second_image_beyond_32_bits(op, device, backend):
    """Images 2^31 elements apart, in 4 GB of which only two pages are touched (on a GPU, the memory is really taken)."""
    buffer = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    case = cases.ChannelCase(op, 2, 4, (4, 4), 2, dtype=torch.float16)
    t = cases.make(case, backend)
    x = buffer.as_strided(t.x.shape, (2**31, *t.x.stride()[1:])).copy_(t.x)
    cases.assert_same(cases.everything(case, replace(t, x=x)), cases.everything(case, t))
    cases.assert_same(cases.everything(case, replace(t, dy=x)), cases.everything(case, replace(t, dy=t.x)))


def free_memory():
    """Bytes that the system and the control group leave, or 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
    group = Path("/sys/fs/cgroup")
    try:
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return free


@pytest.mark.once
@pytest.mark.parametrize("layout", cases.BOTH)
def test_more_values_than_32_bits_count(layout):
    """Two channels whose last values lie beyond 2^31 elements; all but these are zeros, of which the system makes no pages. Without
    the gradient of the input, whose 4 GB would take longer than everything else."""
    if free_memory() < 8 << 30:
        pytest.skip("takes 5 GB")
    height, width, high = 1 << 15, (1 << 15) + 1, 16
    x, dy = (torch.from_numpy(numpy.zeros(2 * height * width, numpy.int16)).view(torch.bfloat16) for _ in range(2))
    shape = (1, 2, height, width)
    x, dy = (t.view(shape) if layout == "contiguous" else t.view(1, height, width, 2).permute(0, 3, 1, 2) for t in (x, dy))
    x[0, 1, -high:] = 1024.0
    dy[0, 1, -1] = 1.0
    mean, square = 1024 * high / height, 1024**2 * high / height
    rstd = (square - mean**2 + 1e-5) ** -0.5
    running = torch.zeros(2), torch.ones(2)
    weight, bias = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    y = normext.batch_norm(x, *running, weight, bias, True, 1.0)
    of_weight, of_bias = torch.autograd.grad(y, (weight, bias), dy)
    assert running[0].tolist() == [0.0, pytest.approx(mean, rel=1e-6)]
    assert running[1].tolist() == [0.0, pytest.approx(square - mean**2, rel=1e-6)]
    assert of_bias.tolist() == [0.0, width]
    assert of_weight.tolist() == [0.0, pytest.approx(width * (1024 - mean) * rstd, rel=1e-6)]
    for row, value in ((-1, 1024), (-high, 1024), (-high - 1, 0), (0, 0)):
        assert y[0, 1, row].tolist() == pytest.approx([(value - mean) * rstd] * width, rel=2**-8), row
    assert not y[0, 0, ::4096].any()


def test_parameters_of_any_layout(backend):
    """Strided and expanded weights and biases, and strided running statistics, whose neighbours keep their bits."""
    for op in cases.OPS:
        case = cases.ChannelCase(op, 3, 6, (4, 5), 2, running=None if op == "group_norm" else torch.float32)
        t = cases.make(case, backend)
        strided = {}
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(t, name)
            strided[name] = None if value is None else torch.stack([value, value], 1)[:, 0]
        neighbours = [s._base[:, 1].clone() for s in strided.values() if s is not None]
        leaves = {name: value for name, value in strided.items() if value is not None and "running" not in name}
        plain = t.fresh()
        found, expected = case.call(replace(t, **strided)), case.call(plain)
        assert found.equal(expected)
        for name in ("running_mean", "running_var"):
            assert strided[name] is None or strided[name].equal(getattr(plain, name))
        cases.assert_same([s._base[:, 1] for s in strided.values() if s is not None], neighbours)
        grads = cases.strided_gradients(case, replace(t, **leaves))
        cases.assert_same(grads, cases.strided_gradients(case, t))
        one = replace(t, weight=torch.tensor(1.5, device=t.x.device).expand(6))
        assert case.call(one.fresh()).equal(case.call(replace(one.fresh(), weight=one.weight.clone())))


@by_mode
def test_special_values_spread_as_in_torch(op, training, device):
    """A NaN or infinity spoils its own slab and no other, in every dtype and layout; in evaluation, only itself."""
    for layout in (cases.contiguous, cases.channels_last):
        for dtype in cases.DTYPES:
            for value, (height, width) in itertools.product((torch.nan, torch.inf, -torch.inf), ((4, 5), (24, 32))):
                x = layout(torch.randn(3, 6, height, width, device=device).to(dtype))
                x[1, 2, 3, 0] = value
                ours, theirs = run(normext, op, x, training), run(F, op, x, training)
                spoilt = torch.zeros_like(ours, dtype=torch.bool)
                if not training:
                    spoilt[1, 2, 3, 0] = value != value
                else:
                    slab = {"batch_norm": (slice(None), 2), "group_norm": (1, slice(0, 3)), "instance_norm": (1, 2)}
                    spoilt[slab[op]] = True
                assert ours.isnan().equal(spoilt), (dtype, value)
                assert layout is not cases.contiguous or ours.isnan().equal(theirs.isnan())


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_activations_of_special_values_are_torchs(activation, device):
    """NaN stays NaN; infinities and extremes give torch's limits in float64, which its vectorised float32 misses."""
    infinity = float("inf")
    large = [88.0, -88.0, -104.0, -700.0, -1e4, 3e38, -3e38, infinity, -infinity, float("nan")]
    values = [0.0, -0.0, 1e-30, -1e-30, 1e-45, -1e-45, *large]
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(values, device=device, dtype=dtype).view(-1, 1)
        zero, one = torch.zeros(1, device=device, dtype=dtype), torch.ones(1, device=device, dtype=dtype)
        found = normext.batch_norm(x, zero, one, eps=0.0, activation=activation)
        expected = getattr(F, activation)(x.double()).to(dtype)
        least = 1e-36 if dtype == torch.float32 else 1e-300
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=least, equal_nan=True)
        ours = x[~x.isinf()].view(-1, 1).requires_grad_()  # at infinities torch's derivatives are NaN, or not, by chance
        theirs = ours.detach().double().requires_grad_()
        normext.batch_norm(ours, zero, one, eps=0.0, activation=activation).sum().backward()
        getattr(F, activation)(theirs).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad.to(dtype), rtol=1e-5, atol=least, equal_nan=True)
