"""The table of the channel norms: BatchNorm, GroupNorm and InstanceNorm, as cases.py is that of the row norms.

A ChannelCase says what to compute; `make(case, backend)` builds its tensors; `case.call(...)` and `case.torch(...)` run it with
normext and with plain torch. Random data comes from a fixed seed, so every back end and every run sees the same values.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from cases import DTYPES, MIXES, SIXTEEN_BIT, ids, short
from channel_data import fill, fill_grad

import normext

__all__ = ["DTYPES", "MIXES", "SIXTEEN_BIT", "ids"]
OPS = ("batch_norm", "group_norm", "instance_norm")
ACTIVATIONS = ("relu", "silu", "gelu", "leaky_relu")
BOTH = ("contiguous", "channels_last")  # the layouts that kernels take; others are copied to the first
MEANS = (0.0, 10.0, 1e3, 1e5)
LEAVES = ("x", "residual", "weight", "bias")
BUDGET = 1 << 15  # elements on the emulator

# (batch, channels, spatial, groups), around the boundaries of the schedules: 2-D to 5-D inputs, one image, one channel, one
# spatial element, odd sizes, short planes of many images, more channels than a block has threads, slabs of one and of several
# segments.
SHAPES = (
    (64, 10, (), 2),
    (33, 300, (), 300),
    (1, 1, (7,), 1),
    (8, 1, (31,), 1),
    (7, 3, (33,), 3),
    (16, 8, (1, 1), 2),
    (4, 12, (5, 7), 3),
    (3, 17, (9, 13), 17),
    (2, 32, (16, 16), 8),
    (8, 1, (12, 5), 1),
    (3, 1030, (2, 2), 103),
    (5, 96, (7, 7), 1),
    (5, 70, (6, 5), 7),
    (37, 41, (2, 3), 41),
    (1, 64, (28, 28), 32),
    (2, 5, (3, 4, 5), 5),
    (2, 6, (129, 65), 2),
    (2, 4, (64, 256), 1),
    (1, 2, (65536,), 2),
)


@dataclass(frozen=True)
class ChannelCase:
    op: str
    batch: int = 4
    channels: int = 12
    spatial: tuple[int, ...] = (6, 7)
    groups: int = 3  # of group_norm
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None  # None: dtype
    layout: str = "contiguous"
    data: str = "normal"
    mean: float = 0.0
    grad: str = "normal"
    weight: bool = True
    bias: bool = True
    training: bool = True  # use_input_stats of instance_norm
    running: torch.dtype | None = None  # of the running statistics; None: there are none, or in evaluation of dtype
    activation: str | None = None
    residual: bool = False  # of batch_norm
    eps: float = 1e-5
    momentum: float = 0.1

    @property
    def parameters(self):
        return self.param_dtype or self.dtype

    @property
    def buffers(self):
        """Dtype of the running statistics, or None."""
        return self.running or (None if self.training else self.dtype)

    @property
    def slab_groups(self):
        return {"batch_norm": self.channels, "group_norm": self.groups, "instance_norm": self.channels}[self.op]

    @property
    def per_image(self):
        """What one image gives does not depend on the others."""
        return self.op != "batch_norm" or not self.training

    @property
    def image(self):
        """Elements of an image."""
        return self.channels * torch.Size(self.spatial).numel()

    @property
    def id(self):
        """Only what differs from the defaults, so that ids stay readable."""
        parts = [self.op, short(self.dtype), "x".join(map(str, (self.batch, self.channels, *self.spatial)))]
        parts += [f"g{self.groups}"] * (self.op == "group_norm")
        parts += ["cl"] * (self.layout == "channels_last") + [self.layout] * (self.layout not in BOTH)
        if self.parameters != self.dtype:
            parts.append(short(self.parameters) + "w")
        parts += [word for word, present in (("noweight", not self.weight), ("nobias", not self.bias)) if present]
        parts += ["eval"] * (not self.training)
        parts += [f"running{short(self.running)}"] * (self.running is not None)
        parts += [f"mean{self.mean:g}"] * (self.mean != 0)
        parts += [word for word in (self.data, self.grad) if word != "normal"]
        parts += ["residual"] * self.residual + [self.activation] * (self.activation is not None)
        parts += [f"eps{self.eps:g}"] * (self.eps != 1e-5) + [f"momentum{self.momentum:g}"] * (self.momentum != 0.1)
        return "-".join(parts)

    def arguments(self, t):
        """Positional and keyword arguments of the public function; torch's own take them without the keywords."""
        extra = {"activation": self.activation} if self.activation else {}
        extra |= {"residual": t.residual} if self.residual else {}
        if self.op == "group_norm":
            return (t.x, self.groups, t.weight, t.bias, self.eps), extra
        return (t.x, t.running_mean, t.running_var, t.weight, t.bias, self.training, self.momentum, self.eps), extra

    def call(self, t):
        args, extra = self.arguments(t)
        return getattr(normext, self.op)(*args, **extra)

    def torch(self, t):
        """The same from torch's own functions, as a user would write it."""
        output = getattr(F, self.op)(*self.arguments(t)[0])
        output = output + t.residual if self.residual else output
        return getattr(F, self.activation)(output) if self.activation else output


