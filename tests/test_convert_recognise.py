"""normext.convert on norms written in Python: the right formula or none. Real ones where transformers is installed."""

import copy
import importlib
import importlib.util
import inspect
import pickle
import re
from pathlib import Path

import cases
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

import normext

pytestmark = pytest.mark.python

LLAMA = "rms_norm(rounding='llama')"
ONCE = "rms_norm(rounding='torch')"
GEMMA = "rms_norm(weight_offset=1.0, rounding='torch')"
LAYER = "layer_norm"

# (model, class, constructor arguments, what it is)
RECOGNISED = [
    ("llama", "LlamaRMSNorm", (96,), LLAMA),
    ("mistral", "MistralRMSNorm", (96,), LLAMA),
    ("mixtral", "MixtralRMSNorm", (96,), LLAMA),
    ("qwen2", "Qwen2RMSNorm", (96,), LLAMA),
    ("qwen3", "Qwen3RMSNorm", (96,), LLAMA),
    ("phi3", "Phi3RMSNorm", (96,), LLAMA),
    ("deepseek_v3", "DeepseekV3RMSNorm", (96,), LLAMA),
    ("llama4", "Llama4TextRMSNorm", (96,), LLAMA),
    ("llama4", "Llama4TextL2Norm", (), ONCE),
    ("gemma", "GemmaRMSNorm", (96,), GEMMA),
    ("gemma2", "Gemma2RMSNorm", (96,), GEMMA),
    ("gemma3", "Gemma3RMSNorm", (96,), GEMMA),
    ("gemma3n", "Gemma3nRMSNorm", (96,), ONCE),
    ("gemma3n", "Gemma3nRMSNorm", (96, 1e-6, False), ONCE),
    ("qwen3_next", "Qwen3NextRMSNorm", (96,), GEMMA),
    ("olmo2", "Olmo2RMSNorm", (96,), ONCE),
    ("helium", "HeliumRMSNorm", (96,), ONCE),
    ("xlstm", "xLSTMRMSNorm", (96,), LLAMA),
    ("cohere", "CohereLayerNorm", (96,), LAYER),
    ("olmo", "OlmoLayerNorm", (96,), LAYER),
    ("convnext", "ConvNextLayerNorm", (96,), LAYER),
]
REFUSED = [
    ("t5", "T5LayerNorm", (96,), "bfloat16 input of scale 1 and float32 parameters"),
    ("cohere", "CohereLayerNorm", ((4, 96),), "of one dimension"),
    ("xlstm", "xLSTMRMSNorm", (96, 1e-6, True, True), "no RMSNorm or LayerNorm"),
    ("deberta", "DebertaLayerNorm", (96,), "no RMSNorm or LayerNorm"),
    ("imagegpt", "ImageGPTLayerNorm", ((96,),), "no RMSNorm or LayerNorm"),
    ("mobilebert", "NoNorm", (96,), "no RMSNorm or LayerNorm"),
    ("vitdet", "VitDetLayerNorm", (96,), "no RMSNorm or LayerNorm"),
    ("nemotron", "NemotronLayerNorm1P", (96,), "no RMSNorm or LayerNorm"),
    ("mamba2", "MambaRMSNormGated", (96, 96), "takes (hidden_states, gate)"),
    ("qwen3_next", "Qwen3NextRMSNormGated", (96,), "takes (hidden_states, gate)"),
    ("detr", "DetrFrozenBatchNorm2d", (96,), "of one dimension"),
]


def hugging_face(model, name, args, dtype=torch.float32, device="cpu", **kwargs):
    pytest.importorskip("transformers")
    try:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ImportError:
        pytest.skip(f"this transformers has no {model}")
    norm = getattr(module, name, None)
    if norm is None:
        pytest.skip(f"this transformers has no {name}")
    norm = norm(*args, **kwargs)
    for tensor in (*norm.parameters(), *norm.buffers()):
        nn.init.normal_(tensor)
    return norm.to(device, dtype)


@pytest.mark.parametrize(("model", "name", "args", "now"), RECOGNISED, ids=lambda value: str(value).split("(")[0])
def test_recognised_classes(model, name, args, now, device):
    norm = hugging_face(model, name, args, device=device)
    kind, state = type(norm), copy.deepcopy(norm.state_dict())
    x = torch.randn(3, 5, 96).to(device)
    original = copy.deepcopy(norm)
    report = normext.convert(norm, x)
    assert [(s.name, s.now) for s in report.swapped] == [("", now)]
    assert report.never_called == ()
    assert isinstance(norm, kind)
    assert type(norm).__name__ == name
    assert list(inspect.signature(norm.forward).parameters) == list(inspect.signature(original.forward).parameters)
    assert list(norm.state_dict()) == list(state)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        norm, original, xs = norm.to(dtype), original.to(dtype), x.to(dtype)
        ours, theirs = norm(xs), original(xs)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
        (argument,) = inspect.signature(original.forward).parameters
        assert norm(**{argument: xs}).equal(ours)


