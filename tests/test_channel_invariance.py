"""An image's GroupNorm or InstanceNorm never depends on the batch, and nothing depends on threads, runs, addresses or strides."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import channel_cases as cases
import pytest
import torch

# (channels, spatial, groups, dtype): slabs of a few elements, of one segment and of several, odd and even, narrow and wide.
SHAPES = [
    (12, (6, 7), 3, torch.float32),
    (6, (33,), 2, torch.float16),
    (10, (), 5, torch.float32),
    (96, (7, 7), 32, torch.bfloat16),
    (40, (5, 7), 8, torch.bfloat16),
    (128, (3, 5), 2, torch.float32),
    (5, (3, 4, 5), 1, torch.float32),
    (8, (64, 70), 2, torch.bfloat16),
]
# At most 128 segments per group: these are longer than 128 of the usual size.
WIDE = [(2, (520, 530), 1, torch.float32), (4, (290, 500), 1, torch.bfloat16)]
BATCHES = (1, 2, 3, 7, 8, 9, 16)
PER_IMAGE = (("group_norm", True), ("instance_norm", True), ("instance_norm", False), ("batch_norm", False))


def per_image_cases(shapes):
    for op, training in PER_IMAGE:
        for layout in cases.BOTH:
            for channels, spatial, groups, dtype in shapes:
                if not (op == "instance_norm" and not spatial) and not (layout == "channels_last" and len(spatial) < 2):
                    batch = max(3, min(17, (1 << 17) // (channels * torch.Size(spatial).numel())))
                    yield cases.ChannelCase(
                        op, batch, channels, spatial, groups, dtype=dtype, layout=layout, data="mixed", training=training
                    )


def results(case, t):
    """Everything that is computed image by image: outputs and the gradient of the input."""
    return [case.call(t.fresh()), cases.strided_gradients(case, t)[0]]


@pytest.mark.parametrize("activation", [None, "silu"], ids=["", "silu"])
@pytest.mark.parametrize("case", **cases.ids(tuple(per_image_cases(SHAPES))))
def test_images_do_not_depend_on_the_batch(case, activation, backend):
    case = replace(case, activation=activation)
    t = cases.make(case, backend)
    largest = t.x.shape[0]
    expected = results(case, t)
    for images in [b for b in BATCHES if b < largest]:
        for start in {0, largest - images}:
            index = slice(start, start + images)
            cases.assert_same(results(case, t.images(index)), [r[index] for r in expected], index)
    order = torch.randperm(largest, device=t.x.device)
    layout = cases.LAYOUTS[case.layout]
    permuted = t.images(order).laid_out(layout)
    cases.assert_same(results(case, permuted), [r[order] for r in expected], "permuted")


@pytest.mark.parametrize("case", **cases.ids(tuple(per_image_cases(WIDE))))
def test_large_images_do_not_depend_on_the_batch(case, backend):
    if case.op != "group_norm":
        pytest.skip("groups of several channels only")
    largest = 2 if backend.emulated else 5
    t = cases.make(case, backend, batch=largest)
    expected = results(case, t)
    for index in (slice(0, 1), slice(largest - 1, largest)) if backend.emulated else (slice(0, 1), slice(1, 3), slice(4, 5)):
        cases.assert_same(results(case, t.images(index)), [r[index] for r in expected], index)


@pytest.mark.parametrize("least", [3 << 20, 12 << 20], ids=["3MB", "12MB"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_images_from_memory_are_those_from_cache(dtype, least, backend):
    """The CPU takes channels-last rows otherwise from 3 MB of input on: two at a time if wider than 16 bits, one from 12 MB on, and
    fetches ahead."""
    if backend.runs_cuda_code:
        pytest.skip("about the CPU's kernels")
    spatial = (99, 103) if dtype in cases.SIXTEEN_BIT else (69, 73)  # an image is too large to be handled in one go, too
    for op, more in (
        ("group_norm", {}),
        ("group_norm", {"activation": "silu"}),
        ("batch_norm", {"training": False}),
        ("batch_norm", {"training": False, "residual": True, "activation": "relu"}),
    ):
        case = cases.ChannelCase(op, 3, 70, spatial, 7, dtype=dtype, layout="channels_last", **more)
        image_bytes = 70 * spatial[0] * spatial[1] * dtype.itemsize
        t = cases.make(case, backend, batch=least // image_bytes + 1)
        assert t.x.nbytes > least and 3 << 20 > image_bytes > 1 << 20
        expected = results(case, t)
        for image in (0, t.x.shape[0] // 2, t.x.shape[0] - 1):
            index = slice(image, image + 1)
            cases.assert_same(results(case, t.images(index)), [r[index] for r in expected], op, more, image)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_images_in_blocks_of_columns_are_those_in_rows(dtype, backend):
    """On AMD the CPU takes channels-last images of more than L2 or 1 MB, up to 6 MB of them, in blocks of columns; the last is
    narrow."""
    if backend.runs_cuda_code:
        pytest.skip("about the CPU's kernels")
    torch.set_num_threads(1)  # more would have to be kept busy by 4 images
    spatial = {2: (20, 40), 4: (20, 20), 8: (10, 20)}[dtype.itemsize]
    case = cases.ChannelCase("group_norm", 6, 700, spatial, 70, dtype=dtype, layout="channels_last")
    t = cases.make(case, backend)
    assert t.x[:4].nbytes < 6 << 20 < t.x.nbytes and t.x[0].nbytes > 1 << 20
    expected = results(case, t)
    for index in (slice(0, 4), slice(2, 6)):
        cases.assert_same(results(case, t.images(index)), [r[index] for r in expected], index)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("channels", (1000, 2040, 2100))
def test_scalars_of_many_channels(channels, dtype, backend):
    """Where several threads share rows of channels-last, each keeps scalars of its own for up to 2048 channels (2040 fill the
    arrays). A thread alone takes images of float32 in blocks of 320 channels on AMD, unless an activation follows; the last is
    narrow."""
    if backend.runs_cuda_code:
        pytest.skip("about the CPU's kernels")
    shape = (1, channels, (13, 14) if channels == 1000 else (9, 8), channels // 20)
    plain = cases.ChannelCase("group_norm", *shape, dtype=dtype, layout="channels_last")
    t = cases.make(plain, backend)
    fused = replace(plain, activation="relu")
    torch.set_num_threads(1)
    assert plain.call(t).relu().equal(fused.call(t))
    norms = [
        replace(plain, op="batch_norm", **more) for more in ({}, {"training": False}, {"residual": True, "activation": "relu"})
    ]
    for case in (plain, fused, *norms):
        t = cases.make(case, backend)
        torch.set_num_threads(1)
        expected = cases.everything(case, t)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            cases.assert_same(cases.everything(case, t), expected, case.id, threads)


@pytest.mark.parametrize("channels", (1000, 2040, 2100))
def test_scalars_with_the_sums_of_all_ranks(channels, backend):
    """The second half of SyncBatchNorm's backward, whose means come from given sums."""
    if backend.runs_cuda_code:
        pytest.skip("about the CPU's kernels")
    case = cases.ChannelCase("batch_norm", 2, channels, (9, 8), layout="channels_last")
    t = cases.make(case, backend)
    ops = torch.ops.normext
    _, stats = ops.batch_norm_forward(t.x, None, t.weight, t.bias, None, None, 1e-5, 0)
    sums = 2 * ops.batch_norm_backward_sums(t.dy, t.x, stats, None, t.weight, None, 0)  # those of two ranks that hold the same
    count = torch.tensor([2 * t.x.numel() / channels], dtype=torch.float64)
    alone = ops.batch_norm_backward(t.dy, t.x, stats, None, t.weight, t.bias, 0, 0, 1)[0]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = ops.batch_norm_backward_apply(t.dy, t.x, stats, None, t.weight, None, sums, count, 0, 1)[0]
        cases.assert_same([found], [alone], threads)


