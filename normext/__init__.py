"""Normalization layers for PyTorch: hand-written CUDA and CPU kernels, accurate at any mean, batch-invariant, drop-in.

Modules and functions have the names and arguments of torch.nn and torch.nn.functional.
"""

import torch as _torch  # noqa: F401  first: it loads the libraries the compiled module needs

from normext import _library, functional
from normext.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from normext.convert import Report, convert
from normext.fold import FoldReport, fold_batch_norm
from normext.functional import (
    add_layer_norm,
    add_rms_norm,
    batch_norm,
    fused_add_rms_norm_,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)
from normext.group_norm import GroupNorm
from normext.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from normext.layer_norm import LayerNorm
from normext.rms_norm import RMSNorm
from normext.sync_batch_norm import SyncBatchNorm

__version__: str = _library.C.build_info()["version"]

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FoldReport",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "Report",
    "SyncBatchNorm",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "convert",
    "fold_batch_norm",
    "functional",
    "fused_add_rms_norm_",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
]
