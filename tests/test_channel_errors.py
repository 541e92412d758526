"""Bad input to the channel norms: torch's class and text, and nothing written before it is refused."""

import importlib
from fractions import Fraction

import channel_cases as cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_errors import attempt
from torch import nn

import normext

X = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(5))


def batch_norm_calls(device):
    x = X.to(device)
    m, v = torch.zeros(6, device=device), torch.ones(6, device=device)
    w, b = torch.ones(6, device=device), torch.zeros(6, device=device)
    train = (m, v, w, b, True, 0.1)
    return {
        "running_mean size": (x, m[:5], v),
        "running_var size": (x, m, v[:5]),
        "weight size": (x, m, v, w[:5]),
        "bias size": (x, m, v, w, b[:5]),
        "weight size in training": (x, m, v, w[:5], b, True),
        "larger weight": (x, m, v, torch.ones(7, device=device), b),
        "2-D running_mean": (x, m[None], v),
        "no statistics in evaluation": (x, None, None),
        "running_mean only": (x, m, None),
        "running_var only": (x, None, v),
        "eps zero in training": (x, *train, 0.0),
        "eps negative in training": (x, *train, -1.0),
        "eps negative in evaluation": (x, m, v, w, b, False, 0.1, -1e-6),
        "eps a string": (x, m, v, w, b, False, 0.1, "small"),
        "eps None": (x, m, v, w, b, False, 0.1, None),
        "momentum None": (x, m, v, w, b, True, None),
        "momentum a string": (x, m, v, w, b, True, "a"),
        "momentum a fraction": (x, m, v, w, b, True, Fraction(1, 10)),
        "momentum an array": (x, m, v, w, b, True, np.array(0.1)),
        "momentum with a gradient": (x, m, v, w, b, True, torch.tensor(0.1, requires_grad=True)),
        "training an int": (x, m, v, w, b, 1),
        "training None": (x, m, v, w, b, None),
        "int64 input": (x.long(), m, v),
        "int32 input": (x.int(), m, v),
        "bool input": (x > 0, m, v),
        "integers in training": (x.long(), m, v, w, b, True),
        "zero dims": (torch.tensor(1.0, device=device), m, v),
        "one dim": (x[0, 0], m, v),
        "zero dims in training": (torch.tensor(1.0, device=device), None, None, None, None, True),
        "one dim in training": (x[0, 0], None, None, None, None, True),
        "one value per channel": (x[:1, :, 0], m, v, w, b, True),
        "one value per channel, 3-D": (x[:1, :, :1], m, v, w, b, True),
        "half weight": (x, m, v, w.half(), b.half()),
        "half bias": (x, m, v, w, b.half()),
        "half statistics": (x, m.half(), v.half()),
        "half running_mean": (x, m.half(), v),
        "half all but statistics": (x.half(), m, v, w.half(), b.half()),
        "half all but bias": (x.half(), m, v, w, b.half()),
        "bf16 input, half weight": (x.bfloat16(), m, v, w.half(), b.half()),
        "f64 input": (x.double(), m, v, w, b),
        "integer statistics": (x, m.long(), v.long()),
        "meta weight": (x, m, v, w.to("meta")),
        "meta running_mean": (x, m.to("meta"), v),
        "a list": ([1.0, 2.0], m, v),
        "None": (None, m, v),
        "weight a number": (x, m, v, 3.0),
        "running_mean a number": (x, 0.0, v),
    }


