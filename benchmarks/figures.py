"""What the raw results of the CPU grids mean: speed-ups, copy-speed bounds, who is slower. Pure arithmetic, no torch."""

import math
import statistics
from dataclasses import dataclass

import channel_grid
import traffic

SLOWER = 0.97  # a ratio below this in every run is a slower case
SMALL_INPUT = 128 * 1024  # bytes of input below which a training step is judged by its extra time, not by the ratio
OUT_OF_CACHE = 32 << 20  # bytes of input and output from which a core's own caches hold no case
ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")


def geomean(values):
    values = list(values)
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


@dataclass(frozen=True)
class OpKind:
    """As much of an op as its traffic depends on."""

    centred: bool
    fused: bool

    @classmethod
    def of(cls, name):
        return cls(centred="layer" in name, fused=name.startswith("add_"))


class Figure:
    """One case of the grid over its runs."""

    def __init__(self, case):
        self.case = case
        self.op, self.kind, self.dtype = case["op"], case["pass"], case["dtype"]
        self.rows, self.cols = case["rows"], case["cols"]

    @property
    def shape(self):
        return f"{self.rows}x{self.cols}"

    @property
    def name(self):
        """The shape, and what else tells cases of an op and dtype apart."""
        return self.shape

    @property
    def input_bytes(self):
        return self.rows * self.cols * ITEM_SIZE[self.dtype]

    @property
    def floor_bytes(self):
        count = traffic.train if self.kind == "train" else traffic.forward
        size = ITEM_SIZE[self.dtype]
        return count(OpKind.of(self.op), self.rows, self.cols, size, size)

    @property
    def out_of_cache(self):
        return 2 * self.input_bytes >= OUT_OF_CACHE

    def us(self, name="normext"):
        return statistics.median(self.case["us"][name])

    def has(self, name):
        return name in self.case["us"]

    def speedup(self, over="eager"):
        return statistics.median(self.case["speedup"][over])

    def slower(self, than="eager"):
        return self.has(than) and max(self.case["speedup"][than]) < SLOWER

    @property
    def small_step(self):
        """A training step so short that its extra time is judged, not its ratio."""
        return self.kind == "train" and self.input_bytes < SMALL_INPUT

    def extra_us(self):
        """Least extra time over torch eager among the runs: what every run agrees on."""
        us = self.case["us"]
        return min(ours - eager for ours, eager in zip(us["normext"], us["eager"], strict=True))

    def copy_bound_us(self):
        """Time of a kernel that moves the op's floor of bytes at the speed of the copy measured beside it."""
        return self.us("copy") * self.floor_bytes / (2 * self.input_bytes)

    def speedup_at_copy_speed(self):
        return self.us("eager") / self.copy_bound_us()

    def share_of_copy_rate(self):
        """Bytes per second over the copy's, the floor counted as the bytes."""
        return self.copy_bound_us() / self.us()


class ChannelFigure(Figure):
    """One case of the grid of the channel norms over its runs."""

    def __init__(self, case):
        self.case = case
        self.op, self.kind, self.dtype, self.layout = case["op"], case["pass"], case["dtype"], case["layout"]
        self.extents = tuple(map(int, case["shape"].split("x")))

    @property
    def shape(self):
        return self.case["shape"]

    @property
    def name(self):
        return f"{self.shape} {self.layout} {self.kind}"

    @property
    def input_bytes(self):
        return math.prod(self.extents) * ITEM_SIZE[self.dtype]

    @property
    def floor_bytes(self):
        count = traffic.channel_train if self.kind == "train" else traffic.channel_forward
        return count(channel_grid.OPS[self.op], self.extents, self.layout, ITEM_SIZE[self.dtype], ITEM_SIZE["float32"])


def _those(chosen, **properties):
    """Figures with these properties; None leaves a property open."""
    for name, wanted in properties.items():
        chosen = [figure for figure in chosen if wanted in (None, getattr(figure, name))]
    return chosen


def select(section, op=None, kind=None, dtype=None):
    """Figures of a cpu section; None leaves a property open."""
    return _those(map(Figure, section["cases"]), op=op, kind=kind, dtype=dtype)


def select_channel(section, op=None, kind=None, dtype=None, layout=None):
    """Figures of the channel section; None leaves a property open."""
    return _those(map(ChannelFigure, section["cases"]), op=op, kind=kind, dtype=dtype, layout=layout)


def of_bounds(bounds, op=None, kind=None, dtype=None):
    """Figures of bounds.py, of the row norms or the channel norms; speedup(build) is that of one of its builds."""
    cases = bounds["row_cases"] if op in OPS else bounds["channel_cases"]
    return (select if op in OPS else select_channel)({"cases": cases}, op, kind, dtype)


def slower(chosen, rival):
    """Cases slower than the rival in every run, small training steps aside; None where the rival was not measured."""
    compared = [figure for figure in chosen if figure.has(rival)]
    return [figure for figure in compared if figure.slower(rival) and not figure.small_step] if compared else None


def speedup_at_copy_speed_and_call(chosen):
    """Geometric mean for a kernel at copy speed that costs as much per call as ours: in the
    shortest case, what our time exceeds the copy's by."""
    shortest = min(chosen, key=Figure.us)
    call = shortest.us() - shortest.copy_bound_us()
    return geomean(figure.us("eager") / (figure.copy_bound_us() + call) for figure in chosen)


def other_load(section):
    """Largest share of the processors that other processes took during any measurement of a section."""
    loads = [load for case in section.get("cases", []) for load in case.get("other_load", []) if load is not None]
    return max(loads, default=math.nan)
