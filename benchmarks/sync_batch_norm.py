"""SyncBatchNorm over several processes on this machine (gloo): is it right, how often does it communicate, what does a step take?

    python benchmarks/sync_batch_norm.py            # 4 processes, about half a minute
    python benchmarks/sync_batch_norm.py --quick

Right means: every rank's output and input gradient, the ranks' parameter gradients added up, and the running statistics are those
of BatchNorm on all images together, in float64, within rounding; ranks hold different numbers of images, in one case none. Each
process runs on one thread and all share this machine, so times are for comparing the contenders only. torch's own SyncBatchNorm
refuses CPU tensors; `TorchAlgorithm` is what it does on CUDA, in plain torch ops. Checks decide the exit status.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from machine import import_normext
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

normext = import_normext()
CHANNELS = 16
SHARDS = ((5, 1, 8, 3), (4, 0, 2, 7))  # images of each rank, cycled through
SHAPES = ((4, 64, 28, 28), (4, 256, 14, 14), (8, 64, 56, 56))  # [images of a rank, C, H, W], timed
TOLERANCE = 1e-5  # relative to the largest element of what is compared
PLAIN_TOLERANCE = 1e-4  # of the contender written here


class _TorchAlgorithm(torch.autograd.Function):
    """torch/nn/modules/_functions.py: mean, 1/std and count are gathered; sums of dy and dy * (x - mean) are reduced."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        channels, axes, shape = x.shape[1], (0, *range(2, x.dim())), [1, -1] + [1] * (x.dim() - 2)
        var, mean = torch.var_mean(x, axes, correction=0)
        count = mean.new_full((1,), x.numel() // channels)
        mine = torch.cat((mean, torch.rsqrt(var + eps), count))
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        means, rstds, counts = torch.stack(gathered).split((channels, channels, 1), dim=1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = ((rstds**-2 - eps + (means - mean) ** 2) * counts).sum(0) / total
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * total / (total - 1), momentum)
        rstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, rstd, total)
        return (x - mean.view(shape)) * (rstd * weight).view(shape) + bias.view(shape)

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd, total = ctx.saved_tensors
        channels, axes, shape = x.shape[1], (0, *range(2, x.dim())), [1, -1] + [1] * (x.dim() - 2)
        centred = x - mean.view(shape)
        sums = torch.cat((dy.sum(axes), (dy * centred).sum(axes)))
        dweight, dbias = sums[channels:] * rstd, sums[:channels].clone()
        dist.all_reduce(sums)
        mean_dy, mean_dy_centred = (sums / total).split(channels)
        dx = dy - mean_dy.view(shape) - centred * (rstd * rstd * mean_dy_centred).view(shape)
        return dx * (rstd * weight).view(shape), dweight, dbias, None, None, None, None


class TorchAlgorithm(nn.BatchNorm2d):
    def forward(self, x):
        self.num_batches_tracked.add_(1)
        buffers = self.running_mean, self.running_var
        return _TorchAlgorithm.apply(x, self.weight, self.bias, *buffers, self.momentum, self.eps)


CONTENDERS = {
    "normext.SyncBatchNorm": normext.SyncBatchNorm,
    "torch's algorithm, plain ops": TorchAlgorithm,
    "normext.BatchNorm2d, this rank only": normext.BatchNorm2d,
    "nn.BatchNorm2d, this rank only": nn.BatchNorm2d,
}
TOGETHER = tuple(CONTENDERS)[:2]


def module(kind, channels, dtype=torch.float32):
    """A norm with the same parameters on every rank, in training."""
    generator = torch.Generator().manual_seed(0)
    norm = kind(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels, generator=generator) + 2)
        norm.bias.copy_(torch.randn(channels, generator=generator))
    return norm.to(dtype)


def step(norm, x, dy):
    """Forward, then the gradients of input and parameters."""
    y = norm(x)
    return y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)


# ---- Is it right?


def shards(sizes, layout):
    """Images and output gradients of all ranks together, the same in every process; mean far from 0, scales of their own."""
    generator = torch.Generator().manual_seed(1)
    shape = (sum(sizes), CHANNELS, 9, 7)
    scale = torch.rand(1, CHANNELS, 1, 1, generator=generator) + 0.5
    x = torch.randn(shape, generator=generator) * scale + 10
    return x.contiguous(memory_format=layout), torch.randn(shape, generator=generator).contiguous(memory_format=layout)


