"""The part of the demo with channel norms: networks for scikit-learn's digits, 1797 images of 8x8, trained before and after
`normext.convert`; and the trained CNN after `normext.fold_batch_norm`. demo.py runs it.

A residual CNN (BatchNorm, ReLU) tells which digit an image shows. A U-Net (GroupNorm, SiLU) removes noise: it tells which
pixels are ink, its accuracy being the share of pixels.
"""

import copy
from dataclasses import dataclass, field

import timing
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import normext

TRAINED_ON = 1200  # images; the other 597 are for testing
BATCH = 60
EPOCHS = 16
RATE = 0.02  # small enough that rounding alone changes the answer for an image or two at most
NOISE = 0.5
SAME_STEPS, STEP_TOLERANCE = 20, 1e-3  # rounding grows in training: only the first steps can be the same
ACCURACY_TOLERANCE = 0.005


@dataclass
class Row:
    """One line of the table; times are seconds."""

    name: str
    norms: int
    accuracy: dict[str, float] = field(default_factory=dict)
    step_seconds: dict[str, float] = field(default_factory=dict)
    forward_seconds: dict[str, float] = field(default_factory=dict)


# ---- The networks


class Residual(nn.Module):
    """Two convolutions, each with BatchNorm, around a shortcut."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.norm2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.shortcut = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


def residual_cnn():
    stem = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    return nn.Sequential(*stem, Residual(16, 16, 1), Residual(16, 32, 2), *head)


class Smooth(nn.Module):
    """GroupNorm, SiLU and a convolution, twice, around a shortcut: the block of diffusion models."""

    def __init__(self, inside, outside):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inside), nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outside), nn.Conv2d(outside, outside, 3, padding=1)
        self.shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.down, self.middle, self.up = Smooth(16, 16), Smooth(16, 32), Smooth(48, 16)
        self.norm, self.head = nn.GroupNorm(8, 16), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x):
        fine = self.down(self.stem(x))
        coarse = F.interpolate(self.middle(F.avg_pool2d(fine, 2)), scale_factor=2.0)
        return self.head(F.silu(self.norm(self.up(torch.cat((fine, coarse), 1)))))


# ---- What they learn


@dataclass
class Task:
    inputs: torch.Tensor
    targets: torch.Tensor

    def loss(self, model, chosen):
        outputs, targets = model(self.inputs[chosen]), self.targets[chosen]
        if targets.dim() == 1:
            return F.cross_entropy(outputs, targets)
        return F.binary_cross_entropy_with_logits(outputs, targets)

    def test_inputs(self):
        return self.inputs[TRAINED_ON:]

    def answers(self, outputs):
        return outputs.argmax(1) if self.targets.dim() == 1 else (outputs > 0).float()

    def accuracy(self, model):
        with torch.no_grad():
            answers = self.answers(model(self.test_inputs()))
        return (answers == self.targets[TRAINED_ON:]).double().mean().item()


def tasks():
    """Recognition and removal of noise."""
    digits = load_digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.tensor(digits.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    noisy = images + NOISE * torch.randn(images.shape, generator=generator)
    return Task(images, torch.tensor(digits.target)[order]), Task(noisy, (images > 0.5).float())


def train(model, task):
    """Losses of all steps of SGD with momentum; the rate rises, then falls to nothing. In eval mode afterwards."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * TRAINED_ON // BATCH)
    losses = []
    model.train()
    for _ in range(EPOCHS):
        for chosen in torch.randperm(TRAINED_ON, generator=generator).split(BATCH):
            loss = task.loss(model, chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    return losses


def time_both(row, before, after, task, seconds):
    """Interleaved medians of a training step without its optimizer, and of the forward over all test images. The steps are taken
    by copies: they move running statistics."""
    chosen = torch.arange(BATCH)

    def step(model):
        model = copy.deepcopy(model).train()
        return lambda: torch.autograd.grad(task.loss(model, chosen), list(model.parameters()))

    row.step_seconds = timing.interleave({"torch": step(before), "normext": step(after)}, "normext", seconds).seconds
    x = task.test_inputs()
    with torch.no_grad():
        contenders = {"torch": lambda: before(x), "normext": lambda: after(x)}
        row.forward_seconds = timing.interleave(contenders, "normext", seconds).seconds


def compare(name, build, task, check, seconds):
    """Trains a network twice from the same seed, with torch's norms and with ours. The row, and both networks."""
    torch.manual_seed(0)
    before = build()
    after = copy.deepcopy(before)
    report = normext.convert(after, task.inputs[:BATCH])
    norms = sum(isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) for module in before.modules())
    check(
        len(report.swapped) == norms and not report.refused and not report.never_called,
        f"{len(report.swapped)} of {norms} norms swapped, none left out by a forward",
    )
    theirs, ours = train(before, task), train(after, task)
    worst = max(abs(a - b) / abs(a) for a, b in zip(theirs[:SAME_STEPS], ours[:SAME_STEPS], strict=True))
    check(
        worst <= STEP_TOLERANCE and ours[-1] < ours[0],
        f"training: loss {ours[0]:.4f} -> {ours[-1]:.4f}, largest relative difference in {SAME_STEPS} steps {worst:.1e}",
    )
    row = Row(name, norms, {"torch": task.accuracy(before), "normext": task.accuracy(after)})
    difference = abs(row.accuracy["normext"] - row.accuracy["torch"])
    check(
        difference <= ACCURACY_TOLERANCE,
        f"test accuracy {row.accuracy['normext']:.2%}, with torch's norms {row.accuracy['torch']:.2%}",
    )
    time_both(row, before, after, task, seconds)
    return row, before, after


