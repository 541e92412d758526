"""normext.convert: what it changes in a model, what it must leave alone, and what it refuses."""

import copy
import functools
import io
import pickle

import cases
import oracle
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import normext

pytestmark = pytest.mark.python


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.LayerNorm(24)
        self.mix = nn.Linear(24, 24)
        self.bare = nn.LayerNorm((24,), elementwise_affine=False)
        self.second = nn.RMSNorm(24, eps=1e-5)
        self.batch = nn.BatchNorm1d(24)
        self.tied = nn.LayerNorm(24)
        self.tied.weight = self.first.weight
        self.shared = self.first

    def forward(self, x):
        x = x + self.mix(self.first(x))
        x = self.second(x) + self.bare(x)
        return self.tied(self.shared(self.batch(x.transpose(1, 2)).transpose(1, 2)))


NORMS = {
    "first": normext.LayerNorm,
    "bare": normext.LayerNorm,
    "second": normext.RMSNorm,
    "batch": normext.BatchNorm1d,
    "tied": normext.LayerNorm,
}


@pytest.fixture
def model(device):
    model = Block().to(device)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.fixture
def x(device):
    return torch.randn(2, 5, 24).to(device)


def test_swaps_the_class_and_nothing_else(model, x, capsys):
    model.first.register_forward_hook(lambda module, args, out: out * 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {id(m): {k: v for k, v in m.__dict__.items() if k != "training"} for m in model.modules()}
    parameters = [id(p) for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = copy.deepcopy(model)
    generator = torch.get_rng_state()

    report = normext.convert(model)

    assert {s.name for s in report.swapped} == set(NORMS)
    assert (report.refused, report.never_called) == ((), None)
    assert {name: type(getattr(model, name)) for name in NORMS} == NORMS
    assert torch.get_rng_state().equal(generator)
    assert {id(m): {k: v for k, v in m.__dict__.items() if k != "training"} for m in model.modules()} == before
    assert [id(p) for p in model.parameters()] == parameters
    assert model.tied.weight is model.first.weight
    assert model.shared is model.first
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(after[name].equal(value) for name, value in state.items())
    assert capsys.readouterr() == ("", "")

    torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-5)
    model(x).square().sum().backward()
    optimizer.step()
    assert not model.first.weight.equal(state["first.weight"])
    assert model.tied.weight is model.first.weight


def test_converting_twice_changes_nothing_more(model):
    normext.convert(model)
    types = [type(m) for m in model.modules()]
    assert normext.convert(model) == normext.Report((), ())
    assert [type(m) for m in model.modules()] == types


def test_a_norm_may_be_the_model(x, device):
    norm = nn.LayerNorm(24).to(device)
    report = normext.convert(norm, x)
    assert type(norm) is normext.LayerNorm
    assert (report.swapped[0].name, report.never_called) == ("", ())
    assert "the root" in str(report)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_output_meets_the_contract_in_the_same_dtype(kind, dtype, backend):
    case = cases.Case("layer_norm" if kind is nn.LayerNorm else "rms_norm", 64, 96, dtype, mean=10.0)
    t = cases.make(case, backend)
    norm = kind(96, eps=case.eps, device=backend.device, dtype=dtype)
    norm.load_state_dict({"weight": t.weight} | ({} if t.bias is None else {"bias": t.bias}))
    theirs = norm(t.x)
    normext.convert(norm)
    ours = norm(t.x)
    assert ours.dtype == theirs.dtype
    assert oracle.forward_error(case, t, ours) <= oracle.LIMIT


@pytest.mark.parametrize("training", [True, False])
def test_keeps_the_mode(model, training):
    model.train(training)
    normext.convert(model)
    assert {m.training for m in model.modules()} == {training}


def test_pickle_deepcopy_and_save(model, x):
    normext.convert(model)
    model.eval()
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False, map_location=x.device),
    ]
    for twin in copies:
        assert {name: type(getattr(twin, name)) for name in NORMS} == NORMS
        assert twin(x).equal(expected)


def test_a_compiled_model_recompiles(model, x):
    model.eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    theirs = compiled(x)
    report = normext.convert(compiled)
    assert len(report.swapped) == len(NORMS)
    ours = compiled(x)
    assert ours.equal(model(x))
    assert not ours.equal(theirs)  # 1000 values that all round alike would be a coincidence


# ---- Forwards on the instance


def test_rebinds_a_bound_forward(x, device):
    norm = nn.LayerNorm(24).to(device)
    norm.forward = norm.forward
    assert len(normext.convert(norm).swapped) == 1
    assert norm.forward.__func__ is normext.LayerNorm.forward
    assert norm(x).equal(normext.layer_norm(x, (24,), norm.weight, norm.bias))


def test_accelerate_hooks_stay_and_call_ours(model, x):
    hooks = pytest.importorskip("accelerate.hooks")
    calls = []

    class Counts(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module))
            return args, kwargs

    model.eval()
    hooks.add_hook_to_module(model.first, Counts())
    report = normext.convert(model, x)
    assert not report.refused
    assert report.never_called == ()
    assert calls == [normext.LayerNorm] * 2
    assert model.first._old_forward.__func__ is normext.LayerNorm.forward
    expected = model(x)
    hooks.remove_hook_from_module(model.first)
    assert model.first.forward.__func__ is normext.LayerNorm.forward
    assert model(x).equal(expected)


