"""Runs the suite in one worker process per back end and reports it as one pytest run.

The controller (`python -m pytest tests`) collects nothing itself. It starts `pytest` with the same arguments once per back
end, NORMEXT_TEST_BACKEND telling the worker which one it is. Workers send their reports as JSON lines through a pipe, and the
controller hands them to its own terminal reporter: one list of failures, one summary line. When a worker dies, the test it
was running fails with the signal's name, and a new worker continues with the rest.

To debug one back end in one ordinary process:  NORMEXT_TEST_BACKEND='cpu[avx2]' python -m pytest tests -k ... --pdb
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict

import backends
import pytest

TIME_LIMIT = 900  # seconds that a test may take until its worker is taken for hung: a packaging test compiles for minutes
CUDA_TIME_LIMIT = 300  # there, nothing compiles for long but torch.compile


class Sender:
    """In a worker: tells the controller what happens."""

    def __init__(self, config, fd, skip):
        self.config = config
        self.pipe = os.fdopen(fd, "w", buffering=1)
        self.skip = set(skip)

    def send(self, kind, **content):
        self.pipe.write(json.dumps({"kind": kind, **content}, default=str) + "\n")

    def send_report(self, kind, report):
        self.send(kind, report=self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config):
        config.option.xmlpath = None  # written once, by the controller

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        self.send("collected", count=len(items))
        items[:] = [item for item in items if item.nodeid not in self.skip]

    def pytest_runtest_logstart(self, nodeid):
        self.send("start", nodeid=nodeid)

    def pytest_runtest_logreport(self, report):
        self.send_report("test", report)

    def pytest_collectreport(self, report):
        if report.failed:
            self.send_report("collect", report)


class Worker:
    """In the controller: one back end's process, restarted when it dies."""

    def __init__(self, backend, args, threads, messages):
        self.backend, self.args, self.threads, self.messages = backend, args, threads, messages
        self.done = []
        self.gateway, self.id = self, backend.name  # the terminal reporter takes us for a worker of pytest-xdist
        self.log = tempfile.TemporaryFile("w+")
        self.begin = time.monotonic()
        self.start()

    def start(self):
        read, write = os.pipe()
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as skip:
            json.dump(self.done, skip)
        self.skip_file = skip.name
        env = self.backend.environment(
            NORMEXT_TEST_BACKEND=self.backend.name,
            NORMEXT_TEST_PIPE=str(write),
            NORMEXT_TEST_SKIP=self.skip_file,
            OMP_NUM_THREADS=str(self.threads),
        )
        command = [sys.executable, "-m", "pytest", *self.args]
        self.process = subprocess.Popen(command, env=env, pass_fds=[write], stdout=self.log, stderr=subprocess.STDOUT)
        os.close(write)
        self.running, self.started = None, time.monotonic()
        threading.Thread(target=self.read, args=(read,), daemon=True).start()

    def read(self, fd):
        with os.fdopen(fd) as pipe:
            for line in pipe:
                self.messages.put((self, json.loads(line)))
        self.messages.put((self, None))

    def hung(self):
        limit = CUDA_TIME_LIMIT if self.backend.device == "cuda" else TIME_LIMIT
        return self.running is not None and time.monotonic() - self.started > limit

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGABRT)  # faulthandler prints where it was

    def close(self):
        self.process.wait()
        os.unlink(self.skip_file)
        return time.monotonic() - self.begin

    def tail(self, lines=60):
        self.log.seek(0)
        return "".join(self.log.readlines()[-lines:])


