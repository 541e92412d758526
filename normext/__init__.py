"""Normalization layers for PyTorch: hand-written CUDA and CPU kernels, accurate at any mean, batch-invariant, drop-in.

Modules and functions have the names and arguments of torch.nn and torch.nn.functional.
"""

import torch as _torch  # noqa: F401  first: it loads the libraries the compiled module needs

from normext import _library, functional
from normext.convert import Report, convert
from normext.functional import add_layer_norm, add_rms_norm, fused_add_rms_norm_, layer_norm, rms_norm
from normext.layer_norm import LayerNorm
from normext.rms_norm import RMSNorm

__version__: str = _library.C.build_info()["version"]

__all__ = [
    "LayerNorm",
    "RMSNorm",
    "Report",
    "add_layer_norm",
    "add_rms_norm",
    "convert",
    "functional",
    "fused_add_rms_norm_",
    "layer_norm",
    "rms_norm",
]
