"""A row's result never depends on the batch, its place in it, the thread count, the run, or where it lies in memory."""

import os
import subprocess
import sys
from dataclasses import replace

import cases
import pytest
import torch

# (cols, dtype): one width per schedule. The wide ones are the rows that may be split over blocks or threads.
SHAPES = [
    (40, torch.float32),
    (64, torch.bfloat16),
    (111, torch.float16),
    (769, torch.float32),
    (1024, torch.bfloat16),
    (4096, torch.float32),
]
WIDE = [(16384, torch.float32), (65536, torch.bfloat16), (65537, torch.float32), (200000, torch.float32)]


def rows_of(t, index):
    """The same problem restricted to some rows."""
    picked = {name: getattr(t, name)[index] for name in ("x", "residual", "dy", "dres") if getattr(t, name) is not None}
    return replace(t, **picked)


def results(case, t):
    """Everything that is computed row by row: outputs and the gradient of the input."""
    return [*case.call(t), cases.gradients(case, t)[0]]


def assert_same(found, expected, index):
    for one, all_rows in zip(found, expected, strict=True):
        assert one.equal(all_rows[index])


@pytest.mark.parametrize("cols, dtype", SHAPES)
@pytest.mark.parametrize("op", cases.OPS)
def test_rows_do_not_depend_on_the_batch(op, cols, dtype, backend):
    largest = backend.rows(4097, cols)
    case = cases.Case(op, cols=cols, dtype=dtype, data="mixed")
    t = cases.make(case, backend, rows=largest)
    expected = results(case, t)
    for rows in [r for r in cases.BATCHES if r < largest]:
        for start in {0, (largest - rows) // 2, largest - rows}:
            index = slice(start, start + rows)
            assert_same(results(case, rows_of(t, index)), expected, index)


@pytest.mark.parametrize("cols, dtype", WIDE)
@pytest.mark.parametrize("op", cases.OPS)
def test_wide_rows_do_not_depend_on_the_batch(op, cols, dtype, backend):
    largest = 5 if backend.emulated else 40
    case = cases.Case(op, cols=cols, dtype=dtype, data="mixed")
    t = cases.make(case, backend, rows=largest)
    expected = results(case, t)
    for index in (slice(0, 1), slice(2, 4), slice(largest - 1, largest)):
        assert_same(results(case, rows_of(t, index)), expected, index)


@pytest.mark.parametrize("cols, data", [(192, "tight"), (521, "mixed"), (1024, "mixed"), (1024, "regular"), (5000, "mixed")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", cases.OPS)
def test_rows_from_memory_are_those_from_cache(op, dtype, cols, data, backend):
    """The CPU goes through its rows otherwise where the input exceeds 3 MB, or on AMD 6 MB in 16 bits."""
    if backend.runs_cuda_code:
        pytest.skip("about the CPU's kernels")
    case = cases.Case(op, cols=cols, dtype=dtype, data=data)
    t = cases.make(case, backend, rows=(6 << 20) // (cols * dtype.itemsize) + 3)
    assert t.x.nbytes > 6 << 20
    expected = case.call(t)
    for start in range(0, len(t.x), 50):
        index = slice(start, start + 50)
        assert_same(case.call(rows_of(t, index)), expected, index)
    if case.fused:
        assert expected[0].equal(case.unfused.call(replace(t, x=expected[1], residual=None))[0])


PAST_THE_CACHES = """
import resource
import torch
import normext

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

f32, bf16 = torch.float32, torch.bfloat16
mapped = 0
for dtype, cols in ((f32, 1024), (f32, 1021), (f32, 5008), (bf16, 1024), (bf16, 5000)):
    x = torch.randn((33 << 20) // (cols * dtype.itemsize), cols, dtype=dtype)
    weight, bias = torch.randn(2, cols, dtype=dtype)
    for call in (
        lambda x: normext.layer_norm(x, (cols,), weight, bias),
        lambda x: normext.rms_norm(x, (cols,), weight),
        lambda x: normext.add_rms_norm(x, x, (cols,), weight)[0],
    ):
        for _ in range(4):
            before = faults()
            large = call(x)
            mapped += faults() - before < 1000  # of 8448 pages and more, written for the first time
            assert large.nbytes >= 32 << 20
            for start in (0, len(x) // 2, len(x) - 50):
                rows = slice(start, start + 50)
                assert large[rows].equal(call(x[rows]))
assert mapped >= 10, mapped
"""


def test_output_past_the_caches(backend):
    """From 32 MB on the CPU's output may go past the caches into pages that are mapped: here, where memory is never given back."""
    if backend.runs_cuda_code:
        pytest.skip("about the CPU's kernels")
    keep = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    environment = backend.environment(NORMEXT_HUGE_PAGES="0", NORMEXT_POISON="0", **keep)
    subprocess.run([sys.executable, "-c", PAST_THE_CACHES], env=environment, check=True, timeout=280)


@pytest.mark.parametrize("cols, dtype", SHAPES)
@pytest.mark.parametrize("op", cases.OPS)
def test_permuted_rows_give_permuted_results(op, cols, dtype, backend):
    case = cases.Case(op, rows=300, cols=cols, dtype=dtype, data="mixed")
    t = cases.make(case, backend)
    order = torch.randperm(t.x.shape[0], device=t.x.device)
    assert_same(results(case, rows_of(t, order)), results(case, t), order)


@pytest.mark.parametrize(
    "case", **cases.ids([cases.Case(op, rows=700, cols=c, dtype=d, data="mixed") for op in cases.OPS for c, d in SHAPES])
)
def test_repeated_runs_and_thread_counts(case, backend):
    """Parameter gradients included: bitwise the same in every run and with 1, 2, 3 and 8 threads."""
    t = cases.make(case, backend)
    expected = [*case.call(t), *cases.gradients(case, t)]
    for threads in (1, 2, 3, 8) if backend.device == "cpu" and not backend.emulated else (1, 1, 1):
        torch.set_num_threads(threads)
        for _ in range(3):
            found = [*case.call(t), *cases.gradients(case, t)]
            assert all(one.equal(other) for one, other in zip(found, expected, strict=True)), threads


@pytest.mark.parametrize("rows, cols", [(8, 65536), (1, 200000), (20000, 33), (60, 65536), (70, 20000), (100, 4096)])
@pytest.mark.parametrize("op", ["layer_norm", "add_rms_norm"])
def test_thread_counts_on_unbalanced_shapes(op, rows, cols, backend):
    case = cases.Case(op, rows=rows, cols=cols)
    t = cases.make(case, backend)
    expected = [*case.call(t), *cases.gradients(case, t)]
    for threads in (1, 2, 3, 8) if not backend.runs_cuda_code else (1, 1):
        torch.set_num_threads(threads)
        found = [*case.call(t), *cases.gradients(case, t)]
        assert all(one.equal(other) for one, other in zip(found, expected, strict=True)), threads


@pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=list(cases.LAYOUTS))
@pytest.mark.parametrize("cols, dtype", [(48, torch.float32), (111, torch.bfloat16), (768, torch.bfloat16), (4096, torch.float16)])
@pytest.mark.parametrize("op", cases.OPS)
def test_layout_does_not_change_the_result(op, cols, dtype, layout, backend):
    """Strided, transposed, expanded and misaligned inputs give the bits of their contiguous copies; so do gradients."""
    case = cases.Case(op, rows=24, cols=cols, dtype=dtype)
    t = cases.make(case, backend)
    laid_out = {k: layout(getattr(t, k)) for k in ("x", "residual", "dy", "dres") if getattr(t, k) is not None}
    strided = replace(t, **laid_out)
    plain = replace(t, **{k: v.contiguous().clone() for k, v in laid_out.items()})
    for one, other in zip(case.call(strided), case.call(plain), strict=True):
        assert one.equal(other)
    for one, other in zip(strided_gradients(case, strided), strided_gradients(case, plain), strict=True):
        assert one.equal(other)


def strided_gradients(case, t):
    """Gradients without copying the inputs first: cloning would keep values but change the layout."""
    t = replace(
        t, **{k: getattr(t, k).detach().requires_grad_() for k in ("x", "residual", "weight", "bias") if getattr(t, k) is not None}
    )
    outputs = case.call(t)
    return torch.autograd.grad(outputs, t.leaves(), [t.dy, t.dres][: len(outputs)])


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("op", cases.OPS)
def test_every_alignment_gives_the_same_bits(op, dtype, backend):
    """Every offset of 0 to 15 bytes that the element size allows, for inputs, parameters and gradients."""
    for cols in (64, 96, 1152, 2880):
        case = cases.Case(op, rows=6, cols=cols, dtype=dtype)
        t = cases.make(case, backend)
        expected = [*case.call(t), *strided_gradients(case, t)]
        for offset in range(1, 16 // t.x.element_size()):
            moved = {k: shifted(v, offset) for k, v in vars(t).items() if v is not None}
            found = [*case.call(replace(t, **moved)), *strided_gradients(case, replace(t, **moved))]
            assert all(one.equal(other) for one, other in zip(found, expected, strict=True)), (cols, offset)


def shifted(x, offset):
    buffer = x.new_empty(x.numel() + offset)
    return buffer[offset:].copy_(x.reshape(-1)).view(x.shape)


@pytest.mark.parametrize("op", cases.OPS)
def test_multi_dimensional_normalized_shape(op, backend):
    """(4, 5, 6) normalised over (5, 6) is (4, 30) normalised over 30, parameters and gradients included."""
    case = cases.Case(op, rows=12, cols=30)
    t = cases.make(case, backend)
    shaped = {k: v.view(*v.shape[:-1], 5, 6) for k, v in vars(t).items() if v is not None}
    s = replace(t, **shaped).requires_grad()
    args, extra = case.arguments(s)
    outputs = getattr(__import__("normext"), op)(*[(5, 6) if a == (30,) else a for a in args], **extra)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for one, other in zip(outputs, case.call(t), strict=True):
        assert one.equal(other.view(12, 5, 6))
    grads = torch.autograd.grad(outputs, s.leaves(), [s.dy, s.dres][: len(outputs)])
    for one, other in zip(grads, cases.gradients(case, t), strict=True):
        assert one.equal(other.view(one.shape))


SCHEDULE_PROBE = """
import hashlib, sys, torch
sys.path.insert(0, {tests!r})
import backends, cases
backend = backends.EMULATED
digest = hashlib.sha256()
for op in cases.OPS:
    for rows, cols, dtype in ((70, 40, "float32"), (33, 111, "bfloat16"), (9, 1152, "float16"), (3, 4097, "float32"),
                              (2, 16384, "bfloat16"), (1, 65536, "float32")):
        case = cases.Case(op, rows=rows, cols=cols, dtype=getattr(torch, dtype))
        t = cases.make(case, backend, rows=rows)
        for result in (*case.call(t), *cases.gradients(case, t)):
            digest.update(result.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_emulated_schedules_agree(backend):
    """Whatever order warps and blocks run in, and on both kinds of device (clusters or split rows), the bits are the same."""
    if not backend.emulated:
        pytest.skip("schedules are the emulator's")
    script = SCHEDULE_PROBE.format(tests=os.path.dirname(__file__))
    settings = [{"NORMEXT_SIMT_ORDER": order} for order in ("forward", "reverse", "random:1", "random:2", "random:3")]
    settings += [{"NORMEXT_PDL": "1"}, {"NORMEXT_SIMT_ARCH": "80"}, {"NORMEXT_SIMT_ARCH": "80", "NORMEXT_SIMT_ORDER": "random:4"}]
    digests = {}
    for setting in settings:
        run = subprocess.run([sys.executable, "-c", script], env=backend.environment(**setting), capture_output=True, text=True)
        assert run.returncode == 0, (setting, run.stderr)
        digests[str(setting)] = run.stdout.strip()
    assert len(set(digests.values())) == 1, digests