class Controller:
    def __init__(self, config, chosen):
        self.config, self.chosen = config, chosen
        self.collected, self.counts, self.seconds = {}, defaultdict(Counter), {}
        self.figures = defaultdict(dict)

    def pytest_report_header(self):
        return "back ends: " + ", ".join(backend.name for backend in self.chosen)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session):
        session.items = []
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        self.session = session
        cores = len(os.sched_getaffinity(0))
        jobs = int(os.environ.get("NORMEXT_TEST_JOBS", 0)) or min(cores, len(self.chosen))
        args = list(self.config.invocation_params.args)
        waiting, running, messages = list(self.chosen), [], queue.Queue()
        while waiting or running:
            stopping = session.shouldfail or session.shouldstop
            if stopping:
                waiting.clear()
            while waiting and len(running) < jobs:
                running.append(Worker(waiting.pop(0), args, max(1, cores // jobs), messages))
            for worker in running:
                if stopping or worker.hung():
                    worker.stop()
            try:
                worker, message = messages.get(timeout=1.0)
            except queue.Empty:
                continue
            if message:
                self.receive(worker, message)
            elif self.ended(worker, stopping):
                running.remove(worker)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        return True

    def receive(self, worker, message):
        kind = message["kind"]
        if kind == "collected":
            self.collected[worker.backend.name] = message["count"]
            self.session.testscollected = sum(self.collected.values())
        elif kind == "start":
            worker.running, worker.started = message["nodeid"], time.monotonic()
        else:
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=message["report"])
            if isinstance(report.longrepr, list):  # where and why a test was skipped: a tuple, until it went through JSON
                report.longrepr = tuple(report.longrepr)
            self.publish(worker, report, kind)

    def publish(self, worker, report, kind="test"):
        if kind == "collect":
            self.session.testsfailed += 1
            self.config.hook.pytest_collectreport(report=report)
            return
        if report.when == "call" or not report.passed:
            self.counts[worker.backend.name][report.outcome] += 1
        for name, value in report.user_properties:
            if name.startswith("figure "):
                best = self.figures[name[7:]]
                best[worker.backend.name] = max(best.get(worker.backend.name, 0.0), float(value))
        if report.when == "teardown":
            worker.done.append(report.nodeid)
            worker.running = None
        report.node = worker  # asks the terminal for a line that can stand between those of other workers
        self.config.hook.pytest_runtest_logreport(report=report)
        del report.node

    def ended(self, worker, stopping):
        """The pipe is closed. True if the worker is finished with, False if another process continues its work."""
        self.seconds[worker.backend.name] = worker.close()
        code = worker.process.returncode
        fine = {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED}
        if any("::" in argument for argument in worker.args):
            fine.add(pytest.ExitCode.USAGE_ERROR)  # the id of a test that exists on another back end only
        if stopping or (code in fine and worker.running is None):
            return True
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        nodeid = worker.running or f"tests::worker[{worker.backend.name}]"
        text = f"The worker of {worker.backend.name} died ({cause}) while running {nodeid}.\n{worker.tail()}"
        self.publish(worker, failure(nodeid, text))
        if worker.running is None:
            return True
        worker.done.append(worker.running)
        worker.start()
        return False

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        terminalreporter.section("back ends")
        for name, count in self.counts.items():
            parts = ", ".join(f"{count[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if count[outcome])
            write(f"{name:<18} {self.seconds.get(name, 0.0):6.0f} s   {parts}")
        if self.figures:
            columns = sorted({column for row in self.figures.values() for column in row})
            terminalreporter.section("largest error, in units of the accuracy contract (limit 4)")
            write(" " * 34 + "".join(f"{column:>18}" for column in columns))
            for name, row in sorted(self.figures.items()):
                cells = "".join(f"{row[column]:15.3g}" if column in row else " " * 15 for column in columns)
                write(f"{name:<34}{cells}")


def failure(nodeid, text):
    location = (nodeid.split("::")[0], 0, nodeid.split("::")[-1])
    return pytest.TestReport(nodeid, location, {}, "failed", text, "call", [], 0.0)


def _means(word, backend, found):
    """A back end's name, or part of the names of several."""
    return word == backend.name if any(word == other.name for other in found) else word in backend.name


def install(config):
    """Called by conftest.py: makes this process a controller, a reporting worker or, for debugging, neither."""
    name = os.environ.get("NORMEXT_TEST_BACKEND")
    if name is None:
        if config.option.collectonly:
            return backends.HOST
        wanted = config.getoption("--backend")
        found = backends.available()
        chosen = [backend for backend in found if not wanted or any(_means(word, backend, found) for word in wanted.split(","))]
        if not chosen:
            raise pytest.UsageError(f"--backend {wanted}: this machine has {', '.join(b.name for b in found)}")
        config.pluginmanager.register(Controller(config, chosen), "normext-controller")
        return None
    if "NORMEXT_TEST_PIPE" in os.environ:
        with open(os.environ["NORMEXT_TEST_SKIP"]) as file:
            skip = json.load(file)
        sender = Sender(config, int(os.environ.pop("NORMEXT_TEST_PIPE")), skip)
        config.pluginmanager.register(sender, "normext-sender")
    backend = backends.named(name)
    if "normext" in sys.modules:
        raise pytest.UsageError(f"normext was imported before {name} was chosen")
    os.environ.update(backend.env)  # a worker has them already, the one process of a debugger not
    return backend
