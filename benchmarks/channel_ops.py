"""The channel norms under test as plain functions of tensors, in normext and in torch; and their inputs.

A fused op is compared with what a user writes without it: torch's norm, then the sum, then the activation.
"""

from dataclasses import dataclass

import channel_grid as grid
import torch
import torch.nn.functional as F
from machine import import_normext

normext = import_normext()
EPS, MOMENTUM = 1e-5, 0.1


# torch ------------------------------------------------------------------------------------------------------------
def torch_batch_norm(x, mean, var, weight, bias):
    return F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS)


def torch_batch_norm_eval(x, mean, var, weight, bias):
    return F.batch_norm(x, mean, var, weight, bias, False, MOMENTUM, EPS)


def torch_batch_norm_add_relu(x, residual, mean, var, weight, bias):
    return F.relu(F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS) + residual)


def torch_group_norm(x, weight, bias):
    return F.group_norm(x, grid.GROUPS, weight, bias, EPS)


def torch_group_norm_silu(x, weight, bias):
    return F.silu(F.group_norm(x, grid.GROUPS, weight, bias, EPS))


def torch_instance_norm(x, weight, bias):
    return F.instance_norm(x, None, None, weight, bias, True, MOMENTUM, EPS)


# normext ----------------------------------------------------------------------------------------------------------
def normext_batch_norm(x, mean, var, weight, bias):
    return normext.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS)


def normext_batch_norm_eval(x, mean, var, weight, bias):
    return normext.batch_norm(x, mean, var, weight, bias, False, MOMENTUM, EPS)


def normext_batch_norm_add_relu(x, residual, mean, var, weight, bias):
    return normext.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS, residual=residual, activation="relu")


def normext_group_norm(x, weight, bias):
    return normext.group_norm(x, grid.GROUPS, weight, bias, EPS)


def normext_group_norm_silu(x, weight, bias):
    return normext.group_norm(x, grid.GROUPS, weight, bias, EPS, activation="silu")


def normext_instance_norm(x, weight, bias):
    return normext.instance_norm(x, None, None, weight, bias, True, MOMENTUM, EPS)


def function(library, op):
    """The function of `library` ("torch" or "normext"), taking what `Inputs.arguments()` gives."""
    return globals()[f"{library}_{op.name}"]


# Inputs -----------------------------------------------------------------------------------------------------------
@dataclass
class Inputs:
    x: torch.Tensor
    residual: torch.Tensor | None
    running: tuple[torch.Tensor, ...]  # mean and variance; none where the op has none
    weight: torch.Tensor
    bias: torch.Tensor
    output_grads: tuple[torch.Tensor, ...] = ()

    def arguments(self):
        return tuple(t for t in (self.x, self.residual, *self.running, self.weight, self.bias) if t is not None)

    def leaves(self):
        return tuple(t for t in (self.x, self.residual, self.weight, self.bias) if t is not None)

    def gradients(self, fn):
        """Forward, then the gradients of every input: one training step's share of this op."""
        return torch.autograd.grad(fn(*self.arguments()), self.leaves(), self.output_grads)


def memory_format(shape, layout):
    if layout == "contiguous":
        return torch.contiguous_format
    return torch.channels_last if len(shape) == 4 else torch.channels_last_3d


def make_inputs(op, shape, dtype, layout, requires_grad=False, device="cpu", param_dtype=torch.float32):
    """Random activations of a dtype and layout; parameters and running statistics are float32, or of param_dtype."""

    def activation(layout):
        return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format(shape, layout))

    def parameter():
        return torch.randn(shape[1], device=device).to(param_dtype)

    running = (parameter(), parameter().abs() + 0.5) if op.norm == "batch_norm" else ()
    inputs = Inputs(activation(layout), activation(layout) if op.residual else None, running, parameter(), parameter())
    if requires_grad:
        # Like the output, which of instance_norm is always contiguous.
        inputs.output_grads = (activation("contiguous" if op.norm == "instance_norm" else layout),)
        for tensor in inputs.leaves():
            tensor.requires_grad_()
    return inputs
