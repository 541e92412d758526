"""normext.fold_batch_norm: what must stay as it is, with which reason."""

import pytest
import torch
from fold_models import ResNet, pair, randomised, refusals, refused_for, unchanged
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from normext.fold import fold_batch_norm

pytestmark = pytest.mark.once


def test_training_mode_changes_nothing():
    model = randomised(ResNet())
    model.layers[1].bn2.train()
    check = unchanged(model)
    with pytest.raises(ValueError, match=r"layers\.1\.bn2.*call model\.eval\(\)"):
        fold_batch_norm(model)
    check()


class Two(nn.Module):
    """conv and bn with a forward to be told."""

    def __init__(self, forward, layer=None, norm=None):
        super().__init__()
        self.conv = layer or nn.Conv2d(4, 4, 3, padding=1)
        self.bn = norm or nn.BatchNorm2d(4)
        self.told = forward

    def forward(self, x):
        return self.told(self, x)


def stashing(m, x):
    m.stash = m.conv(x)
    return m.bn(m.stash) + m.stash


BRANCHING = {
    "used after the norm": (lambda m, x: (y := m.conv(x)) + m.bn(y), "used elsewhere"),
    "used before the norm": (lambda m, x: (y := m.conv(x)).relu() + m.bn(y), "used elsewhere"),
    "returned": (lambda m, x: (y := m.conv(x), m.bn(y)), "used elsewhere"),
    "kept on the module": (stashing, "used elsewhere"),
    "changed in place": (lambda m, x: m.bn(m.conv(x).mul_(2)), "not directly"),
    "activation between": (lambda m, x: m.bn(m.conv(x).relu()), "not directly"),
    "norm of the input": (lambda m, x: m.conv(m.bn(x)), "not directly"),
    "norm of a constant": (lambda m, x: m.conv(x) + m.bn(torch.ones(1, 4, 1, 1)), "not directly"),
    "conv called twice": (lambda m, x: m.bn(m.conv(m.conv(x))), "Conv2d is called more than once"),
    "norm called twice": (lambda m, x: m.bn(m.bn(m.conv(x))), "BatchNorm2d is called more than once"),
    "pair called twice": (lambda m, x: m.bn(m.conv(m.bn(m.conv(x)))), "called more than once"),
    "norm not called": (lambda m, x: m.conv(x), "does not call it"),
    "weight used": (lambda m, x: m.bn(m.conv(x)) * m.conv.weight.sum(), "other code uses"),
    "weight used eagerly": (lambda m, x: m.bn(m.conv(x)) * m.conv.weight.sum().item(), "other code uses"),
    "statistics used": (lambda m, x: m.bn(m.conv(x)) - m.bn.running_mean.mean(), "other code uses"),
    "data-dependent": (lambda m, x: m.bn(m.conv(x)) if x.sum() > 0 else m.conv(x), "cannot be traced (TraceError"),
}


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("name", BRANCHING)
def test_other_uses_of_the_pair(name, example):
    forward, reason = BRANCHING[name]
    model = randomised(Two(forward))
    x = torch.randn(2, 4, 6, 6)
    check = unchanged(model)
    report = fold_batch_norm(model, x) if example and name != "kept on the module" else fold_batch_norm(model)
    assert list(refusals(report)) == ["bn"]
    assert reason in refused_for(report)
    check()


def test_the_pair_without_other_uses_is_folded():
    """What the refusals above have in common is not what they are refused for."""
    model = randomised(Two(lambda m, x: m.bn(m.conv(x))))
    assert [(f.layer, f.norm) for f in fold_batch_norm(model).folded] == [("conv", "bn")]


def shared_module(model):
    model.again = model.conv


def shared_norm(model):
    model.again = nn.ModuleList([model.bn])


def tied_weight(model):
    model.other = nn.Conv2d(4, 4, 3)
    model.other.weight = model.conv.weight


def tied_storage(model):
    model.other = nn.Conv2d(4, 4, 3)
    model.other.weight.data = model.conv.weight.data


def tied_norm(model):
    model.other = nn.BatchNorm2d(4)
    model.other.bias = model.bn.bias


def forward_of_its_own(model):
    model.conv.forward = lambda x: nn.Conv2d.forward(model.conv, x).relu()


def no_statistics(model):
    model.bn = nn.BatchNorm2d(4, track_running_stats=False).eval()


def wider(model):
    model.bn = randomised(nn.BatchNorm2d(5))


def other_dimensions(model):
    model.bn = randomised(nn.BatchNorm1d(4))


def extra_buffer(model):
    model.conv.register_buffer("mask", torch.ones(1))


def scripted_norm(model):
    model.bn = torch.jit.script(model.bn)


def scripted_layer(model):
    model.conv = torch.jit.script(model.conv)


def lazy_norm(model):
    model.bn = nn.LazyBatchNorm2d().eval()


