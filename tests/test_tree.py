"""The reduction tree of a row fixes its bits: every legal mapping to threads, every alignment and every row stride agree.

Mappings are forced through `plan()`: all legal combinations of the numbers in legal_mappings(), at alignments and strides taken in
turn; the default mapping and one other are tried at all of these.
"""

import itertools
from dataclasses import replace
from functools import partial

import cases
import oracle
import pytest
import torch

from normext import _library

# The mappings that are legal on the device at hand, or on the emulated one.
ARCH = 90
if _library.BACKEND == "_C" and torch.cuda.is_available():
    MAJOR, MINOR = torch.cuda.get_device_capability()
    ARCH = 10 * MAJOR + MINOR
PLAN = partial(_library.C.plan, arch=ARCH)
TIERS = ("registers", "shared", "split")
DIRECTIONS = ("forward", "backward")
COMPLETE = [(n, d) for n in cases.TREE_WIDTHS for d in (torch.float32, torch.bfloat16)]
COMPLETE += [(n, torch.float64) for n in (111, 1152, 4096)]


@pytest.fixture(autouse=True)
def no_override_survives(backend):
    if not backend.runs_cuda_code:
        pytest.skip("mappings are those of CUDA")
    yield
    for direction in DIRECTIONS:
        PLAN(direction, "float32", 1, 1, override={})


def name(dtype):
    return str(dtype).removeprefix("torch.")


