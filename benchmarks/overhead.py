"""What a call costs beside the kernel: 1x64 norms against torch's; a transformer block and a CNN with and without torch.compile.

Printed as one JSON line per figure; `run.py` starts it, several times.
"""

import argparse
import json
from functools import partial

import machine
import timing
import torch
import torch.nn.functional as F
from torch import nn

normext = machine.import_normext()
EPS = 1e-5
MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad mode, nothing requires grad": torch.enable_grad,
}


def call_contenders(requires_grad):
    """`partial` adds 0.03 us to each call; a lambda would add three times that."""
    x, weight, bias = (torch.randn(*shape, requires_grad=requires_grad) for shape in ((1, 64), (64,), (64,)))
    layer, rms = (x, (64,), weight, bias, EPS), (x, (64,), weight, EPS)
    return {
        "normext.layer_norm": partial(normext.layer_norm, *layer),
        "normext.rms_norm": partial(normext.rms_norm, *rms),
        "F.layer_norm": partial(F.layer_norm, *layer),
        "F.rms_norm": partial(F.rms_norm, *rms),
    }


def calls(bench):
    for mode, context in MODES.items():
        contenders = call_contenders(requires_grad=False)
        with context():
            yield figure("call", mode, bench.measure(contenders, subject="F.layer_norm"))


def train_step(function, arguments, dy):
    return torch.autograd.grad(function(*arguments, (64,)), arguments, dy)


def train_calls(bench):
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((1, 64), (64,), (64,)))
    dy = torch.randn(1, 64)
    functions = {
        "normext.layer_norm": (lambda x, w, b, shape: normext.layer_norm(x, shape, w, b, EPS), (x, weight, bias)),
        "normext.rms_norm": (lambda x, w, shape: normext.rms_norm(x, shape, w, EPS), (x, weight)),
        "F.layer_norm": (lambda x, w, b, shape: F.layer_norm(x, shape, w, b, EPS), (x, weight, bias)),
        "F.rms_norm": (lambda x, w, shape: F.rms_norm(x, shape, w, EPS), (x, weight)),
    }
    contenders = {name: partial(train_step, function, arguments, dy) for name, (function, arguments) in functions.items()}
    yield figure("call", "forward+backward", bench.measure(contenders, subject="F.layer_norm"))


class Block(nn.Module):
    """A pre-norm transformer block; `norm` is the class of its two norms."""

    def __init__(self, width, heads, norm):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def blocks(bench, with_compile):
    for norm in ("LayerNorm", "RMSNorm"):
        for tokens, width, heads in ((16, 256, 4), (197, 768, 12)):
            x = torch.randn(1, tokens, width)
            torch.compiler.reset()
            contenders = {}
            reference = Block(width, heads, getattr(nn, norm))
            for name, library in (("torch", nn), ("normext", normext)):
                block = Block(width, heads, getattr(library, norm)).eval()
                block.load_state_dict(reference.state_dict())
                contenders[f"eager {name}"] = partial(block, x)
                if with_compile:
                    contenders[f"compiled {name}"] = partial(torch.compile(block, dynamic=False, fullgraph=True), x)
            with torch.no_grad():
                yield figure("block", f"{norm}, {tokens}x{width}", bench.measure(contenders, subject="eager torch"))


class ResidualCNN(nn.Module):
    """A stem and two residual blocks; `norm` is the class of the five norms."""

    def __init__(self, width, norm):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, width, 3, padding=1, bias=False), norm(width)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(norm(width) for _ in range(4))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        for i in (0, 2):
            y = F.relu(self.norms[i](self.convs[i](x)))
            x = F.relu(x + self.norms[i + 1](self.convs[i + 1](y)))
        return self.head(x.mean((2, 3)))


def model_step(model, x, training):
    if training:
        return torch.autograd.grad(model(x).sum(), list(model.parameters()))
    with torch.no_grad():
        return model(x)


def networks(bench, with_compile):
    """What fusing with neighbours brings a compiled network: torch.compile fuses torch's norms with the relu and the sum, ours
    stay calls."""
    x = torch.randn(8, 3, 32, 32)
    reference = ResidualCNN(32, nn.BatchNorm2d)
    for training in (False, True):
        torch.compiler.reset()
        contenders = {}
        for name, library in (("torch", nn), ("normext", normext)):
            model = ResidualCNN(32, library.BatchNorm2d).train(training)
            model.load_state_dict(reference.state_dict())
            contenders[f"eager {name}"] = partial(model_step, model, x, training)
            if with_compile:
                fast = torch.compile(model, dynamic=False, fullgraph=True)
                contenders[f"compiled {name}"] = partial(model_step, fast, x, training)
        what = f"5 BatchNorms of 8x32x32x32, {'forward+backward' if training else 'inference'}"
        yield figure("network", what, bench.measure(contenders, subject="eager torch"))


def figure(kind, what, measured):
    return {
        "kind": kind,
        "what": what,
        "us": {name: seconds * 1e6 for name, seconds in measured.seconds.items()},
        # How many times the reference's time each takes: F.layer_norm for calls, torch eager for models.
        "relative": measured.speedup,
        "other_load": measured.other_load,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_argument("--patience", type=float, default=60)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    bench = timing.Bench(0.2 if args.quick else args.budget, args.patience)
    print(json.dumps({"machine": machine.describe()}), flush=True)
    with_compile = not args.no_compile
    for measurement in (calls(bench), train_calls(bench), blocks(bench, with_compile), networks(bench, with_compile)):
        for row in measurement:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
