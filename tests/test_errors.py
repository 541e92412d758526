"""Bad input: torch's class and text, compared with torch's own function as installed, and nothing changed by the attempt."""

import importlib

import cases
import pytest
import torch
import torch.nn.functional as F

import normext

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))


def attempt(function, *args, **kwargs):
    """(class name, text) of what is raised, or None."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


# name: (ops, arguments). Parameters and shapes that torch refuses, and some odd ones that it accepts.
def bad_calls(device):
    x = X.to(device)
    half = x.half()
    weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device)
    both = ("layer_norm", "rms_norm")
    return {
        "empty normalized_shape": (both, (x, ())),
        "wrong normalized_shape": (both, (x, (7,))),
        "two wrong dims": (both, (x, (3, 8))),
        "more dims than input": (both, (x, (2, 4, 8))),
        "zero-dim input": (both, (torch.tensor(1.0, device=device), (1,))),
        "wrong weight shape": (both, (x, (8,), weight[:7])),
        "weight with more dims": (both, (x, (8,), weight[None])),
        "wrong bias shape": (("layer_norm",), (x, (8,), weight, bias[:3])),
        "integer input": (both, (x.long(), (8,))),
        "int32 input": (both, (x.int(), (8,))),
        "bool input": (both, (x > 0, (8,))),
        "integer weight": (("layer_norm",), (x, (8,), weight.long())),
        "not a tensor": (both, ([1.0, 2.0], (2,))),
        "None input": (both, (None, (2,))),
        "weight not a tensor": (both, (x, (8,), 3.0)),
        "string shape": (both, (x, "8")),
        "set shape": (both, (x, {8})),
        "range shape": (both, (x, range(8, 9))),
        "iterator shape": (both, (x, iter([8]))),
        "tensor shape": (both, (x, torch.tensor([8]))),
        "float shape": (both, (x, (8.0,))),
        "negative shape": (both, (x, (-8,))),
        "eps is a string": (("layer_norm",), (x, (8,), None, None, "small")),
        "eps is None": (("layer_norm",), (x, (8,), None, None, None)),
        "eps is a string, rms": (("rms_norm",), (x, (8,), None, "small")),
        "half weight": (("layer_norm",), (x, (8,), weight.half(), bias.half())),
        "half bias only": (("layer_norm",), (x, (8,), weight, bias.half())),
        "float weight and half bias": (("layer_norm",), (half, (8,), weight, bias.half())),
        "bf16 input, half weight": (("layer_norm",), (x.bfloat16(), (8,), weight.half(), bias.half())),
        "f64 input, f32 weight": (("layer_norm",), (x.double(), (8,), weight, bias)),
        "meta weight": (both, (x, (8,), weight.to("meta"))),
        "meta bias": (("layer_norm",), (x, (8,), weight, bias.to("meta"))),
        "sparse input": (both, (x.to_sparse(), (8,))),
        "no shape": (both, (x,)),
        "too many arguments": (both, (x, (8,), weight, bias, 1e-5, True, 3, 4)),
    }


NAMES = [(op, name) for name, (ops, _) in bad_calls("cpu").items() for op in ops]


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("op, name", NAMES, ids=[f"{op}-{name}" for op, name in NAMES])
def test_torchs_class_and_text(op, name, grad, device):
    """In grad mode too: the checks must not depend on which op serves the call."""
    args = bad_calls(device)[name][1]
    if grad:
        args = tuple(
            a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() and not a.is_sparse else a
            for a in args
        )
    expected = attempt(getattr(F, op), *args)
    found = attempt(getattr(normext, op), *args)
    if name in ("no shape", "too many arguments"):  # Python's own text names the function and its extra keywords
        assert found[0] == expected[0] == "TypeError"
    else:
        assert found == expected


def mixes(device):
    x, weight = X.to(device), torch.rand(8, device=device)
    for activation in (*cases.DTYPES, torch.complex64):
        for parameter in (*cases.DTYPES, torch.int64):
            yield x.to(activation), weight.to(parameter)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_other_rms_norm_mixes_do_as_torch_does(device):
    """Mixes that no kernel takes run torch's composite formula: same values, dtype and errors."""
    for x, weight in mixes(device):
        expected = attempt(F.rms_norm, x, (8,), weight)
        assert attempt(normext.rms_norm, x, (8,), weight) == expected
        if expected is None:
            ours, theirs = normext.rms_norm(x, (8,), weight), F.rms_norm(x, (8,), weight)
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("extras", [{"weight_offset": 1.0}, {"rounding": "llama"}])
def test_complex_input_has_no_extras(extras, device):
    x = X.to(device).to(torch.complex64)
    for call in (lambda: normext.rms_norm(x, (8,), **extras), lambda: normext.add_rms_norm(x, x, (8,), **extras)):
        with pytest.raises(TypeError, match=r"real floating-point input, got torch\.complex64"):
            call()


