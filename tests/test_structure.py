"""The rules of the house that a machine can check: what may be included, named and written where."""

import ast
import re
from pathlib import Path

import planted
import planted_channel
import pytest

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
NATIVE = sorted(path for suffix in ("h", "cuh", "cu", "inl", "cpp") for path in CSRC.rglob(f"*.{suffix}"))
SIMT = sorted(path for suffix in ("h", "cpp") for path in (ROOT / "tests" / "simt").rglob(f"*.{suffix}"))
PACKAGE = sorted((ROOT / "normext").glob("*.py"))
NORMS = ("layer_norm", "rms_norm")

# pattern: the only places where it may occur, relative to csrc/
CONFINED = {
    r"#\s*include\s*[<\"](torch|ATen|c10)/": ("ops/",),
    r"__CUDACC__|__NVCC__": ("core/portable.h",),
    r"__CUDA_ARCH__": ("cuda/intrinsics.cuh", "core/portable.h"),
    r"\basm\b": ("cuda/intrinsics.cuh", "cpu/packed.h", "core/portable.h"),
    r"<<<|cudaLaunch\w+": ("cuda/launch.cuh",),
    r"\b__shfl|\b__syncwarp|\b__syncthreads|\b__ldg|\bcp\.async": ("cuda/intrinsics.cuh",),
    r"vector_size\s*\(": ("cpu/",),
    r"__m(128|256|512|mask)|\b_mm\d*_|\b_k[a-z]+_mask": ("cpu/vector.h", "cpu/packed.h"),
    r"\bthrow\b": ("core/error.h", "ops/tensor.h", "ops/tensor.cpp", "ops/boxed.h", "ops/boxed.cpp"),
    r"#\s*define\s+\w+\(": ("ops/", "core/portable.h"),
    r"\bgetenv\b": ("cpu/isa.cpp", "cuda/row_launch.cuh", "ops/tensor.cpp"),
}
FORBIDDEN = (
    r"(?<!extern )__shared__",  # static shared memory: everything is dynamic_smem(), which the emulator bounds and poisons
    r"\batomic(Add|Max|Min|CAS|Exch|Or|And)\b",  # would make results depend on timing
    r"#\s*include\s*<(cub|cooperative_groups|thrust)",
    r"STD_TORCH_CHECK|TORCH_CHECK",  # put file paths into messages
    r"data_ptr<",
    r"\buse_fast_math\b|__fdividef|__expf|\brsqrtf\b",
    r"cudaDeviceSynchronize|cudaStreamSynchronize",
    r"\b(TODO|FIXME|XXX|HACK)\b",
)


def code_of(path):
    """The file without comments and string contents, so that prose may name what code may not."""
    text = path.read_text()
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    return re.sub(r'(?<!include )"(\\.|[^"\\\n])*"', '""', text)


def where(pattern, files, text=code_of):
    return [str(path.relative_to(ROOT)) for path in files if re.search(pattern, text(path))]


@pytest.mark.parametrize("pattern", CONFINED)
def test_confined_to_its_place(pattern):
    allowed = tuple(f"csrc/{place}" for place in CONFINED[pattern])
    assert [path for path in where(pattern, NATIVE) if not path.startswith(allowed)] == []


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_forbidden_everywhere(pattern):
    assert where(pattern, NATIVE, Path.read_text if "TODO" in pattern else code_of) == []


def test_python_module_source_includes_no_torch_header():
    assert where(r"#\s*include\s*[<\"](torch|ATen|c10)/", [CSRC / "ops" / "module.cpp"]) == []


def test_layers_include_downwards_only():
    """core knows nobody, norms know core, back ends know norms, ops know everybody."""
    below = {"core": ("core",), "norms": ("core", "norms"), "cpu": ("core", "norms", "cpu"), "cuda": ("core", "norms", "cuda")}
    for path in NATIVE:
        layer = path.relative_to(CSRC).parts[0]
        for target in re.findall(r'#\s*include\s*"(\w+)/', path.read_text()):
            assert layer == "ops" or target in below[layer], f"{path} includes {target}/"


