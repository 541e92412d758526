"""`pip install .`: finds the installed torch and runs CMake with Ninja. What is built stands in CMakeLists.txt.

Environment variables, none of them needed:
  NORMEXT_TORCH       folder of the torch package to compile against
  NORMEXT_CUDA        1: CUDA kernels or an error; 0: none. Default: whether there is an nvcc
  NORMEXT_CUDA_ARCHS  GPU architectures, for example "80 90" (TORCH_CUDA_ARCH_LIST, for example "8.0;9.0+PTX", is understood too)
  NORMEXT_CPU_ISAS    instruction sets to compile CPU kernels for beside the baseline; x86-64: "avx2 avx512", which is the default
  NORMEXT_EMULATOR    1: also build normext/_C_emulated, which runs the CUDA kernels on the CPU, for the tests
  NORMEXT_BUILD_DIR   where CMake works; kept between builds
  NORMEXT_CMAKE_ARGS  more arguments for CMake
  MAX_JOBS            compilers that run at the same time
"""

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
TORCH_OLDEST = (2, 10)
NVCC_OLDEST = (12, 8)  # the first that knows sm_100 and sm_120
ARCH_OLDEST = 80
GIB_PER_JOB = 1  # what one compiler may need [half of it at most; the emulator of the tests, which users do not build, 0.9]

NO_TORCH = """\
no torch found to compile against: run `pip install torch` first. If it is installed, the build cannot see it, as under uv, build \
and poetry: use --no-build-isolation (build: --no-isolation), or set NORMEXT_TORCH=<site-packages>/torch."""


def stop(sentence):
    sys.exit(f"\nnormext: {sentence}")


# ---- torch ------------------------------------------------------------------------------------------------------------------


def has_system_packages():
    """Whether this interpreter sees what is installed outside its virtual environment."""
    config = Path(sys.prefix, "pyvenv.cfg")
    return not config.exists() or "include-system-site-packages = true" in config.read_text().lower()


def torch_folders():
    """Where torch may be. Build isolation hides installed packages from `import`, but sysconfig still names their folder."""
    spec = find_spec("torch")
    if spec and spec.origin:
        yield Path(spec.origin).parent
    schemes = [{}]
    if has_system_packages():
        schemes.append({"base": sys.base_prefix, "platbase": sys.base_exec_prefix})
    for scheme in schemes:
        paths = sysconfig.get_paths(vars=scheme)
        yield Path(paths["purelib"], "torch")
        yield Path(paths["platlib"], "torch")
    if has_system_packages():
        yield Path(site.getusersitepackages(), "torch")


def torch_version(folder):
    """Read, not imported: importing torch takes seconds and can fail under build isolation."""
    text = (folder / "version.py").read_text()
    return re.search(r"__version__ = '([^']+)'", text)[1]


def find_torch():
    named = os.environ.get("NORMEXT_TORCH")
    folders = [Path(named)] if named else torch_folders()
    torch = next((folder for folder in folders if (folder / "version.py").is_file()), None)
    if torch is None:
        stop(f"NORMEXT_TORCH={named} is not the folder of a torch package." if named else NO_TORCH)
    version = torch_version(torch)
    if tuple(map(int, version.split(".")[:2])) < TORCH_OLDEST:
        stop(f"torch {version} in {torch} is too old: normext needs torch {TORCH_OLDEST[0]}.{TORCH_OLDEST[1]} or newer.")
    if not (torch / "include" / "torch" / "csrc" / "stable").is_dir():
        stop(f"torch {version} in {torch} has no C++ headers: install a complete torch (`pip install torch`).")
    print(f"normext: compiling against torch {version} in {torch}", flush=True)
    return torch.resolve()


# ---- CUDA -------------------------------------------------------------------------------------------------------------------


def find_nvcc():
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX"), *[f"{home}/bin/nvcc" for home in homes if home], "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def cuda_archs():
    """Empty: those of CMakeLists.txt. Torch's list may have GPUs that we do not serve; ours may not."""
    own, torchs = os.environ.get("NORMEXT_CUDA_ARCHS"), os.environ.get("TORCH_CUDA_ARCH_LIST")
    if own:
        archs = sorted(re.findall(r"\d+[af]?", own), key=lambda arch: int(arch.rstrip("af")))
        if archs and int(archs[0].rstrip("af")) < ARCH_OLDEST:
            stop(f"NORMEXT_CUDA_ARCHS={own}: normext needs sm_{ARCH_OLDEST} or newer.")
        return archs
    listed = sorted({major + minor for major, minor in re.findall(r"(\d+)\.(\d)", torchs or "")}, key=int)
    archs = [arch for arch in listed if int(arch) >= ARCH_OLDEST]
    if archs != listed:
        print(f"normext: TORCH_CUDA_ARCH_LIST={torchs}: only sm_{ARCH_OLDEST} and newer are served", flush=True)
    return archs


