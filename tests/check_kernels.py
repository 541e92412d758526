"""The spill gate: what the compiler made of the CUDA kernels, checked without a GPU.

    python tests/check_kernels.py build/test             check a CUDA build; `make kernels` builds and runs it
    python tests/check_kernels.py build/test --update    write tests/kernel_table.csv anew

1. ptxas logs (kept beside each object by cmake/keep_ptxas_log.sh): no kernel spills or has a stack frame on any architecture.
2. tests/kernel_table.csv, registers per kernel and architecture: no kernel comes or goes, or grows by a step of register
   allocation, unnoticed. Compared for the nvcc release that wrote the table only; others allocate differently.
3. Machine code, where cuobjdump is found (CUDA toolkit, or `pip install --group sass`): no local memory, no float64 instruction
   in a kernel for other types, and 128-bit global loads and stores in every kernel whose vectors have 16 bytes.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

TABLE = Path(__file__).with_name("kernel_table.csv")
REGISTER_STEP = 8  # registers are allocated to a warp in steps of 8 per thread
SIZES = {"float": 4, "double": 8, "Half": 2, "BFloat16": 2}  # bytes, by name of the type
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP|MMA)\b|F2F\.F64|F2F\.F32\.F64|I2F\.F64|MUFU\.RCP64H|MUFU\.RSQ64H")


def demangle(names):
    """Mangled to readable names: kernel<arguments>, without namespaces and parameters."""
    names = sorted(set(names))
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"\w+::", "", line.removeprefix("void ")) for line in text.splitlines()]
    return dict(zip(names, (re.sub(r">\(.*|\(.*", lambda end: end[0][0].replace("(", ""), line) for line in short), strict=True))


# ---- ptxas ------------------------------------------------------------------------------------------------------------------

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'\n"
    r"ptxas info\s+: Function properties for (?P=name)\n"
    r"\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"ptxas info\s+: Used (?P<registers>\d+) registers"
)


def read_logs(build):
    """{(mangled kernel, arch): match of ENTRY} of every log under the build folder."""
    logs = sorted(build.rglob("*.cu.o.ptxas"))
    if not logs:
        sys.exit(f"{build}: no ptxas logs; is this a CUDA build?")
    found = {}
    for log in logs:
        text = log.read_text()
        entries = list(ENTRY.finditer(text))
        if len(entries) != text.count("Compiling entry function"):
            sys.exit(f"{log}: a form of ptxas output this script does not know")
        found.update({(entry["name"], entry["arch"]): entry for entry in entries})
    return found


def check_spills(entries, names):
    for (name, arch), entry in entries.items():
        if any(int(entry[what]) for what in ("stack", "stores", "loads")):
            amounts = f"{entry['stack']} bytes of stack, spills of {entry['stores']} bytes stored and {entry['loads']} loaded"
            yield f"sm_{arch} {names[name]}: {amounts}"


# ---- Table ------------------------------------------------------------------------------------------------------------------


def register_table(entries, names):
    table = defaultdict(dict)
    for (name, arch), entry in entries.items():
        table[names[name]][arch] = int(entry["registers"])
    return table


def nvcc_release(build):
    cache = (build / "CMakeCache.txt").read_text()
    nvcc = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cache, re.MULTILINE)[1]
    return re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)[1]


def write_table(table, release):
    archs = sorted({arch for row in table.values() for arch in row}, key=int)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f"registers per thread, nvcc {release}", *archs])
        writer.writerows([kernel, *[row.get(arch, "") for arch in archs]] for kernel, row in sorted(table.items()))
    print(f"{TABLE.name}: {len(table)} kernels, {len(archs)} architectures")


def check_table(table, release):
    if not TABLE.exists():
        yield f"{TABLE.name} is missing: write it with --update"
        return
    with TABLE.open(newline="") as file:
        (title, *archs), *rows = csv.reader(file)
    if not title.endswith(f"nvcc {release}"):
        print(f"table of {title}, this build is nvcc {release}: registers not compared")
        return
    known = {kernel: dict(zip(archs, map(int, registers), strict=True)) for kernel, *registers in rows}
    for kernel in sorted(known.keys() ^ table.keys()):
        yield f"{kernel}: {'not in the build' if kernel in known else 'not in the table'} (--update)"
    for kernel in sorted(known.keys() & table.keys()):
        for arch, registers in table[kernel].items():
            before = known[kernel].get(arch, registers)
            if registers >= before + REGISTER_STEP:
                yield f"sm_{arch} {kernel}: {registers} registers, {before} in the table (--update if intended)"


# ---- Machine code -----------------------------------------------------------------------------------------------------------


def find_cuobjdump():
    """In PATH, the toolkit, or NVIDIA's Python packages, which keep cuobjdump and nvdisasm in one folder."""
    packages = sorted(Path(sysconfig.get_paths()["purelib"], "nvidia").glob("cu*/bin"))
    path = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin", *map(str, packages)])
    return shutil.which("cuobjdump", path=path), {**os.environ, "PATH": path}


