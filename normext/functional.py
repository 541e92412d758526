"""The functions, under one name as in torch.nn.functional. Keyword-only extras come after torch's own arguments."""

from normext.layer_norm import add_layer_norm, layer_norm
from normext.rms_norm import add_rms_norm, fused_add_rms_norm_, rms_norm

__all__ = ["add_layer_norm", "add_rms_norm", "fused_add_rms_norm_", "layer_norm", "rms_norm"]
