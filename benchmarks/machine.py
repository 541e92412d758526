"""What a result was measured on and with, and the files that keep results."""

import datetime
import importlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def import_normext():
    """The installed normext, else the one built in this checkout."""
    if importlib.util.find_spec("normext") is None:
        sys.path.append(str(ROOT))
    return importlib.import_module("normext")


def commit():
    """The checkout's commit, marked when a tracked file outside the results differs from it."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def cpu_name():
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def describe():
    """Everything about this machine and build that a reader of a result needs. Imports torch."""
    import torch

    normext = import_normext()
    info = normext._C.build_info()
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": info.get("cpu_isa"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "normext": normext.__version__,
    }


def stamp(command):
    """Provenance of one section of results."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"commit": commit(), "date": now.strftime("%Y-%m-%d %H:%M UTC"), "command": command}


def file_name(machine):
    """A file name made of the hardware's name, never the host's. Virtual machines give processors of several years one name."""
    name = machine.get("gpu") or f"{machine['cpu']} {machine['isa']} {machine['threads']} threads"
    words = re.sub(r"\((r|tm)\)|@.*ghz|\bprocessor\b|\bcpu\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def rounded(value):
    """Four significant digits: more would suggest a precision that no timing has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def save(path, results):
    """JSON with one record per line, so that a changed figure is a changed line."""

    def lines(value, depth):
        pad = "  " * depth
        if isinstance(value, dict) and depth < 3 and any(isinstance(item, (dict, list)) for item in value.values()):
            items = (f"{pad}  {json.dumps(key)}: {lines(item, depth + 1)}" for key, item in value.items())
            return "{\n" + ",\n".join(items) + "\n" + pad + "}"
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(f"{pad}  {json.dumps(item)}" for item in value) + "\n" + pad + "]"
        return json.dumps(value)

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(rounded(results), 0) + "\n")


def load(path):
    return json.loads(path.read_text()) if path.exists() else {}