def group_norm_calls(device):
    x = X.to(device)
    w, b = torch.ones(6, device=device), torch.zeros(6, device=device)
    return {
        "one dim": (x[0, 0], 1),
        "zero dims": (torch.tensor(1.0, device=device), 1),
        "not divisible": (x, 4),
        "more groups than channels": (x, 12),
        "huge groups": (x, 2**40),
        "zero groups": (x, 0),
        "negative groups": (x, -2),
        "groups a float": (x, 2.0),
        "groups a string": (x, "2"),
        "groups None": (x, None),
        "weight size": (x, 2, w[:5]),
        "bias size": (x, 2, w, b[:5]),
        "weight 2-D": (x, 2, w[None]),
        "int64 input": (x.long(), 2),
        "bool input": (x > 0, 2),
        "one value per group": (x[:1, :, 0], 6),
        "one value per group, 3-D": (x[:1, :, :1], 6),
        "half weight": (x, 2, w.half(), b.half()),
        "half bias": (x, 2, w, b.half()),
        "bf16 input, half weight": (x.bfloat16(), 2, w.half(), b.half()),
        "f64 input": (x.double(), 2, w, b),
        "meta weight": (x, 2, w.to("meta")),
        "sparse input": (x.to_sparse(), 2),
        "eps a string": (x, 2, None, None, "small"),
        "eps None": (x, 2, None, None, None),
        "a list": ([1.0], 2),
        "None": (None, 2),
        "weight a number": (x, 2, 3.0),
    }


def instance_norm_calls(device):
    x = X.to(device)
    m, v = torch.zeros(6, device=device), torch.ones(6, device=device)
    w, b = torch.ones(6, device=device), torch.zeros(6, device=device)
    return {
        "two dims": (x[0],),
        "one dim": (x[0, 0],),
        "zero dims": (torch.tensor(1.0, device=device),),
        "one position": (x[:, :, :1],),
        "no statistics": (x, None, None, None, None, False),
        "running_mean only": (x, m, None),
        "running_mean only, evaluation": (x, m, None, None, None, False),
        "weight size": (x, None, None, w[:5]),
        "bias size": (x, None, None, w, b[:5]),
        "weight size in evaluation": (x, m, v, w[:5], None, False),
        "running_mean size": (x, m[:5], v),
        "running_var size": (x, m, v[:5]),
        "running_mean size in evaluation": (x, m[:5], v, None, None, False),
        "weight 2-D": (x, None, None, w[None]),
        "int64 input": (x.long(),),
        "half weight": (x, None, None, w.half()),
        "f64 input": (x.double(), None, None, w, b),
        "meta weight": (x, None, None, w.to("meta")),
        "sparse input": (x.to_sparse(),),
        "a list": ([1.0],),
        "None": (None,),
        "weight a number": (x, None, None, 3.0),
        "eps a string": (x, None, None, None, None, True, 0.1, "small"),
        "eps None": (x, None, None, None, None, True, 0.1, None),
        "momentum None": (x, m, v, None, None, True, None),
    }


CALLS = {"batch_norm": batch_norm_calls, "group_norm": group_norm_calls, "instance_norm": instance_norm_calls}
NAMES = [(op, name) for op, calls in CALLS.items() for name in calls("cpu")]
STATISTICS = {"batch_norm": (1, 2), "group_norm": (), "instance_norm": (1, 2)}


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("op, name", NAMES, ids=[f"{op}-{name}" for op, name in NAMES])
def test_torchs_class_and_text(op, name, grad, device):
    """In grad mode too: the checks must not depend on which op serves the call. Statistics keep their bits."""
    args = CALLS[op](device)[name]
    if grad:
        args = tuple(
            a.clone().requires_grad_()
            if isinstance(a, torch.Tensor) and a.is_floating_point() and not a.is_sparse and i not in STATISTICS[op]
            else a
            for i, a in enumerate(args)
        )
    statistics = [args[i] for i in STATISTICS[op] if i < len(args) and isinstance(args[i], torch.Tensor)]
    before = [s.clone() for s in statistics]
    found = attempt(getattr(normext, op), *args)
    assert all(one.is_meta or one.equal(other) for one, other in zip(statistics, before, strict=True))
    expected = attempt(getattr(F, op), *args)
    assert found == expected and expected is not None


@pytest.mark.parametrize("op", cases.OPS)
def test_sparse_complex_and_missing_arguments(op, device):
    """Texts that name other operators or files: the class is torch's."""
    x = X.to(device)
    tail = {"batch_norm": (None, None, None, None, True), "group_norm": (2,), "instance_norm": ()}[op]
    for args in ((x.to_sparse(), *tail), (x.to(torch.complex64), *tail), ()):
        found, expected = attempt(getattr(normext, op), *args), attempt(getattr(F, op), *args)
        assert found is not None and found[0] == expected[0]