def relative(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item() if expected.numel() else 0.0


def errors(kind, rank, sizes, layout):
    """Largest relative error over the ranks, by quantity; and whether all ranks have the same running statistics, bit for bit."""
    x, dy = shards(sizes, layout)
    exact = module(nn.BatchNorm2d, CHANNELS, torch.float64)
    whole = step(exact, x.double().requires_grad_(), dy.double())
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    norm = module(kind, CHANNELS)
    y, dx, dweight, dbias = step(norm, x[mine].requires_grad_(), dy[mine])
    for gradient in (dweight, dbias):
        dist.all_reduce(gradient)
    pairs = {
        "y": (y.detach(), whole[0].detach()[mine]),
        "dx": (dx, whole[1][mine]),
        "dweight": (dweight, whole[2]),
        "dbias": (dbias, whole[3]),
        "running_mean": (norm.running_mean, exact.running_mean),
        "running_var": (norm.running_var, exact.running_var),
    }
    found = torch.tensor([relative(*pair) for pair in pairs.values()])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    buffers = torch.stack((norm.running_mean, norm.running_var))
    everyones = [torch.empty_like(buffers) for _ in sizes]
    dist.all_gather(everyones, buffers)
    return dict(zip(pairs, found.tolist(), strict=True)), all(other.equal(buffers) for other in everyones)


# ---- How often does it communicate, what does a step take?


class Collectives(TorchDispatchMode):
    """The collectives run inside, by the names of their ops."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self.names.append(function._opname.strip("_"))
        return function(*args, **(kwargs or {}))


def communication(kind):
    norm, x = module(kind, CHANNELS), torch.randn(4, CHANNELS, 9, 7, requires_grad=True)
    norm(x)  # whatever happens once
    with Collectives() as forward:
        y = norm(x)
    with Collectives() as backward:
        y.sum().backward()
    return forward.names, backward.names


def step_times(shape, rounds, calls):
    """Median seconds of a step by contender. Contenders take turns, and all ranks start each turn together."""
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    norms = {name: module(kind, shape[1]) for name, kind in CONTENDERS.items()}
    samples = {name: [] for name in norms}
    names = list(norms)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            dist.barrier()
            start = time.perf_counter()
            for _ in range(calls):
                step(norms[name], x, dy)
            samples[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(times[1:]) for name, times in samples.items()}  # the first turn warms up


# ---- The processes


def report(options, check):
    """Runs on every rank; rank 0 prints."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for sizes in SHARDS:
        sizes = [sizes[i % len(sizes)] for i in range(world)]
        for layout in (torch.contiguous_format, torch.channels_last):
            found, same = errors(normext.SyncBatchNorm, rank, sizes, layout)
            worst = ", ".join(f"{name} {error:.1e}" for name, error in found.items())
            name = str(layout).removeprefix("torch.").removesuffix("_format")
            check(max(found.values()) <= TOLERANCE, f"{'+'.join(map(str, sizes))} images, {name}, as one batch: {worst}")
            check(same, "running statistics the same bits on all ranks")
    found, _ = errors(TorchAlgorithm, rank, [1 + i % 3 for i in range(world)], torch.contiguous_format)
    check(max(found.values()) <= PLAIN_TOLERANCE, f"torch's algorithm in plain ops: largest error {max(found.values()):.1e}")
    for name in TOGETHER:
        forward, backward = communication(CONTENDERS[name])
        text = f"{name}: {', '.join(forward) or 'none'} forward; {', '.join(backward) or 'none'} backward"
        check(name != TOGETHER[0] or len(forward) == len(backward) == 1, text)
    rows = [(shape, step_times(shape, *((3, 2) if options.quick else (15, 5)))) for shape in SHAPES]
    if rank == 0:
        print(f"\nstep of forward and backward on rank 0, us, {world} processes of one thread on {os.cpu_count()} CPUs")
        print(f"{'':38}" + "".join(f"{'x'.join(map(str, shape)):>16}" for shape, _ in rows))
        for name in CONTENDERS:
            print(f"{name:38}" + "".join(f"{seconds[name] * 1e6:16,.0f}" for _, seconds in rows))


def worker(rank, options, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=options.processes)
    failed = 0

    def check(passed, text):
        nonlocal failed
        failed += not passed
        if rank == 0:
            print(f"  {'ok    ' if passed else 'FAILED'} {text}", flush=True)

    try:
        report(options, check)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if failed:
        sys.exit(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    options = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(worker, (options, folder), nprocs=options.processes)
        except torch.multiprocessing.ProcessExitedException:
            print("CHECKS FAILED")
            return 1
    print("all checks passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
