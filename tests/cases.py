"""The one table of what is tested: ops, shapes, dtypes, layouts and arguments. Property tests select from it.

A Case says what to compute; `make(case, backend)` builds its tensors; `case.call(...)` and `case.torch(...)` run it with
normext and with plain torch. Random data comes from a fixed seed, so every back end and every run sees the same values.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import normext

OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
# (activation, parameters); None: the case has no parameters of its own
MIXES = tuple((d, d) for d in DTYPES) + tuple((d, torch.float32) for d in SIXTEEN_BIT)

# Widths around every boundary of the schedules: vectors of 1 to 8, partial lanes, one and several segments, wide rows.
WIDTHS = (1, 2, 5, 8, 31, 64, 111, 128, 257, 384, 768, 769, 1024, 1152, 2048, 2880, 4096, 4097, 8192, 16384, 65536)
TREE_WIDTHS = (64, 111, 128, 769, 1152, 2880, 4096, 4097, 16384, 65536)
BATCHES = (1, 2, 3, 5, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097)
MEANS = (0.0, 10.0, 1e3, 1e5)


@dataclass(frozen=True)
class Case:
    op: str
    rows: int = 64
    cols: int = 768
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None  # None: dtype
    data: str = "normal"
    mean: float = 0.0
    grad: str = "normal"
    weight: bool = True
    bias: bool = True
    eps: float | None = 1e-5
    alpha: float = 1.0
    weight_offset: float = 0.0
    rounding: str = "torch"

    @property
    def centred(self):
        return "layer" in self.op

    @property
    def fused(self):
        return self.op.startswith("add_")

    @property
    def parameters(self):
        return self.param_dtype or self.dtype

    @property
    def unfused(self):
        return replace(self, op=self.op.removeprefix("add_"), alpha=1.0)

    @property
    def id(self):
        """Only what differs from the defaults, so that ids stay readable."""
        parts = [self.op, short(self.dtype), f"{self.rows}x{self.cols}"]
        if self.parameters != self.dtype:
            parts.append(short(self.parameters) + "w")
        parts += [word for word, present in (("noweight", not self.weight), ("nobias", self.centred and not self.bias)) if present]
        parts += [f"mean{self.mean:g}"] * (self.mean != 0)
        parts += [word for word in (self.data, self.grad) if word != "normal"]
        parts += [f"eps{self.eps}"] * (self.eps != 1e-5) + [f"alpha{self.alpha:g}"] * (self.alpha != 1)
        parts += [f"offset{self.weight_offset:g}"] * (self.weight_offset != 0) + [self.rounding] * (self.rounding != "torch")
        return "-".join(parts)

    def arguments(self, t):
        """Positional and keyword arguments of the public function."""
        inputs = (t.x, t.residual) if self.fused else (t.x,)
        if self.centred:
            extra = {"alpha": self.alpha} if self.alpha != 1 else {}
            return (*inputs, (self.cols,), t.weight, t.bias, self.eps), extra
        extra = {"weight_offset": self.weight_offset} if self.weight_offset else {}
        extra |= {"rounding": self.rounding} if self.rounding != "torch" else {}
        return (*inputs, (self.cols,), t.weight, self.eps), extra

    def call(self, t):
        """normext's result as a tuple: (output,) or (output, residual_out)."""
        args, extra = self.arguments(t)
        result = getattr(normext, self.op)(*args, **extra)
        return result if isinstance(result, tuple) else (result,)

    def torch(self, t):
        """The same from torch's own functions, in the arithmetic a user would write."""
        x = t.x
        if self.fused:
            x = t.x + self.alpha * t.residual if self.alpha != 1 else t.x + t.residual
        if self.centred:
            output = F.layer_norm(x, (self.cols,), t.weight, t.bias, self.eps)
        else:
            weight = t.weight + self.weight_offset if self.weight_offset and t.weight is not None else t.weight
            output = F.rms_norm(x, (self.cols,), weight, self.eps)
        return (output, x) if self.fused else (output,)


@dataclass
class Tensors:
    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    dy: torch.Tensor
    dres: torch.Tensor | None

    def leaves(self):
        return [t for t in (self.x, self.residual, self.weight, self.bias) if t is not None]

    def requires_grad(self):
        """A copy whose inputs and parameters are leaves that need gradients."""
        fresh = {k: v.detach().clone().requires_grad_() for k, v in vars(self).items() if v is not None and k[0] != "d"}
        return replace(self, **fresh)


def short(dtype):
    return str(dtype).removeprefix("torch.").replace("bfloat16", "bf16").replace("float", "f")


