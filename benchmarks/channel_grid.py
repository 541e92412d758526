"""The channel norms that are measured: which ops, on which shapes. Committed, so that two results compare. No torch.

Every op runs on its shapes in both layouts and in float32 and bfloat16, whose parameters and running statistics are float32,
as people train. No float32 activation is larger than 64 MB.
"""

from dataclasses import dataclass
from math import prod

GROUPS = 32  # of group_norm
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class ChannelOp:
    name: str
    norm: str  # whose statistics: "batch_norm", "group_norm" or "instance_norm"
    fixed_stats: bool = False  # running statistics instead of the batch's
    residual: bool = False
    activation: bool = False


OPS = {
    op.name: op
    for op in (
        ChannelOp("batch_norm", "batch_norm"),
        ChannelOp("batch_norm_eval", "batch_norm", fixed_stats=True),
        ChannelOp("batch_norm_add_relu", "batch_norm", residual=True, activation=True),
        ChannelOp("group_norm", "group_norm"),
        ChannelOp("group_norm_silu", "group_norm", activation=True),
        ChannelOp("instance_norm", "instance_norm"),
    )
}


@dataclass(frozen=True)
class ChannelShape:
    norm: str
    shape: tuple[int, ...]  # [N, C, *spatial]
    compiled: bool  # whether torch.compile takes part: it needs seconds for every op, layout and dtype

    @property
    def name(self):
        return "x".join(map(str, self.shape))


# (C, H = W) of feature maps, with the batches that are measured. One image, the 8 of a small batch, and 32 where that is small.
_RESNET_50 = (
    (64, 112, (1, 8)),
    (64, 56, (8,)),
    (256, 56, (1, 8)),
    (128, 28, (8, 32)),
    (512, 28, (8,)),
    (256, 14, (1, 8, 32)),
    (1024, 14, (8,)),
    (512, 7, (1, 8, 32)),
    (2048, 7, (8, 32)),
)
_MOBILENET = ((32, 112, (8,)), (96, 112, (1,)), (144, 56, (8,)), (1280, 7, (1, 8)))
# Diffusion: the blocks of a U-Net on one image and with guidance on two; the decoder of an image is run on one.
_DIFFUSION = ((320, 64, (1, 2)), (640, 32, (1, 2)), (1280, 16, (1, 2)), (1280, 8, (1, 2)), (512, 128, (1,)))
_INSTANCE = ((8, 64, 64, 64), (1, 64, 256, 256), (2, 32, 32, 32, 32))


def _maps(norm, table, compiled_batch):
    return tuple(ChannelShape(norm, (n, c, hw, hw), n == compiled_batch) for c, hw, batches in table for n in batches)


SHAPES = (
    *_maps("batch_norm", _RESNET_50 + _MOBILENET, 8),
    *_maps("group_norm", _DIFFUSION, 1),
    *(ChannelShape("instance_norm", shape, True) for shape in _INSTANCE),
)
QUICK = (
    ChannelShape("batch_norm", (8, 64, 56, 56), False),
    ChannelShape("batch_norm", (8, 512, 7, 7), True),
    ChannelShape("group_norm", (1, 1280, 8, 8), True),
    ChannelShape("instance_norm", (2, 32, 32, 32, 32), False),
)


@dataclass(frozen=True)
class GpuCase:
    group: str
    norm: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    layout: str = "contiguous"


def gpu_cases(full=False):
    """In both layouts; what matters most comes first: training ResNet-50, diffusion, then one image."""
    resnet = ((256, 56), (512, 28), (1024, 14), (2048, 7), (64, 112), (64, 56))
    cases = [GpuCase("resnet", "batch_norm", (64, c, hw, hw), layout=layout) for c, hw in resnet[:4] for layout in LAYOUTS]
    cases += [GpuCase("diffusion", "group_norm", (2, c, hw, hw), layout=layout) for c, hw, _ in _DIFFUSION for layout in LAYOUTS]
    cases += [GpuCase("instance", "instance_norm", shape, layout=layout) for shape in _INSTANCE for layout in LAYOUTS]
    cases += [GpuCase("image", "batch_norm", (1, c, hw, hw), layout=layout) for c, hw in resnet[:4] for layout in LAYOUTS]
    cases += [
        GpuCase("spot", "batch_norm", (64, 512, 28, 28), "float32"),
        GpuCase("spot", "group_norm", (2, 640, 32, 32), "float32"),
    ]
    if full:
        cases += [
            GpuCase("resnet", "batch_norm", (n, c, hw, hw), dtype, layout)
            for n in (8, 64, 256)
            for c, hw in resnet
            for dtype in DTYPES
            for layout in LAYOUTS
        ]
        cases += [
            GpuCase("diffusion", "group_norm", (n, c, hw, hw), dtype, layout)
            for n in (1, 8)
            for c, hw, _ in _DIFFUSION
            for dtype in DTYPES
            for layout in LAYOUTS
        ]
    return list(dict.fromkeys(cases))


GPU_DRY = [
    GpuCase("resnet", "batch_norm", (2, 8, 4, 4), "float32"),
    GpuCase("diffusion", "group_norm", (1, 64, 4, 4), "float32", "channels_last"),
    GpuCase("instance", "instance_norm", (1, 4, 4, 4), "float32"),
]


def statistics(op, shape):
    """How many slabs have a mean of their own."""
    images, channels = shape[:2]
    return {"batch_norm": channels, "group_norm": images * GROUPS, "instance_norm": images * channels}[op.norm]


def slab_bytes(op, shape, layout, e):
    """What must stay in cache for statistics and output to come from one read of memory: a slab; in channels_last at least as
    many slabs as share a cache line."""
    images, channels, positions = shape[0], shape[1], prod(shape[2:])
    wide = channels // GROUPS if op.norm == "group_norm" else 1
    line = max(64, wide * e) if layout == "channels_last" else wide * e
    return line * positions * (images if op.norm == "batch_norm" else 1)