@pytest.mark.parametrize("rounding", ["gemma", "", None, 1, ["torch"]])
def test_unknown_rounding(rounding, device):
    x = X.to(device)
    for call in (normext.rms_norm, lambda x, *args, **extras: normext.add_rms_norm(x, x, *args, **extras)):
        with pytest.raises(ValueError, match="expected rounding 'torch' or 'llama'"):
            call(x, (8,), rounding=rounding)
    with pytest.raises(ValueError, match="expected rounding"):
        normext.RMSNorm(8, rounding=rounding)


def test_inference_tensor_with_a_trained_weight(device):
    """As torch's rms_norm, which saves what it makes of the input."""
    with torch.inference_mode():
        x = X.to(device).clone()
    weights = [torch.ones(8, device=device, requires_grad=True) for _ in range(2)]
    for function, weight in zip((normext.rms_norm, F.rms_norm), weights, strict=True):
        function(x, (8,), weight).sum().backward()
    torch.testing.assert_close(*(weight.grad for weight in weights))


def test_layer_norm_mixes_do_as_torch_does(device):
    """On a GPU, too, as on the CPU, where torch takes float32 parameters with 16-bit input."""
    for x, weight in mixes(device):
        expected = attempt(F.layer_norm, x.cpu(), (8,), weight.cpu(), weight.cpu())
        found = attempt(normext.layer_norm, x, (8,), weight, weight)
        assert found == expected, (x.dtype, weight.dtype)


def fused_calls(device):
    x, weight = X.to(device), torch.ones(8, device=device)
    return {
        "residual shape": (x, x[:2], (8,)),
        "residual broadcast": (x, x[:1], (8,)),
        "residual dtype": (x, x.half(), (8,)),
        "residual device": (x, x.to("meta"), (8,)),
        "normalized_shape": (x, x, (7,)),
        "empty normalized_shape": (x, x, ()),
        "weight shape": (x, x, (8,), weight[:4]),
        "integers": (x.long(), x.long(), (8,)),
        "weight dtype": (x, x, (8,), weight.double()),
        "input None": (None, x, (8,)),
        "residual None": (x, None, (8,)),
        "weight a list": (x, x, (8,), [1.0] * 8),
        "shape a number": (x, x, 8),
        "shape of floats": (x, x, (8.0,)),
    }


@pytest.mark.parametrize("name", fused_calls("cpu"))
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_fused_ops_refuse_in_one_sentence(op, name, device):
    """These have no torch namesake: a class that torch would use, what was expected and what was given, no file paths."""
    if op == "add_rms_norm" and name == "weight dtype":
        pytest.skip("RMSNorm accepts any mix, as torch does")
    kind, text = attempt(getattr(normext, op), *fused_calls(device)[name]) or (None, None)
    assert kind in ("RuntimeError", "ValueError", "TypeError", "NotImplementedError")
    assert text and "\n" not in text and ".cpp" not in text and ".h:" not in text


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_float_shapes_are_refused_under_transforms_too(op, device):
    """(8.0,) equals (8,), but torch refuses it."""
    norm, x = getattr(normext, op), X.to(device)
    for call in (lambda x: norm(x, (8.0,)), torch.func.vmap(lambda x: norm(x, (8.0,)))):
        with pytest.raises(TypeError):
            call(x)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_no_memory_is_torchs_class(op, device):
    """A result larger than any memory: RuntimeError on the CPU, torch.OutOfMemoryError on CUDA, never MemoryError."""
    huge = torch.zeros(1, device=device).expand(2**44, 8)
    arguments = (huge, huge, (8,)) if op.startswith("add") else (huge, (8,))
    with pytest.raises(torch.OutOfMemoryError if device == "cuda" else RuntimeError):
        getattr(normext, op)(*arguments)