def test_odd_values_do_as_torch_does(device):
    """eps 0 where torch takes it, infinite, NaN and tiny; momentum negative, above 1, infinite and NaN."""
    x = torch.cat([X, torch.ones(1, 6, 5)]).to(device)
    for eps in (0.0, 1e-45, 1e30, float("inf"), float("nan")):
        for op, args in (
            ("batch_norm", (x.new_zeros(6), x.new_ones(6), None, None, False, 0.1, eps)),
            ("batch_norm", (None, None, None, None, True, 0.1, eps)),
            ("group_norm", (2, None, None, eps)),
            ("group_norm", (2, None, None, -eps)),
            ("instance_norm", (None, None, None, None, True, 0.1, eps)),
        ):
            if attempt(getattr(F, op), x, *args) is None:
                ours, theirs = getattr(normext, op)(x, *args), getattr(F, op)(x, *args)
                torch.testing.assert_close(ours[:4], theirs[:4], rtol=1e-4, atol=1e-5, equal_nan=True)
    for momentum in (-0.5, 1.5, float("inf"), float("nan"), 1, np.float32(0.1), torch.tensor(0.1)):
        results = []
        for library in (normext, F):
            buffers = [x.new_zeros(6), x.new_ones(6)]
            results.append([library.batch_norm(x, *buffers, None, None, True, momentum), *buffers])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("activation", ["tanh", "", "ReLU", 1, True, ["relu"], torch.relu])
@pytest.mark.parametrize("op", cases.OPS)
def test_unknown_activations(op, activation, device):
    buffers = {"batch_norm": (None, None, None, None, True), "group_norm": (2,), "instance_norm": ()}[op]
    kind, text = attempt(getattr(normext, op), X.to(device), *buffers, activation=activation) or (None, None)
    assert kind == "ValueError" and text.startswith(f"{op}: expected activation") and "leaky_relu" in text


def bad_residuals(device):
    x = X.to(device)
    return {
        "shape": x[:, :5],
        "batch": x[:2],
        "broadcast": x[:1],
        "one more dim": x[None],
        "transposed": x.transpose(0, 2),
        "dtype": x.half(),
        "wider dtype": x.double(),
        "integers": x.long(),
        "device": x.to("meta"),
        "sparse": x.to_sparse(),
        "a number": 1.0,
        "a list": [1.0],
    }


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("name", bad_residuals("cpu"))
def test_bad_residuals_are_refused_in_one_sentence(name, grad, training, device):
    """They have no torch namesake. Running statistics are not written."""
    x, buffers = X.to(device).clone().requires_grad_(grad), [torch.zeros(6, device=device), torch.ones(6, device=device)]
    residual = bad_residuals(device)[name]
    kind, text = attempt(normext.batch_norm, x, *buffers, training=training, residual=residual) or (None, None)
    assert kind in ("RuntimeError", "ValueError", "TypeError", "NotImplementedError")
    assert text and "\n" not in text and ".cpp" not in text and ".h:" not in text
    if isinstance(residual, torch.Tensor) and not residual.is_sparse:
        assert text.startswith("batch_norm: expected"), text
    assert buffers[0].eq(0).all() and buffers[1].eq(1).all()


@pytest.mark.parametrize("op", cases.OPS)
def test_extras_are_keyword_only(op, device):
    """Another positional argument is Python's TypeError, as in torch."""
    x = X.to(device)
    args = {
        "batch_norm": (None, None, None, None, True, 0.1, 1e-5, x),
        "group_norm": (2, None, None, 1e-5, "relu"),
        "instance_norm": (None, None, None, None, True, 0.1, 1e-5, "relu"),
    }[op]
    assert attempt(getattr(normext, op), x, *args)[0] == "TypeError"
    if op != "batch_norm":
        assert attempt(lambda: getattr(normext, op)(x, *args[:-1], residual=x))[0] == "TypeError"


