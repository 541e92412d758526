"""`make gpu-check`: everything that needs a GPU, in one command on a machine that has one. Nothing is downloaded.

Builds for the GPUs present, runs the whole suite on them, captured graphs, compute-sanitizer where it is found, and the
benchmarks. Logs and results go to the folder given ($OUT); a short table comes last.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A part of the suite that reaches every kernel tier at small sizes: the sanitizer slows kernels 10 to 100 times.
SANITIZED_TESTS = ["tests/test_exact.py", "tests/test_layouts.py"]
SANITIZERS = {"memcheck": 600, "racecheck": 600, "synccheck": 300, "initcheck": 300}  # seconds at most

GRAPH = """
import torch, normext
functions = {
    "layer_norm": lambda x, r, w: normext.layer_norm(x, w.shape, w, w),
    "rms_norm": lambda x, r, w: normext.rms_norm(x, w.shape, w),
    "add_layer_norm": lambda x, r, w: normext.add_layer_norm(x, r, w.shape, w, w),
    "add_rms_norm": lambda x, r, w: normext.add_rms_norm(x, r, w.shape, w),
}
def flat(result):
    return result if isinstance(result, tuple) else (result,)
for name, function in functions.items():
    for cols in (64, 1000, 4096, 65536):
        x, r, w = (torch.randn(shape, device="cuda", requires_grad=True) for shape in ((64, cols), (64, cols), (cols,)))
        def step():
            outputs = flat(function(x, r, w))
            inputs = [t for t in (x, r, w) if t is not r or name.startswith("add")]
            return [*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), inputs)]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            x.normal_(), r.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True)), (name, cols)
        print("captured and replayed", name, cols)
"""


class Check:
    def __init__(self, out):
        self.out, self.rows = out, []
        out.mkdir(parents=True, exist_ok=True)

    def run(self, name, command, limit=1800, **environment):
        """Runs one step; its output goes to the terminal's log file, its outcome into the table."""
        begin, log = time.monotonic(), self.out / f"{name.replace(' ', '_')}.log"
        print(f"{name} ...", flush=True)
        with log.open("w") as file:
            try:
                code = subprocess.run(
                    list(map(str, command)),
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"stopped after {limit} s"
        text = log.read_text(errors="replace")
        counts = re.findall(r"^=* ?(\d+ (?:passed|failed).*?) in [\d.]+", text, re.MULTILINE) or re.findall(
            r"ERROR SUMMARY: .*", text
        )
        self.rows.append((name, "ok" if code == 0 else f"FAILED ({code})", time.monotonic() - begin, counts[-1] if counts else ""))
        return code == 0, text

    def finish(self):
        lines = [f"{name:<24} {state:<24} {seconds:6.0f} s  {note}" for name, state, seconds, note in self.rows]
        (self.out / "summary.txt").write_text("\n".join(lines) + "\n")
        print("\n" + "\n".join(lines))
        return all(state == "ok" for _, state, _, _ in self.rows)


def present_archs():
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        sys.exit("gpu-check: nvidia-smi finds no GPU here")
    return " ".join(sorted({capability.replace(".", "") for capability in found}, key=int))


def main():
    check = Check(Path(sys.argv[1] if len(sys.argv) > 1 else "out").resolve())
    archs = present_archs()
    build = {"NORMEXT_CUDA": "1", "NORMEXT_CUDA_ARCHS": archs, "NORMEXT_BUILD_DIR": "build/gpu"}
    built, log = check.run(f"build for {archs}", [sys.executable, "setup.py", "build_ext", "--inplace"], **build)
    if not built:
        print(log[-4000:])
        check.finish()
        sys.exit("gpu-check: the build failed")
    _, about = check.run("python -m normext", [sys.executable, "-m", "normext"])
    print(about)
    tests = [sys.executable, "-m", "pytest", "-q"]
    check.run("suite on cuda", [*tests, "tests", "--backend", "cuda"])
    check.run("graph capture", [sys.executable, "-c", GRAPH])
    if sanitizer := shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer"):
        for tool, limit in SANITIZERS.items():
            prefix = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--target-processes", "application-only"]
            # One ordinary process, without torch's caching allocator, which would hide accesses beyond a tensor.
            alone = {"NORMEXT_TEST_BACKEND": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            check.run(f"sanitizer {tool}", [*prefix, *tests, "-x", *SANITIZED_TESTS], limit, **alone)
    check.run("benchmarks", [sys.executable, "benchmarks/gpu.py", "--output", check.out])
    sys.exit(not check.finish())


if __name__ == "__main__":
    main()
