"""The ranks of the SyncBatchNorm tests: `python sync_process.py <world> <rendezvous file>`. Every check raises on failure."""

import os
import sys
import traceback
import unittest.mock

import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normext

CHANNELS = 33


def shards_of(world):
    """Images per rank: even, uneven with a single one, and with an empty shard."""
    uneven = [1 + 3 * rank for rank in range(world)]
    return {"even": [4] * world, "uneven": uneven, "empty": [0, *uneven[1:]], "last empty": [*uneven[1:], 0]}


def shard(x, sizes, rank):
    return x.split(sizes)[rank]


def batch(images, shape, dtype, mean, channels_last, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(images, CHANNELS, *shape, generator=generator, dtype=torch.float64) + mean).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def new_module(params, **more):
    module = normext.SyncBatchNorm(CHANNELS, dtype=params, **more)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        module.weight.copy_(1 + 0.5 * torch.randn(CHANNELS, generator=generator))
        module.bias.copy_(torch.randn(CHANNELS, generator=generator))
    return module


def expected(module, x, dy):
    """BatchNorm of the whole batch in float64: output, gradients and running statistics after one step."""
    whole = nn.BatchNorm1d(CHANNELS, eps=module.eps, momentum=module.momentum).double()
    with torch.no_grad():
        whole.weight.copy_(module.weight)
        whole.bias.copy_(module.bias)
        whole.running_mean.copy_(module.running_mean)
        whole.running_var.copy_(module.running_var)
    x = x.detach().double().requires_grad_()
    output = whole(x.flatten(2)).view(x.shape)
    grads = torch.autograd.grad(output, (x, whole.weight, whole.bias), dy.double())
    return output, grads, (whole.running_mean, whole.running_var)


def same_on_all_ranks(tensor):
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor.contiguous())
    assert all(other.equal(tensor) for other in others)


def summed(tensor):
    tensor = tensor.double()
    dist.all_reduce(tensor)
    return tensor


def close(found, wanted, dtype, factor=1.0):
    tolerance = factor * {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def equals_batch_norm_of_the_whole(rank, world):
    for kind, sizes in shards_of(world).items():
        for dtype, params in ((torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
            for mean, channels_last in ((0.0, False), (1e3 if dtype != torch.bfloat16 else 8.0, True)):
                x = batch(sum(sizes), (3, 5), dtype, mean, channels_last)
                dy = batch(sum(sizes), (3, 5), dtype, 0.0, channels_last, seed=1)
                module = new_module(params)
                y, grads, running = expected(module, x, dy)
                mine = shard(x, sizes, rank).detach().requires_grad_()
                output = module(mine)
                assert output.dtype == dtype, kind
                found = torch.autograd.grad(output, (mine, module.weight, module.bias), shard(dy, sizes, rank))
                close(output, shard(y, sizes, rank), dtype)
                close(found[0], shard(grads[0], sizes, rank), dtype)
                close(summed(found[1]), grads[1], dtype, 20)
                close(summed(found[2]), grads[2], dtype, 20)
                close(module.running_mean, running[0], params)
                close(module.running_var, running[1], params)
                for buffer in (module.running_mean, module.running_var):
                    same_on_all_ranks(buffer)


def a_single_value_per_rank(rank, world):
    """Refused by BatchNorm, but the world has more."""
    x = batch(world, (), torch.float32, 5.0, False)
    module = new_module(torch.float32)
    y, _, running = expected(module, x[..., None], x[..., None])
    close(module(x[rank : rank + 1]), y[rank : rank + 1, :, 0], torch.float32, 10)
    close(module.running_var, running[1], torch.float32)


def nothing_on_any_rank(rank, world):
    """The batch is counted, as in torch; statistics have nothing to learn from it."""
    module = new_module(torch.float32)
    output = module(torch.empty(0, CHANNELS, 3, requires_grad=True))
    output.sum().backward()
    assert output.shape == (0, CHANNELS, 3)
    assert module.running_mean.equal(torch.zeros(CHANNELS))
    assert module.running_var.equal(torch.ones(CHANNELS))
    assert module.weight.grad.equal(torch.zeros(CHANNELS))


def two_collectives_a_step(rank, world):
    calls = []
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    originals = {name: getattr(dist, name) for name in (gather, "all_reduce", "all_gather", "broadcast", "barrier")}

    def counting(name):
        def call(*args, **kwargs):
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    module, x = new_module(torch.float32), batch(3, (4,), torch.float32, 0.0, False).requires_grad_()
    try:
        for name in originals:
            setattr(dist, name, counting(name))
        output = module(x)
        assert calls == [gather], calls
        output.square().sum().backward()
        assert calls == [gather, "all_reduce"], calls
        module.eval()(x)
        assert len(calls) == 2, calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def cumulative_average(rank, world):
    module = new_module(torch.float32, momentum=None)
    means = []
    for step in range(3):
        x = batch(2 * world, (3,), torch.float32, float(step), False, seed=step)
        module(x[2 * rank : 2 * rank + 2])
        means.append(x.double().mean((0, 2)))
    assert module.num_batches_tracked == 3
    close(module.running_mean, torch.stack(means).mean(0), torch.float32)


def trains_under_ddp(rank, world):
    def model(norm):
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, CHANNELS, 3), norm(CHANNELS), nn.ReLU(), nn.Conv2d(CHANNELS, 2, 3), nn.Flatten())

    torch.manual_seed(4)
    x = torch.randn(2 * world, 3, 7, 7)
    whole = model(nn.BatchNorm2d)
    # DDP refuses every SyncBatchNorm on the CPU, by its class and before anything runs; what it does otherwise is tested.
    with unittest.mock.patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda *_: None):
        spread = DistributedDataParallel(normext.SyncBatchNorm.convert_sync_batchnorm(model(normext.BatchNorm2d)))
    assert type(spread.module[1]) is normext.SyncBatchNorm
    steps = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (whole, spread)]
    for _ in range(3):
        for m, images, step in ((whole, x, steps[0]), (spread, x[2 * rank : 2 * rank + 2], steps[1])):
            step.zero_grad()
            m(images).square().mean().backward()
            step.step()
    for one, other in zip(whole.parameters(), spread.parameters(), strict=True):
        close(other, one, torch.float32, 10)
    for buffer in spread.buffers():
        same_on_all_ranks(buffer)


