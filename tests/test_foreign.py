"""Tensors that are not what they seem: freed memory, and kinds of tensor for which torch's ops have rules and ours have none."""

import os

import pytest
import raw_ops
import torch
from test_process import child
from torch import nn

import normext


def freed(tensor, left=0):
    """A tensor as sharded training leaves one behind, a part of a storage: its shape is there, its memory is not, or some."""
    offset = 24
    whole = tensor.new_zeros(tensor.numel() + offset)
    part = whole[offset:].view(tensor.shape)
    whole.untyped_storage().resize_(left and (tensor.numel() + offset - left) * tensor.itemsize)
    return part


def copied(argument):
    return argument.detach().clone(memory_format=torch.preserve_format) if isinstance(argument, torch.Tensor) else argument


def flat(result):
    return result if isinstance(result, tuple) else (result,)


def test_freed_memory_is_refused_by_every_op(device):
    """Null is how kernels see an absent tensor: one that is there but has no memory must not pass for it, nor be read."""
    checked = 0
    for name, calls in raw_ops.arguments(device=device).items():
        op = getattr(torch.ops.normext, name)
        for call in calls:
            for i, argument in enumerate(call):
                if not isinstance(argument, torch.Tensor) or argument.numel() == 0:
                    continue
                arguments = [copied(a) for a in call]
                before = [copied(a) for a in arguments]
                try:
                    found = op(*arguments[:i], freed(argument, left=checked % 2), *arguments[i + 1 :])
                except RuntimeError as error:
                    assert "has no memory" in str(error), (name, i)
                    for old, new in zip(before, arguments, strict=True):
                        assert not isinstance(old, torch.Tensor) or old.equal(new), (name, i)
                else:  # only its dtype counts
                    expected = op(*[copied(a) for a in call])
                    assert all(a.equal(b) for a, b in zip(flat(found), flat(expected), strict=True)), (name, i)
                checked += 1
    assert checked > 200


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "add_rms_norm", "batch_norm", "group_norm", "instance_norm"])
def test_freed_parameters_are_refused(op, device):
    x, weight = torch.randn(2, 8, 8, device=device), freed(torch.ones(8, device=device))
    arguments = {
        "add_rms_norm": (x, x, (8,), weight),
        "group_norm": (x, 2, weight),
        "batch_norm": (x, torch.zeros(8, device=device), torch.ones(8, device=device), weight),
        "instance_norm": (x, None, None, weight),
    }.get(op, (x, (8,), weight))
    with pytest.raises(RuntimeError, match=r"memory|allocated"):
        getattr(normext, op)(*arguments)


