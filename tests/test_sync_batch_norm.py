"""SyncBatchNorm in real processes over gloo: what each rank must find is in sync_process.py. And what holds in one process."""

import contextlib
import os
import signal
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
    # Files, not pipes: after a failure, ranks that wait for it would keep those open.
    printed, errors = tmp_path / "stdout", tmp_path / "stderr"
    with printed.open("a") as out, errors.open("a") as err:
        command = [sys.executable, SCRIPT, str(world), str(tmp_path / "rendezvous")]
        ranks = subprocess.Popen(command, env=backend.environment(), stdout=out, stderr=err, start_new_session=True)
        try:
            status = ranks.wait(timeout=240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ranks.pid, signal.SIGKILL)
    assert status == 0, errors.read_text()[-3000:]
    done = [f"done {rank} {len(sync_process.CHECKS)}" for rank in range(world)]
    assert sorted(printed.read_text().splitlines()) == done


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
