"""The back ends a machine can test, and how a process selects one. One process runs one back end."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

# Variables that choose a back end or its behaviour: a worker starts with none of them but its own.
SELECTORS = ("NORMEXT_BACKEND", "NORMEXT_CPU_ISA", "NORMEXT_POISON", "NORMEXT_SIMT_ORDER", "NORMEXT_SIMT_ARCH", "NORMEXT_PDL")

PROBE = """
import json, torch
from normext import _C
info = _C.build_info()
print(json.dumps({"isas": info["cpu_isas"], "cuda": bool(info["cuda"]) and torch.cuda.is_available()}))
"""


@dataclass(frozen=True)
class Backend:
    name: str  # as it stands in test ids
    device: str = "cpu"
    env: dict = field(default_factory=dict, hash=False)

    @property
    def emulated(self):
        return self.name == "cuda-emulated"

    @property
    def runs_cuda_code(self):
        return self.emulated or self.device == "cuda"

    def rows(self, rows, cols):
        """Fewer rows where a row is expensive: the emulator spends about 100 ns per element, a GPU or CPU below 1 ns."""
        budget = 1 << 16 if self.emulated else 1 << 22
        return max(1, min(rows, budget // max(cols, 1)))

    def environment(self, **more):
        """The environment of a process that runs this back end."""
        kept = {name: value for name, value in os.environ.items() if name not in SELECTORS}
        return {**kept, **self.env, **more}


# Tests that do not depend on the back end (marked `once`) run here, with what a user gets by default.
HOST = Backend("host")
EMULATED = Backend("cuda-emulated", env={"NORMEXT_BACKEND": "emulated", "NORMEXT_POISON": "1"})
CUDA = Backend("cuda", "cuda", {"NORMEXT_POISON": "1"})


def cpu(isa):
    return Backend(f"cpu[{isa}]", env={"NORMEXT_CPU_ISA": isa, "NORMEXT_POISON": "1"})


def has_emulator():
    import importlib.util

    package = importlib.util.find_spec("normext")
    folder = package.submodule_search_locations[0] if package else ""
    return any(name.startswith("_C_emulated.") for name in os.listdir(folder)) if folder else False


def available():
    """Every back end of this machine, slowest first."""
    probe = subprocess.run([sys.executable, "-c", PROBE], env=HOST.environment(), capture_output=True, text=True)
    if probe.returncode != 0:
        raise pytest.UsageError("normext does not import; build it first (`make develop`):\n" + probe.stderr)
    found = json.loads(probe.stdout.splitlines()[-1])
    emulated = [EMULATED] if has_emulator() else []
    return emulated + ([CUDA] if found["cuda"] else []) + [HOST] + [cpu(isa) for isa in found["isas"]]


def named(name):
    if name.startswith("cpu["):
        return cpu(name[4:-1])
    return {backend.name: backend for backend in (HOST, EMULATED, CUDA)}[name]