def fold(before, model, task, check, seconds):
    """The trained CNN without its norms: they become part of the convolutions. Its row compares it with torch's, unfolded."""
    folded, x = copy.deepcopy(model), task.test_inputs()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    report = normext.fold_batch_norm(folded, x[:BATCH])
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    check(len(report.folded) == norms and left == 0, f"{len(report.folded)} of {norms} norms folded, error {report.error:.1e}")
    with torch.no_grad():
        same = task.answers(folded(x)).equal(task.answers(model(x)))
        check(same, f"same answer as before for each of {len(x)} test images")
        contenders = {"torch": lambda: before(x), "normext": lambda: model(x), "folded": lambda: folded(x)}
        measured = timing.Bench(seconds, patience=20).measure(contenders, "folded")
    gain = measured.speedup
    text = f"folded forward {gain['torch']:.2f}x as fast as with torch's norms"
    check(gain["torch"] > 1, f"{text}, {gain['normext']:.2f}x as fast as with normext's")
    row = Row("CNN, folded", 0, {"torch": task.accuracy(before), "normext": task.accuracy(folded)})
    row.forward_seconds = {"torch": measured.seconds["torch"], "normext": measured.seconds["folded"]}
    return row


def demo(check, seconds):
    recognition, denoising = tasks()
    print("\nDigits: residual CNN with BatchNorm, float32")
    cnn, before, after = compare("CNN, BatchNorm", residual_cnn, recognition, check, seconds)
    print("\nThe trained CNN, its BatchNorms folded into the convolutions")
    folded = fold(before, after, recognition, check, seconds)
    print("\nNoise: U-Net with GroupNorm and SiLU, float32")
    unet, _, _ = compare("U-Net, GroupNorm", UNet, denoising, check, seconds)
    return [cnn, folded, unet]


def print_table(rows):
    print(f"\n{'':18}{'norms':>6}{'test accuracy':>18}{'training step, ms':>26}{'forward of 597 images, ms':>28}")
    print(f"{'':18}{'':6}" + f"{'torch':>9}{'normext':>9}" + f"{'torch':>10}{'normext':>9}{'':7}" + f"{'torch':>12}{'normext':>9}")
    for row in rows:
        line = f"{row.name:18}{row.norms:6}{row.accuracy['torch']:9.2%}{row.accuracy['normext']:9.2%}"
        for seconds, width in ((row.step_seconds, 10), (row.forward_seconds, 12)):
            if seconds:
                theirs, ours = (seconds[who] * 1e3 for who in ("torch", "normext"))
                line += f"{theirs:{width}.2f}{ours:9.2f}{f'{theirs / ours:.2f}x':>7}"
            else:
                line += f"{'-':>{width}}{'-':>9}{'':7}"
        print(line)