@pytest.mark.parametrize(("model", "name", "args", "reason"), REFUSED, ids=lambda value: str(value).split("(")[0])
def test_refused_classes(model, name, args, reason):
    norm = hugging_face(model, name, args)
    kind = type(norm)
    (refused,) = normext.convert(norm).refused
    assert reason in refused.reason
    assert type(norm) is kind


def distinct_norms():
    """(model, class): one for every text that a norm of the installed transformers has, found without importing them."""
    folder = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    found = {}
    for file in sorted(folder.glob("*/modeling_*.py")):
        for name, body in re.findall(r"^class (\w*Norm\w*)\(.*?\n(.*?)(?=^\S|\Z)", file.read_text(), re.MULTILINE | re.DOTALL):
            found.setdefault(re.sub(r'""".*?"""|= ?1e-\d+', "", body.replace(name, ""), flags=re.DOTALL), (file.parent.name, name))
    return found.values()


@pytest.mark.once
def test_every_norm_of_transformers_keeps_its_results_or_is_refused():
    """Those that take a width and nothing else. What is recognised differs from release to release; a swap is right or a bug."""
    pytest.importorskip("transformers")
    swapped, x = [], torch.randn(3, 5, 96)
    for model, name in distinct_norms():
        try:
            original = hugging_face(model, name, (96,))
            (width, *_) = inspect.signature(type(original)).parameters
        except (Exception, pytest.skip.Exception):
            continue
        if "eps" in width:
            original = hugging_face(model, name, ())
        norm = copy.deepcopy(original)
        if [found.name for found in normext.convert(norm).swapped] != [""]:  # refused, or a block that has norms inside
            assert type(norm) is type(original), (model, name)
            continue
        swapped.append(name)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            ours, theirs = norm.to(dtype)(x.to(dtype)), original.to(dtype)(x.to(dtype))
            # Before the weight a value may be rounded to either neighbour: an ulp.
            close = {"rtol": 2**-9, "atol": 1e-5} if dtype == torch.float16 else {}
            torch.testing.assert_close(ours, theirs, **close, msg=lambda text, at=(model, name): f"{at}: {text}")
    assert len(swapped) >= 10, swapped


def test_the_configuration_counts_not_the_class_alone():
    """One class, two meanings: with channels first ConvNext's norm is not over the last dimension."""
    first = hugging_face("convnext", "ConvNextLayerNorm", (96,), data_format="channels_first")
    last = hugging_face("convnext", "ConvNextLayerNorm", (96,), data_format="channels_last")
    report = normext.convert(nn.ModuleList([first, last, first]))
    assert [s.name for s in report.swapped] == ["1"]
    assert [r.name for r in report.refused] == ["0"]


@pytest.mark.once
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32], ids=cases.short)
@pytest.mark.parametrize(
    ("model", "name", "args"),
    [(model, name, args) for model, name, args, now in RECOGNISED if name[:5] in ("Llama", "Gemma", "ConvN", "Olmo2")],
)
def test_dtype_under_cuda_autocast_is_the_originals(model, name, args, parameters):
    """Llama's arithmetic ignores autocast; a call of torch's layer_norm follows it. Fake tensors show it without a GPU."""
    norm = hugging_face(model, name, args)
    original = copy.deepcopy(norm)
    assert normext.convert(norm).swapped
    dtypes = []
    with FakeTensorMode(), cases.cuda_autocast():
        x = torch.empty(2, 96, device="cuda:0", dtype=torch.bfloat16)
        for module in (original, norm):
            for parameter in module._parameters:
                module._parameters[parameter] = torch.empty(96, device="cuda:0", dtype=parameters)
            with torch.no_grad():
                dtypes.append(module(x).dtype)
    assert dtypes[0] == dtypes[1]


# ---- Norms made for the test


class OwnRmsNorm(nn.Module):
    """A Llama norm in its own spelling, with one step open to change."""

    def __init__(self, cols=96, epsilon=1e-5):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(cols))
        self.epsilon = epsilon
        self.dropout = 0.1  # a float that is not epsilon

    def rstd(self, x):
        return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.epsilon)

    def forward(self, states):
        return self.gain * (states.float() * self.rstd(states)).to(states.dtype)