def lazy_layer(model):
    model.conv = nn.LazyConv2d(4, 3)


def meta(model):
    model.to("meta")


def nan_statistics(model):
    model.bn.running_var[1] = float("nan")


def overflow(model):
    model.half()
    model.conv.weight.data.mul_(4000)
    model.bn.running_var.zero_()


def underflow(model):
    model.half()
    model.bn.weight.data.mul_(1e-4)
    model.bn.bias.data.zero_()
    model.bn.running_mean.zero_()
    model.conv.bias.data.zero_()


REASONS = {
    "hook": (lambda m: m.conv.register_forward_hook(lambda *_: None), "the Conv2d has hooks"),
    "pre-hook": (lambda m: m.bn.register_forward_pre_hook(lambda *_: None), "the BatchNorm2d has hooks"),
    "backward hook": (lambda m: m.conv.register_full_backward_hook(lambda *_: None), "the Conv2d has hooks"),
    "backward pre-hook": (lambda m: m.bn.register_full_backward_pre_hook(lambda *_: None), "the BatchNorm2d has hooks"),
    "weight norm": (lambda m: parametrizations.weight_norm(m.conv), "Conv2d is parametrised"),
    "parametrised norm": (lambda m: parametrize.register_parametrization(m.bn, "weight", nn.ReLU()), "BatchNorm2d is parametrised"),
    "old weight norm": (lambda m: torch.nn.utils.spectral_norm(m.conv), "the Conv2d has hooks"),
    "pruned": (lambda m: prune.l1_unstructured(m.conv, "weight", 0.5), "the Conv2d has hooks"),
    "forward of its own": (forward_of_its_own, "or a forward of its own"),
    "shared layer": (shared_module, "the Conv2d is shared"),
    "shared norm": (shared_norm, "the BatchNorm2d is shared"),
    "tied weight": (tied_weight, "tied"),
    "tied storage": (tied_storage, "tied"),
    "tied norm": (tied_norm, "tied"),
    "no statistics": (no_statistics, "without running statistics"),
    "channel mismatch": (wider, "could not be tried out: RuntimeError"),
    "other dimensions": (other_dimensions, "could not be tried out: ValueError"),
    "extra buffer": (extra_buffer, "more parameters, buffers or children"),
    "scripted norm": (scripted_norm, "scripted"),
    "scripted layer": (scripted_layer, "not directly the output"),
    "lazy norm": (lazy_norm, "LazyBatchNorm2d has no plain tensors"),
    "lazy layer": (lazy_layer, "LazyConv2d has no plain tensors"),
    "meta": (meta, "meta"),
    "nan": (nan_statistics, "something else"),
    "overflow": (overflow, "do not fit torch.float16"),
    "underflow": (underflow, "do not fit torch.float16"),
}


@pytest.mark.filterwarnings("ignore")  # some of these are deprecated
@pytest.mark.parametrize("name", REASONS)
def test_refused(name):
    change, reason = REASONS[name]
    model = randomised(Two(lambda m, x: m.bn(m.conv(x))))
    change(model)
    model.eval()
    types = [type(m) for m in model.modules()]
    bn, weight = model.bn, model.conv.weight
    report = fold_batch_norm(model)
    assert reason in refusals(report)["bn"]
    assert [type(m) for m in model.modules()] == types
    assert model.bn is bn
    if not parametrize.is_parametrized(model.conv):
        assert model.conv.weight is weight


class Active(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(-50, 50)


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True) * 0.5 + 0.1, self.bias)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * 2)


@pytest.mark.parametrize(("layer", "norm"), [(nn.Conv2d, Active), (Standardized, nn.BatchNorm2d)])
def test_subclasses_that_compute_something_else(layer, norm):
    model = pair(layer(4, 4, 3), norm(4))
    check = unchanged(model)
    assert "something else on a random batch" in refused_for(fold_batch_norm(model))
    check()


def test_subclasses_that_are_affine_in_the_same_parameters():
    model = pair(Scaled(4, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(1, 4, 5, 5)
    expected = model(x)
    assert len(fold_batch_norm(model).folded) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_the_dimensions_of_a_linear():
    model = pair(nn.Linear(4, 8), nn.BatchNorm1d(8))
    assert "pass an example" in refused_for(fold_batch_norm(model))
    check = unchanged(model)
    assert "3-D input" in refused_for(fold_batch_norm(model, torch.randn(2, 8, 4)))  # the norm is over positions
    check()
    assert len(fold_batch_norm(model, torch.randn(2, 4)).folded) == 1


def test_an_unbatched_convolution():
    model = pair(nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8))
    assert "2-D input" in refused_for(fold_batch_norm(model, torch.randn(4, 8)))  # (channels, length) is (N, C) to the norm


def test_the_model_may_be_a_norm():
    assert "does not call it" in refusals(fold_batch_norm(nn.BatchNorm2d(4).eval()))[""]