def test_sums_over_the_batch_are_the_only_ones(backend):
    """Parameter gradients of one image at a time add up to those of the batch."""
    for op in ("group_norm", "instance_norm"):
        for layout in cases.BOTH:
            case = cases.ChannelCase(op, 5, 12, (6, 7), 3, dtype=torch.float64, layout=layout)
            t = cases.make(case, backend)
            whole = cases.strided_gradients(case, t)[1:]
            parts = [cases.strided_gradients(case, t.images(slice(i, i + 1)))[1:] for i in range(5)]
            for one, other in zip(whole, map(sum, zip(*parts, strict=True)), strict=True):
                torch.testing.assert_close(one, other)


def all_cases(shapes, **more):
    for op in cases.OPS:
        for layout in cases.BOTH:
            for batch, channels, spatial, groups in shapes:
                if not (op == "instance_norm" and not spatial) and not (layout == "channels_last" and len(spatial) < 2):
                    running = None if op == "group_norm" else torch.float32
                    yield cases.ChannelCase(op, batch, channels, spatial, groups, layout=layout, running=running, **more)


# Few large slabs, many small ones, one image, one channel: whatever is divided among threads.
UNBALANCED = (
    (7, 12, (9, 7), 3),
    (300, 40, (), 5),
    (1, 1, (300, 211), 1),
    (3, 2, (200, 160), 1),
    (70, 5, (4, 5), 5),
    (2, 700, (6, 5), 7),
    (140, 41, (2, 3), 41),
    (33, 64, (14, 14), 32),
)


