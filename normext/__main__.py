"""`python -m normext`: what this build contains, and what it uses on this machine."""

import torch

import normext
from normext._library import C


def served_by(capability: tuple[int, int], archs: list[int]) -> str:
    """How a GPU runs a build for these architectures: machine code serves later minor versions, PTX of the newest later GPUs."""
    arch = 10 * capability[0] + capability[1]
    if any(built // 10 == capability[0] and built <= arch for built in archs):
        return "machine code"
    return "PTX, compiled by the driver at first use" if arch > max(archs) else "not served by this build: see NORMEXT_CUDA_ARCHS"


def main() -> None:
    info = C.build_info()
    print(f"normext {normext.__version__}, {normext.__path__[0]}")
    print(f"torch   {torch.__version__}")
    print(f"built   with compiler {info['compiler']}{', CUDA kernels emulated on the CPU' if info['emulated'] else ''}")
    print(f"CPU     uses {info['cpu_isa']}; this machine runs {', '.join(info['cpu_isas'])}; {torch.get_num_threads()} threads")
    if not info["cuda"]:
        print("CUDA    not built: there was no nvcc, or NORMEXT_CUDA=0. CUDA tensors are refused.")
        return
    archs = [int(arch.rstrip("af")) for arch in info["cuda_archs"].split()]
    print(f"CUDA    built for {', '.join(f'sm_{arch}' for arch in archs)}")
    if not torch.cuda.is_available():
        print("GPU     none that this torch can use")
        return
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (sm_{capability[0]}{capability[1]})"
        print(f"GPU {device}   {name}: {served_by(capability, archs)}")


if __name__ == "__main__":
    main()
