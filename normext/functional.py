"""The functions, under one name as in torch.nn.functional. Keyword-only extras come after torch's own arguments."""

from normext.batch_norm import batch_norm
from normext.group_norm import group_norm
from normext.instance_norm import instance_norm
from normext.layer_norm import add_layer_norm, layer_norm
from normext.rms_norm import add_rms_norm, fused_add_rms_norm_, rms_norm

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "fused_add_rms_norm_",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
]