@pytest.mark.parametrize("case", **cases.ids(tuple(all_cases(UNBALANCED))))
def test_thread_counts_and_runs(case, backend):
    """Outputs, all gradients and running statistics."""
    t = cases.make(case, backend)
    expected = cases.everything(case, t)
    for threads in (1, 2, 3, 8) if not backend.runs_cuda_code else (1, 1):
        torch.set_num_threads(threads)
        for _ in range(1 if backend.emulated else 2):
            cases.assert_same(cases.everything(case, t), expected, threads)


@pytest.mark.parametrize("more", [{"training": False}, {"residual": True, "activation": "gelu"}], ids=["eval", "fused"])
@pytest.mark.parametrize("layout", cases.BOTH)
def test_thread_counts_of_the_other_batch_norms(layout, more, backend):
    for shape in UNBALANCED:
        if layout == "contiguous" or len(shape[2]) > 1:
            case = cases.ChannelCase("batch_norm", *shape, layout=layout, dtype=torch.bfloat16, **more)
            t = cases.make(case, backend)
            expected = cases.everything(case, t)
            for threads in (1, 3, 8) if not backend.runs_cuda_code else (1,):
                torch.set_num_threads(threads)
                cases.assert_same(cases.everything(case, t), expected, shape, threads)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_thread_counts_where_dz_is_kept(dtype, backend):
    """With an activation that takes long, dz is kept between two passes; in 16 bits in room for each thread, where threads do not
    share groups (one group, and three threads, do), and in channels-last where an image or a few have room."""
    if backend.runs_cuda_code:
        pytest.skip("about the CPU's kernels")
    for shape in ((7, 40, (8, 8), 5), (5, 64, (16, 16), 8), (2, 6, (64, 64), 3), (1, 64, (16, 16), 1), (1, 3, (128, 128), 1)):
        for op, layout in itertools.product(cases.OPS, cases.BOTH):
            case = cases.ChannelCase(op, *shape, layout=layout, dtype=dtype, activation="silu")
            t = cases.make(case, backend)
            torch.set_num_threads(1)
            expected = cases.everything(case, t)
            for threads in (2, 3, 8):
                torch.set_num_threads(threads)
                cases.assert_same(cases.everything(case, t), expected, case.id, threads)
    case = cases.ChannelCase("group_norm", 1, 64, (64, 64), 8, layout="channels_last", dtype=dtype, activation="silu")
    t = cases.make(case, backend, batch=8)
    assert t.x.numel() * 4 > 6 << 20  # of which all is kept, or nothing
    expected = results(case, t)
    cases.assert_same(results(case, t.images(slice(3, 4))), [r[3:4] for r in expected], case.id)


def test_twenty_runs(backend):
    for case in cases.VARIANTS:
        t = cases.make(case, backend)
        expected = cases.everything(case, t)
        for _ in range(20):
            cases.assert_same(cases.everything(case, t), expected, case.id)


def canonical(op, x):
    """The layout in which x is computed: results lie in it, too."""
    x = x.detach()[:1].cpu().double()
    y = getattr(torch.nn.functional, op)(x, *([1] if op == "group_norm" else [None, None, None, None, True]))
    return cases.contiguous if y.is_contiguous() else cases.channels_last


@pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=list(cases.LAYOUTS))
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("op", cases.OPS)
def test_layout_does_not_change_the_result(op, dtype, layout, backend):
    """Strided, permuted, expanded and misaligned inputs give the bits of their dense copies; so do gradients."""
    shapes = ((2, 12, (9, 7), 3), (2, 8, (8, 8), 4), (3, 6, (5,), 2), (2, 6, (3, 4, 5), 2), (2, 1, (5, 8), 1))
    for shape in shapes if dtype == torch.float32 else shapes[:2]:
        case = cases.ChannelCase(op, *shape, dtype=dtype, residual=op == "batch_norm", activation="relu")
        t = cases.make(case, backend)
        strided = t.laid_out(layout)
        plain = strided.laid_out(lambda x, like=strided.x: canonical(op, like)(x).clone())
        cases.assert_same(cases.everything(case, strided), cases.everything(case, plain), shape)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("op", cases.OPS)
