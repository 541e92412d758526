"""Plants bugs that norms really had (one at a time, in a copy of the tree) and checks that the suite notices:  make mutants

Each mutant is a textual replacement in one file, the back ends it needs and the tests that must fail. A mutant that nothing
notices has survived; the program then exits with 1. Words on the command line select mutants by name. The copy is compiled
with -O1, incrementally: only what a mutant touches, only the library its tests load, AVX-512 only if a mutant needs it (tests of
Python code then run there rather than on AVX2).
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import backends
import planted
import planted_channel

MUTANTS = planted.MUTANTS + planted_channel.MUTANTS
ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "mutants"
BUILD = COPY / "build"
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]


def sync():
    """The working tree as git sees it, unchanged files keeping their time stamps so that nothing is compiled twice."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, COPY / name
        if not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != source.read_bytes():
            shutil.copy(source, target)


def configure(isas):
    import pybind11
    import torch

    options = {
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_FLAGS": "-O1",
        "NORMEXT_CPU_ISAS": ";".join(isas),
        "NORMEXT_EMULATOR": "ON",
        "NORMEXT_TORCH": Path(torch.__file__).parent,
        "NORMEXT_PYBIND11": pybind11.get_include(),
        "Python_EXECUTABLE": sys.executable,
    }
    arguments = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-G", "Ninja", "-S", COPY, "-B", BUILD, *arguments], check=True, stdout=subprocess.DEVNULL)


def compile_for(names):
    """Builds the libraries the back ends load. Returns what the compiler said if it refused."""
    targets = ["_C_emulated"] if "emulated" in names else ["_C"]
    run = subprocess.run(["cmake", "--build", BUILD, "--target", *targets], capture_output=True, text=True)
    if run.returncode:
        return run.stdout[-3000:]
    install({library.name: library.read_bytes() for library in BUILD.glob("_C*.so")})
    return None


def install(libraries):
    for name, content in libraries.items():
        (COPY / "normext" / name).unlink(missing_ok=True)  # never written over: a process may still have it mapped
        (COPY / "normext" / name).write_bytes(content)


def failing_test(names, tests):
    """The first test that fails, or None."""
    environment = {**os.environ, "PYTHONPATH": str(COPY)}
    command = [*PYTEST, "--backend", names, *tests]
    run = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True)
    failed = re.search(r"^FAILED (.*?)(?: - .*)?$", run.stdout, re.MULTILINE)
    if run.returncode not in (0, 1) or (run.returncode == 1 and not failed):
        raise SystemExit(f"the tests did not run:\n{run.stdout[-3000:]}{run.stderr[-2000:]}")
    return failed.group(1) if failed else None


def plant(mutant):
    """Changes the file. Returns its original text."""
    path = COPY / mutant.file
    original = path.read_text()
    assert original.count(mutant.find) >= 1, f"{mutant.name}: {mutant.file} no longer contains\n{mutant.find}"
    path.write_text(original.replace(mutant.find, mutant.replace))
    return original


def main(words):
    names = [backend.name for backend in backends.available()]
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    for mutant in [m for m in chosen if not any(m.backends in name for name in names)]:
        print(f"this machine has no {mutant.backends}: {mutant.name}", flush=True)
        chosen.remove(mutant)
    sync()
    configure(["avx2", "avx512"] if any("avx512" in m.backends for m in chosen) else ["avx2"])
    for kind in ("avx2", "emulated"):
        refused = compile_for(kind)
        assert refused is None, refused
    pristine = {library.name: library.read_bytes() for library in BUILD.glob("_C*.so")}
    outcomes = []
    for mutant in chosen:
        begin = time.monotonic()
        native = mutant.file.startswith("csrc/")
        original = plant(mutant)
        try:
            refused = compile_for(mutant.backends) if native else None
            if refused is not None:
                raise SystemExit(f"{mutant.name} does not compile:\n{refused}")
            failure = failing_test(mutant.backends, mutant.tests)
        finally:
            (COPY / mutant.file).write_text(original)
        install(pristine)
        if failure:  # which counts only if that test passes without the mutant
            assert failing_test(mutant.backends, [failure]) is None, f"{failure} fails without any mutant"
        outcomes.append((mutant, failure is None))
        verdict = "killed" if failure else "SURVIVED"
        shown = failure.split("::")[-1] if failure else ""
        print(f"{verdict:<9} {time.monotonic() - begin:5.0f} s  {mutant.name:<52} {shown}", flush=True)
    survivors = [mutant.name for mutant, survived in outcomes if survived]
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
