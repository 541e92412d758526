"""Installing normext the ways people do, what the compiled module links to, and what a build that cannot work says.

One unoptimised CPU-only build of the source distribution, for the baseline instruction set, shared by all tests, keeps this
cheap: each installation from it compiles one file or none. Environments share the torch of this one through symbolic links.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.once, pytest.mark.slow]

CLEARED = ("NORMEXT_", "PYTHON", "VIRTUAL_ENV", "CXX", "MAKE", "MFLAGS", "TORCH_CUDA")
DOWNLOADS_TORCH = re.compile(r"(Downloading|Using cached) torch-|Downloading torch\b")


def environment(**more):
    """This process's environment without what configures a build or an interpreter. Without build isolation, cmake and ninja are
    those of this interpreter: an older ninja on the PATH would build everything again, since it cannot read the other's log."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(CLEARED)}
    plain["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), plain["PATH"]))
    cheap = {"NORMEXT_CUDA": "0", "NORMEXT_CPU_ISAS": "", "NORMEXT_CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=None"}
    return {**plain, **cheap, **more}


def run(*command, cwd=None, **variables):
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def succeeds(*command, **options):
    result = run(*command, **options)
    assert result.returncode == 0, result.stdout[-6000:]
    assert not DOWNLOADS_TORCH.search(result.stdout)
    return result.stdout


def refused(*command, **options):
    """What a command that must fail printed; no download of torch may have begun."""
    result = run(*command, **options)
    assert result.returncode != 0, result.stdout[-6000:]
    assert not DOWNLOADS_TORCH.search(result.stdout)
    return " ".join(result.stdout.split())


def link_packages(target):
    """Makes the packages of this environment those of another; normext and pip stay out."""
    import torch

    target.mkdir(parents=True, exist_ok=True)
    for entry in Path(torch.__file__).parents[1].iterdir():
        foreign = entry.name.startswith(("normext", "pip", "uv", "__editable__", "_virtualenv")) or entry.suffix == ".pth"
        if foreign or (target / entry.name).exists():
            continue
        if entry.suffix == ".dist-info":  # uv does not see linked ones
            shutil.copytree(entry, target / entry.name)
        else:
            (target / entry.name).symlink_to(entry)


def make_venv(folder, *options, torch=True):
    """A virtual environment's python."""
    succeeds(sys.executable, "-m", "venv", *options, folder)
    python = folder / "bin" / "python"
    packages = Path(succeeds(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    for bundled in packages.glob("setuptools*"):  # some Pythons bring an old one
        shutil.rmtree(bundled)
    if torch:
        link_packages(packages)
    return python


@dataclass
class Source:
    folder: Path  # the unpacked source distribution
    build: Path  # CMake's folder, warm after the first installation

    def pip(self, python, *arguments):
        return [python, "-m", "pip", "install", "--verbose", *arguments]

    def environment(self):
        return {"NORMEXT_BUILD_DIR": str(self.build)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """`python -m build --sdist`: it works in an environment without torch."""
    folder = tmp_path_factory.mktemp("packaging")
    succeeds(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    (archive,) = folder.glob("normext-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        assert not [name for name in names if name.endswith((".so", ".o"))]
        assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()} <= names
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return Source(unpacked, folder / "build")


def imports(python, folder):
    """The installed package runs, from a folder that holds no sources."""
    code = "import torch, normext; x = torch.randn(3, 64); print(normext.__file__, normext.layer_norm(x, (64,)).std().item() > 0.5)"
    file, works = succeeds(python, "-c", code, cwd=folder).split()
    assert works == "True"
    assert "CPU" in succeeds(python, "-m", "normext", cwd=folder)
    return Path(file)


CUDA_TENSOR = """
import torch, normext
class Claims(torch.Tensor):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(function)
x, w = (torch.Tensor._make_wrapper_subclass(Claims, size, dtype=torch.float32, device="cuda") for size in ((2, 8), (8,)))
torch.ops.normext.layer_norm.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), x, w, w, 1e-5)
"""


def test_venv_with_torch(source, tmp_path):
    python = make_venv(tmp_path / "venv")
    output = succeeds(*source.pip(python, source.folder), **source.environment())
    assert "CPU-only build" in output
    package = imports(python, tmp_path).parent
    assert (tmp_path / "venv") in package.parents
    (module,) = package.glob("_C.*.so")
    assert b".symtab" not in module.read_bytes()  # names of local functions, which only make the wheel larger
    # A tensor that claims to be on a GPU, asked on the dispatcher, since torch without CUDA makes none that is.
    assert "built without CUDA and got a CUDA tensor" in refused(python, "-c", CUDA_TENSOR, cwd=tmp_path)


def test_editable(source, tmp_path):
    python = make_venv(tmp_path / "venv")
    command = source.pip(python, "--no-build-isolation", "--editable", source.folder)
    succeeds(*command, **source.environment())
    assert imports(python, tmp_path).parent == source.folder / "normext"


def test_system_site_packages(source, tmp_path):
    """torch outside the virtual environment, which lets it in: here it is in the user's site-packages."""
    base = {"PYTHONUSERBASE": str(tmp_path / "user")}
    folder = succeeds(sys.executable, "-c", "import site; print(site.getusersitepackages())", **base).strip()
    link_packages(Path(folder))
    python = make_venv(tmp_path / "venv", "--system-site-packages", torch=False)
    succeeds(*source.pip(python, source.folder), **source.environment(), **base)
    succeeds(python, "-c", "import normext; print(normext.__version__)", cwd=tmp_path, **base)


def test_venv_without_torch(source, tmp_path):
    """One sentence that names both cures, before pip has looked for a torch to download."""
    python = make_venv(tmp_path / "venv", torch=False)
    for options in ([], ["--editable"]):
        output = refused(*source.pip(python, *options, source.folder), **source.environment())
        assert "run `pip install torch` first" in output
        assert "--no-build-isolation" in output


def test_uv(source, tmp_path):
    """uv builds in an environment of its own: it needs to be told of torch."""
    pytest.importorskip("uv")
    uv = [sys.executable, "-m", "uv", "--no-progress"]
    python = make_venv(tmp_path / "venv")
    install = [*uv, "pip", "install", "--verbose", "--no-cache", "--python", python, source.folder]
    assert "NORMEXT_TORCH=<site-packages>/torch" in refused(*install, **source.environment())
    import torch

    succeeds(*install, **source.environment(), NORMEXT_TORCH=str(Path(torch.__file__).parent))
    imports(python, tmp_path)


def test_cpp_package(source, tmp_path):
    """find_package(normext) gives a C++ program the CPU kernels, without torch or Python."""
    prefix, program = tmp_path / "prefix", tmp_path / "program"
    cmake, ninja = map(setup_functions()["tool"], ("cmake", "ninja"))
    configure = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=None"]
    # The folder remembers the torch and the interpreter of an earlier test's build, which may be gone.
    succeeds(cmake, "-S", source.folder, "-B", source.build, "-DNORMEXT_TORCH=", "-DNORMEXT_CPU_ISAS=", *configure)
    succeeds(cmake, "--build", source.build, "--target", "normext_kernels")
    succeeds(cmake, "--install", source.build, "--prefix", prefix, "--component", "cpp")
    program.mkdir()
    (program / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(user CXX)\nset(CMAKE_CXX_STANDARD 17)\nfind_package(normext 0.1 REQUIRED)\n"
        "add_executable(user user.cpp)\ntarget_link_libraries(user normext::kernels)\n"
    )
    (program / "user.cpp").write_text(
        '#include <cstdio>\n#include "cpu/isa.h"\nint main() { std::puts(normext::cpu::isa_name()); }\n'
    )
    succeeds(cmake, "-S", program, "-B", program / "build", *configure, f"-DCMAKE_PREFIX_PATH={prefix}")
    succeeds(cmake, "--build", program / "build")
    assert succeeds(program / "build" / "user").strip() in ("scalar", "neon")


# ---- Builds that cannot work -------------------------------------------------------------------------------------------------


def build_in(folder, **variables):
    """The sentence with which a build stops."""
    return refused(
        sys.executable, ROOT / "setup.py", "build_ext", "--build-lib", folder, NORMEXT_BUILD_DIR=str(folder), **variables
    )


def torch_folder(folder, version):
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    return str(folder / "torch")


def test_torch_too_old(tmp_path):
    output = build_in(tmp_path, NORMEXT_TORCH=torch_folder(tmp_path, "2.9.1+cu128"))
    assert "torch 2.9.1+cu128" in output
    assert "normext needs torch 2.10 or newer" in output


def test_torch_without_headers(tmp_path):
    assert "has no C++ headers" in build_in(tmp_path, NORMEXT_TORCH=torch_folder(tmp_path, "2.12.0"))


def test_named_torch_absent(tmp_path):
    assert f"NORMEXT_TORCH={tmp_path} is not the folder of a torch package" in build_in(tmp_path, NORMEXT_TORCH=str(tmp_path))


def test_no_compiler(tmp_path):
    assert "no C++ compiler g++-none: install g++" in build_in(tmp_path, CXX="g++-none")


def test_no_nvcc(monkeypatch, capsys):
    """A CPU-only build that says so, or the sentence if CUDA was demanded."""
    functions = setup_functions()
    monkeypatch.setitem(functions["cuda_options"].__globals__, "find_nvcc", lambda: None)
    monkeypatch.delenv("NORMEXT_CUDA", raising=False)
    assert functions["cuda_options"](2) == ["-DNORMEXT_CUDA=OFF"]
    assert "no nvcc found, so this is a CPU-only build" in capsys.readouterr().out
    monkeypatch.setenv("NORMEXT_CUDA", "1")
    with pytest.raises(SystemExit, match="NORMEXT_CUDA=1, but there is no nvcc"):
        functions["cuda_options"](2)


def test_nvcc_too_old(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    output = build_in(tmp_path, NORMEXT_CUDA="", CUDA_HOME=str(tmp_path))
    assert "is of CUDA 11.8, which is too old: install CUDA 12.8 or newer" in output
    assert "NORMEXT_CUDA=0" in output


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("g++: fatal error: Killed signal terminated program cc1plus\ncompilation terminated.", "MAX_JOBS=1"),
        ("nvcc error : 'ptxas' died due to signal 9 (Kill signal)", "MAX_JOBS=1"),
        ("cc1plus: out of memory allocating 65536 bytes after a total of 1234 bytes", "MAX_JOBS=1"),
        ("error: #error -- unsupported GNU version! gcc versions later than 15 are not supported!", "CUDAHOSTCXX"),
        ("CMake Error: Could NOT find Python (missing: Python_INCLUDE_DIRS Development.Module)", "python3-dev"),
        ("ld: final link failed: No space left on device", "the disk is full"),
        ("error: expected ';' before '}' token", "its messages stand above"),
    ],
)
def test_diagnosis_of_a_failed_build(printed, expected):
    assert expected in setup_functions()["diagnose"](printed, "the build")


def setup_functions():
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def test_jobs_are_bounded(monkeypatch):
    jobs = setup_functions()["jobs"]
    monkeypatch.setenv("MAX_JOBS", "3")
    assert jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= jobs() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 3 << 17, "SC_PAGE_SIZE": 4096}.get)  # 1.5 GiB
    assert jobs() == 1


def test_instruction_sets(monkeypatch):
    options = setup_functions()["cpu_options"]
    monkeypatch.delenv("NORMEXT_CPU_ISAS", raising=False)
    assert options() == ["-UNORMEXT_CPU_ISAS"]  # not what an earlier build in the same folder was told
    for given, expected in (("", ""), ("avx2", "avx2"), ("avx2, avx512", "avx2;avx512")):
        monkeypatch.setenv("NORMEXT_CPU_ISAS", given)
        assert options() == [f"-DNORMEXT_CPU_ISAS={expected}"]


def test_architectures(monkeypatch):
    archs = setup_functions()["cuda_archs"]
    monkeypatch.delenv("NORMEXT_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0 12.0+PTX")
    assert archs() == ["80", "90", "120"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "5.0 7.5 8.6 9.0+PTX")  # as in container images
    assert archs() == ["86", "90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    assert archs() == []
    monkeypatch.setenv("NORMEXT_CUDA_ARCHS", "90a, 80")
    assert archs() == ["80", "90a"]
    monkeypatch.setenv("NORMEXT_CUDA_ARCHS", "75 80")
    with pytest.raises(SystemExit, match="needs sm_80 or newer"):
        archs()


# ---- The module in use -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def module():
    from normext._library import C

    return C.__file__


@pytest.mark.parametrize(
    "capability, answer",
    [
        *(((8, 0), "machine code"), ((8, 9), "machine code"), ((10, 3), "machine code"), ((12, 1), "machine code")),
        *(((13, 0), "PTX"), ((7, 5), "not served"), ((11, 0), "not served")),
    ],
)
def test_what_serves_a_gpu(capability, answer):
    from normext.__main__ import served_by

    assert served_by(capability, [80, 90, 100, 120]).startswith(answer)


def test_links_to_torch_and_to_no_driver(module):
    """libtorch by name, without which the current CUDA stream is silently unknown; found through torch, never by a path of ours."""
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    dynamic = succeeds("readelf", "--dynamic", "--wide", module)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(needed)
    assert not [name for name in needed if name.startswith(("libcuda", "libcudart", "libnv", "libc10", "libtorch_python"))]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_exports_its_entry_only(module):
    """Hidden symbols cannot clash with those of other extensions, not even with ours for the emulator."""
    symbols = succeeds("nm", "--dynamic", "--defined-only", "--demangle", module)
    names = [line.split(maxsplit=2)[2] for line in symbols.splitlines()]
    assert [name for name in names if name.startswith("PyInit_")] == [f"PyInit_{Path(module).name.split('.')[0]}"]
    assert not [name for name in names if "normext" in name.split("(")[0] and not name.startswith("PyInit_")]


def test_import_leaves_cuda_alone():
    """Importing may be followed by fork: no CUDA context, no driver loaded by us."""
    code = "import normext, torch; print(torch.cuda.is_initialized()); print('libcuda.so' in open('/proc/self/maps').read())"
    initialised, driver_mapped = succeeds(sys.executable, "-c", code, cwd=ROOT).split()
    without = "import torch; print('libcuda.so' in open('/proc/self/maps').read())"
    assert initialised == "False"
    assert driver_mapped == succeeds(sys.executable, "-c", without).strip()
