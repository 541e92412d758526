"""SyncBatchNorm in real processes over gloo: what each rank must find is in sync_process.py. And what holds in one process."""

import os
import subprocess
import sys

import pytest
import sync_process
import torch
from torch import nn

import normext

SCRIPT = os.path.join(os.path.dirname(__file__), "sync_process.py")


# Three ranks on every back end; more and fewer exercise what does not depend on it.
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.python), 3, pytest.param(4, marks=pytest.mark.python)])
def test_processes(world, backend, tmp_path):
    if backend.device == "cuda":
        pytest.skip("gloo moves CPU tensors; NCCL wants a GPU per rank")
    rendezvous = str(tmp_path / "rendezvous")
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(world), rendezvous],
            env=backend.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        results = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (out, err) in zip(ranks, results, strict=True):
        assert rank.returncode == 0, err[-3000:]
        assert out.split() == ["done", str(len(sync_process.CHECKS))]


def test_alone_it_is_batch_norm(device):
    x = torch.randn(3, 4, 5, device=device, requires_grad=True)
    sync, batch = normext.SyncBatchNorm(4).to(device), normext.BatchNorm1d(4).to(device)
    for mode in (True, True, False):
        one, other = sync.train(mode)(x), batch.train(mode)(x)
        assert one.equal(other)
        assert torch.autograd.grad(one.square().sum(), x)[0].equal(torch.autograd.grad(other.square().sum(), x)[0])
    for one, other in zip(sync.buffers(), batch.buffers(), strict=True):
        assert one.equal(other)


@pytest.mark.once
def test_is_a_torch_sync_batch_norm():
    module = normext.SyncBatchNorm(4, process_group=None)
    assert isinstance(module, nn.SyncBatchNorm)
    assert repr(module) == repr(nn.SyncBatchNorm(4))
    assert list(module.state_dict()) == list(nn.SyncBatchNorm(4).state_dict())
    with pytest.raises(ValueError, match="at least 2D input"):
        module(torch.randn(4))
