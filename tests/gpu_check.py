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
SANITIZED_TESTS = ["test_exact.py", "test_layouts.py", "test_channel_exact.py", "test_channel_layouts.py"]
SANITIZERS = {"memcheck": 600, "racecheck": 600, "synccheck": 300, "initcheck": 300}  # seconds at most

GRAPH = """
import torch, normext
functions = {
    "layer_norm": lambda x, r, w: normext.layer_norm(x, w.shape, w, w),
    "rms_norm": lambda x, r, w: normext.rms_norm(x, w.shape, w),
    "add_layer_norm": lambda x, r, w: normext.add_layer_norm(x, r, w.shape, w, w),
    "add_rms_norm": lambda x, r, w: normext.add_rms_norm(x, r, w.shape, w),
}
channel_functions = {
    "batch_norm": lambda x, r, w: normext.batch_norm(x, None, None, w, w, True),
    "add_batch_norm": lambda x, r, w: normext.batch_norm(x, None, None, w, w, True, residual=r, activation="relu"),
    "group_norm": lambda x, r, w: normext.group_norm(x, 8, w, w, activation="silu"),
    "instance_norm": lambda x, r, w: normext.instance_norm(x, None, None, w, w),
}
def flat(result):
    return result if isinstance(result, tuple) else (result,)
def check(name, function, x, r, w):
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
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True)), (name, x.shape)
    print("captured and replayed", name, list(x.shape))
def leaf(*shape):
    return torch.randn(shape, device="cuda")
for name, function in functions.items():
    for cols in (64, 1000, 4096, 65536):
        check(name, function, *(t.requires_grad_() for t in (leaf(64, cols), leaf(64, cols), leaf(cols))))
for name, function in channel_functions.items():
    for shape in ((8, 64, 7, 7), (2, 64, 56, 56), (1, 64, 512, 512)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x, r = (leaf(*shape).to(memory_format=layout).requires_grad_() for _ in range(2))
            check(name, function, x, r, leaf(64).requires_grad_())
# The momentum of a cumulative average is computed where the count lies, so replays must go on counting.
norm = normext.BatchNorm2d(64, momentum=None, device="cuda")
eager = normext.BatchNorm2d(64, momentum=None, device="cuda")
x = leaf(8, 64, 7, 7)
graph = torch.cuda.CUDAGraph()
norm(x), eager(x)
with torch.cuda.graph(graph):
    norm(x)
for _ in range(3):
    x.normal_()
    graph.replay()
    eager(x)
assert torch.equal(norm.running_mean, eager.running_mean) and torch.equal(norm.running_var, eager.running_var)
print("running statistics of replays are those of calls")
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
            files = [ROOT / "tests" / name for name in SANITIZED_TESTS]
            check.run(f"sanitizer {tool}", [*prefix, *tests, "-x", *files], limit, **alone)
    check.run("benchmarks", [sys.executable, "benchmarks/gpu.py", "--output", check.out])
    sys.exit(not check.finish())


if __name__ == "__main__":
    main()
