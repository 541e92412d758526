"""normext.fold_batch_norm: how it finds out what a model calls, and that this leaves nothing behind."""

import pytest
import torch
from fold_models import ResNet, pair, randomised, refused_for, unchanged
from torch import nn

from normext.fold import fold_batch_norm

pytestmark = pytest.mark.once


class Gate(nn.Module):
    """Data-dependent control flow around a block that can be traced and one that cannot."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() > 0 else self.block(x)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList([Gate(), Gate()])
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        for gate in self.gates:
            x = gate(x)
        return self.bn(self.conv(x))


@pytest.mark.parametrize("example", [False, True])
def test_what_cannot_be_traced_is_folded_by_its_structure(example):
    model = randomised(Gated())
    inputs = [torch.randn(2, 4, 5, 5) + offset for offset in (-3, 3)]
    expected = [model(x) for x in inputs]
    report = fold_batch_norm(model, inputs[0]) if example else fold_batch_norm(model)
    assert [(f.layer, f.norm) for f in report.folded] == [
        ("gates.0.block.0", "gates.0.block.1"),
        ("gates.1.block.0", "gates.1.block.1"),
        ("conv", "bn"),
    ]
    assert [r.name for r in report.refused] == ["gates.0.bn", "gates.1.bn"]
    assert all("TraceError" in r.reason for r in report.refused)
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


def test_a_container_with_a_forward_of_its_own():
    model = pair(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model.forward = lambda x: model[1](model[0](x).relu())
    assert "the forward of a Sequential is not that of its class" in refused_for(fold_batch_norm(model))


class Taps(nn.Module):
    """Walks a Sequential and keeps intermediate results, in code that cannot be traced."""

    def __init__(self, norms):
        super().__init__()
        layers = [[nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)] for _ in range(norms)]
        self.features = nn.Sequential(*(m for both in layers for m in both))

    def forward(self, x):
        tap = int(x.abs().max() >= 0) * 2
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i == tap:
                kept = x
        return x + kept


def test_an_output_that_changes_its_shape():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            y = self.pair(x)
            return y[: sum(isinstance(m, nn.BatchNorm2d) for m in self.modules())]

    assert "changes the model's output on the example by inf" in refused_for(
        fold_batch_norm(randomised(Counting()), torch.ones(2, 4, 1, 1))
    )


def test_the_example_finds_what_the_structure_does_not_tell():
    model = randomised(Taps(4))
    x = torch.randn(2, 4, 6, 6)
    expected = model(x)
    report = fold_batch_norm(model, x)
    assert [f.norm for f in report.folded] == ["features.1", "features.5", "features.7"]
    (refused,) = report.refused
    assert refused.name == "features.3"
    assert "changes the model's output" in refused.reason
    assert 0 < report.error < 1e-4
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x, skip=None, raw=False):
        y = self.conv(x)
        if skip is not None:
            return self.bn(y) + skip
        return y if raw else self.bn(y)


class OptionalSkip(Optional):
    def forward(self, x, skip=None):
        y = self.conv(x)
        return self.bn(y) + (y if skip is None else skip)


class OptionalFeatures(Optional):
    def forward(self, x, features=None):
        return self.bn(self.conv(x) if features is None else features)


def test_arguments_that_may_be_left_out():
    assert "not directly" in refused_for(fold_batch_norm(randomised(OptionalFeatures())))
    assert "used elsewhere" in refused_for(fold_batch_norm(randomised(OptionalSkip())))
    assert "TraceError" in refused_for(fold_batch_norm(randomised(Optional())))


@pytest.mark.parametrize("as_example", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_examples(as_example):
    model = randomised(Optional())
    x = torch.randn(1, 4, 3, 3)
    assert len(fold_batch_norm(model, as_example(x)).folded) == 1


def test_an_argument_given_by_the_example():
    x = torch.randn(1, 4, 3, 3)
    assert "does not call it" in refused_for(fold_batch_norm(randomised(Optional()), {"x": x, "raw": True}))
    assert len(fold_batch_norm(randomised(Optional()), {"x": x, "skip": x}).folded) == 1


def test_an_example_that_the_model_changes():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.pair(x.mul_(3))

    x = torch.randn(1, 4, 3, 3)
    same = x.clone()
    report = fold_batch_norm(randomised(InPlace()), x)
    assert len(report.folded) == 1
    assert x.equal(same)


def test_an_example_that_raises_changes_nothing():
    model = randomised(ResNet())
    check = unchanged(model)
    with pytest.raises(RuntimeError, match="channels"):
        fold_batch_norm(model, torch.randn(1, 4, 8, 8))
    check()
    model.head.register_forward_hook(lambda *_: 5)
    with pytest.raises(ValueError, match="return tensors"):
        fold_batch_norm(model, torch.randn(1, 3, 8, 8))


def test_norms_that_are_also_in_a_list():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(4, 4, 1)
            self.second = nn.BatchNorm2d(4)
            self.layers = [self.first, self.second]

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = randomised(Listed())
    check = unchanged(model)
    assert "is shared" in refused_for(fold_batch_norm(model))
    check()


def test_tracing_leaves_no_traces():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.calls = 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.last = self.pair(x)
            self.seen.add_(1)
            return self.last + torch.rand(1)

    model = randomised(Stateful())
    generator = torch.get_rng_state()
    assert len(fold_batch_norm(model).folded) == 1
    assert (model.calls, model.seen.item(), hasattr(model, "last")) == (0, 0, False)
    assert torch.get_rng_state().equal(generator)


def test_hooks_on_the_modules_around_a_pair():
    model = randomised(ResNet())
    seen = []
    model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
    assert len(fold_batch_norm(model).folded) == 9
    assert seen == []
    model(torch.randn(1, 3, 8, 8))
    assert len(seen) == 1


@pytest.mark.parametrize("later", [lambda m, y, z: z + y, lambda m, y, z: z + m.conv(z), lambda m, y, z: m.norm(z)])
def test_code_that_stops_tracing_after_the_pair(later):
    """What follows is not known: it may use the layer's output, or either module, once more."""

    class Stops(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            z = self.norm(y)
            return later(self, y, z) if z.sum() * 0 == 0 else z

    model = Stops().eval()
    nn.init.uniform_(model.norm.running_mean)
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    report = fold_batch_norm(model)
    assert not report.folded
    assert "cannot be traced" in report.refused[0].reason
    assert model(x).equal(expected)
