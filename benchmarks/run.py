"""Runs the suite and writes benchmarks/results/<machine>.json, from which `report.py` makes every published figure.

    python benchmarks/run.py                      everything: about 30 minutes on two idle cores
    python benchmarks/run.py --quick              a look at each part: about 3 minutes, written to no results file
    python benchmarks/run.py --sections overhead  one part again; the others keep the figures they had

Each part runs in processes of its own, three times (`--runs`): a case counts as slower only if it is in every run. For
figures to publish the machine must be otherwise idle; the harness notes what it saw and repeats what was disturbed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import machine

HERE = Path(__file__).resolve().parent
# Memory is never given back to the system, so outputs land in pages already mapped. glibc reads these at start.
WARM_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
SECTIONS = ("cpu_fresh", "cpu_warm", "channel", "overhead", "accuracy", "fold", "sync")


def child(script, *arguments, env=None):
    """Runs one script; its JSON lines, errors and progress passed through."""
    command = [sys.executable, str(HERE / script), *arguments]
    inherited = {name: value for name, value in os.environ.items() if name not in WARM_ENVIRONMENT}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**inherited, **(env or {})})
    rows = []
    for line in process.stdout:
        rows.append(json.loads(line))
        if sys.stderr.isatty():
            print(f"\r{script} {' '.join(arguments)}: {len(rows)} results", end="", file=sys.stderr)
    if process.wait() != 0:
        raise SystemExit(f"{script} failed with status {process.returncode}")
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return rows


def merged(runs, key):
    """Rows of several runs as one list: figures of a case become {name: [one per run]}."""
    cases = {}
    for rows in runs:
        for row in rows:
            label = {name: row[name] for name in key}
            case = cases.setdefault(tuple(label.values()), label)
            for name, value in row.items():
                if name in key:
                    continue
                if isinstance(value, dict):
                    for inner, figure in value.items():
                        case.setdefault(name, {}).setdefault(inner, []).append(figure)
                else:
                    case.setdefault(name, []).append(value)
    return list(cases.values())


def cpu_section(regime, options):
    env = WARM_ENVIRONMENT if regime == "warm" else {}
    # Warm pages are for comparing kernels with a copy: forward, without torch.compile.
    arguments = [*options.common, *(["--passes", "forward", "--no-compile"] if regime == "warm" else options.compile)]
    runs = [child("cpu.py", *arguments, env=env) for _ in range(options.runs)]
    cases = merged([rows[1:] for rows in runs], ("op", "pass", "dtype", "rows", "cols"))
    return {"page_faults_per_mb": runs[0][0]["page_faults_per_mb"], "cases": cases}, runs[0][0]["machine"]


def channel_section(options):
    runs = [child("channel_cpu.py", *options.common, *options.compile) for _ in range(options.runs)]
    cases = merged([rows[1:] for rows in runs], ("op", "pass", "dtype", "layout", "shape"))
    return {"page_faults_per_mb": runs[0][0]["page_faults_per_mb"], "cases": cases}, runs[0][0]["machine"]


def overhead_section(options):
    runs = [child("overhead.py", *options.common, *options.compile) for _ in range(options.runs)]
    return {"cases": merged([rows[1:] for rows in runs], ("kind", "what"))}, runs[0][0]["machine"]


def accuracy_section(options):
    rows = []
    quick = ["--quick"] if options.quick else []
    listed = child("accuracy.py")[0]
    for backend in [*listed, {"name": "torch", "env": {}}]:
        rows += child("accuracy.py", "--backend", backend["name"], *quick, env=backend["env"])
    return {"cases": rows, "runs": 1}, None


def fold_section(options):
    runs = [child("fold.py", *options.common) for _ in range(options.runs)]
    return {"cases": merged([rows[1:] for rows in runs], ("model",))}, runs[0][0]["machine"]


def sync_section(options):
    """What sync_batch_norm.py prints; it judges its figures itself."""
    command = [sys.executable, str(HERE / "sync_batch_norm.py"), *(["--quick"] if options.quick else [])]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(f"{process.stdout}\n{' '.join(command)} failed")
    return {"runs": 1, "printed": process.stdout.splitlines()}, None


def section(name, options):
    if name.startswith("cpu_"):
        return cpu_section(name.removeprefix("cpu_"), options)
    of_name = {"channel": channel_section, "overhead": overhead_section, "accuracy": accuracy_section, "fold": fold_section}
    return {**of_name, "sync": sync_section}[name](options)


def describe(threads):
    """This machine, where only sections ran that do not tell."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    return machine.describe()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--runs", type=int, help="default 3, with --quick 1")
    parser.add_argument("--threads", type=int, help="of torch's pool; default: torch's own choice")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (no C++ compiler)")
    parser.add_argument("--patience", type=float, default=60, help="seconds per run for repeating what other load disturbed")
    parser.add_argument("--machine", help="name of the results file, without .json; default: the CPU's")
    parser.add_argument("--output", type=Path, help="folder of the results file; default benchmarks/results")
    options = parser.parse_args()
    options.runs = options.runs or (1 if options.quick else 3)
    options.common = (["--quick"] if options.quick else []) + ["--patience", str(options.patience)]
    options.common += ["--threads", str(options.threads)] if options.threads else []
    options.compile = ["--no-compile"] if options.no_compile else []

    sections, described, command = {}, None, "python benchmarks/run.py " + " ".join(sys.argv[1:])
    for name in options.sections.split(","):
        start = time.time()
        sections[name], seen = section(name, options)
        about = {"runs": options.runs, "minutes": (time.time() - start) / 60} | machine.stamp(command.strip())
        sections[name] = about | sections[name]
        described = described or seen
        print(f"{name}: {sections[name]['minutes']:.1f} minutes", file=sys.stderr)

    import report

    if options.quick and not options.output:
        print(report.render({"machine": described or describe(options.threads), "sections": sections}))
        return
    described = described or describe(options.threads)
    path = (options.output or machine.RESULTS) / f"{options.machine or machine.file_name(described)}.json"
    results = {"machine": described, "sections": {**machine.load(path).get("sections", {}), **sections}}
    machine.save(path, results)
    report.write(path)
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}; tables and plot beside it")


if __name__ == "__main__":
    main()