def compiles_to_one_graph(rank, world):
    module, x = new_module(torch.float32), batch(4, (3, 3), torch.float32, 2.0, False, seed=rank)
    twin = new_module(torch.float32)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    results = []
    for m, function in ((module, module), (twin, compiled)):
        leaf = x.clone().requires_grad_()
        output = function(leaf)
        results.append([output, *torch.autograd.grad(output.square().sum(), (leaf, m.weight, m.bias)), *m.buffers()])
    for one, other in zip(*results, strict=True):
        assert one.equal(other)


def conversion_keeps_everything(rank, world):
    for kind in (nn.BatchNorm2d, normext.BatchNorm2d, nn.SyncBatchNorm):
        original = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), kind(CHANNELS, eps=1e-3, momentum=None))
        weight = original[1].weight
        converted = normext.SyncBatchNorm.convert_sync_batchnorm(original)
        assert type(converted[1]) is normext.SyncBatchNorm
        assert converted[1].weight is weight
        assert (converted[1].eps, converted[1].momentum) == (1e-3, None)


def bad_input_is_refused(rank, world):
    """Before any collective, so that the other ranks do not wait."""
    module = new_module(torch.float32)
    for x, error in (
        (torch.randn(3), ValueError),
        (torch.randn(3, 0, 2), ValueError),
        (torch.randn(3, CHANNELS + 1, 2), RuntimeError),
        (torch.randn(3, CHANNELS, 2, dtype=torch.float64), RuntimeError),
    ):
        try:
            module(x)
        except error:
            continue
        raise AssertionError(f"accepted {list(x.shape)} {x.dtype}")
    assert module.num_batches_tracked == 0


CHECKS = (
    equals_batch_norm_of_the_whole,
    a_single_value_per_rank,
    nothing_on_any_rank,
    two_collectives_a_step,
    cumulative_average,
    trains_under_ddp,
    compiles_to_one_graph,
    conversion_keeps_everything,
    bad_input_is_refused,
)


def run(rank, world, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    for check in CHECKS:
        check(rank, world)
        dist.barrier()
    dist.destroy_process_group()
    # One write, for the ranks share the file: print() makes one of each part under PYTHONUNBUFFERED, and lines would mix.
    os.write(sys.stdout.fileno(), f"done {rank} {len(CHECKS)}\n".encode())


def main():
    """Forks the ranks, so that torch is imported once; ends with the first that fails, for which the others would wait."""
    world, rendezvous = int(sys.argv[1]), sys.argv[2]
    ranks = []
    for rank in range(world):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            try:
                run(rank, world, rendezvous)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
    for _ in ranks:
        _, status = os.wait()
        if status != 0:
            sys.exit(1)


if __name__ == "__main__":
    main()
