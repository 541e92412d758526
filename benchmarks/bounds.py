"""What our norms would reach if they left work out: `python benchmarks/bounds.py`, half an hour on two idle cores.

Builds the committed sources three times, as they are and with the changes of bounds_changes.py, runs the CPU grids with each, by
turns, and writes the speed-ups over torch eager into results/<machine>.json, from which report.py makes a table. The changed
builds give wrong results; they show how much there is to gain.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bounds_changes
import machine
import report
import run

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "bounds"
SOURCE, BUILD = FOLDER / "source", FOLDER / "build"
PASSES = {"no kernels": "train"}  # of the others forward, and training of the channel norms, whose aims count both
ROW_OPS = "layer_norm,rms_norm,add_rms_norm"  # those that have an aim


def export():
    """The committed tree. Files that are the same keep their time, so that nothing is compiled twice."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    shutil.rmtree(FOLDER / "fresh", ignore_errors=True)
    (FOLDER / "fresh").mkdir(parents=True)
    subprocess.run(["tar", "-x", "-C", FOLDER / "fresh"], input=archive, check=True)
    for path in (FOLDER / "fresh").rglob("*"):
        target = SOURCE / path.relative_to(FOLDER / "fresh")
        if path.is_file() and not (target.is_file() and target.read_bytes() == path.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    for path in SOURCE.rglob("*"):
        if path.is_file() and not (FOLDER / "fresh" / path.relative_to(SOURCE)).exists():
            path.unlink()


def configure(isa):
    import pybind11
    import torch

    options = {
        "NORMEXT_CPU_ISAS": isa.removesuffix("_bf16"),
        "NORMEXT_CUDA": "OFF",
        "NORMEXT_TORCH": Path(torch.__file__).parent,
        "NORMEXT_PYBIND11": pybind11.get_include(),
        "Python_EXECUTABLE": sys.executable,
    }
    arguments = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-G", "Ninja", "-S", SOURCE, "-B", BUILD, *arguments], check=True, stdout=subprocess.DEVNULL)


def package(name):
    """The folder from which that build is imported."""
    texts = bounds_changes.changed(SOURCE, bounds_changes.BUILDS[name])
    originals = {file: (SOURCE / file).read_text() for file in texts}
    try:
        for file, text in texts.items():
            (SOURCE / file).write_text(text)
        done = subprocess.run(["cmake", "--build", BUILD, "--target", "_C"], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stdout[-3000:])
    finally:
        for file, text in originals.items():
            (SOURCE / file).write_text(text)
    folder = FOLDER / "packages" / name.replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(SOURCE / "normext", folder / "normext", ignore=shutil.ignore_patterns("*.so"))
    for library in BUILD.glob("_C.*so"):
        shutil.copy(library, folder / "normext")
    return folder


def measure(name, folder, options):
    """Rows of both grids."""
    env = {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", "import normext; print(normext.__file__)"]
    imported = subprocess.run(command, cwd="/", env={**os.environ, **env}, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert imported.startswith(str(folder)), imported
    arguments = ["--no-compile", "--patience", str(options.patience)]
    of_rows = ["--ops", ROW_OPS, "--passes", PASSES.get(name, "forward")]
    of_channels = ["--passes", PASSES.get(name, "forward,train")]
    rows = [] if options.shapes else run.child("cpu.py", *arguments, *of_rows, env=env)[1:]
    of_channels += ["--shapes", options.shapes] if options.shapes else []
    return rows, run.child("channel_cpu.py", *arguments, *of_channels, env=env)[1:]


def cases(measured):
    """Rows of a grid, from (build, rows) of every run, as cases with figures of each build: ours, and as multiples of torch's."""
    found = {}
    for name, rows in measured:
        for row in rows:
            label = {key: row[key] for key in ("op", "pass", "dtype", "layout", "shape", "rows", "cols") if key in row}
            case = found.setdefault(json.dumps(label), {**label, "us": {}, "speedup": {}})
            case["us"].setdefault(name, []).append(row["us"]["normext"])
            case["speedup"].setdefault(name, []).append(row["speedup"]["eager"])
    return list(found.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patience", type=float, default=4, help="seconds per grid for repeating what other load disturbed")
    parser.add_argument("--shapes", help="of the channel grid alone, comma separated; writes no results")
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    described, start = machine.describe(), time.time()
    path = machine.RESULTS / f"{machine.file_name(described)}.json"
    results = machine.load(path) or {"machine": described, "sections": {}}
    stamp = machine.stamp("python benchmarks/bounds.py")
    export()
    configure(described["isa"])
    folders = {name: package(name) for name in bounds_changes.BUILDS}
    found = [(name, *measure(name, folder, options)) for _ in range(options.runs) for name, folder in folders.items()]
    section = {"runs": options.runs, "minutes": (time.time() - start) / 60, **stamp}
    section["row_cases"] = cases((name, rows) for name, rows, _ in found)
    section["channel_cases"] = cases((name, rows) for name, _, rows in found)
    if options.shapes:
        print(report.bounds(section))
        return
    results["sections"]["bounds"] = section
    machine.save(path, results)
    report.write(path)


if __name__ == "__main__":
    main()