def legal_mappings(direction, dtype, rows, cols):
    """Every mapping that plan() accepts, out of all combinations of some numbers: powers of two and one or two others."""
    segments = PLAN(direction, name(dtype), rows, cols)["segments"]
    exact = {-(-segments // warps) for warps in (1, 3, 8, 16)}  # blocks that just cover the row
    for tier, warps, at_once, blocks, repeats in itertools.product(
        TIERS, (1, 2, 3, 4, 6, 8, 16), (1, 2, 3, 4, 8, 16, 64), sorted({1, 2, 4, 8, 16} | exact), (1, 3)
    ):
        mapping = {"tier": tier, "warps": warps, "rows_at_once": at_once, "blocks_per_row": blocks, "repeats": repeats}
        try:
            PLAN(direction, name(dtype), rows, cols, override=mapping)
        except RuntimeError:
            continue
        PLAN(direction, name(dtype), rows, cols, override={})
        yield mapping


def placements(element_size, cols):
    """Byte offsets 0 to 15 in steps of an element; rows contiguous, or apart by one element or one vector more."""
    offsets, gaps = range(16 // element_size), (0, 1, 16 // element_size)
    if cols > 4097:  # expensive: all offsets, all gaps, but not all pairs
        return [*((offset, 0) for offset in offsets), *((0, gap) for gap in gaps[1:]), (1, 1)]
    return list(itertools.product(offsets, gaps))


def placed(x, offset, gap):
    """The values of x at an offset of some elements, `gap` elements between rows."""
    rows, cols = x.shape if x.dim() == 2 else (1, x.shape[0])
    buffer = x.new_full((offset + rows * (cols + gap),), float("nan"))
    view = buffer[offset:].view(rows, cols + gap)[:, :cols]
    view.copy_(x)
    return view if x.dim() == 2 else view[0]


def run(direction, case, t, placement=(0, 0)):
    t = replace(t, **{k: placed(v, *placement) for k, v in vars(t).items() if v is not None})
    if direction == "forward":
        return case.call(t)
    leaves = {k: v.detach().requires_grad_() for k, v in vars(t).items() if v is not None and k[0] != "d"}
    t = replace(t, **leaves)
    outputs = case.call(t)
    return torch.autograd.grad(outputs, t.leaves(), [t.dy, t.dres][: len(outputs)])


def rows_for(direction, cols, backend):
    """Enough rows to fill a block several times where rows are short; two where they are long."""
    few = 2 if cols > 4097 else 5
    many = 150 if direction == "forward" else 300
    return many if cols <= 128 else few


@pytest.mark.parametrize("op", ["add_layer_norm", "rms_norm"])
@pytest.mark.parametrize("cols, dtype", COMPLETE, ids=[f"{n}-{name(d)}" for n, d in COMPLETE])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_mapping_and_alignment_change_no_bit(direction, cols, dtype, op, backend, record_property):
    rows = rows_for(direction, cols, backend)
    case = cases.Case(op, cols=cols, dtype=dtype, data="mixed")
    t = cases.make(case, backend, rows=rows)
    expected = run(direction, case, t)
    everywhere = placements(t.x.element_size(), cols)

    def check(placement, mapping):
        found = run(direction, case, t, placement)
        assert all(one.equal(other) for one, other in zip(found, expected, strict=True)), (mapping, placement)

    for placement in everywhere:
        check(placement, "default")
    mappings = list(legal_mappings(direction, dtype, rows, cols))
    assert len(mappings) > 1
    for index, mapping in enumerate(mappings):
        PLAN(direction, name(dtype), rows, cols, override=mapping)
        chosen = everywhere if index == len(mappings) // 2 and cols <= 4097 else [everywhere[index % len(everywhere)]]
        for placement in chosen:
            check(placement, mapping)
        PLAN(direction, name(dtype), rows, cols, override={})


def test_more_blocks_than_16_bits_count(backend):
    """70 000 rows, one row per block: nothing may depend on a grid dimension that ends at 65535."""
    case = cases.Case("layer_norm", cols=8)
    t = cases.make(case, backend, rows=70000)
    expected = case.call(t)[0]
    PLAN("forward", "float32", 70000, 8, override={"rows_at_once": 1})
    assert case.call(t)[0].equal(expected)
    assert oracle.forward_error(case, t, expected) <= oracle.LIMIT


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tree_is_a_function_of_width_and_size_only(direction):
    """Not of the number of rows or the architecture, and it covers the row as core/row_tree.h says."""
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("float64", 8)):
        for cols in (*cases.WIDTHS, 100003, 262144, 1 << 20):
            keys = ("vector", "lanes", "slots", "segments", "segment_cols")
            trees = {
                tuple(PLAN(direction, dtype, rows, cols, arch=arch)[k] for k in keys)
                for rows in (1, 7, 4096, 1 << 20)
                for arch in (80, 86, 89, 90, 100, 120)
            }
            assert len(trees) == 1
            vector, lanes, slots, segments, segment_cols = trees.pop()
            assert cols % vector == 0 and vector * size <= 16 and vector & (vector - 1) == 0
            assert vector * size == 16 or cols % (2 * vector)
            assert segments == -(-cols // (1024 if direction == "forward" else 256))
            assert segment_cols == vector * lanes * slots and segment_cols * segments >= cols
            assert slots == 1 or vector * lanes * (slots - 1) * segments < cols
            assert lanes == (8 if cols // vector <= 8 else 16 if cols // vector <= 16 else 32)


def test_number_of_runs_depends_on_rows_only():
    for rows in (1, 7, 8, 9, 2048, 4095, 4096, 4097, 65536, 1 << 20):
        runs = {PLAN("backward", "float32", rows, cols, arch=arch)["runs"] for cols in (8, 768, 65536) for arch in (80, 90, 120)}
        assert runs == {max(min(-(-rows // 8), 512), -(-rows // 256))}


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_what_is_chosen_can_run(arch):
    """On every architecture, whose shared memory is from 99 to 227 KB: plan() checks what it is told to use."""
    for direction, dtype in itertools.product(DIRECTIONS, ("float32", "bfloat16", "float64")):
        for cols in (*cases.WIDTHS, *cases.TREE_WIDTHS, 100003, 262144):
            for rows in (1, 2, 33, 300, 4096, 1 << 20):
                chosen = PLAN(direction, dtype, rows, cols, arch=arch)
                mapping = {k: chosen[k] for k in ("tier", "warps", "rows_at_once", "blocks_per_row", "repeats")}
                PLAN(direction, dtype, rows, cols, arch=arch, override=mapping)
                PLAN(direction, dtype, rows, cols, override={})


def test_plan_refuses_what_cannot_run():
    for mapping, word in (
        ({"tier": "registers", "warps": 99}, "warps"),
        ({"tier": "warp"}, "tier"),
        ({"threads": 1}, "expected"),
        ({"tier": "split", "rows_at_once": 2}, "one at a time"),
        ({"tier": "shared", "blocks_per_row": 2}, "one block"),
        ({"repeats": 2}, "repeats"),
    ):
        with pytest.raises(RuntimeError, match=word):
            PLAN("forward", "float32", 8, 4096, override=mapping)
    for wrong in (("sideways", "float32"), ("forward", "int8")):
        with pytest.raises(RuntimeError, match="expected"):
            PLAN(*wrong, 1, 8)