def module_calls():
    """name: (class, constructor arguments, keywords, shapes of inputs)."""
    return {
        "BatchNorm1d": ((6,), {}, [(6,), (4, 6, 5, 2), (1, 6), (1, 6, 1), (4, 5), (4, 7, 3)]),
        "BatchNorm2d": ((6,), {}, [(6,), (4, 6, 5), (1, 6, 1, 1), (4, 5, 2, 2), (2, 6, 3, 4, 5)]),
        "BatchNorm3d": ((6,), {}, [(4, 6, 5, 2), (1, 6, 1, 1, 1), (4, 5, 2, 2, 2)]),
        "SyncBatchNorm": ((6,), {}, [(6,), (4, 5, 2), (1, 6), (4, 0, 2)]),
        "GroupNorm": ((2, 6), {}, [(6,), (4, 5, 3), (4, 8, 3), (1, 2, 1)]),
        "InstanceNorm1d": ((6,), {"affine": True}, [(6,), (4, 7, 5), (4, 6, 5, 2), (4, 6, 1), (7, 5)]),
        "InstanceNorm2d": ((6,), {"affine": True}, [(4, 6), (4, 7, 5, 2), (4, 6, 1, 1), (6, 1, 1)]),
        "InstanceNorm3d": ((6,), {"affine": True}, [(4, 6, 5), (4, 7, 5, 2, 2), (4, 6, 1, 1, 1)]),
    }


@pytest.mark.python
@pytest.mark.parametrize("name", module_calls())
def test_modules_refuse_as_torchs(name, device):
    args, kwargs, shapes = module_calls()[name]
    ours, theirs = (getattr(library, name)(*args, **kwargs).to(device) for library in (normext, nn))
    for shape in shapes:
        for mode in (True, False):
            x = torch.randn(shape, device=device)
            expected = attempt(theirs.train(mode), x)
            assert attempt(ours.train(mode), x) == expected, (shape, mode)
        for key, value in ours.state_dict().items():
            assert key == "num_batches_tracked" or value.isfinite().all(), (shape, key)


@pytest.mark.python
@pytest.mark.parametrize(
    "name, args",
    [("GroupNorm", (3, 10)), ("GroupNorm", (0, 10)), ("GroupNorm", ("2", 10)), ("BatchNorm2d", (-1,)), ("BatchNorm2d", ("6",))],
)
def test_constructors_refuse_as_torchs(name, args):
    expected = attempt(getattr(nn, name), *args)
    assert attempt(getattr(normext, name), *args) == expected


@pytest.mark.parametrize("op", cases.OPS)
def test_no_memory_is_torchs_class(op, device):
    """A result larger than any memory: RuntimeError on the CPU, torch.OutOfMemoryError on CUDA, never MemoryError."""
    huge = torch.zeros(1, device=device).expand(2**40, 8, 4)
    args = {"batch_norm": (None, None, None, None, True), "group_norm": (2,), "instance_norm": ()}[op]
    with pytest.raises(torch.OutOfMemoryError if device == "cuda" else RuntimeError):
        getattr(normext, op)(huge, *args)


@pytest.mark.parametrize("op", ["batch_norm", "group_norm"])
def test_no_memory_in_backward_is_torchs_class(op, device, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    module = importlib.import_module(f"normext.{op}")
    monkeypatch.setattr(module, "_backward", module._backward._replace(direct=no_memory))
    args = {"batch_norm": (None, None, None, None, True), "group_norm": (2,)}[op]
    y = getattr(normext, op)(X.to(device).clone().requires_grad_(), *args)
    with pytest.raises(torch.OutOfMemoryError if device == "cuda" else RuntimeError, match="no memory"):
        y.sum().backward()


@pytest.mark.parametrize("op", cases.OPS)
def test_ops_are_registered_for_both_devices(op):
    """A CPU-only build has a CUDA stub, which says in one sentence what is missing."""
    op = "batch_norm" if op == "batch_norm" else "group_norm"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"normext::{op}", "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"normext::{op}", "CUDA")