def test_files_are_short():
    files = [*NATIVE, *SIMT, *PACKAGE, *(ROOT / "tests").glob("*.py"), *(ROOT / "tests" / "cpp").glob("*")]
    long = {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text().splitlines())) > 460}
    assert long == {}


def test_kernels_are_short():
    for path in NATIVE:
        lines = path.read_text().splitlines()
        for start, line in enumerate(lines):
            if "__global__" in line and not line.lstrip().startswith("//"):
                length = next(i for i, text in enumerate(lines[start:]) if text.startswith("}"))
                assert length <= 90, f"{path}:{start + 1} has {length} lines"


def test_every_file_says_what_it_is():
    for path in NATIVE:
        described = path.suffix == ".cpp" and path.with_suffix(".h").exists()  # the header says it
        assert described or path.read_text().startswith("//"), path
    for path in PACKAGE:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_headers_are_guarded():
    for path in NATIVE:
        if path.suffix in (".h", ".cuh"):
            assert "#pragma once" in path.read_text(), path


def test_same_stem_everywhere():
    """`git ls-files '*rms_norm*'` shows one file per layer."""
    for norm in NORMS:
        for place in (CSRC / "norms" / f"{norm}.h", CSRC / "cuda" / f"{norm}.cu", CSRC / "ops" / f"{norm}.cpp"):
            assert place.exists()
        assert (ROOT / "normext" / f"{norm}.py").exists()


def test_avx512_runs_on_avx2():
    """`make avx512-test` has every intrinsic of AVX-512 that the kernels use; conversion to bfloat16 by name is packed.h's."""
    name = r"\b(?:_mm512|_mm(?:256)?_maskz?_|_cvtmask|_k[a-z]+_mask)\w+"
    used = {found for path in NATIVE for found in re.findall(name, code_of(path))}
    defined = set(re.findall(rf"#define ({name})", (ROOT / "tests" / "cpp" / "avx512_on_avx2.h").read_text()))
    assert used and used == defined


def test_no_stem_is_both_host_and_device_source():
    for folder in {path.parent for path in NATIVE}:
        assert not {p.stem for p in folder.glob("*.cpp")} & {p.stem for p in folder.glob("*.cu")}


def private_torch_names(path):
    """Every `torch.<...>._x` and every import from a private module of torch, as written in code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names if alias.name.split(".")[0] == "torch" for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute):
            names = ast.unparse(node).split(".")
            names = names if names[0] == "torch" else []
        else:
            continue
        if any(re.match(r"_[a-zA-Z]", name) for name in names):
            yield ".".join(names)


def test_private_torch_names_live_in_one_file():
    for path in PACKAGE:
        assert path.name == "_library.py" or not list(private_torch_names(path)), (path, list(private_torch_names(path)))
    assert list(private_torch_names(ROOT / "normext" / "_library.py"))  # the search finds what there is


@pytest.mark.parametrize("mutant", planted.MUTANTS + planted_channel.MUTANTS, ids=lambda mutant: mutant.name)
def test_every_planted_bug_has_a_place(mutant):
    """mutants.py replaces text; what it replaces must still be there, so that no mutant goes stale between its runs."""
    assert mutant.find in (ROOT / mutant.file).read_text() and mutant.find != mutant.replace


def test_every_rule_can_fail(tmp_path):
    """The patterns match what they are meant to match."""
    samples = ["#include <torch/x.h>", "asm volatile", "k<<<1, 2>>>", "__shared__ float x", "atomicAdd(p, 1)", "#define F(x) x"]
    for number, sample in enumerate(samples):
        file = tmp_path / f"{number}.h"
        file.write_text(f"// a comment\n{sample}\n")
        assert any(re.search(pattern, code_of(file)) for pattern in (*CONFINED, *FORBIDDEN)), sample
    file.write_text('// atomicAdd in a comment\nconst char* s = "asm";\n')
    assert not any(re.search(pattern, code_of(file)) for pattern in (*CONFINED, *FORBIDDEN))
