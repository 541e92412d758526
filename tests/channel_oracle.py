"""What the channel norms must return, in wider arithmetic from the already rounded inputs, and the accuracy contract.

The rules are those of oracle.py: float64 for float32 and 16-bit types, the 80-bit type of x86 for float64; figures are in units
of the contract (README, What it promises), 4 is the limit; the kernel's own statistics are never used. Arrays have the shape
[batch, groups, channels of a group, spatial]; batch norm has one channel per group, and its slab is a group of all images.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from oracle import LIMIT, half_ulp, unit, wide, worst

__all__ = ["LIMIT"]
FEW = 2048  # terms of a parameter's gradient below which their own error counts
STEEPEST = 1.13  # |act'| is nowhere larger


@dataclass
class Slabs:
    x: np.ndarray
    mean: np.ndarray
    variance: np.ndarray  # biased
    xhat: np.ndarray
    rstd: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    residual: np.ndarray
    axes: tuple[int, ...]  # of a slab
    count: int  # elements of a slab

    def average(self, values):
        return values.mean(self.axes, keepdims=True)

    @property
    def z(self):
        """What the activation is applied to."""
        return self.xhat * self.gamma + self.beta + self.residual

    @property
    def z_size(self):
        """What the error of z may be a small multiple of."""
        return np.abs(self.gamma) * np.maximum(1, np.abs(self.xhat)) + np.abs(self.beta) + np.abs(self.residual)


def grouped(case, t):
    return None if t is None else wide(t).reshape(t.shape[0], case.slab_groups, case.channels // case.slab_groups, -1)


def per_channel(case, t, default):
    values = np.full(case.channels, default) if t is None else wide(t)
    return values.reshape(1, case.slab_groups, -1, 1)


def normalise(case, t):
    x = grouped(case, t.x)
    axes = (0, 2, 3) if case.op == "batch_norm" else (2, 3)
    if case.training or case.op == "group_norm":
        mean = x.mean(axes, keepdims=True)
        mean = mean + (x - mean).mean(axes, keepdims=True)  # once more: the first was rounded, too
        centred = x - mean
        centred = centred - centred.mean(axes, keepdims=True)
        variance = (centred * centred).mean(axes, keepdims=True)
    else:
        mean, variance = per_channel(case, t.running_mean, 0.0), per_channel(case, t.running_var, 1.0)
        centred = x - mean
    rstd = 1 / np.sqrt(variance + case.eps)
    residual = grouped(case, t.residual) if case.residual else np.zeros((1, 1, 1, 1))
    gamma, beta = per_channel(case, t.weight, 1.0), per_channel(case, t.bias, 0.0)
    count = x.size // mean.size if x.size else 0
    return Slabs(x, mean, variance, centred * rstd, rstd, gamma, beta, residual, axes, count)


def gauss(z):
    """Density and cumulative probability of the normal distribution."""
    cumulative = 0.5 * torch.special.erfc(torch.from_numpy(np.ascontiguousarray(z, np.float64)) / -(2**0.5)).numpy()
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    return density, cumulative + density * (z - z.astype(np.float64))


@dataclass
class Activated:
    """An activation at z: value and derivative, the sum of the derivative's absolute terms, and the second derivative."""

    value: np.ndarray
    slope: np.ndarray
    slope_size: np.ndarray
    curvature: np.ndarray


def activate(case, z):
    if case.activation == "silu":
        s = 1 / (1 + np.exp(-z))
        slope = s * (1 + z * (1 - s))
        curvature = s * (1 - s) * (2 + z * (1 - 2 * s))
        return Activated(z * s, slope, s * (1 + np.abs(z) * (1 - s)), np.abs(curvature))
    if case.activation == "gelu":
        density, cumulative = gauss(z)
        slope = cumulative + z * density
        return Activated(z * cumulative, slope, cumulative + np.abs(z) * density, np.abs(density * (2 - z * z)))
    below = {"relu": 0.0, "leaky_relu": 0.01}.get(case.activation, 1.0)
    slope = np.where(z > 0, 1.0, below).astype(z.dtype)
    return Activated(z * slope, slope, slope, np.zeros(1))