def variant(forward=None, rstd=None, **attributes):
    body = {"forward": forward} if forward else {}
    body |= {"rstd": rstd} if rstd else {}
    norm = type("VariantRmsNorm", (OwnRmsNorm,), body)()
    for name, value in attributes.items():
        setattr(norm, name, value)
    return norm


def scaled(by):
    return lambda self, states: OwnRmsNorm.forward(self, states) * by


def in_place(self, states):
    return states.mul_(self.rstd(states)) * self.gain


def detached(self, states):
    with torch.no_grad():
        rstd = self.rstd(states)
    return self.gain * (states.float() * rstd).to(states.dtype)


def eval_only(self, states):
    return OwnRmsNorm.forward(self, states) if not self.training else states


def four_dimensional(self, states):
    return OwnRmsNorm.forward(self, states) if states.ndim < 4 else OwnRmsNorm.forward(self, states.mT).mT


def two_results(self, states):
    return OwnRmsNorm.forward(self, states), states


def bfloat16_offset(self, states):
    return (states.float() * self.rstd(states) * (1.0 + self.gain).float()).to(states.dtype)


def optional_gate(self, states, gate=None):
    return OwnRmsNorm.forward(self, states)


def unbiased(self, states):
    return self.gain * (states.float() * torch.rsqrt(states.float().var(-1, keepdim=True) + self.epsilon))


def noisy(self, states):
    return F.dropout(OwnRmsNorm.forward(self, states), self.dropout, self.training)


def counting(self, states):
    self.calls += 1
    return OwnRmsNorm.forward(self, states)


def keeping(self, states):
    self.kept.append(OwnRmsNorm.forward(self, states))
    return self.kept[-1]


WRONG = {
    "off by 1e-4": variant(scaled(1 + 1e-4)),
    "off by one bit": variant(scaled(1 + 2**-23)),
    "epsilon off by 1e-4": variant(
        rstd=lambda self, x: torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.epsilon * (1 + 1e-4))
    ),
    "epsilon outside the root": variant(rstd=lambda self, x: 1 / (x.float().square().mean(-1, keepdim=True).sqrt() + self.epsilon)),
    "epsilon as a maximum": variant(
        rstd=lambda self, x: torch.rsqrt(x.float().square().mean(-1, keepdim=True).clamp_min(self.epsilon))
    ),
    "another axis": variant(rstd=lambda self, x: torch.rsqrt(x.float().square().mean(0, keepdim=True) + self.epsilon)),
    "changes its input": variant(in_place),
    "no gradient through the statistics": variant(detached),
    "eval mode only": variant(eval_only),
    "another meaning in four dimensions": variant(four_dimensional),
    "two results": variant(two_results),
    "1 + weight in bfloat16": variant(bfloat16_offset),
    "a gate that may be left out": variant(optional_gate),
    "unbiased variance": variant(unbiased),
    "dropout": variant(noisy),
    "clamps large inputs": variant(lambda self, states: OwnRmsNorm.forward(self, states.clamp(-100, 100))),
    "replaces NaN": variant(lambda self, states: OwnRmsNorm.forward(self, states).nan_to_num()),
    "replaces -inf": variant(lambda self, states: OwnRmsNorm.forward(self, states.masked_fill(states == -torch.inf, 0.0))),
    "counts its calls": variant(counting, calls=0),
    "keeps its results": variant(keeping, kept=[]),
    "a tensor attribute": variant(table=torch.ones(96)),
    "an attribute that cannot be copied": variant(generator=(i for i in range(3))),
    "an integer parameter": variant(gain=nn.Parameter(torch.ones(96, dtype=torch.int64), requires_grad=False)),
}


@pytest.mark.once
def test_the_norm_that_the_wrong_ones_start_from_is_recognised():
    assert [s.now for s in normext.convert(variant()).swapped] == [LLAMA]
    assert [s.now for s in normext.convert(variant(scaled(1.0))).swapped] == [LLAMA]


@pytest.mark.once
@pytest.mark.parametrize("what", WRONG)
def test_a_norm_that_computes_something_else_is_refused(what):
    norm = WRONG[what]
    kind, state = type(norm), copy.deepcopy(norm.state_dict())
    report = normext.convert(norm)
    assert not report.swapped
    assert report.refused[0].reason
    assert type(norm) is kind
    assert all(value.equal(state[name]) for name, value in norm.state_dict().items())


def test_epsilon_and_weight_are_found_under_any_name_and_read_when_called(device):
    norm = OwnRmsNorm().to(device)
    (swapped,) = normext.convert(nn.Sequential(norm)).swapped
    assert swapped.now == LLAMA
    x = torch.randn(4, 96).to(device)
    for epsilon in (1e-5, 0.25):
        norm.epsilon = epsilon
        nn.init.normal_(norm.gain)
        assert norm(states=x).equal(normext.rms_norm(x, (96,), norm.gain, epsilon, rounding="llama"))


