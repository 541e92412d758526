"""The fewest bytes an op can move: each input read once, each output written once. Everything is judged against these.

e: bytes of an activation, n = rows * cols, p: bytes of a parameter. Statistics are float32: mean (high and low part)
and rstd for LayerNorm, rstd for RMSNorm. Partial sums of parameter gradients are left out: a design chooses how many it
writes. On a CPU a store to memory that is not in cache reads it first (write-allocate), so n * e more really moves;
copies pay that too, which is why results are given as a fraction of a copy and not of the memory's nominal speed.
"""


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


def copy(rows, cols, e):
    return 2 * rows * cols * e
