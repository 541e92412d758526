"""The shapes that are measured: rows x cols, cols being the normalised width. Committed, so that two results compare.

CPU_SHAPES is the whole CPU grid; every op runs on all of it in float32 and bfloat16. GPU cases come in groups, and in
order of importance, because time on a GPU is often limited.
"""

from dataclasses import dataclass

CPU_SHAPES = (
    # From one row to far out of cache, narrow and wide.
    (1, 4096),
    (32, 4096),
    (256, 768),
    (4096, 128),
    (2048, 1024),
    (4096, 4096),
    (16384, 1024),
    # Sentence encoders and vision transformers: batch x tokens, hidden size.
    (128, 384),
    (197, 192),
    (197, 768),
    (577, 1024),
    (1576, 768),
    (1024, 1152),
    (1024, 1280),
    # Language models: decoding a few tokens, then prompts.
    (1, 2048),
    (8, 2880),
    (8, 8192),
    (64, 2048),
    (128, 5120),
    (512, 4096),
    (512, 7168),
    (128, 16384),
)
CPU_QUICK = ((1, 4096), (32, 4096), (256, 768), (4096, 128), (2048, 1024))
CPU_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class GpuCase:
    group: str
    rows: int
    cols: int
    dtype: str = "bfloat16"
    layout: str = "contiguous"  # "qkv": rows are the query heads of a fused projection, so they have gaps


def _product(group, rows, cols, **more):
    return [GpuCase(group, m, n, **more) for m in rows for n in cols]


def gpu_cases(full=False):
    """Cases in the order in which they should run: what matters most comes first."""
    cases = [
        GpuCase("llm", m, n) for m, n in ((16384, 4096), (8192, 8192), (4096, 16384), (8192, 5120), (2048, 4096), (1024, 12288))
    ]
    cases += [GpuCase("decode", m, n) for m, n in ((1, 4096), (8, 4096), (64, 4096), (256, 4096), (1, 16384))]
    cases += [GpuCase("qk_norm", m, n) for m, n in ((131072, 128), (8192, 128), (131072, 64))]
    cases += [GpuCase("qk_norm", 131072, 128, layout="qkv")]
    cases += [GpuCase("vit", m, n) for m, n in ((12608, 768), (18464, 1024), (16384, 1152))]
    cases += [GpuCase("wide", m, n) for m, n in ((4096, 65536), (2048, 131072), (8, 262144))]
    cases += _product("awkward", (8192,), (111, 1000, 4095, 4097))
    cases += [GpuCase("spot", 8192, 4096, dtype=dtype) for dtype in ("float32", "float16")]
    if full:
        cases += _product("llm", (1024, 2048, 4096, 8192, 16384, 32768), (2048, 2880, 4096, 5120, 6144, 7168, 8192, 12288, 16384))
        cases += _product("decode", (1, 2, 4, 8, 16, 32, 64, 128, 256), (2048, 4096, 7168, 8192, 16384))
        cases += _product("qk_norm", (256, 1024, 8192, 16384, 131072, 648720), (64, 96, 128, 256))
        cases += _product("qk_norm", (8192, 131072), (64, 128), layout="qkv")
        cases += [GpuCase("wide", m, n) for n in (32768, 65536, 131072, 262144) for m in (1, 8, min(32768, 2**30 // n))]
        cases += _product("awkward", (8192,), (500, 768, 1536, 2304, 3000, 3072, 5119, 6656, 18432))
        cases += _product("vit", (12608, 16384), (192, 384, 768, 1024, 1152, 1280, 1408, 1536, 3072))
    return list(dict.fromkeys(cases))


# Enough to run every code path on a machine without a GPU.
GPU_DRY = [
    GpuCase("decode", 1, 64),
    GpuCase("qk_norm", 64, 16, layout="qkv"),
    GpuCase("awkward", 8, 111, dtype="float32"),
]
