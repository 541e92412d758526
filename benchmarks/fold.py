"""CNNs before and after `normext.fold_batch_norm`: error against float64, answers, time. One run, printed as JSON lines; `run.py`
starts it, several times.

Weights are random, running statistics those of a batch. Errors are relative to the largest output of the float64 model.
"""

import argparse
import copy
import json

import cpu
import machine
import timing
import torch
from overhead import ResidualCNN
from torch import nn

normext = machine.import_normext()
IMAGES = 256  # whose answers are compared
BATCH = 8  # images of a forward that is timed


def convolution(inside, outside, size, stride=1, groups=1):
    layer = nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outside), nn.ReLU6())


def separable(inside, outside, stride):
    """MobileNet's block."""
    return nn.Sequential(convolution(inside, inside, 3, stride, inside), convolution(inside, outside, 1))


def mobilenet():
    blocks = [separable(16 << i, 32 << i, 1 + i % 2) for i in range(4)]
    return nn.Sequential(convolution(3, 16, 3, 2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 100))


MODELS = {
    "residual CNN, 32x32": (lambda: ResidualCNN(32, nn.BatchNorm2d), (3, 32, 32)),
    "MobileNet, 112x112": (mobilenet, (3, 112, 112)),
}


def trained(model, shape):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    with torch.no_grad():
        model.train()(torch.randn(64, *shape))
    return model.eval()


def measure(bench, name, make, shape):
    model = trained(make(), shape)
    ours, folded = copy.deepcopy(model), copy.deepcopy(model)
    normext.convert(ours)
    report = normext.fold_batch_norm(folded, torch.randn(2, *shape))
    x, batch = torch.randn(IMAGES, *shape), torch.randn(BATCH, *shape)
    with torch.no_grad():
        exact, before, after = copy.deepcopy(model).double()(x.double()), model(x), folded(x)
        scale = exact.abs().max()
        error = {what: ((y - exact).abs().max() / scale).item() for what, y in (("unfolded", before), ("folded", after))}
        contenders = {what: lambda m=m: m(batch) for what, m in (("torch", model), ("normext", ours), ("folded", folded))}
        measured = bench.measure(contenders, "folded")
    answers = {what: (y.argmax(1) == exact.argmax(1)).sum().item() for what, y in (("unfolded", before), ("folded", after))}
    return {
        "model": name,
        "folded": len(report.folded),
        "error": error,
        "answers_of_float64": answers,
        "us": {what: seconds * 1e6 for what, seconds in measured.seconds.items()},
        "speedup": measured.speedup,
        "other_load": measured.other_load,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cpu.add_common_arguments(parser)
    args = parser.parse_args()
    cpu.prepare(args)
    torch.manual_seed(0)
    print(json.dumps({"machine": machine.describe()}), flush=True)
    bench = timing.Bench(args.budget, args.patience)
    for name, (make, shape) in MODELS.items():
        print(json.dumps(measure(bench, name, make, shape)), flush=True)


if __name__ == "__main__":
    main()
