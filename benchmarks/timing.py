"""Interleaved paired medians on a machine that may not be idle.

Contenders take turns, in an order that changes, so that slow drifts (clock, temperature, neighbours) hit all of them
alike, and so does what the one before left in the caches; the speed-up is the median over rounds of the ratio within a
round. A result lives until the next one is there, whoever computes it, as in a model: so outputs alternate between two
blocks for every contender. Freed at once, a block is found again or not by chance, for hundreds of calls in a row, and
with it the cache: up to 1.7 times the time for the same work. While a case runs, /proc/stat tells how much processor
time went to others; a disturbed measurement is repeated, and the least disturbed attempt is kept together with its load.
So is one in which a contender's median is far above its lower quartile in any attempt: the host of a virtual machine
takes and gives memory without being seen in /proc/stat.
"""

import gc
import os
import random
import statistics
import time
from dataclasses import dataclass
from itertools import permutations, repeat

SAMPLE_SECONDS = 1e-3  # one sample is as many calls as take this long
LONG_SECONDS = 20e-3  # a call this long finds no cache of its own anyway
SETTLING_CALLS = 8
TOLERATED_LOAD = 0.05  # share of all processors that others may use during a measurement
TOLERATED_SPREAD = 1.5  # of a contender's median over its lower quartile in the best attempt
MOST_ATTEMPTS = 4
TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass
class Measured:
    seconds: dict[str, float]  # median time of one call
    speedup: dict[str, float]  # median over rounds of contender's time / subject's time
    rounds: int
    other_load: float | None  # share of all processors used by others; None where the system does not say
    quick: dict[str, float]  # lower quartile

    def spread(self, quickest):
        """The largest of a contender's median over the least of its lower quartiles."""
        return max(self.seconds[name] / seconds for name, seconds in quickest.items())

    def disturbance(self, quickest):
        """Above 1: to be repeated."""
        return max((self.other_load or 0) / TOLERATED_LOAD, (self.spread(quickest) - 1) / (TOLERATED_SPREAD - 1))


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
    """Seconds per call; calls = 0 means one, unprepared. Else an untimed one first restores the contender's caches, and frees the
    result of the contender before."""
    global _kept
    _kept = call() if calls else None
    start = time.perf_counter()
    for _ in repeat(None, calls or 1):
        _kept = call()
    return (time.perf_counter() - start) / (calls or 1)


def _settle(call):
    """Calls until two in a row take about the same. A virtual machine gets memory from its host at the first touch, which makes
    the first calls with large outputs several times slower: that is the host's time, whoever comes first."""
    before = _sample(call, 1)
    for _ in range(SETTLING_CALLS):
        after = _sample(call, 1)
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


def _orders(names):
    """Every order once, in a shuffled sequence: each contender follows each other one equally often. Whoever comes after one that
    wrote to the same freed block finds it in the cache; after one that wrote elsewhere, lines must be evicted first."""
    orders = list(permutations(names))
    random.Random(0).shuffle(orders)
    return orders


def interleave(contenders, subject, budget, min_rounds=6, max_rounds=99):
    """Times callables in turn for about `budget` seconds. `subject` names the one that the others are compared with."""
    global _kept
    names, orders = list(contenders), _orders(contenders)
    calls = {name: _calls_per_sample(call) for name, call in contenders.items()}
    samples = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        meter, start, rounds = LoadMeter(), time.perf_counter(), 0
        while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() - start < budget):
            for name in orders[rounds % len(orders)]:
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
    quick = {name: statistics.quantiles(times, n=4)[0] for name, times in samples.items()}
    return Measured(seconds, speedup, rounds, load, quick)


class Bench:
    """Repeats disturbed measurements, within a total allowance of `patience` seconds."""

    def __init__(self, budget, patience, min_rounds=6):
        self.budget, self.patience, self.min_rounds = budget, patience, min_rounds

    def measure(self, contenders, subject="normext"):
        """The least disturbed attempt."""
        attempts, quickest = [], {}
        while True:
            start = time.perf_counter()
            attempts.append(interleave(contenders, subject, self.budget, self.min_rounds))
            for name, seconds in attempts[-1].quick.items():
                quickest[name] = min(seconds, quickest.get(name, seconds))
            if len(attempts) > 1:
                self.patience -= time.perf_counter() - start
            best = min(attempts, key=lambda attempt: attempt.disturbance(quickest))
            if best.disturbance(quickest) <= 1 or len(attempts) == MOST_ATTEMPTS or self.patience <= 0:
                return best
            time.sleep(min(0.5, self.patience))
