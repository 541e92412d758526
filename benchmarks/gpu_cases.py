"""What gpu.py measures: cases of row norms and of channel norms behind one interface."""

import channel_grid
import channel_ops
import grid
import ops
import torch
import traffic


class Case:
    """`shape` is text; `of` the grid's own description."""

    def __init__(self, of, shape):
        self.of, self.shape = of, shape
        self.group, self.dtype, self.layout = of.group, getattr(torch, of.dtype), of.layout

    def described(self, op):
        return {"group": self.group, "op": op.name, "dtype": self.of.dtype, "shape": self.shape, "layout": self.layout}


class RowCase(Case):
    function = staticmethod(ops.function)

    def __init__(self, of):
        super().__init__(of, f"{of.rows}x{of.cols}")

    def ops(self):
        return list(ops.OPS.values())

    def inputs(self, op, device, requires_grad):
        return ops.make_inputs(op, self.of.rows, self.of.cols, self.dtype, device, self.layout, requires_grad)

    def floor_bytes(self, op, kind):
        count = traffic.forward if kind == "forward" else traffic.backward
        return count(op, self.of.rows, self.of.cols, self.dtype.itemsize, self.dtype.itemsize)


class ChannelCase(Case):
    function = staticmethod(channel_ops.function)

    def __init__(self, of):
        super().__init__(of, "x".join(map(str, of.shape)))
        # As torch takes them on a GPU: batch norm with float32 parameters, the others with the input's.
        self.param_dtype = torch.float32 if of.norm == "batch_norm" else self.dtype

    def ops(self):
        return [op for op in channel_grid.OPS.values() if op.norm == self.of.norm]

    def inputs(self, op, device, requires_grad):
        return channel_ops.make_inputs(op, self.of.shape, self.dtype, self.layout, requires_grad, device, self.param_dtype)

    def floor_bytes(self, op, kind):
        count = traffic.channel_forward if kind == "forward" else traffic.channel_backward
        sizes = self.dtype.itemsize, self.param_dtype.itemsize
        return count(op, self.of.shape, self.layout, *sizes, cache=traffic.CLUSTER_MEMORY)


FIRST = ("llm", "decode", "resnet", "diffusion")  # groups in this order, then the others


def cases(full=False, dry=False):
    rows = grid.GPU_DRY if dry else grid.gpu_cases(full)
    channels = channel_grid.GPU_DRY if dry else channel_grid.gpu_cases(full)
    every = [*map(RowCase, rows), *map(ChannelCase, channels)]
    return sorted(every, key=lambda case: FIRST.index(case.group) if case.group in FIRST else len(FIRST))
