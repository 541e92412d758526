"""What the tensors of a ChannelCase hold: activations and incoming gradients, in float64."""

import cases
import torch


def sampled_places(case):
    """Where the CPU's kernels may look for a first idea of a channel's mean, of shape [spatial]."""
    size = torch.Size(case.spatial).numel()
    return torch.arange(size) % 8 == 0 if case.layout == "channels_last" else cases.sampled_places(size)


def fill(case, batch, generator):
    """Activations in float64; the caller rounds them to the dtype under test."""
    shape = (batch, case.channels, *case.spatial)
    per_slab = (1 if case.op == "batch_norm" else batch, case.slab_groups, 1)

    def of_slabs():
        """One value per slab, of shape [batch, channels, 1...]."""
        values = torch.randn(per_slab, generator=generator, dtype=torch.float64)
        values = values.expand(batch, case.slab_groups, case.channels // case.slab_groups)
        return values.reshape(batch, case.channels, *[1] * len(case.spatial))

    x = torch.randn(shape, generator=generator, dtype=torch.float64) + case.mean
    first = slice(1 if case.op == "batch_norm" else batch)  # images in which a slab begins
    if case.data == "two_valued":
        x = torch.where(x > case.mean, 0.1, -0.1).double() + case.mean
    elif case.data == "outlier":  # in the first element of every slab
        x.view(batch, case.slab_groups, -1)[first, :, 0] = 1e4
    elif case.data == "lead":  # the first image, or the first channel of a group, is many deviations away from the rest
        x = 1e-3 * x
        x.view(batch, case.slab_groups, -1, *case.spatial)[first, :, 0] += 7777.7
    elif case.data == "constant":
        x = of_slabs().expand(shape) * 100 + case.mean
    elif case.data == "tiny":
        x = x * 1e-4
    elif case.data == "regular":  # two values, one of them at all places that a sample may take
        share = torch.linspace(0, 1, case.channels, dtype=torch.float64)[:, None]
        regular = sampled_places(case)
        of_channel = regular | (torch.arange(len(regular)) >= len(regular) * (1 - share))
        x = torch.where(of_channel, 0.1, -0.1).double().view(1, case.channels, *case.spatial).expand(shape) + case.mean
    elif case.data == "mixed":  # every channel of every image its own mean and scale, and a difference where a sample may look
        per_channel = (batch, case.channels, *[1] * len(case.spatial))
        spread = torch.randn(2, *per_channel, generator=generator, dtype=torch.float64)
        regular = sampled_places(case).view(case.spatial)
        x = x + 3 * torch.rand(per_channel, generator=generator, dtype=torch.float64) * regular
        x = x * torch.exp2(3 * spread[0]) + 50 * spread[1]
    return x


def fill_grad(kind, shape, generator):
    """The incoming gradients of the accuracy contract; the constant ones expose long accumulation chains."""
    if kind == "uniform":
        return torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "tenth":
        return torch.full(shape, 0.1, dtype=torch.float64)
    if kind == "per_channel":
        channel = torch.randn(1, shape[1], *[1] * (len(shape) - 2), generator=generator, dtype=torch.float64)
        return channel.expand(shape)
    if kind == "mean_loss":
        return torch.full(shape, 1.0 / torch.Size(shape).numel(), dtype=torch.float64)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