def test_every_alignment_gives_the_same_bits(op, dtype, backend):
    """Every offset of 0 to 15 bytes that the element size allows, for inputs, parameters, statistics and gradients."""
    for shape in ((2, 12, (3, 7), 3), (2, 16, (8, 8), 4), (2, 24, (2, 9), 2), (3, 32, (1, 1), 4), (2, 8, (16, 17), 1)):
        for layout in cases.BOTH:
            if op == "instance_norm" and shape[2] == (1, 1):
                continue
            fused = {"residual": op == "batch_norm", "running": None if op == "group_norm" else dtype}
            case = cases.ChannelCase(op, *shape, dtype=dtype, layout=layout, **fused)
            t = cases.make(case, backend)
            expected = cases.everything(case, t)
            for offset in range(1, 16 // t.x.element_size(), 2 if backend.emulated else 1):
                moved = replace(t, **{k: cases.shifted(v, offset) for k, v in vars(t).items() if v is not None})
                cases.assert_same(cases.everything(case, moved), expected, shape, layout, offset)


@pytest.mark.parametrize("case", **cases.ids(cases.VARIANTS))
def test_nothing_outside_the_inputs_matters(case, backend):
    """NaN on both sides of every input changes no result: no kernel reads out of bounds and uses it."""
    t = cases.make(case, backend)
    expected = cases.everything(case, t)
    guarded = replace(t, **{k: between_nan(v) for k, v in vars(t).items() if v is not None})
    found = cases.everything(case, guarded)
    cases.assert_same(found, expected)
    assert not any(result.isnan().any() for result in found)


def between_nan(x, guard=4096):
    buffer = x.new_full((x.numel() + 2 * guard,), float("nan"))
    return buffer.as_strided(x.shape, x.stride(), guard).copy_(x)


@pytest.mark.parametrize("case", **cases.ids(cases.VARIANTS))
def test_inputs_keep_their_bits(case, backend):
    """Gradients included; only the running statistics of training change."""
    t = cases.make(case, backend)
    before = {k: v.clone() for k, v in vars(t).items() if v is not None}
    leaves = replace(t, **{name: getattr(t, name).detach().requires_grad_() for name in t.names()})
    torch.autograd.grad(case.call(leaves), leaves.leaves(), t.dy)
    for name, value in before.items():
        if case.training and "running" in name:
            assert not getattr(t, name).equal(value), name
        else:
            assert getattr(t, name).equal(value), name


SCHEDULE_PROBE = """
import hashlib, sys, torch
sys.path.insert(0, {tests!r})
import backends, channel_cases as cases
from test_channel_invariance import all_cases
backend = backends.EMULATED
digest = hashlib.sha256()
shapes = ((3, 12, (9, 7), 3), (70, 40, (), 5), (1, 1, (100, 61), 1), (2, 70, (6, 5), 7), (2, 4, (64, 70), 2))
for dtype in (torch.float32, torch.bfloat16):
    for case in all_cases(shapes, dtype=dtype, param_dtype=torch.float32):
        for result in cases.everything(case, cases.make(case, backend)):
            digest.update(result.contiguous().view(torch.uint8).numpy().tobytes())
for case in cases.VARIANTS:
    for result in cases.everything(case, cases.make(case, backend)):
        digest.update(result.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_emulated_schedules_agree(backend):
    """Whatever order warps and blocks run in, and for whichever device it is scheduled, the bits are the same."""
    if not backend.emulated:
        pytest.skip("schedules are the emulator's")
    script = SCHEDULE_PROBE.format(tests=os.path.dirname(__file__))
    settings = [{"NORMEXT_SIMT_ORDER": order} for order in ("forward", "reverse", "random:1", "random:2")]
    settings += [{"NORMEXT_PDL": "1"}, {"NORMEXT_SIMT_ARCH": "80", "NORMEXT_SIMT_ORDER": "random:4"}]
    digests = {}
    for setting in settings:
        run = subprocess.run([sys.executable, "-c", script], env=backend.environment(**setting), capture_output=True, text=True)
        assert run.returncode == 0, (setting, run.stderr)
        digests[str(setting)] = run.stdout.strip()
    assert len(set(digests.values())) == 1, digests
