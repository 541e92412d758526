"""Libraries that normext is compared with on a GPU, beside torch: each op as a function of `Inputs.arguments()`.

A peer that is not installed is left out. Which, and why, is in benchmarks/README.md.
"""

from ops import EPS


def liger():
    """Liger-Kernel (Triton). Not in place, and with the "llama" rounding, its default."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return {
        "layer_norm": lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS),
        "rms_norm": lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False),
        "add_rms_norm": lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(
            x, residual, weight, EPS, 0.0, "llama", False
        ),
    }


def quack():
    """QuACK (CuTe DSL): RMSNorm with and without residual; LayerNorm has no backward and takes float32 parameters."""
    from quack.rmsnorm import layernorm_fwd, rmsnorm

    def layer_norm(x, weight, bias):
        if weight.requires_grad:
            raise NotImplementedError("forward only")
        return layernorm_fwd(x, _float32(weight), _float32(bias), eps=EPS)

    return {
        "layer_norm": layer_norm,
        "rms_norm": lambda x, weight: rmsnorm(x, weight, eps=EPS),
        "add_rms_norm": lambda x, residual, weight: rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True),
    }


def _float32(parameter):
    """A float32 copy, made once, so that the conversion is not part of what is timed."""
    if not hasattr(parameter, "as_float32"):
        parameter.as_float32 = parameter.float()
    return parameter.as_float32


def installed():
    """{name: {op: function}} of the peers that import here, and {name: reason} of the others."""
    found, missing = {}, {}
    for library in (liger, quack):
        try:
            found[library.__name__] = library()
        except Exception as error:  # a broken installation must not end the run
            missing[library.__name__] = f"{type(error).__name__}: {error}"
    return found, missing