@dataclass
class Tensors:
    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    dy: torch.Tensor

    def leaves(self):
        return [t for name in LEAVES if (t := getattr(self, name)) is not None]

    def names(self):
        return [name for name in LEAVES if getattr(self, name) is not None]

    def buffers(self):
        return [t for t in (self.running_mean, self.running_var) if t is not None]

    def requires_grad(self, wanted=LEAVES):
        """Leaves of the same layout, of which the wanted ones need gradients, and buffers of their own."""
        fresh = {name: getattr(self, name).detach().clone().requires_grad_(name in wanted) for name in self.names()}
        return replace(self.fresh(), **fresh)

    def fresh(self):
        """The same with running statistics that may be written to."""
        copies = [b if b is None else b.clone() for b in (self.running_mean, self.running_var)]
        return replace(self, running_mean=copies[0], running_var=copies[1])

    def images(self, index):
        """The same problem restricted to some images, in their layout."""
        picked = {k: getattr(self, k)[index] for k in ("x", "residual", "dy") if getattr(self, k) is not None}
        return replace(self, **picked)

    def laid_out(self, layout):
        """The tensors of x's shape in another layout."""
        return replace(self, **{k: layout(getattr(self, k)) for k in ("x", "residual", "dy") if getattr(self, k) is not None})


# How a [batch, channels, *spatial] tensor can lie in memory. Each returns a view with the same values, expanded excepted.
def contiguous(x):
    return x.contiguous()


def memory_format(x):
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())


def channels_last(x):
    """Three and fewer dimensions have no such format in torch; they stay as they are."""
    if memory_format(x) is None:
        return x.contiguous()
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x)).copy_(x)


def permuted(x):
    """The dimensions in reverse order."""
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def sliced(x):
    """Some channels, and some of the last dimension, of a larger tensor of NaN."""
    shape = list(x.shape)
    shape[1] += 2
    shape[-1] += 3 if x.dim() > 2 else 0
    view = x.new_full(shape, float("nan"))[:, 1:-1]
    view = view[..., : x.shape[-1]] if x.dim() > 2 else view
    return view.copy_(x)


def sliced_channels_last(x):
    """Some channels of a larger channels_last tensor, as torch.cat and split leave them."""
    if memory_format(x) is None:
        return sliced(x)
    shape = (x.shape[0], x.shape[1] + 3, *x.shape[2:])
    buffer = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x)).fill_(float("nan"))
    view = buffer[:, 1 : 1 + x.shape[1]]
    return view.copy_(x)


def expanded(x):
    return x[:1].expand_as(x)


def misaligned(x):
    return shifted(x.contiguous(), 1)


