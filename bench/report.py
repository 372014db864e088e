"""What the benchmarks have in common: the document they print, and what is said of machine and memory."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def print_json(document: dict, path: Path | None) -> None:
    """Print a document on stdout, and write it to a file if one is given."""
    text = json.dumps(document, indent=1)
    print(text)
    if path:
        path.write_text(text + "\n")


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes (Linux); unlike ru_maxrss, VmHWM does not begin with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def machine(device: str) -> dict:
    """What the numbers depend on."""
    import torch

    versions = {}
    for package in ("saerelay", "torch", "sae-lens", "dictionary-learning", "eai-sparsify", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu.get("cpu_name", platform.machine()),
        "instructions": [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if cpu.get(name)],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }
