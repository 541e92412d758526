"""What needs a process of its own, or threads: fuzzing, fork, concurrency, leaks, and which library gets loaded."""

import os
import subprocess
import sys
import threading

import cases
import pytest
import torch

import normext

HERE = os.path.dirname(__file__)


def child(backend, *command, timeout=280, **env):
    """Runs Python on this back end and returns what it printed; a signal or a failure is an error here."""
    run = subprocess.run(
        [sys.executable, *command], env=backend.environment(**env), capture_output=True, text=True, timeout=timeout, cwd=HERE
    )
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}"
    return run.stdout


@pytest.mark.parametrize("mode", ["public", "raw"])
def test_fuzz(mode, backend, request):
    for seed in range(request.config.getoption("--seeds")):
        child(backend, "fuzz.py", mode, str(seed), backend.device)


FORK = """
import os
os.environ["NORMEXT_POISON"] = "0"  # torch fills tensors in its pool, which the child no longer has
import torch, normext
x = torch.randn(2000, 513)
expected = normext.layer_norm(x, (513,))
torch.set_num_threads(2)
again = normext.layer_norm(x, (513,))
pid = os.fork()
if pid == 0:
    with_two_threads = normext.layer_norm(x, (513,))
    torch.set_num_threads(1)
    leaf = x.clone().requires_grad_()
    y = normext.layer_norm(leaf, (513,))
    y.sum().backward()
    same = y.detach().equal(expected) and with_two_threads.equal(expected) and leaf.grad.isfinite().all()
    os._exit(0 if same else 3)
assert os.waitpid(pid, 0)[1] == 0, "the child failed"
assert normext.layer_norm(x, (513,)).equal(expected) and again.equal(expected)
"""


def test_fork_after_use(backend):
    """Data loaders fork: the child of a process that has used normext computes, and so does its parent afterwards. For
    torch's own sums the child then sets one thread, as torch's data loader does: libgomp's pool does not survive fork."""
    if backend.device == "cuda":
        pytest.skip("CUDA itself does not survive fork")
    child(backend, "-c", FORK, timeout=60)


FORK_BEFORE_USE = """
import os
os.environ["NORMEXT_POISON"] = "0"
import torch, normext
x = torch.randn(2000, 513)
torch.set_num_threads(2)
(x * x).sum()  # wakes torch's pool
if os.fork() == 0:
    y = normext.layer_norm(x, (513,))
    torch.set_num_threads(1)  # for torch's own functions
    os._exit(0 if y.isfinite().all() else 3)
assert os.wait()[1] == 0, "the child failed"
"""


def test_fork_before_use(backend):
    """The child of a process that has only imported normext, and used torch's threads, computes, too."""
    if backend.device == "cuda":
        pytest.skip("CUDA itself does not survive fork")
    child(backend, "-c", FORK_BEFORE_USE, timeout=60)


@pytest.mark.python
def test_import_touches_no_cuda(backend):
    """Importing must not initialise CUDA: it would poison every later fork."""
    child(backend, "-c", "import torch, normext; assert not torch.cuda.is_initialized()")


def test_two_libraries_in_one_process_are_refused_in_a_sentence(backend):
    """Both define the namespace `normext`, and loading the second would abort."""
    if not backend.emulated:
        pytest.skip("needs both libraries")
    script = "import sys, types, torch\nsys.modules['normext._C'] = types.ModuleType('normext._C')\nimport normext"
    run = subprocess.run([sys.executable, "-c", script], env=backend.environment(), capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("ImportError: ") and "one process" in run.stderr.splitlines()[-1]


@pytest.mark.python
def test_unknown_isa_is_refused_with_the_list(backend):
    run = subprocess.run(
        [sys.executable, "-c", "import torch, normext; normext.layer_norm(torch.randn(2, 8), (8,))"],
        env={**os.environ, "NORMEXT_CPU_ISA": "mmx"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1  # an exception, not a signal
    assert "mmx" in run.stderr and "scalar" in run.stderr


def test_forced_isa_is_the_one_that_runs(backend):
    if not backend.name.startswith("cpu["):
        pytest.skip("CPU only")
    from normext import _C

    assert f"cpu[{_C.build_info()['cpu_isa']}]" == backend.name


def test_concurrent_calls(backend):
    """Eight Python threads, different shapes, forward and backward: the results of one thread alone."""
    work = [cases.Case(op, rows=37, cols=cols) for op in cases.OPS for cols in (40, 333)]
    problems = [(case, cases.make(case, backend)) for case in work]
    expected = [(case.call(t), cases.gradients(case, t)) for case, t in problems]
    wrong = []

    def run(index):
        case, t = problems[index]
        for _ in range(3 if backend.emulated else 30):
            outputs, grads = case.call(t), cases.gradients(case, t)
            same = [a.equal(b) for a, b in zip((*outputs, *grads), (*expected[index][0], *expected[index][1]), strict=True)]
            if not all(same):
                wrong.append(case.id)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


LEAK = """
import sys, torch
sys.path.insert(0, {here!r})
import normext, raw_ops
from test_process import resident
table = {{name: calls for name, calls in raw_ops.arguments(rows=2, cols=8).items() if calls and "export" not in name}}

def once(count):
    for name, calls in table.items():
        op = raw_ops.op(name)
        for args in calls[:2]:
            for _ in range(count):
                op(*args)
    x = torch.randn(2, 8, requires_grad=True)
    for _ in range(count):
        normext.layer_norm(x, (8,)).sum().backward()
        try:
            normext.layer_norm(x, (7,))
        except RuntimeError:
            pass

once({warm})
before = resident()
once({count})
print(resident() - before)
"""


def test_ops_do_not_leak(backend):
    """Resident memory after 100 000 calls (the emulator: 4 000), errors and backward passes included."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer keeps what was freed for a while")
    warm, count = (40, 150) if backend.emulated else (500, 4000)
    grown = int(child(backend, "-c", LEAK.format(here=HERE, warm=warm, count=count)))
    assert grown < 2 << 20, f"{grown} bytes"


def test_gil_is_released_or_not_but_never_deadlocks(backend):
    """Backward runs on autograd's own thread while Python threads call forward."""
    x = torch.randn(64, 64, requires_grad=True, device=backend.device)
    stop = threading.Event()

    def forward():
        while not stop.is_set():
            normext.rms_norm(x.detach(), (64,))

    thread = threading.Thread(target=forward)
    thread.start()
    for _ in range(20):
        normext.layer_norm(x, (64,)).sum().backward()
    stop.set()
    thread.join(timeout=30)
    assert not thread.is_alive()


@pytest.mark.once
def test_skips_are_reported_with_their_reason():
    """By the controller, to which a worker's reports come as JSON."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("NORMEXT_TEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--backend", "scalar"]
    select = ["test_channel_exact.py", "-k", "two_values and instance_norm and contiguous"]
    run = subprocess.run([*command, *select], env=env, capture_output=True, text=True, timeout=280, cwd=HERE)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "no such slab" in run.stdout
