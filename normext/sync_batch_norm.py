"""SyncBatchNorm: BatchNorm whose statistics are those of all processes of a group, over torch.distributed.

Forward: one all_gather of every rank's moments and count, merged in rank order, so that all ranks hold the same bits.
Backward: one all_reduce of sum(dz) and sum(dz * xhat). Nothing waits for the device, so that steps can be captured in a
CUDA graph (not yet tried on a GPU)."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx import Proxy

from normext import _channel, _library
from normext._channel import update_running
from normext._library import Op
from normext.batch_norm import module_forward

_moments = Op.named("batch_norm_moments").overload
_merge = Op.named("batch_norm_merge").overload
_apply = Op.named("batch_norm_apply").overload
_backward_sums = Op.named("batch_norm_backward_sums").overload
_backward_apply = Op.named("batch_norm_backward_apply").overload


def _fake_moments(input: Tensor) -> Tensor:
    _channel.check_fake("batch_norm_moments", input, 0, (), ())
    return _channel.stats_like(input, 0)[:3].clone()


def _fake_merge(gathered: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    channels = (gathered.shape[1] - _count_elements(gathered)) // 3
    return gathered.new_empty((4, channels)), gathered.new_empty(1, dtype=torch.float64)


def _fake_apply(
    input: Tensor, residual: Tensor | None, stats: Tensor, weight: Tensor | None, bias: Tensor | None, activation: int
) -> Tensor:
    _channel.check_fake("batch_norm_apply", input, 0, (weight, bias), (residual,))
    _library.check_fake_stats("batch_norm_apply", stats, _channel.stats_like(input, 0))
    return _channel.output_like(input)


def _fake_backward_sums(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
) -> Tensor:
    _channel.check_fake("batch_norm_backward_sums", input, 0, (weight, bias), (grad_output, residual))
    _library.check_fake_stats("batch_norm_backward_sums", stats, _channel.stats_like(input, 0))
    return stats.new_empty((2, input.shape[1]))


def _fake_backward_apply(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor,
    count: Tensor,
    activation: int,
    needs: int,
) -> tuple[Tensor, ...]:
    _channel.check_fake("batch_norm_backward_apply", input, 0, (weight, bias), (grad_output, residual))
    expected = _channel.stats_like(input, 0)
    _library.check_fake_stats("batch_norm_backward_apply", stats, expected)
    _library.check_fake_stats("batch_norm_backward_apply", sums, expected[:2])
    _library.check_fake_stats("batch_norm_backward_apply", count, expected.new_empty(1, dtype=torch.float64))
    return _channel.fake_gradients(needs, input, True, weight, bias)[:2]


_library.register_fakes(
    batch_norm_moments=_fake_moments,
    batch_norm_merge=_fake_merge,
    batch_norm_apply=_fake_apply,
    batch_norm_backward_sums=_fake_backward_sums,
    batch_norm_backward_apply=_fake_backward_apply,
)


def _count_elements(moments: Tensor) -> int:
    """How many elements of moments' dtype an int64 count takes."""
    return 1 if moments.dtype == torch.float64 else 2


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float,
        eps: float,
        group: Any,
    ) -> Tensor:
        moments = _moments(input)
        values = input.numel() // input.shape[1]
        count = torch.full((1,), values, dtype=torch.int64, device=input.device).view(moments.dtype)  # the bits, not the value
        mine = torch.cat((moments.flatten(), count))
        gathered = mine.new_empty(dist.get_world_size(group) * mine.numel())
        # Newer versions of torch rename the collective, and warn about its old name.
        all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        all_gather(gathered, mine, group=group)
        stats, total = _merge(gathered.view(-1, mine.numel()), eps)
        # An empty shard, too, takes the statistics of the others.
        update_running(gathered, stats, running_mean, running_var, num_batches_tracked, momentum)
        ctx.group = group
        ctx.save_for_backward(input, stats, total, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return cast(Tensor, _apply(input, None, stats, weight, bias, 0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        input, stats, total, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        sums = _backward_sums(grad_output, input, stats, None, weight, None, 0)
        # Parameters take the sums of this rank: whoever averages gradients adds them up.
        grad_weight = sums[1].to(weight.dtype, copy=True) if needs_weight else None
        grad_bias = sums[0].to(ctx.bias_dtype, copy=True) if needs_bias else None
        grad_input = None
        if needs_input:
            dist.all_reduce(sums, group=ctx.group)
            grad_input = _backward_apply(grad_output, input, stats, None, weight, None, sums, total, 0, 1)[0]
        return grad_input, grad_weight, grad_bias, None, None, None, None, None, None


class SyncBatchNorm(nn.SyncBatchNorm):
    """:class:`torch.nn.SyncBatchNorm`, computed by normext's kernels: same arguments, buffers and state_dict; works on the CPU
    (gloo) and on CUDA (NCCL; not yet run on a GPU), and keeps channels-last.

    Input ``[N, C, *]``, output of the same shape, dtype and format. In training, statistics are those of all ranks of
    ``process_group``, bitwise equal on each; ranks may hold different numbers of images, none included, or a single value. Without
    a process group, or in evaluation, it is :class:`normext.BatchNorm2d` for any number of dimensions. Gradients of the
    parameters are those of this rank's share, as in torch: DistributedDataParallel averages them (and refuses SyncBatchNorm
    modules on the CPU, by their class). It has a first derivative only.

    Input float32, float64, float16 or bfloat16; parameters and running statistics of its dtype, or float32 with 16-bit input.

    Raises:
        ValueError: in torch's words, for fewer than 2 dimensions or no channels.
        RuntimeError: for dtypes or sizes that do not fit together. CPU tensors are accepted, unlike by torch's module.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, over the batches of all ranks.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (leaf := _library.traced_leaf(self, input)) is not None:
            return leaf
        if input.dim() < 2 or input.shape[1] == 0:
            return super().forward(input)  # raises, in torch's words
        group = self.process_group if self.process_group else None
        together = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
        if not together:
            return module_forward(self, input)
        if not _channel.accepts(input, self.weight, self.bias, self.running_mean, self.running_var):
            raise RuntimeError(
                f"SyncBatchNorm: expected [N, {self.num_features}, *] and parameters of input's dtype, or float32 with 16-bit "
                f"input, got input {list(input.shape)} of {input.dtype}"
            )
        tracked = self.track_running_stats
        if tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        output = _SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
            input,
            self.weight,
            self.bias,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.num_batches_tracked if self.momentum is None else None,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
            group if group is not None else dist.group.WORLD,
        )
        return cast(Tensor, output)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Replaces the batch norms of a model, torch's and ours, by :class:`normext.SyncBatchNorm`.

        Parameters, buffers and mode are kept. Returns the model, or a new module if it is a batch norm itself.

        Args:
            module: any module.
            process_group: whose statistics are shared; None for all ranks.
        """
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)  # type: ignore[no-untyped-call]
        for child in converted.modules():
            if type(child) is nn.SyncBatchNorm:
                child.__class__ = cls
        return cast(nn.Module, converted)