def opcodes(library, arch):
    """(mangled kernel, arch, Counter of opcodes) of all kernels for one architecture, from the machine code."""
    tool, environment = find_cuobjdump()
    command = [tool, "-sass", "-arch", f"sm_{arch}", str(library)]
    counts, count = [], None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
        for line in process.stdout:
            if found := OPCODE.search(line):
                count[found[1]] += 1
            elif "Function :" in line:
                count = Counter()
                counts.append((line.split(":")[1].strip(), arch, count))
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return counts


# Where the data type of a family of kernels stands among its template arguments; the vector length is the first number.
TYPE_PLACE = {"row_": 1, "planes_": 0, "last_": 0}
WITHOUT_STORES = ("planes_moments", "planes_sums", "last_moments", "last_sums")  # of whole vectors


def vector_bytes(kernel):
    """Bytes of a vector of the input; 0 for kernels without."""
    arguments = re.search(r"<(.*)>", kernel)
    fields = arguments[1].split(", ") if arguments else []
    numbers = [int(field) for field in fields if field.isdigit()]
    place = next((place for family, place in TYPE_PLACE.items() if kernel.startswith(family)), None)
    return 0 if place is None or not numbers else SIZES[fields[place]] * numbers[0]


def check_machine_code(library, entries):
    archs = sorted({arch for _, arch in entries}, key=int)
    with ProcessPoolExecutor() as pool:
        counts = list(chain.from_iterable(pool.map(partial(opcodes, library), archs)))
    names = demangle(name for name, _, _ in counts)
    print(f"machine code of {len(counts)} kernels: {sum(count.total() for _, _, count in counts)} instructions")
    if missing := entries.keys() - {(name, arch) for name, arch, _ in counts}:
        yield f"no machine code found of {len(missing)} kernels that ptxas compiled"
    for name, arch, count in counts:
        kernel, where = names[name], f"sm_{arch} {names[name]}"
        local = sum(number for opcode, number in count.items() if opcode.startswith(("LDL", "STL")))
        if local:
            yield f"{where}: {local} accesses to local memory"
        if "double" not in kernel and (wide := [opcode for opcode in count if FLOAT64.match(opcode)]):
            yield f"{where}: float64 instructions {', '.join(wide)}"
        if vector_bytes(kernel) == 16:
            for access in ("LDG.E.128", "STG.E.128")[: 1 if kernel.startswith(WITHOUT_STORES) else 2]:
                if not any(opcode.startswith(access) for opcode in count):
                    yield f"{where}: no {access}, though its vectors have 16 bytes"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="CMake's build folder")
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    options = parser.parse_args()
    entries = read_logs(options.build)
    names = demangle(name for name, _ in entries)
    table, release = register_table(entries, names), nvcc_release(options.build)
    most = max(entries.values(), key=lambda entry: int(entry["registers"]))
    print(f"{len(table)} kernels, {len(entries)} with architectures; most registers: {most['registers']} ({names[most['name']]})")
    problems = list(check_spills(entries, names))
    if options.update:
        write_table(table, release)
    else:
        problems += check_table(table, release)
    libraries = list(options.build.glob("_C.*.so"))
    if find_cuobjdump()[0] and libraries:
        problems += check_machine_code(libraries[0], entries)
    else:
        print("machine code not checked: no cuobjdump, or no Python module in this build")
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
