"""The C++ tests, and what the compiled objects must not contain. Both are read from the newest build folder."""

import os
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "tests" / "cpp").glob("test_*.cpp"))


def build_folders():
    """With a CMake cache, newest first. `make test` says which one it used."""
    if "NORMEXT_BUILD_DIR" in os.environ:
        return [ROOT / os.environ["NORMEXT_BUILD_DIR"]]
    caches = [ROOT / "build" / name / "CMakeCache.txt" for name in ("main", "develop")]
    return [cache.parent for cache in sorted((c for c in caches if c.exists()), key=os.path.getmtime, reverse=True)]


@pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
def test_cpp(source):
    binaries = [folder / source.stem for folder in build_folders() if (folder / source.stem).exists()]
    if not binaries:
        pytest.skip("not built: make develop")
    newest = max(binaries, key=os.path.getmtime)
    run = subprocess.run([newest], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}"


def isa_objects():
    return [path for folder in build_folders() for path in folder.rglob("isa_*.cpp.o")]


def test_no_code_is_shared_between_instruction_sets():
    """A weak function outside its ISA's namespace would be merged by the linker: AVX-512 code could then run on any machine."""
    objects = isa_objects()
    if not objects:
        pytest.skip("no build folder")
    for path in objects:
        isa = re.match(r"isa_(\w+)\.cpp", path.name).group(1)
        listing = subprocess.run(["nm", "--demangle", path], capture_output=True, text=True, check=True).stdout
        weak = [line[19:] for line in listing.splitlines() if re.match(r"[0-9a-f]{16} [WVu] ", line)]
        leaked = [symbol for symbol in weak if f"normext::{isa}::" not in symbol and not symbol.startswith("DW.ref.")]
        assert not leaked, (path, leaked)
