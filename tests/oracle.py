"""What the ops must return, in wider arithmetic from the already rounded inputs, and the accuracy contract.

float16, bfloat16 and float32 are judged in float64, float64 in the 80-bit type of x86. Each `*_error` function returns the
largest error in units of the contract (README, What it promises): 4 is the limit, infinity means not finite or wrong where the
contract leaves no room. The kernel's own statistics are never used.
"""

import os
from dataclasses import dataclass

import cases
import numpy as np
import torch

LIMIT = 4.0
# The baseline instruction set has no fma, and may round a*b + c twice.
FUSED_MULTIPLY_ADD = os.environ.get("NORMEXT_CPU_ISA") != "scalar"
PRECISION = {torch.float16: (11, -14), torch.bfloat16: (8, -126)}  # significant bits, smallest exponent


def wide(t):
    if t is None:
        return None
    values = t.detach().cpu().double().numpy()
    return values.astype(np.longdouble) if t.dtype == torch.float64 else values


def unit(dtype):
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def half_ulp(values, dtype):
    """Half a unit in the last place of `values` once stored as a 16-bit dtype; zero for wider ones."""
    if dtype not in PRECISION:
        return 0.0
    bits, smallest = PRECISION[dtype]
    exponent = np.maximum(np.frexp(values)[1] - 1, smallest)
    return np.ldexp(0.5, exponent - (bits - 1))


@dataclass
class Row:
    """Per row: what is normalised and how. Shapes [rows, cols] and [rows, 1]."""

    x: np.ndarray
    xhat: np.ndarray
    rstd: np.ndarray
    gamma: np.ndarray


def residual_sum(case, t):
    """input + alpha * residual as the ops define it: one fma in the accumulation type, rounded once to the dtype."""
    if not case.fused:
        return t.x
    if case.alpha == 1:
        return t.x + t.residual
    if case.dtype == torch.float64:
        total = wide(t.x) + np.longdouble(case.alpha) * wide(t.residual)
        return torch.from_numpy(total.astype(np.float64)).to(t.x.device)
    alpha = float(np.float32(case.alpha))
    product = alpha * t.residual.double()
    if not FUSED_MULTIPLY_ADD:
        product = product.float()
    return (t.x.double() + product).float().to(case.dtype)


def normalise(case, t):
    x = wide(residual_sum(case, t))
    eps = cases.default_eps(case.dtype) if case.eps is None else case.eps
    centred = x - x.mean(-1, keepdims=True) if case.centred else x
    if case.centred:  # once more: the first mean was rounded, too
        centred = centred - centred.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    gamma = wide(t.weight) + case.weight_offset if case.weight else np.ones(case.cols)
    return Row(x, centred * rstd, rstd, gamma)


def forward(case, t):
    row = normalise(case, t)
    bias = wide(t.bias) if t.bias is not None else 0.0
    return row.xhat * row.gamma + bias


def worst(error, scale):
    """max(error / scale), with 0/0 = 0: where the contract allows nothing, an exact result is fine."""
    error = np.maximum(error, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0.0, error / scale)
    return float(np.nan_to_num(ratio, nan=np.inf).max()) if ratio.size else 0.0


def forward_error(case, t, output):
    row = normalise(case, t)
    bias = wide(t.bias) if t.bias is not None else np.zeros(case.cols)
    expected = row.xhat * row.gamma + bias
    allowed = half_ulp(expected, output.dtype)
    if case.rounding == "llama":  # xhat is rounded too
        allowed = 1.01 * allowed + half_ulp(row.xhat, case.dtype) * np.abs(row.gamma)
    scale = np.abs(row.gamma) * np.maximum(1, np.abs(row.xhat)) + np.abs(bias)
    return worst(np.abs(wide(output) - expected) - allowed, scale * unit(case.dtype))


def backward(case, t):
    """dx (of the sum, where there is one), dweight and dbias, each with the size that the contract scales by."""
    row, dy = normalise(case, t), wide(t.dy)
    g = dy * row.gamma
    product = g * row.xhat

    def mean(values):
        return values.mean(-1, keepdims=True)

    dx = row.rstd * (g - (mean(g) if case.centred else 0) - row.xhat * mean(product))
    centring = mean(np.abs(g)) if case.centred else 0
    dx_size = row.rstd * (np.abs(g) + centring + np.abs(row.xhat) * mean(np.abs(product)))
    if t.dres is not None:
        dx, dx_size = dx + wide(t.dres), dx_size + np.abs(wide(t.dres))
    terms = dy * row.xhat
    return {
        "dx": (dx, dx_size),
        "dweight": (terms.sum(0), np.abs(terms).sum(0)),
        "dbias": (dy.sum(0), np.abs(dy).sum(0)),
    }


def backward_errors(case, t, grads):
    """Contract figures of gradients given in the order of Tensors.leaves()."""
    named = dict(zip([k for k in ("x", "residual", "weight", "bias") if getattr(t, k) is not None], grads, strict=True))
    expected = backward(case, t)
    found = {"dx": named["x"]}
    if "weight" in named:
        found["dweight"] = named["weight"]
    if "bias" in named:
        found["dbias"] = named["bias"]
    errors = {}
    for name, gradient in found.items():
        value, size = expected[name]
        if name == "dweight" and case.rows < 2048:  # few terms: their own error counts, as it does in the forward
            size = (np.abs(wide(t.dy)) * np.maximum(1, np.abs(normalise(case, t).xhat))).sum(0)
        allowed = half_ulp(value, gradient.dtype)
        if case.rounding == "llama" and name == "dweight":  # the weight multiplied the rounded xhat
            allowed = 1.01 * allowed + (np.abs(wide(t.dy)) * half_ulp(normalise(case, t).xhat, case.dtype)).sum(0)
        errors[name] = worst(np.abs(wide(gradient) - value) - allowed, size * unit(case.dtype))
    return errors