def settled(case, t):
    """dy is zero where the derivative of the activation is a matter of rounding: at a z within the error of a step."""
    if case.activation not in ("relu", "leaky_relu"):
        return t
    slabs = normalise(case, t)
    clear = np.abs(slabs.z) > 2 * LIMIT * unit(case.dtype) * slabs.z_size
    dy = t.dy * torch.from_numpy(clear.reshape(t.dy.shape)).to(t.dy)
    return replace(t, dy=torch.empty_like(t.dy).copy_(dy))


def forward(case, t):
    return activate(case, normalise(case, t).z).value.reshape(t.x.shape)


def forward_error(case, t, output):
    slabs = normalise(case, t)
    expected = activate(case, slabs.z).value
    scale = slabs.z_size if case.activation is None else STEEPEST * slabs.z_size + np.abs(expected)
    error = np.abs(grouped(case, output) - expected) - half_ulp(expected, output.dtype)
    return worst(error, scale * unit(case.dtype))


def backward(case, t):
    """dx, dresidual, dweight and dbias, each with the size that the contract scales by."""
    slabs, dy = normalise(case, t), grouped(case, t.dy)
    act = activate(case, slabs.z)
    dz, dz_size = dy * act.slope, np.abs(dy) * (act.slope_size + act.curvature * slabs.z_size)
    g, g_size = dz * slabs.gamma, dz_size * np.abs(slabs.gamma)
    if case.training or case.op == "group_norm":
        product, product_size = slabs.average(g * slabs.xhat), slabs.average(g_size * np.abs(slabs.xhat))
        dx = slabs.rstd * (g - slabs.average(g) - slabs.xhat * product)
        dx_size = slabs.rstd * (g_size + slabs.average(g_size) + np.abs(slabs.xhat) * product_size)
    else:
        dx, dx_size = slabs.rstd * g, slabs.rstd * g_size

    terms = dz.shape[0] * dz.shape[3]
    xhat_size = np.maximum(1, np.abs(slabs.xhat)) if terms < FEW else np.abs(slabs.xhat)

    def over_channels(values):
        return values.sum((0, 3)).reshape(-1)

    return {
        "dx": (dx.reshape(t.x.shape), dx_size.reshape(t.x.shape)),
        "dresidual": (dz.reshape(t.x.shape), dz_size.reshape(t.x.shape)),
        "dweight": (over_channels(dz * slabs.xhat), over_channels(dz_size * xhat_size)),
        "dbias": (over_channels(dz), over_channels(dz_size)),
    }


def backward_errors(case, t, grads):
    """Contract figures of gradients given in the order of Tensors.leaves()."""
    expected, errors = backward(case, t), {}
    for name, gradient in zip(t.names(), grads, strict=True):
        value, size = expected["d" + name]
        errors["d" + name] = worst(np.abs(wide(gradient) - value) - half_ulp(value, gradient.dtype), size * unit(case.dtype))
    return errors


def statistics(case, t):
    """Mean and unbiased variance as running statistics take them, [channels] each, with the sizes of their terms."""
    slabs = normalise(replace(case, training=True), t)
    mean_size = slabs.average(np.abs(slabs.x))
    variance = slabs.variance * (slabs.count / max(slabs.count - 1, 1))
    return [values.mean(0).reshape(-1) for values in (slabs.mean, mean_size, variance)]


def running(case, t, momentum=None):
    """What a training step leaves in running_mean and running_var, given t's, each with the size of its terms."""
    m = case.momentum if momentum is None else momentum
    mean, mean_size, variance = statistics(case, t)
    old_mean, old_var = wide(t.running_mean), wide(t.running_var)
    return {
        "running_mean": ((1 - m) * old_mean + m * mean, np.abs((1 - m) * old_mean) + np.abs(m) * mean_size),
        "running_var": ((1 - m) * old_var + m * variance, np.abs((1 - m) * old_var) + np.abs(m) * variance),
    }


def running_errors(case, t, after):
    """Contract figures of the buffers of `after`, which were those of `t` before the call."""
    errors = {}
    for name, (value, size) in running(case, t).items():
        found = getattr(after, name)
        errors[name] = worst(np.abs(wide(found) - value) - half_ulp(value, found.dtype), size * unit(case.dtype))
    return errors