def cuda_options(jobs):
    wanted = os.environ.get("NORMEXT_CUDA")
    if wanted == "0":
        print("normext: CPU-only build (NORMEXT_CUDA=0)", flush=True)
        return ["-DNORMEXT_CUDA=OFF"]
    nvcc = find_nvcc()
    if nvcc is None:
        if wanted == "1":
            stop("NORMEXT_CUDA=1, but there is no nvcc: install the CUDA toolkit, or set CUDA_HOME to its folder.")
        print("normext: no nvcc found, so this is a CPU-only build; for CUDA install the toolkit or set CUDA_HOME", flush=True)
        return ["-DNORMEXT_CUDA=OFF"]
    release = re.search(r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    version = tuple(map(int, release.groups())) if release else (0, 0)
    if version < NVCC_OLDEST:
        oldest = "{}.{}".format(*NVCC_OLDEST)
        stop(
            f"{nvcc} is of CUDA {version[0]}.{version[1]}, which is too old: install CUDA {oldest} or newer and set CUDA_HOME to "
            "it, or set NORMEXT_CUDA=0 for a CPU-only build."
        )
    print(f"normext: CUDA build with {nvcc} {version[0]}.{version[1]}", flush=True)
    # As many architectures at a time as keep the cores busy when the last file is compiled alone.
    threads = min(jobs, max(2, jobs // 4))
    options = ["-DNORMEXT_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DNORMEXT_NVCC_THREADS={threads}"]
    archs = cuda_archs()
    options.append(f"-DNORMEXT_CUDA_ARCHS={';'.join(archs)}" if archs else "-UNORMEXT_CUDA_ARCHS")
    return options


# ---- CPU --------------------------------------------------------------------------------------------------------------------


def cpu_options():
    isas = os.environ.get("NORMEXT_CPU_ISAS")
    return ["-UNORMEXT_CPU_ISAS" if isas is None else f"-DNORMEXT_CPU_ISAS={';'.join(re.findall(r'[a-z0-9]+', isas))}"]


# ---- CMake ------------------------------------------------------------------------------------------------------------------


def jobs():
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    return max(1, min(len(os.sched_getaffinity(0)), memory // (GIB_PER_JOB << 30)))


def tool(name):
    """Beside this interpreter, which need not be activated, or in PATH."""
    path = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    if path is None:
        stop(f"{name} is missing: run `pip install cmake ninja pybind11 setuptools`, or build without --no-build-isolation.")
    return path


def check_compiler():
    named = os.environ.get("CXX")
    if not any(map(shutil.which, [shlex.split(named)[0]] if named else ["c++", "g++", "clang++"])):
        stop(f"no C++ compiler{f' {named}' if named else ''}: install g++ (Debian and Ubuntu: `apt install g++`), or set CXX.")


# What a failed build printed, and the sentence that says what to do about it.
DIAGNOSES = [
    (
        r"Killed signal|fatal error: Killed|died due to signal 9|signal terminated program|out of memory|virtual memory exhausted",
        "the compiler ran out of memory or was killed: set MAX_JOBS=1 and, for CUDA, fewer NORMEXT_CUDA_ARCHS.",
    ),
    (
        r"unsupported GNU version|unsupported clang version",
        "nvcc refuses this C++ compiler: name an older one, for example CUDAHOSTCXX=g++-13, or set NORMEXT_CUDA=0.",
    ),
    (
        r"Could NOT find Python",
        "the headers of this Python are missing: install them (Debian and Ubuntu: `apt install python3-dev`).",
    ),
    (r"No space left on device", "the disk is full."),
]


def diagnose(output, tool):
    known = (sentence for pattern, sentence in DIAGNOSES if re.search(pattern, output))
    return next(known, f"{tool} failed; its messages stand above (pip shows all of them with -v).")


def run(command):
    """Runs a command, shows its output as it comes, and ends with one sentence if it fails."""
    print(shlex.join(command), flush=True)
    output = []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line)
    if process.returncode:
        stop(diagnose("".join(output), "the build"))


class BuildNative(build_ext):
    def run(self):
        torch = find_torch()
        check_compiler()
        cmake, ninja = tool("cmake"), tool("ninja")
        import pybind11

        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = Path(os.environ.get("NORMEXT_BUILD_DIR") or ROOT / "build" / tag).resolve()
        count = jobs()
        configure = [
            *[cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), f"-DCMAKE_MAKE_PROGRAM={ninja}"],
            *[f"-DPython_EXECUTABLE={sys.executable}", f"-DNORMEXT_TORCH={torch}", f"-DNORMEXT_PYBIND11={pybind11.get_include()}"],
            f"-DNORMEXT_EMULATOR={os.environ.get('NORMEXT_EMULATOR', '0')}",
            *cpu_options(),
            *cuda_options(count),
            *shlex.split(os.environ.get("NORMEXT_CMAKE_ARGS", "")),
        ]
        run(configure)
        run([cmake, "--build", str(folder), "--parallel", str(count)])
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        if not self.inplace:  # what an earlier build with other options left behind must not get into a wheel
            for old in prefix.glob("normext/_C*.so"):
                old.unlink()
        # Names of local functions, 1.4 MB with CUDA, are for who works on the kernels: perf and the sanitizers read them.
        keep_names = self.inplace or "NORMEXT_SANITIZE" in os.environ.get("NORMEXT_CMAKE_ARGS", "")
        strip = [] if keep_names else ["--strip"]
        run([cmake, "--install", str(folder), "--prefix", str(prefix), "--component", "python", *strip])


class CheckedDistInfo(dist_info):
    """Looks for torch before pip resolves dependencies: otherwise it would download gigabytes before the build could complain."""

    def run(self):
        find_torch()
        super().run()


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("normext._C", sources=[])],
        cmdclass={"build_ext": BuildNative, "dist_info": CheckedDistInfo},
        install_requires=["torch>={}.{}".format(*TORCH_OLDEST)],
    )