@pytest.mark.parametrize("dtypes", [*cases.MIXES[:3], (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("now", [LLAMA, ONCE])
def test_output_meets_the_contract(now, dtypes, backend):
    rounding = "llama" if now == LLAMA else "torch"
    case = cases.Case("rms_norm", 64, 96, *dtypes, rounding=rounding)
    t = cases.make(case, backend)
    once = lambda self, x: (self.gain.float() * (x.float() * self.rstd(x))).to(x.dtype)  # noqa: E731
    norm = OwnRmsNorm() if now == LLAMA else variant(once)
    norm.gain = nn.Parameter(t.weight)
    theirs = norm(t.x)
    assert normext.convert(norm).swapped[0].now == now
    ours = norm(t.x)
    assert ours.dtype == theirs.dtype
    assert oracle.forward_error(case, t, ours) <= oracle.LIMIT


def test_conversion_does_not_depend_on_the_callers_state(device):
    x = torch.randn(2, 96).to(device)
    norm = OwnRmsNorm().to(device)
    generator = torch.get_rng_state()
    with torch.inference_mode(), torch.device("meta"):
        inside = normext.convert(norm)
    torch.set_default_dtype(torch.float64)
    try:
        assert normext.convert(OwnRmsNorm()).swapped == inside.swapped
    finally:
        torch.set_default_dtype(torch.float32)
    assert inside.swapped
    assert torch.get_rng_state().equal(generator)
    assert norm(x).shape == x.shape


@pytest.mark.once
def test_meta_parameters_are_not_needed():
    with torch.device("meta"):
        norm = OwnRmsNorm()
    assert normext.convert(norm).swapped
    assert norm.gain.is_meta


def test_converted_norms_copy_pickle_and_share_their_class(device):
    pytest.importorskip("transformers")
    model = nn.ModuleList([hugging_face("llama", "LlamaRMSNorm", (96,), device=device) for _ in range(2)])
    normext.convert(model)
    x = torch.randn(2, 96).to(device)
    assert type(model[0]) is type(model[1])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nn.ModuleList(map(copy.copy, model))):
        assert type(twin[0]) is type(model[0])
        assert twin[0](x).equal(model[0](x))
        assert normext.convert(twin) == normext.Report((), ())


def test_converted_norms_compile_and_train(device):
    norm = OwnRmsNorm().to(device)
    original = copy.deepcopy(norm)
    normext.convert(norm)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 7):
        x = torch.randn(rows, 96).to(device)
        results = []
        for module in (compiled, norm, original):
            leaf = x.clone().requires_grad_()
            module(leaf).square().sum().backward()
            results.append((leaf.grad, norm.gain.grad if module is not original else original.gain.grad))
            norm.gain.grad = original.gain.grad = None
        assert all(a.equal(b) for a, b in zip(results[0], results[1], strict=True))
        torch.testing.assert_close(results[1], results[2], rtol=1e-4, atol=1e-5)


# ---- Whole models

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "pad_token_id": 0,
}
MODELS = {
    "LlamaForCausalLM": (TINY, 5, 0),
    "Qwen3ForCausalLM": (TINY, 9, 0),
    "Gemma2ForCausalLM": (TINY, 9, 0),
    "MixtralForCausalLM": ({**TINY, "num_local_experts": 2}, 5, 0),
    "GPT2LMHeadModel": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}, 5, 0),
    "BertModel": (TINY, 5, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name, device):
    transformers = pytest.importorskip("transformers")
    config, norms, refused = MODELS[name]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**config)).to(device).eval()
    ids = torch.arange(1, 13).view(2, 6).to(device)
    with torch.no_grad():
        expected = model(input_ids=ids)[0]
        report = normext.convert(model, {"input_ids": ids})
        ours = model(input_ids=ids)[0]
    assert (len(report.swapped), len(report.refused), report.never_called) == (norms, refused, ())
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.once
def test_report_lists_alike_modules_once():
    model = nn.ModuleDict({"a": OwnRmsNorm(), "b": OwnRmsNorm(), "c": variant(scaled(2.0))})
    text = str(normext.convert(model))
    assert text.splitlines()[0] == "2 norms swapped, 1 refused"
    assert "OwnRmsNorm at a and 1 more: now normext.rms_norm(rounding='llama')" in text
    assert "VariantRmsNorm at c: computes no RMSNorm" in text