def test_no_memory_in_backward_is_torchs_class(device, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    module = importlib.import_module("normext.layer_norm")
    monkeypatch.setattr(module, "_backward", module._backward._replace(direct=no_memory))
    y = normext.layer_norm(X.to(device).clone().requires_grad_(), (8,))
    with pytest.raises(torch.OutOfMemoryError if device == "cuda" else RuntimeError, match="no memory"):
        y.sum().backward()


@pytest.mark.once
def test_no_memory_is_said_in_torchs_words():
    """On CUDA they tell how much is taken, or that an earlier kernel has failed, which only looks like a lack of memory here."""
    huge = torch.zeros(1).expand(2**44, 8)
    with pytest.raises(RuntimeError) as theirs:
        torch.empty_like(huge)
    assert str(normext._library.out_of_memory(huge)) == str(theirs.value)


def test_in_place_under_a_transform_changes_nothing_it_refuses(device):
    x, residual, weight = X.to(device).clone(), X.to(device).clone(), torch.ones(5, device=device)
    before = residual.clone()
    fused = torch.func.vmap(lambda x, r: normext.fused_add_rms_norm_(x, r, weight, 1e-6) or x)
    with pytest.raises(RuntimeError):
        fused(x, residual)
    assert residual.equal(before)


def in_place_calls(device):
    x, weight = X.to(device), torch.ones(8, device=device)
    wide = torch.randn(4, 16, device=device)
    return {
        "requires grad": (x.clone().requires_grad_(), x.clone(), weight, 1e-6),
        "weight requires grad": (x.clone(), x.clone(), weight.clone().requires_grad_(), 1e-6),
        "expanded input": (x[:1].expand(4, 8), x.clone(), weight, 1e-6),
        "expanded residual": (x.clone(), x[:1].expand(4, 8), weight, 1e-6),
        "same tensor twice": (wide[:, :8], wide[:, :8], weight, 1e-6),
        "partly overlapping": (wide[:, :8], wide[:, 4:12], weight, 1e-6),
        "weight inside the input": (wide[:, :8], x.clone(), wide[0, :8], 1e-6),
        "shapes": (x.clone(), x[:2].clone(), weight, 1e-6),
        "dtypes": (x.clone(), x.half(), weight, 1e-6),
        "weight shape": (x.clone(), x.clone(), weight[:5], 1e-6),
        "weight None": (x.clone(), x.clone(), None, 1e-6),
        "integers": (x.long(), x.long(), weight, 1e-6),
        "zero dims": (torch.tensor(1.0, device=device), torch.tensor(1.0, device=device), weight, 1e-6),
    }


@pytest.mark.parametrize("name", in_place_calls("cpu"))
def test_in_place_refusals_change_nothing(name, device):
    args = in_place_calls(device)[name]
    before = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
    versions = [a._version for a in args[:2]]
    assert attempt(normext.fused_add_rms_norm_, *args) is not None
    for one, other in zip(args, before, strict=True):
        assert one.equal(other) if isinstance(one, torch.Tensor) else one is other or one == other
    assert [a._version for a in args[:2]] == versions
    if name == "expanded input":
        assert attempt(normext.fused_add_rms_norm_, *args) == attempt(args[0].mul_, 2)


def test_in_place_accepts_what_is_safe(device):
    """Column slices of one matrix share no element; no_grad lifts the refusal of arguments that need gradients."""
    wide, weight = torch.randn(4, 16, device=device), torch.ones(8, device=device)
    expected = normext.add_rms_norm(wide[:, :8].clone(), wide[:, 8:].clone(), (8,), weight, 1e-6)
    normext.fused_add_rms_norm_(wide[:, :8], wide[:, 8:], weight, 1e-6)
    assert wide[:, :8].equal(expected[0]) and wide[:, 8:].equal(expected[1])
    with torch.no_grad():
        normext.fused_add_rms_norm_(wide[:, :8], wide[:, 8:], weight.clone().requires_grad_(), 1e-6)


def test_odd_eps_values_do_as_torch_does(device):
    """Zero, negative, infinite and NaN eps are accepted by torch, with whatever they give."""
    x = torch.cat([X, torch.zeros(1, 8), torch.ones(1, 8)]).to(device)
    for op in ("layer_norm", "rms_norm"):
        for eps in (0.0, -1.0, -1e-5, 1e-45, float("inf"), float("nan"), 1e30):
            args = (None, None, eps) if op == "layer_norm" else (None, eps)
            ours, theirs = getattr(normext, op)(x, (8,), *args), getattr(F, op)(x, (8,), *args)
            torch.testing.assert_close(
                ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda text, e=eps, o=op: f"{o} eps={e}: {text}"
            )


def test_bad_grad_output_is_refused(device):
    """What autograd itself checks, for the fused ops' two outputs."""
    x = X.to(device).clone().requires_grad_()
    output, total = normext.add_layer_norm(x, x, (8,))
    for grads in ((torch.ones(3, 8, device=device), None), (None, torch.ones(4, 7, device=device))):
        with pytest.raises(RuntimeError):
            torch.autograd.grad((output, total), x, grads, retain_graph=True)
    only_output = torch.autograd.grad(output, x, torch.ones_like(output), retain_graph=True)[0]
    only_total = torch.autograd.grad(total, x, torch.ones_like(total))[0]
    assert only_output.isfinite().all() and only_total.equal(torch.full_like(total, 2.0))


def test_cuda_tensor_without_cuda_build_gets_one_sentence():
    """A CPU-only build has a CUDA stub. A fake CUDA tensor reaches Python only, so the raw op is asked on the dispatcher."""
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("normext::layer_norm", "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("normext::layer_norm", "CUDA")
