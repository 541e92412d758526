"""Fixtures, and the split into one worker process per back end (see workers.py)."""

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))

import workers

BACKEND = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--backend", help="run only back ends whose name contains one of these comma-separated words")
    parser.addoption("--seeds", type=int, default=1, help="how many seeds the fuzz tests try")


def pytest_configure(config):
    config.addinivalue_line("markers", "once: does not depend on the back end; runs in one worker only")
    config.addinivalue_line("markers", "python: exercises Python code only: runs on the default ISA and the CUDA back ends")
    config.stash[BACKEND] = workers.install(config)


# avx512_bf16 is avx512 with another conversion: where both are there, avx512 runs the tests of values that show it, unless it was
# asked for by --backend.
CONVERSION_TESTS = ("test_exact.py", "test_layouts.py", "test_channel_exact.py", "test_channel_layouts.py", "test_invariance.py")


def runs_on(item, backend):
    alike = backend.name == "cpu[avx512]" and default_cpu() != backend.name and item.config.option.backend is None
    if alike and item.path.name not in CONVERSION_TESTS:
        return False
    if item.get_closest_marker("once"):
        return backend.name == "host"
    if item.get_closest_marker("python"):
        return backend.runs_cuda_code or backend.name == default_cpu()
    return backend.name != "host"


def default_cpu():
    from normext import _C

    return f"cpu[{_C.build_info()['cpu_isas'][-1]}]"


def pytest_collection_modifyitems(config, items):
    backend = config.stash[BACKEND]
    if config.option.collectonly:
        return
    kept = [item for item in items if runs_on(item, backend)]
    config.hook.pytest_deselected(items=[item for item in items if not runs_on(item, backend)])
    items[:] = kept


def pytest_generate_tests(metafunc):
    """Puts the back end's name first in every test id."""
    metafunc.fixturenames.append("backend")
    backend = metafunc.config.stash[BACKEND]
    metafunc.parametrize("backend", [backend], ids=[backend.name], scope="session")


@pytest.fixture
def device(backend):
    return backend.device


@pytest.fixture(autouse=True)
def fixed_state(request, device):
    """Every test starts from the same seed and thread count, and leaves them so. A test that breaks the GPU's context ends the
    process, as a crash does: the next worker starts with another."""
    import torch

    threads = torch.get_num_threads()
    torch.manual_seed(20240131)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                print(error, file=sys.stderr, flush=True)
            if "NORMEXT_TEST_SKIP" in os.environ:
                os._exit(70)
            pytest.exit(f"the GPU's context is broken: {error}", returncode=70)