@pytest.mark.python
def test_jagged_tensors_do_as_torchs(device):
    parts = [torch.randn(2, 8, device=device), torch.randn(3, 8, device=device)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for ours, theirs in ((normext.LayerNorm, nn.LayerNorm), (normext.RMSNorm, nn.RMSNorm)):
        found, expected = ours(8, device=device)(nested), theirs(8, device=device)(nested)
        assert found.is_nested
        assert found.values().equal(expected.values())


@pytest.mark.python
def test_nested_sums_do_as_torchs(device):
    nested = torch.nested.nested_tensor([torch.randn(2, 8, device=device), torch.randn(3, 8, device=device)])
    parameters = torch.rand(8, device=device), torch.rand(8, device=device)
    output, summed = normext.add_layer_norm(nested, nested, (8,), *parameters)
    expected = torch.nn.functional.layer_norm(nested + nested, (8,), *parameters)
    assert normext.layer_norm(nested, (8,), *parameters).is_nested
    for found, wanted, total, part in zip(*(t.unbind() for t in (output, expected, summed, nested)), strict=True):
        assert found.equal(wanted) and total.equal(2 * part)


@pytest.mark.once
def test_mkldnn_tensors_do_as_torchs():
    x, mean, var, weight, bias = torch.randn(2, 8, 3, 3), torch.zeros(8), torch.ones(8), torch.ones(8), torch.zeros(8)
    arguments = x.to_mkldnn(), mean, var, weight, bias
    found, expected = (library.batch_norm(*arguments).to_dense() for library in (normext, torch.nn.functional))
    assert found.equal(expected)


DISTRIBUTED = """
import torch, normext
import torch.nn.functional as F
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
def channels_last(module):
    module.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous(memory_format=torch.channels_last))
    return module
pairs = [
    (channels_last(normext.InstanceNorm2d(4)), channels_last(nn.InstanceNorm2d(4))),
    (normext.LayerNorm(8), nn.LayerNorm(8)), (normext.RMSNorm(8), nn.RMSNorm(8)), (normext.GroupNorm(2, 4), nn.GroupNorm(2, 4)),
    (normext.BatchNorm1d(4), nn.BatchNorm1d(4)), (normext.InstanceNorm1d(4), nn.InstanceNorm1d(4)),
]
for pair in pairs:
    x = torch.randn((2, 4, 8) if "2d" not in type(pair[0]).__name__ else (2, 4, 8, 3), requires_grad=True)
    found = []
    for module in pair:
        model = parallelize_module(nn.Sequential(module), mesh, {"0": SequenceParallel()})
        y = model(x)
        y = y.full_tensor() if hasattr(y, "full_tensor") else y
        buffers = [b.full_tensor() if hasattr(b, "full_tensor") else b for b in module.buffers()]
        found.append([y, torch.autograd.grad(y.square().sum(), x)[0], *buffers])
    assert all(a.equal(b) for a, b in zip(*found, strict=True)), pair
for module in (normext.LayerNorm(8), normext.RMSNorm(8), normext.GroupNorm(2, 4), normext.BatchNorm1d(4)):
    model = parallelize_module(nn.Sequential(module), mesh, {"0": SequenceParallel()})
    x = torch.randn(2, 4, 8, requires_grad=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (a,), (b,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (model, compiled))
    assert a.equal(b), module
x = distribute_tensor(torch.randn(2, 4, 8), mesh, [Shard(1)])
weight = distribute_tensor(torch.rand(8), mesh)
y, total = normext.add_rms_norm(x, x, (8,), weight, weight_offset=1.0)
expected = F.rms_norm((x + x).full_tensor(), (8,), 1 + weight.full_tensor())
torch.testing.assert_close(y.full_tensor(), expected)
y, total = normext.add_layer_norm(x, x, (8,), weight, weight)
torch.testing.assert_close(y.full_tensor(), F.layer_norm((x + x).full_tensor(), (8,), weight.full_tensor(), weight.full_tensor()))
dist.destroy_process_group()
"""


@pytest.mark.once
def test_distributed_tensors_do_as_torchs(backend):
    """DTensor has sharding rules for torch's ops: a model that is parallelised goes on to work after its norms were swapped."""
    child(backend, "-W", "ignore", "-c", DISTRIBUTED)


@pytest.mark.python
def test_other_subclasses_raise_what_they_raise(device):
    """A subclass that implements no op of ours and none of torch's gets its own error, not a wrong result."""

    class Opaque(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError(f"Opaque has no {function}")

    x = torch.Tensor._make_wrapper_subclass(Opaque, (2, 8), device=device)
    for call in (lambda: normext.layer_norm(x, (8,)), lambda: normext.rms_norm(x, (8,)), lambda: normext.group_norm(x, 2)):
        with pytest.raises(NotImplementedError, match="Opaque has no"):
            call()


def test_fake_tensors_are_not_read(device):
    """Their address is null. Through the dispatcher they never get to a kernel, unless somebody turns that off."""
    if os.environ.get("NORMEXT_BACKEND") == "emulated":
        pytest.skip("the same code")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="no memory"), torch._C._DisableTorchDispatch():
        torch.ops.normext.layer_norm_inference(x, None, None, 1, 1e-5)
