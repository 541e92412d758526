"""`make gpu-check`: everything that needs a GPU, on a machine that has one. Nothing is downloaded.

    make gpu-check                                     all steps, about an hour
    make gpu-check GPU_ARGS="--minutes 9"              as many as fit
    make gpu-check GPU_ARGS="--only build,graphs,suite"

Builds for the GPUs present, captures graphs, runs the whole suite, part of it under compute-sanitizer, and the
benchmarks. In the folder given ($OUT) are log.txt, summary.txt, up to date after every step, and the benchmarks' results.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A part of the suite that reaches every kernel tier at small sizes: a sanitizer slows kernels 10 to 100 times.
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
def capture(step):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured
def check(name, function, x, r, w):
    def step():
        outputs = flat(function(x, r, w))
        inputs = [t for t in (x, r, w) if t is not r or name.startswith("add")]
        return [*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), inputs)]
    graph, captured = capture(step)
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
# What servers capture: in place, and without gradients.
for cols in (64, 1000, 4096, 65536):
    x, r, w = leaf(64, cols), leaf(64, cols), leaf(cols)
    normed, total = x.clone(), r.clone()
    def step():
        normext.fused_add_rms_norm_(normed, total, w, 1e-6)
        return normext.layer_norm(x, w.shape, w, w), normext.rms_norm(x, w.shape, w)
    with torch.no_grad():
        graph, captured = capture(step)
        x.normal_(), normed.copy_(x), total.copy_(r)
        graph.replay()
        found = [t.clone() for t in (normed, total, *captured)]
        expected = [*normext.add_rms_norm(x, r, w.shape, w, 1e-6), *(f(x, r, w) for f in list(functions.values())[:2])]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), cols
    print("captured and replayed in place", cols)
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
    def __init__(self, out, minutes):
        self.out, self.rows = out, []
        self.end = time.monotonic() + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "log.txt").open("w")

    def run(self, name, command, limit=1800, **environment):
        """Runs one step; its output goes to the log, its outcome into the table. Returns whether it passed, and its output."""
        begin = time.monotonic()
        limit = min(limit, self.end - begin)
        if limit < 5:
            self.add(name, "no time left", 0.0, "")
            return False, ""
        print(f"{name} ...", flush=True)
        self.log.write(f"\n==== {name}: {' '.join(map(str, command))[:300]}\n")
        self.log.flush()
        start = self.log.tell()
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                **environment,
            },
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit:.0f} s"
            process.send_signal(signal.SIGINT)  # pytest reports what has failed so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
        with open(self.log.name, errors="replace") as written:
            written.seek(start)
            text = written.read()
        self.log.seek(0, os.SEEK_END)
        notes = re.findall(r"^=* ?(\d+ (?:passed|failed).*?) in [\d.]+", text, re.MULTILINE)[-1:]
        notes += re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)[-1:]
        state = "ok" if code == 0 else f"FAILED ({code})"
        if code != 0 and name.startswith("sanitizer") and "Device not supported" in text:
            state = "not supported here"  # compute-sanitizer in some virtual machines
        self.add(name, state, time.monotonic() - begin, "; ".join(notes))
        if state.startswith("FAILED"):
            print(text[-3000:], flush=True)
        return code == 0, text

    def add(self, name, state, seconds, note):
        self.rows.append((name, state, seconds, note))
        (self.out / "summary.txt").write_text(self.table() + "\n")

    def table(self):
        return "\n".join(f"{name:<24} {state:<24} {seconds:6.0f} s  {note}" for name, state, seconds, note in self.rows)


def present_archs():
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        sys.exit("gpu-check: nvidia-smi finds no GPU here")
    return " ".join(sorted({capability.replace(".", "") for capability in found}, key=int))


TESTS = [sys.executable, "-m", "pytest", "-q"]
FILES = [ROOT / "tests" / name for name in SANITIZED_TESTS]
# One ordinary process, which keeps the variables of its environment.
ALONE = {"NORMEXT_TEST_BACKEND": "cuda"}


def build(check):
    archs = present_archs()
    settings = {"NORMEXT_CUDA": "1", "NORMEXT_CUDA_ARCHS": archs, "NORMEXT_BUILD_DIR": "build/gpu"}
    built, _ = check.run(f"build for {archs}", [sys.executable, "setup.py", "build_ext", "--inplace"], **settings)
    if not built:
        print(check.table())
        sys.exit("gpu-check: nothing was built")
    print(check.run("python -m normext", [sys.executable, "-m", "normext"])[1])


def graphs(check):
    check.run("graph capture", [sys.executable, "-c", GRAPH])


def suite(check):
    check.run("suite on cuda", [*TESTS, "tests", "--backend", "cuda"])


def pdl(check):
    check.run("dependent launches", [*TESTS, *FILES], **ALONE, NORMEXT_PDL="1")


def sanitize(tool):
    def step(check):
        sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if sanitizer is None:
            return check.add(f"sanitizer {tool}", "no compute-sanitizer", 0.0, "")
        prefix = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--target-processes", "application-only"]
        # Without torch's caching allocator, which would hide accesses beyond a tensor.
        alone = {**ALONE, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return check.run(f"sanitizer {tool}", [*prefix, *TESTS, "--maxfail=20", *FILES], SANITIZERS[tool], **alone)

    return step


def benchmarks(check):
    remaining = max(5, min(480, check.end - time.monotonic() - 60))
    check.run("benchmarks", [sys.executable, "benchmarks/gpu.py", "--output", check.out, "--time-limit", f"{remaining:.0f}"])


# What decides most, soonest.
STEPS = {
    "build": build,
    "graphs": graphs,
    "suite": suite,
    "pdl": pdl,
    **{tool: sanitize(tool) for tool in SANITIZERS},
    "benchmarks": benchmarks,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("out"))
    parser.add_argument("--only", help=f"steps, in the order given, of {', '.join(STEPS)}")
    parser.add_argument("--minutes", type=float, default=120, help="for all steps together; what is running then is stopped")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else list(STEPS)
    if unknown := set(chosen) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    check = Check(args.out.resolve(), args.minutes)
    for step in chosen:
        STEPS[step](check)
    print("\n" + check.table())
    sys.exit(any(state.startswith(("FAILED", "no time left")) for _, state, _, _ in check.rows))


if __name__ == "__main__":
    main()