def shifted(x, offset):
    """The same strides from another address."""
    size = 1 + sum((extent - 1) * stride for extent, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    buffer = x.new_full((size + offset,), float("nan"))
    return buffer.as_strided(x.shape, x.stride(), offset).copy_(x)


LAYOUTS = {f.__name__: f for f in (contiguous, channels_last, permuted, sliced, sliced_channels_last, expanded, misaligned)}


def batch_of(case, backend):
    """Fewer images where an element is expensive, but never one value per channel in training."""
    least = 2 if case.op == "batch_norm" and case.image == case.channels else 1
    return max(least, min(case.batch, BUDGET // case.image)) if backend.emulated else case.batch


def make(case, backend, batch=None):
    generator = torch.Generator().manual_seed(1)
    batch = batch_of(case, backend) if batch is None else batch
    layout = LAYOUTS[case.layout]

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Parameters and statistics first: they do not depend on the number of images.
    weight = (1 + 0.5 * normal(case.channels)).to(case.parameters) if case.weight else None
    bias = normal(case.channels).to(case.parameters) if case.bias else None
    running_mean = running_var = None
    if case.buffers is not None:
        running_mean = (case.mean + 0.5 * normal(case.channels)).to(case.buffers)
        running_var = (0.5 + torch.rand(case.channels, generator=generator, dtype=torch.float64)).to(case.buffers)
    x = layout(fill(case, batch, generator).to(case.dtype))
    residual = layout(normal(*x.shape).to(case.dtype)) if case.residual else None
    dy = layout(fill_grad(case.grad, x.shape, generator).to(case.dtype))
    tensors = (x, residual, weight, bias, running_mean, running_var, dy)
    return Tensors(*(t if t is None else t.to(backend.device) for t in tensors))


def gradients(case, t, function=None):
    """Gradients of every leaf, in the order x, residual, weight, bias."""
    t = t.requires_grad()
    return torch.autograd.grad((function or case.call)(t), t.leaves(), t.dy)


def strided_gradients(case, t):
    """Gradients without copying the inputs first: cloning would keep values but change some layouts."""
    t = replace(t.fresh(), **{name: getattr(t, name).detach().requires_grad_() for name in t.names()})
    return torch.autograd.grad(case.call(t), t.leaves(), t.dy)


def everything(case, t):
    """Output, gradients and what became of the running statistics."""
    s = t.fresh()
    return [case.call(s), *strided_gradients(case, t), *s.buffers()]


def assert_same(found, expected, *context):
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.equal(other), (place, (one.double() - other.double()).abs().max().item(), *context)


# The table itself -------------------------------------------------------------------------------------------------
def _fits(op, shape):
    """InstanceNorm takes 3-D to 5-D inputs with more than one spatial element."""
    return op != "instance_norm" or torch.Size(shape[2]).numel() > 1


def _short_planes(at):
    """Batch norms of planes of a few values in several images: what their kernels meet."""
    shape = (5, 70, (6, 5), 7)
    for dtype, params in MIXES:
        yield at(*shape, dtype=dtype, param_dtype=params, residual=True, activation="silu", running=params)
        yield at(*shape, dtype=dtype, param_dtype=params, training=False, running=params)
    for mean in MEANS[1:]:
        yield at(*shape, mean=mean)
        yield at(*shape, mean=mean, training=False)
    for activation in ACTIVATIONS:
        yield at(*shape, activation=activation)
        yield at(*shape, activation=activation, residual=True, dtype=torch.bfloat16)
    for weight, bias in ((False, False), (True, False), (False, True)):
        yield at(*shape, weight=weight, bias=bias, residual=True)
    for data in ("two_valued", "outlier"):
        yield at(40, 33, (2,), 1, data=data)
    yield at(17, 34, (7, 9), 1, dtype=torch.bfloat16)


def _short_groups(at):
    """Groups of such planes, of one block of columns and of several."""
    several = (19, 96, (5, 7), 2)
    for dtype, params in MIXES:
        yield at(*several, dtype=dtype, param_dtype=params, activation="silu")
        yield at(5, 70, (6, 5), 7, dtype=dtype, param_dtype=params)
    for mean in MEANS[1:]:
        yield at(*several, mean=mean)
    for activation in ACTIVATIONS:
        yield at(*several, activation=activation, grad="per_channel")
    for weight, bias in ((False, False), (True, False), (False, True)):
        yield at(*several, weight=weight, bias=bias, activation="gelu")
    yield at(1, 512, (6, 6), 1)
    yield at(1, 1024, (6, 6), 1)  # more values than such a group may have


def _accuracy():
    for op in OPS:
        for layout in BOTH:
            some = (ChannelCase(op, *shape, layout=layout) for shape in SHAPES if _fits(op, shape))
            yield from (case for case in some if layout == "contiguous" or len(case.spatial) > 1)

            def at(*shape, op=op, layout=layout, **more):
                return ChannelCase(op, *shape, layout=layout, **more)

            small, odd, wide = (4, 12, (6, 7), 3), (3, 15, (13, 11), 5), (2, 8, (64, 64), 2)
            if op == "batch_norm" and layout == "contiguous":
                yield from _short_planes(at)
            if op == "group_norm" and layout == "contiguous":
                yield from _short_groups(at)
            for activation in ("silu", "gelu"):  # planes of whole units: the CPU computes dz once
                for dtype, params in MIXES:
                    yield at(2, 64, (16, 16), 8, activation=activation, dtype=dtype, param_dtype=params)
            if op != "instance_norm":
                for dtype in (torch.float32, torch.float64):
                    yield at(256, 16, (4, 3), 1, data="lead", dtype=dtype)
                yield at(1, 256, (32, 32), 1, data="lead")
            for dtype, params in MIXES[1:]:
                for shape in (small, odd, wide):
                    yield at(*shape, dtype=dtype, param_dtype=params)
            for mean in MEANS[1:]:
                for shape in (small, odd, wide, (2, 4, (64, 256), 1)):
                    yield at(*shape, mean=mean)
                yield at(*odd, mean=mean, dtype=torch.float64)
                yield at(*wide, mean=mean, dtype=torch.bfloat16)
                if mean < 6e4:
                    yield at(*wide, mean=mean, dtype=torch.float16)
            for data in ("two_valued", "outlier", "tiny", "mixed", "regular"):
                for shape in (odd, wide):
                    yield at(*shape, data=data)
            for weight, bias in ((False, False), (True, False), (False, True)):
                yield at(*odd, weight=weight, bias=bias)
            yield at(*odd, weight=True, bias=False, dtype=torch.bfloat16)
            yield at(*small, eps=1.0)
            for activation in ACTIVATIONS:
                for dtype in DTYPES:
                    yield at(*odd, activation=activation, dtype=dtype)
                yield at(*wide, activation=activation, mean=1e3)
                yield at(*odd, activation=activation, weight=False, bias=False)
            if op != "group_norm":
                for dtype, params in MIXES:  # parameters and running statistics share a dtype, as in torch
                    yield at(*odd, training=False, dtype=dtype, param_dtype=params, running=params)
                    yield at(*small, dtype=dtype, param_dtype=params, running=params)
                    if dtype != params:
                        yield at(*odd, training=False, weight=False, bias=False, dtype=dtype, running=params)
                        yield at(*small, weight=False, bias=False, dtype=dtype, running=params)
                for mean in MEANS[1:]:
                    yield at(*wide, training=False, mean=mean)
                    yield at(*wide, mean=mean, running=torch.float32)
                for activation in ACTIVATIONS:
                    yield at(*odd, training=False, activation=activation)
                yield at(*odd, training=False, weight=False, bias=False)
            if op == "batch_norm":
                for activation in (None, *ACTIVATIONS):
                    for dtype in (torch.float32, torch.bfloat16):
                        yield at(*odd, residual=True, activation=activation, dtype=dtype)
                    yield at(*odd, residual=True, activation=activation, training=False)
                yield at(*small, residual=True, dtype=torch.float64)
                yield at(*small, residual=True, dtype=torch.float16, param_dtype=torch.float32, activation="relu")
                yield at(*wide, residual=True, mean=1e3, activation="relu")
                yield at(*wide, residual=True, weight=False, bias=False)
                yield at(64, 10, (), residual=True, activation="relu")
    yield ChannelCase("batch_norm", 64, 10, (), training=False)
    yield ChannelCase("batch_norm", 1, 10, (), training=False)
    yield ChannelCase("instance_norm", 4, 10, (1, 1), training=False)
    yield ChannelCase("group_norm", 64, 10, (), 10)  # one value per group: zero
    yield ChannelCase("group_norm", 1, 2, (384, 1536), 1)  # more segments than one group may have


ACCURACY = tuple(dict.fromkeys(_accuracy()))
# Many terms in each sum of a parameter's gradient.
PARAM_GRADS = tuple(
    ChannelCase(op, *shape, grad=grad, dtype=dtype, layout=layout)
    for op in OPS
    for layout in BOTH
    for shape in ((64, 3, (32, 32), 3), (2048, 4, (4, 2), 2), (2048, 32, (4, 2), 1), (25, 4, (29, 13), 1))
    for grad in ("normal", "uniform", "tenth", "per_channel", "mean_loss")
    for dtype in (torch.float32, torch.bfloat16)
    if dtype == torch.float32 or grad == "normal"
)
# One small case per op and layout, for tests of everything around the kernels.
SMALL = tuple(ChannelCase(op, 3, 6, (4, 5), layout=layout) for op in OPS for layout in BOTH)
VARIANTS = (
    *SMALL,
    ChannelCase("batch_norm", 3, 6, (4, 5), running=torch.float32),
    ChannelCase("batch_norm", 3, 6, (4, 5), training=False),
    ChannelCase("batch_norm", 3, 6, (4, 5), training=False, residual=True, activation="relu", layout="channels_last"),
    ChannelCase("batch_norm", 3, 6, (4, 5), residual=True),
    ChannelCase("batch_norm", 3, 6, (4, 5), residual=True, activation="silu", layout="channels_last"),
    ChannelCase("batch_norm", 3, 6, (4, 5), weight=False, bias=False, activation="gelu"),
    ChannelCase("batch_norm", 7, 6, (), activation="leaky_relu"),
    ChannelCase("batch_norm", 5, 33, (2, 3), running=torch.float32, residual=True, activation="relu"),
    ChannelCase("batch_norm", 3, 6, (5,), bias=False),
    ChannelCase("group_norm", 3, 6, (), activation="silu"),
    ChannelCase("group_norm", 3, 6, (4, 5), weight=False, bias=False),
    ChannelCase("group_norm", 2, 6, (2, 3, 2), activation="gelu", layout="channels_last"),
    ChannelCase("group_norm", 3, 6, (4, 5), weight=False, activation="relu"),
    ChannelCase("instance_norm", 3, 6, (4, 5), weight=False, bias=False),
    ChannelCase("instance_norm", 3, 6, (4, 5), running=torch.float32, activation="leaky_relu"),
    ChannelCase("instance_norm", 3, 6, (4, 5), training=False, activation="gelu", layout="channels_last"),
    ChannelCase("instance_norm", 3, 6, (5,), activation="relu"),
)
