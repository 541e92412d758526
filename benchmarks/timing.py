"""Interleaved paired medians on a machine that may not be idle.

Contenders take turns, in an order that changes, so that slow drifts (clock, temperature, neighbours) hit all of them
alike, and so does what the one before left in the caches; the speed-up is the median over rounds of the ratio within a
round. A result lives until the next one is there, whoever computes it, as in a model: so outputs alternate between two
blocks for every contender. Freed at once, a block is found again or not by chance, for hundreds of calls in a row, and
with it the cache: up to 1.7 times the time for the same work. While a case runs, /proc/stat tells how much processor
time went to others; a disturbed measurement is repeated, and the least disturbed attempt is kept together with its load.
So is one in which a contender's median is far from its best: the host of a virtual machine takes and gives memory
without being seen in /proc/stat.
"""

import gc
import os
import statistics
import time
from dataclasses import dataclass
from itertools import repeat

SAMPLE_SECONDS = 1e-3  # one sample is as many calls as take this long
LONG_SECONDS = 20e-3  # a call this long finds no cache of its own anyway
SETTLING_CALLS = 8
TOLERATED_LOAD = 0.05  # share of all processors that others may use during a measurement
TOLERATED_SPREAD = 1.5  # of a contender's median over its best
TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass
class Measured:
    seconds: dict[str, float]  # median time of one call
    speedup: dict[str, float]  # median over rounds of contender's time / subject's time
    rounds: int
    other_load: float | None  # share of all processors used by others; None where the system does not say
    spread: float  # the largest of a contender's median over its best

    @property
    def disturbance(self):
        """Above 1: to be repeated."""
        return max((self.other_load or 0) / TOLERATED_LOAD, (self.spread - 1) / (TOLERATED_SPREAD - 1))


class LoadMeter:
    """Share of all processors' time, since construction, that went to anything but this process."""

    def __init__(self):
        self.start = self._read()

    @staticmethod
    def _read():
        try:
            with open("/proc/stat") as stat:
                lines = [line.split() for line in stat if line.startswith("cpu")]
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in lines[0][1:9])
        busy = (user + nice + system + irq + softirq + steal) * TICK
        return busy, time.process_time(), time.perf_counter(), len(lines) - 1

    def other(self):
        if self.start is None:
            return None
        busy, own, clock, cpus = self._read()
        elapsed = cpus * (clock - self.start[2])
        # The counters advance in ticks: what one tick per processor could explain is not held against anybody.
        others = (busy - self.start[0]) - (own - self.start[1]) - cpus * TICK
        return max(0.0, others / elapsed)


_kept = None  # the last result


def _sample(call, calls):
    """Seconds per call; calls = 0 means one, unprepared. Else an untimed one first restores the contender's caches."""
    global _kept
    if calls:
        _kept = call()
    start = time.perf_counter()
    for _ in repeat(None, calls or 1):
        _kept = call()
    return (time.perf_counter() - start) / (calls or 1)


def _settle(call):
    """Calls until two in a row take about the same. A virtual machine gets memory from its host at the first touch, which makes
    the first calls with large outputs several times slower: that is the host's time, whoever comes first."""
    before = _sample(call, 0)
    for _ in range(SETTLING_CALLS):
        after = _sample(call, 0)
        if after > before / 1.5:
            return after
        before = after
    return before


def _calls_per_sample(call):
    first = _settle(call)
    if first > LONG_SECONDS:
        return 0
    if first > SAMPLE_SECONDS:
        return 1
    return max(1, round(SAMPLE_SECONDS / _sample(call, max(1, round(SAMPLE_SECONDS / 10 / max(first, 1e-7))))))


def _order(names, turn):
    """Rotates, and is reversed every other time: each contender follows each of two others equally often. Whoever comes after one
    that wrote to the same freed block finds it in the cache; after one that wrote elsewhere, lines must be evicted first
    [12 MB outputs: 1.4 times the time]."""
    first = turn // 2 % len(names)
    order = names[first:] + names[:first]
    return order[::-1] if turn % 2 else order


def interleave(contenders, subject, budget, min_rounds=6, max_rounds=99):
    """Times callables in turn for about `budget` seconds. `subject` names the one that the others are compared with."""
    global _kept
    names = list(contenders)
    calls = {name: _calls_per_sample(call) for name, call in contenders.items()}
    samples = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        meter, start, rounds = LoadMeter(), time.perf_counter(), 0
        while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() - start < budget):
            for name in _order(names, rounds):
                samples[name].append(_sample(contenders[name], calls[name]))
            rounds += 1
        load = meter.other()
    finally:
        _kept = None
        if collecting:
            gc.enable()
    seconds = {name: statistics.median(times) for name, times in samples.items()}
    speedup = {
        name: statistics.median(t / s for t, s in zip(samples[name], samples[subject], strict=True))
        for name in names
        if name != subject
    }
    spread = max(seconds[name] / min(samples[name]) for name in names)
    return Measured(seconds, speedup, rounds, load, spread)


class Bench:
    """Repeats disturbed measurements, within a total allowance of `patience` seconds."""

    def __init__(self, budget, patience, min_rounds=6):
        self.budget, self.patience, self.min_rounds = budget, patience, min_rounds

    def measure(self, contenders, subject="normext"):
        best = interleave(contenders, subject, self.budget, self.min_rounds)
        while best.disturbance > 1 and self.patience > 0:
            start = time.perf_counter()
            time.sleep(min(0.5, self.patience))
            again = interleave(contenders, subject, self.budget, self.min_rounds)
            best = min(best, again, key=lambda measured: measured.disturbance)
            self.patience -= time.perf_counter() - start
        return best