def sampled_places(cols):
    """Where the CPU's kernels may look for a first idea of a row's mean."""
    return torch.arange(cols) % max(32, min(cols, 4096) // 4) < 32


def fill(kind, rows, cols, mean, generator):
    """Activations in float64; the caller rounds them to the dtype under test."""
    x = torch.randn(rows, cols, generator=generator, dtype=torch.float64) + mean
    if kind == "two_valued":
        x = torch.where(x > mean, 0.1, -0.1).double() + mean
    elif kind == "outlier":
        x[:, 0] = 1e4
    elif kind == "constant":
        x = x[:, :1].repeat(1, cols) * 100
    elif kind == "tiny":
        x = x * 1e-4
    elif kind == "regular":  # two values, one of them at all places that a sample may take
        share = torch.linspace(0, 1, rows, dtype=torch.float64)[:, None]
        x = torch.where(sampled_places(cols) | (torch.arange(cols) >= cols * (1 - share)), 1.0, -1.0).double()
        x = x * torch.exp2(2 * torch.randn(rows, 1, generator=generator, dtype=torch.float64)) + mean
    elif kind == "tight":
        x = 1e5 + 0.006 * x
    elif kind == "lead":  # the first segments are many deviations away from the rest
        x = 1e-3 * x
        x[:, : min(4096, cols // 4)] += 77.7 * 1.7 ** torch.arange(rows, dtype=torch.float64)[:, None]
    elif kind == "mixed":  # every row its own mean and scale, and up to 3 deviations' difference at places that a sample may take
        spread = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
        x = x + 3 * torch.rand(rows, 1, generator=generator, dtype=torch.float64) * sampled_places(cols)
        x = x * torch.exp2(3 * spread[:, :1]) + 50 * spread[:, 1:]
    return x


def fill_grad(kind, rows, cols, generator):
    """The incoming gradients of the accuracy contract; the constant ones expose long accumulation chains."""
    if kind == "uniform":
        return torch.rand(rows, cols, generator=generator, dtype=torch.float64)
    if kind == "tenth":
        return torch.full((rows, cols), 0.1, dtype=torch.float64)
    if kind == "per_column":
        return torch.randn(1, cols, generator=generator, dtype=torch.float64).repeat(rows, 1)
    if kind == "mean_loss":
        return torch.full((rows, cols), 1.0 / (rows * cols), dtype=torch.float64)
    return torch.randn(rows, cols, generator=generator, dtype=torch.float64)


def make(case, backend, seed=0, rows=None):
    generator = torch.Generator().manual_seed(seed + 1)
    rows = backend.rows(case.rows, case.cols) if rows is None else rows
    cols, dtype, device = case.cols, case.dtype, backend.device

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Parameters first: they do not depend on the number of rows.
    weight = (1 - case.weight_offset + 0.5 * normal(cols)).to(case.parameters) if case.weight else None
    bias = normal(cols).to(case.parameters) if case.bias and case.centred else None
    output = torch.promote_types(dtype, case.parameters) if case.rounding == "llama" and case.weight else dtype
    x = fill(case.data, rows, cols, case.mean, generator)
    residual = fill(case.data, rows, cols, 0.0, generator) if case.fused else None
    if case.alpha != 1 and dtype == torch.float64:  # so that alpha * residual is exact, and the oracle's sum the fma's
        x, residual = x.float(), residual.float()
    dy = fill_grad(case.grad, rows, cols, generator).to(output)
    residual = residual if residual is None else residual.to(dtype)
    dres = normal(rows, cols).to(dtype) if case.fused else None
    return Tensors(*(t if t is None else t.to(device) for t in (x.to(dtype), residual, weight, bias, dy, dres)))


def gradients(case, t, function=None):
    """Gradients of every leaf, in the order x, residual, weight, bias."""
    t = t.requires_grad()
    outputs = (function or case.call)(t)
    return torch.autograd.grad(outputs, t.leaves(), [t.dy, t.dres][: len(outputs)])


# How a [rows, cols] matrix can lie in memory. Each returns a view with the same values and at least two dimensions.
def row_stride(x):
    buffer = x.new_full((x.shape[0], x.shape[1] + 3), float("nan"))
    buffer[:, : x.shape[1]] = x
    return buffer[:, : x.shape[1]]


def misaligned(x):
    buffer = x.new_full((x.numel() + 1,), float("nan"))
    return buffer[1:].copy_(x.reshape(-1)).view(x.shape)


def split_rows(x):
    """[a, b, cols] with a as large as 4 allows."""
    a = next(k for k in (4, 3, 2, 1) if x.shape[0] % k == 0)
    return x.reshape(a, -1, x.shape[1])


def transposed_heads(x):
    x = split_rows(x)
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def expanded(x):
    return x[:1].unsqueeze(0).expand(3, 2, x.shape[1])


def six_dims(x):
    """More (extent, stride) pairs than a kernel takes: every leading dimension is sliced."""
    buffer = x.new_full((3, 3, 3, 3, 3, x.shape[1] + 1), float("nan"))
    view = buffer[:2, :2, :2, :2, :2, : x.shape[1]]
    return view.copy_(x[torch.arange(32, device=x.device) % x.shape[0]].view(view.shape))


def columns_strided(x):
    return x.t().contiguous().t()


def reversed_dims(x):
    return split_rows(x).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def channels_last(x):
    x = split_rows(x).unsqueeze(1)
    return x.expand(-1, 2, -1, -1).contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    f.__name__: f
    for f in (row_stride, misaligned, transposed_heads, expanded, six_dims, columns_strided, reversed_dims, channels_last)
}


def default_eps(dtype):
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


# The table itself -------------------------------------------------------------------------------------------------
def _accuracy():
    for op in OPS:
        for cols in WIDTHS:
            yield Case(op, cols=cols)
        for dtype, params in MIXES[1:]:
            for cols in (111, 768, 2880, 4097):
                yield Case(op, cols=cols, dtype=dtype, param_dtype=params)
        for mean in MEANS[1:]:
            for cols in (64, 769, 4096, 16384):
                yield Case(op, cols=cols, mean=mean)
            yield Case(op, cols=2880, mean=mean, dtype=torch.float64)
            if mean < 6e4:
                yield Case(op, cols=1152, mean=mean, dtype=torch.float16)
            yield Case(op, cols=1152, mean=mean, dtype=torch.bfloat16)
        for data in ("two_valued", "outlier", "tiny", "mixed", "regular"):
            for cols in (257, 1024, 4096):
                yield Case(op, cols=cols, data=data)
        yield Case(op, cols=1024, weight=False)
        yield Case(op, cols=1000, weight=False, bias=False)
        yield Case(op, cols=1000, bias=False, dtype=torch.bfloat16)
        yield Case(op, rows=1, cols=262144)
        yield Case(op, rows=8, cols=1 << 20, data="lead")
        yield Case(op, cols=768, eps=1.0)
    for op in ("layer_norm", "add_layer_norm"):
        yield Case(op, cols=16384, mean=1e6)
    yield Case("add_layer_norm", cols=768, alpha=2.5)
    yield Case("add_layer_norm", cols=769, alpha=0.81, dtype=torch.bfloat16)
    for op in ("rms_norm", "add_rms_norm"):
        for dtype in DTYPES:
            yield Case(op, cols=768, weight_offset=1.0, dtype=dtype)
            yield Case(op, cols=640, rounding="llama", dtype=dtype)
            yield Case(op, cols=320, eps=None, dtype=dtype)
        yield Case(op, cols=640, rounding="llama", dtype=torch.bfloat16, param_dtype=torch.float32)
        yield Case(op, cols=333, rounding="llama", weight_offset=1.0, dtype=torch.bfloat16)
        yield Case(op, cols=333, rounding="llama", weight=False, dtype=torch.bfloat16)


ACCURACY = tuple(_accuracy())
PARAM_GRADS = tuple(
    Case(op, rows=rows, cols=cols, grad=grad, dtype=dtype)
    for op in ("layer_norm", "rms_norm")
    for rows, cols in ((2048, 24), (65536, 8), (700, 129))
    for grad in ("normal", "uniform", "tenth", "per_column", "mean_loss")
    for dtype in (torch.float32, torch.bfloat16)
    if dtype == torch.float32 or grad == "normal"
)
# One small case per op and rounding policy, for tests of everything around the kernels.
SMALL = tuple(Case(op, rows=6, cols=40) for op in OPS)
VARIANTS = (
    *SMALL,
    Case("layer_norm", rows=6, cols=40, weight=False),
    Case("layer_norm", rows=6, cols=40, bias=False),
    Case("layer_norm", rows=6, cols=40, weight=False, bias=False),
    Case("add_layer_norm", rows=6, cols=40, alpha=0.5),
    Case("rms_norm", rows=6, cols=40, weight=False),
    Case("rms_norm", rows=6, cols=40, weight_offset=1.0, eps=None),
    Case("rms_norm", rows=6, cols=40, rounding="llama"),
    Case("add_rms_norm", rows=6, cols=40, rounding="llama", weight_offset=1.0),
)


def ids(cases):
    return {"argvalues": cases, "ids": [case.id for case in cases]}


@contextmanager
def cuda_autocast():
    """For fake CUDA tensors. torch.autocast would ask for a GPU, and without one only warn."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
