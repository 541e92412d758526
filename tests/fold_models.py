"""The models that the tests of fold_batch_norm share, and what they ask of its reports."""

import torch
from torch import nn


class Plain(nn.BatchNorm2d):
    """Stands in for a subclass with a forward of its own that computes the same, as ours do."""

    def forward(self, input):
        y = (input - self.running_mean[:, None, None]) / (self.running_var[:, None, None] + self.eps).sqrt()
        return y if self.weight is None else y * self.weight[:, None, None] + self.bias[:, None, None]


def randomised(model):
    """In eval mode, with norms that are far from the identity."""
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not tensor.is_floating_point():
                continue
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                scaled = torch.rand_like(tensor) + 0.5 if name in ("weight", "running_var") else torch.randn_like(tensor)
                tensor.data.copy_(scaled)
    return model.eval()


def pair(layer, norm, *rest):
    return randomised(nn.Sequential(layer, norm, *rest))


def refusals(report):
    assert report.folded == ()
    return {r.name: r.reason for r in report.refused}


def refused_for(report):
    (reason,) = refusals(report).values()
    return reason


def unchanged(model):
    """A check, for later, that a model is as it is now."""
    modules = list(model.modules())
    state = [dict(vars(m), _parameters=dict(m._parameters), _buffers=dict(m._buffers), _modules=dict(m._modules)) for m in modules]
    values = [t.clone() for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]

    def check():
        assert list(model.modules()) == modules
        now = [
            dict(vars(m), _parameters=dict(m._parameters), _buffers=dict(m._buffers), _modules=dict(m._modules)) for m in modules
        ]
        assert now == state
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        assert all(a.equal(b) for a, b in zip(values, tensors, strict=True))

    return check


class Residual(nn.Module):
    def __init__(self, inside, out, stride, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = norm(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = norm(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != out:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), norm(out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(inplace=True))
        self.layers = nn.Sequential(Residual(16, 16, 1, norm), Residual(16, 32, 2, norm), Residual(32, 64, 2, norm))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).mean((2, 3)))
