"""The ops under test, each as a plain function of tensors, in normext and in torch; and their inputs.

A fused op is compared with what a user writes without it: the sum, then torch's norm of the sum; both return both.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from machine import import_normext

normext = import_normext()
EPS = 1e-5


@dataclass(frozen=True)
class Op:
    name: str
    centred: bool  # has a mean and a bias
    fused: bool  # adds a residual first


OPS = {
    op.name: op
    for op in (
        Op("layer_norm", centred=True, fused=False),
        Op("rms_norm", centred=False, fused=False),
        Op("add_layer_norm", centred=True, fused=True),
        Op("add_rms_norm", centred=False, fused=True),
    )
}


# torch ------------------------------------------------------------------------------------------------------------
def torch_layer_norm(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def torch_rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


def torch_add_layer_norm(x, residual, weight, bias):
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias, EPS), total


def torch_add_rms_norm(x, residual, weight):
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


# normext ----------------------------------------------------------------------------------------------------------
def normext_layer_norm(x, weight, bias):
    return normext.layer_norm(x, weight.shape, weight, bias, EPS)


def normext_rms_norm(x, weight):
    return normext.rms_norm(x, weight.shape, weight, EPS)


def normext_add_layer_norm(x, residual, weight, bias):
    return normext.add_layer_norm(x, residual, weight.shape, weight, bias, EPS)


def normext_add_rms_norm(x, residual, weight):
    return normext.add_rms_norm(x, residual, weight.shape, weight, EPS)


def function(library, op):
    """The function of `library` ("torch" or "normext"), taking what `Inputs.arguments()` gives."""
    return globals()[f"{library}_{op.name}"]


# Inputs -----------------------------------------------------------------------------------------------------------
@dataclass
class Inputs:
    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor | None
    output_grads: tuple[torch.Tensor, ...]

    def arguments(self):
        return tuple(t for t in (self.x, self.residual, self.weight, self.bias) if t is not None)

    def leaves(self):
        return self.arguments()

    def gradients(self, fn):
        """Forward, then the gradients of every input: one training step's share of this op."""
        return torch.autograd.grad(fn(*self.arguments()), self.leaves(), self.output_grads)


def _activation(rows, cols, dtype, device, layout):
    if layout == "contiguous":
        return torch.randn(rows, cols, device=device).to(dtype)
    heads = 32 if rows % 32 == 0 else 1
    fused = torch.randn(rows // heads, 3 * heads, cols, device=device).to(dtype)
    return fused[:, :heads]


def make_inputs(op, rows, cols, dtype, device="cpu", layout="contiguous", requires_grad=False):
    """Random inputs; parameters have the activations' dtype, as in a model moved to it as a whole."""
    x = _activation(rows, cols, dtype, device, layout)
    residual = torch.randn_like(x) if op.fused else None
    weight = torch.randn(cols, device=device).to(dtype)
    bias = torch.randn(cols, device=device).to(dtype) if op.centred else None
    inputs = Inputs(x, residual, weight, bias, ())
    if requires_grad:
        inputs.output_grads = tuple(torch.randn_like(x) for _ in range(2 if op.fused else 1))
        for tensor in inputs.arguments():
            tensor.requires_grad_()
    return inputs