def test_refuses_a_forward_replaced_on_the_instance(x, device):
    norm = nn.LayerNorm(24).to(device)
    norm.forward = functools.partial(nn.functional.layer_norm, normalized_shape=(24,), eps=0.5)
    expected = norm(x)
    (refused,) = normext.convert(norm).refused
    assert refused.reason == "its forward was replaced on the instance"
    assert type(norm) is nn.LayerNorm
    assert norm(x).equal(expected)


# ---- Refusals


class Shifted(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input) + 1


class Plain(nn.RMSNorm):
    pass


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrised():
    norm = nn.LayerNorm(24)
    parametrize.register_parametrization(norm, "weight", Halved())
    return norm


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Shifted(24), "subclass"),
        (lambda: Plain(24), "subclass"),
        (parametrised, "parametrised"),
        (lambda: torch.jit.script(nn.LayerNorm(24)), "scripted"),
        (lambda: torch.jit.trace(nn.RMSNorm(24), torch.randn(2, 24)), "scripted"),
    ],
)
def test_refuses_with_a_reason(make, reason):
    model = nn.Sequential(make(), nn.Linear(24, 24))
    x = torch.randn(3, 24)
    expected, kind = model(x), type(model[0])
    report = normext.convert(model)
    (refused,) = report.refused
    assert refused.name == "0"
    assert reason in refused.reason
    assert reason in str(report)
    assert type(model[0]) is kind
    assert model(x).equal(expected)


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_norms_are_refused_until_they_have_parameters():
    model = nn.Sequential(nn.LayerNorm(8), nn.LazyBatchNorm1d(), nn.LazyInstanceNorm1d(affine=True), nn.LayerNorm(8))
    report = normext.convert(model)
    assert [swapped.name for swapped in report.swapped] == ["0", "3"]
    assert all("lazy" in refused.reason for refused in report.refused) and len(report.refused) == 2
    model(torch.randn(3, 4, 8))
    assert [swapped.name for swapped in normext.convert(model).swapped] == ["1", "2"]


@pytest.mark.once
def test_other_kinds_of_norm_are_not_mentioned():
    model = nn.Sequential(nn.LocalResponseNorm(2), nn.CrossMapLRN2d(2))
    assert normext.convert(model) == normext.Report((), ())


CHANNEL_NORMS = {
    "BatchNorm1d": ((4,), (3, 4, 5)),
    "BatchNorm2d": ((4,), (3, 4, 5, 2)),
    "BatchNorm3d": ((4,), (3, 4, 5, 2, 2)),
    "SyncBatchNorm": ((4,), (3, 4, 5)),
    "GroupNorm": ((2, 4), (3, 4, 5)),
    "InstanceNorm1d": ((4,), (3, 4, 5)),
    "InstanceNorm2d": ((4,), (3, 4, 5, 2)),
    "InstanceNorm3d": ((4,), (3, 4, 5, 2, 2)),
}


@pytest.mark.parametrize("name", CHANNEL_NORMS)
def test_channel_norms_are_swapped_and_compute_the_same(name, device):
    arguments, shape = CHANNEL_NORMS[name]
    more = {"affine": True, "track_running_stats": True} if name.startswith("Instance") else {}
    theirs = nn.Sequential(getattr(nn, name)(*arguments, **more)).to(device)
    ours = copy.deepcopy(theirs)
    (swapped,) = normext.convert(ours).swapped
    assert (swapped.name, swapped.kind.rsplit(".", 1)[1]) == ("0", name)
    assert type(ours[0]) is getattr(normext, name)
    x = torch.randn(shape).to(device)
    for mode in (True, True, False):
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x))
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


@pytest.mark.once
def test_subclasses_of_channel_norms_are_refused():
    class Mine(nn.BatchNorm2d):
        pass

    (refused,) = normext.convert(nn.Sequential(Mine(4))).refused
    assert "subclass" in refused.reason


# ---- The example forward


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_example_finds_norms_that_never_run(wrap, x, device):
    class Skips(Block):
        def forward(self, x):
            return self.first.forward(x)  # past __call__, and so past any hook

    model = Skips().to(device).eval()
    before = {name: list(module.__dict__) for name, module in model.named_modules()}
    report = normext.convert(model, wrap(x))
    assert report.never_called == ("bare", "second", "batch", "tied")
    assert "never called by the example: bare, second, batch, tied" in str(report)
    assert {name: list(module.__dict__) for name, module in model.named_modules()} == before
    assert normext.convert(model, wrap(x)).never_called == report.never_called


def test_example_that_raises_leaves_the_model_in_order(model, x):
    with pytest.raises(RuntimeError):
        normext.convert(model, x[..., :5])
    assert "forward" not in model.first.__dict__
    assert model(x).shape == x.shape


def test_the_fused_encoder_layer_never_calls_its_norms(device):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).to(device).eval()
    x = torch.randn(2, 3, 16).to(device)
    assert normext.convert(layer, x).never_called == ("norm1", "norm2")
    assert normext.convert(layer.train(), x).never_called == ()
