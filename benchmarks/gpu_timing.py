"""Device time of one call: a CUDA graph of one call per set of buffers, replayed in turns with the other contenders.

Sets rotate so that together they exceed L2 five times (`cold`), as far as MAX_SETS goes; every call of a graph keeps
its own outputs, so stores cannot stay in L2 either. A graph takes the host out of the figure, which matters below about
20 us.
"""

import statistics
import time

import torch

MAX_SETS, MIN_SETS, L2_TIMES = 48, 2, 5


def sets_needed(bytes_per_call, l2_bytes):
    """(number of buffer sets, whether they exceed L2 by enough for every access to come from memory)."""
    wanted = -(-L2_TIMES * l2_bytes // bytes_per_call)
    count = max(MIN_SETS, min(MAX_SETS, wanted))
    return count, count >= wanted


class GraphTimer:
    """`prepare` captures calls; `time` replays what was captured."""

    def __init__(self):
        self.stream = torch.cuda.Stream()

    def scope(self):
        """Forward passes whose backward is captured later must run on the stream of the capture."""
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def prepare(self, calls):
        with self.scope():
            for call in calls[:2]:  # lazy initialisation, compilation
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            outputs = [call() for call in calls]
        graph.replay()
        torch.cuda.synchronize()
        return graph, outputs, len(calls)

    def time(self, prepared, rounds):
        samples = {name: [] for name in prepared}
        names = list(prepared)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                graph, _outputs, calls = prepared[name]
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                graph.replay()  # brings the clocks up and this contender's state back
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                samples[name].append(start.elapsed_time(end) * 1e-3 / calls)
        return {name: statistics.median(times) for name, times in samples.items()}


class HostTimer:
    """The same interface on a machine without a GPU, for a dry run of everything else."""

    def scope(self):
        return torch.enable_grad()

    def prepare(self, calls):
        return calls

    def time(self, prepared, rounds):
        return {name: min(self._once(calls) for _ in range(rounds)) for name, calls in prepared.items()}

    @staticmethod
    def _once(calls):
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)


def host_seconds(call, device, calls=200):
    """Time until an eager call returns, the device's queue being far from full."""
    for _ in range(10):
        call()
    best = float("inf")
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls // 5):
            call()
        best = min(best, (time.perf_counter() - start) / (calls // 5))
    return best
