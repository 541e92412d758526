"""The fewest bytes an op can move: each input read once, each output written once. Everything is judged against these.

e: bytes of an activation, n = rows * cols, p: bytes of a parameter. Statistics are float32: mean (high and low part)
and rstd for LayerNorm, rstd for RMSNorm. Partial sums of parameter gradients are left out: a design chooses how many it
writes. On a CPU a store to memory that is not in cache reads it first (write-allocate), so n * e more really moves;
copies pay that too, which is why results are given as a fraction of a copy and not of the memory's nominal speed.
"""

from math import prod

import channel_grid


def forward(op, rows, cols, e, p, stats=False):
    """Bytes of one forward call; `stats` adds what training saves for the backward."""
    n = rows * cols
    activations = 4 if op.fused else 2
    parameters = 2 if op.centred else 1
    saved = (12 if op.centred else 4) * rows if stats else 0
    return activations * n * e + parameters * cols * p + saved


def backward(op, rows, cols, e, p):
    """x, dy (and the gradient of the residual output) in, dx out; parameters in, their gradients out."""
    n = rows * cols
    activations = 4 if op.fused else 3
    parameters = 3 if op.centred else 2
    return activations * n * e + parameters * cols * p + (12 if op.centred else 4) * rows


def train(op, rows, cols, e, p):
    return forward(op, rows, cols, e, p, stats=True) + backward(op, rows, cols, e, p)


# Channel norms. `op` and `shape` are those of channel_grid.py; whether x has to be read again for the output, or x and the
# incoming gradient for dx, depends on whether a slab stays in cache meanwhile. Without an activation a residual's gradient
# is the incoming one and nothing is moved; with one, what the backward needs to know of its input is a bit per element.
CORE_CACHE = 2 << 20  # bytes: the L2 cache of a server's core
CLUSTER_MEMORY = 16 * 227 << 10  # bytes: the shared memory of the largest cluster of blocks of a GPU


def channel_forward(op, shape, layout, e, p, stats=False, cache=CORE_CACHE):
    """Bytes of one forward call; `stats` adds what training saves for the backward."""
    n, channels = prod(shape), shape[1]
    reads = 1 if op.fixed_stats or channel_grid.slab_bytes(op, shape, layout, e) <= cache else 2
    running = {"batch_norm": 2 if op.fixed_stats else 4}.get(op.norm, 0)  # read, in training written, too
    saved = 12 * channel_grid.statistics(op, shape) + (n // 8 if op.residual and op.activation else 0) if stats else 0
    return (reads + 1 + op.residual) * n * e + (2 + running) * channels * p + saved


def channel_backward(op, shape, layout, e, p, cache=CORE_CACHE):
    """x and dy in, dx out, as well as the residual's gradient; parameters in, their gradients out. An activation of what the
    norm alone gives is computed again."""
    n, channels = prod(shape), shape[1]
    reads = 2 if op.fixed_stats or 2 * channel_grid.slab_bytes(op, shape, layout, e) <= cache else 4
    written = 1 + (op.residual and op.activation)
    bits = n // 8 if op.residual and op.activation else 0
    parameters = 4 if op.activation else 3
    return (reads + written) * n * e + parameters * channels * p + 12 * channel_grid.statistics(op, shape) + bits


def channel_train(op, shape, layout, e, p):
    return channel_forward(op, shape, layout, e, p, stats=True) + channel_backward(op, shape, layout, e, p)
