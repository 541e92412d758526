"""What nobody notices in time: benchmarks that a GPU machine would be the first to run, and a README that shows other figures."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.once
def test_every_path_of_the_gpu_benchmarks_but_the_device():
    done = run("benchmarks/gpu.py", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    for op in ("layer_norm", "add_rms_norm", "batch_norm_add_relu", "group_norm_silu", "instance_norm"):
        assert f"\n{op} " in done.stdout


@pytest.mark.once
def test_readme_shows_the_committed_results():
    done = run("benchmarks/report.py", "--readme", "README.md", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.once
def test_what_bounds_leave_out_is_there(monkeypatch):
    """bounds.py replaces text; what it replaces must still be in the sources, once."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from bounds_changes import BUILDS, changed

    for changes in BUILDS.values():
        assert changed(ROOT, changes).keys() == {change.file for change in changes}
