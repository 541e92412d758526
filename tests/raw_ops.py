"""Valid arguments for every op in the `normext` namespace: the catalogue that raw-op tests walk."""

import torch

ROUNDINGS = {"torch": 0, "llama": 1}


def arguments(dtype=torch.float32, params=None, rows=6, cols=40, layout=lambda x: x, device="cpu", rounding=0, requires_grad=False):
    """{op name: [argument tuples]}. Optional tensors are given in one tuple and None in another."""
    params = params or dtype
    output = torch.promote_types(dtype, params) if rounding else dtype

    def leaf(x):
        return x.to(device).requires_grad_(requires_grad)

    def activation(kind=dtype):
        return leaf(layout(torch.randn(rows, cols, dtype=torch.float32).to(kind).to(device)).detach())

    def parameter():
        return leaf(torch.randn(cols).to(params))

    x, residual, dres, like_x, dy = *(activation() for _ in range(4)), activation(output)
    weight, bias = parameter(), parameter()
    flat = x.numel() // max(cols, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ln_stats = torch.rand(3, flat, dtype=wide, device=device)
    rms_stats = torch.rand(1, flat, dtype=wide, device=device)
    eps, alpha, offset = 1e-5, 0.5, 1.0
    rms = (eps, offset, rounding)
    return {
        "layer_norm": [(x, weight, bias, eps)],
        "layer_norm_inference": [(x, weight, bias, 1, eps), (x, None, None, 1, eps)],
        "layer_norm_forward": [(x, weight, bias, 1, eps), (x, weight, None, 1, eps), (x, None, bias, 1, eps)],
        "layer_norm_backward": [
            *((plain(like_x), None, x, ln_stats, weight, bias, 1, needs) for needs in range(8)),
            (plain(like_x), dres, x, ln_stats, None, bias, 1, 5),
            (plain(like_x), dres, x, ln_stats, None, None, 1, 1),
        ],
        "add_layer_norm": [(x, residual, weight, bias, eps, alpha)],
        "add_layer_norm_inference": [(x, residual, weight, bias, 1, eps, alpha), (x, residual, None, None, 1, eps, 1.0)],
        "add_layer_norm_forward": [(x, residual, weight, bias, 1, eps, alpha), (x, residual, None, None, 1, eps, 1.0)],
        "layer_norm_export": [(x, None, weight, bias, 1, eps, 1.0), (x, residual, weight, None, 1, eps, alpha)],
        "rms_norm": [(x, weight, eps)],
        "rms_norm_inference": [(x, weight, 1, *rms), (x, None, 1, *rms)],
        "rms_norm_forward": [(x, weight, 1, *rms), (x, None, 1, *rms)],
        "rms_norm_backward": [
            *((plain(dy), None, x, rms_stats, weight, 1, offset, rounding, needs) for needs in range(4)),
            (plain(dy), dres, x, rms_stats, weight, 1, 0.0, rounding, 3),
        ],
        "add_rms_norm": [(x, residual, weight, eps)],
        "add_rms_norm_inference": [(x, residual, weight, 1, *rms), (x, residual, None, 1, *rms)],
        "add_rms_norm_forward": [(x, residual, weight, 1, *rms), (x, residual, None, 1, *rms)],
        "rms_norm_export": [(x, None, weight, 1, *rms), (x, residual, None, 1, *rms)],
        "fused_add_rms_norm_": [(x.detach().clone(), residual.detach().clone(), weight.detach(), eps)]
        if output == dtype and layout(torch.ones(2, 2)).numel() == 4
        else [],
        **channel_arguments(x, plain(like_x), residual, params),
    }


def channel_arguments(x, dy, residual, params):
    """The same for the channel norms, on input [batch, channels, ...]."""
    batch, channels = x.shape[:2]
    groups = max(g for g in (1, 2, 4) if channels % g == 0)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    eps, silu, momentum = 1e-5, 2, 0.25

    def uniform(*shape, dtype=params):
        return torch.rand(*shape, dtype=torch.float32).to(x.device, dtype)

    weight, bias = (uniform(channels).requires_grad_(x.requires_grad) for _ in range(2))
    mean, var = uniform(channels), uniform(channels)
    stats, group_stats = uniform(4, channels, dtype=wide), uniform(4, batch * groups, dtype=wide)
    counts = torch.tensor([[5], [7]], device=x.device).view(wide)
    gathered = torch.cat((uniform(2, 3 * channels, dtype=wide), counts), 1)
    count = torch.full((1,), 12.0, dtype=torch.float64, device=x.device)
    batches = torch.tensor([3], device=x.device)
    return {
        "batch_norm": [(x, weight, bias, mean, var, eps)],
        "batch_norm_inference": [(x, residual, weight, bias, mean, var, eps, silu), (x, None, None, None, None, None, eps, 0)],
        "batch_norm_forward": [
            *((x, residual, weight, bias, None, None, eps, activation) for activation in range(5)),
            (x, None, None, bias, mean, var, eps, 0),
        ],
        "batch_norm_backward": [
            *((dy, x, stats, residual, weight, bias, 0, silu, needs) for needs in range(16)),
            *((dy, x, stats, None, None, None, 1, activation, 15) for activation in range(5)),
        ],
        "batch_norm_export": [(x, residual, weight, bias, None, None, eps, silu), (x, None, weight, bias, mean, var, eps, 0)],
        "batch_norm_train_": [
            (x, residual, weight, bias, mean.clone(), var.clone(), batches, momentum, eps, silu),
            (x, None, None, bias, mean.clone(), var.clone(), None, momentum, eps, 0),
            (x, residual, weight, None, None, None, None, momentum, eps, 1),
        ],
        "batch_norm_update_": [
            (stats, mean.clone(), var.clone(), None, momentum),
            (uniform(4, 3 * channels, dtype=wide), mean.clone(), var.clone(), batches, momentum),
        ],
        "batch_norm_moments": [(x,)],
        "batch_norm_merge": [(gathered, eps)],
        "batch_norm_apply": [(x, residual, stats, weight, bias, silu), (x, None, stats, None, None, 0)],
        "batch_norm_backward_sums": [(dy, x, stats, residual, weight, bias, silu), (dy, x, stats, None, None, None, 0)],
        "batch_norm_backward_apply": [
            (dy, x, stats, residual, weight, bias, uniform(2, channels, dtype=wide), count, silu, needs) for needs in range(4)
        ],
        "contiguous": [(x,)],
        "group_norm": [(x, weight, bias, groups, eps)],
        "group_norm_inference": [(x, weight, bias, groups, eps, silu), (x, None, None, groups, eps, 0)],
        "group_norm_forward": [
            *((x, weight, bias, groups, eps, activation) for activation in range(5)),
            (x, None, bias, 1, eps, 0),
        ],
        "instance_norm_forward": [(x, weight, bias, eps, silu), (x, None, None, eps, 0)],
        "group_norm_backward": [
            *((dy, x, group_stats, weight, bias, groups, silu, needs) for needs in range(8)),
            (dy, x, group_stats, None, bias, groups, 0, 7),
        ],
        "group_norm_export": [(x, weight, bias, groups, eps, silu), (x, None, None, 1, eps, 0)],
    }


def plain(gradient):
    return gradient.detach()


def registered():
    return {name.removeprefix("normext::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("normext::")}


def op(name):
    return getattr(torch.ops.normext, name).default
