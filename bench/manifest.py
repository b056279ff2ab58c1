"""Record the circumstances of a measurement, and nothing that names a place on the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.case import Settings

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "transformers", "onnxruntime", "onnx", "onnxscript", "openvino", "triton", "numpy", "effcompile")
_EXTENSIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16", "i8mm")
_ENVIRONMENT = re.compile(
    r"^(OMP_|MKL_|KMP_|GOMP_|OPENBLAS_|ONEDNN_|DNNL_|TORCHINDUCTOR_|TORCH_COMPILE|PYTORCH_|LD_PRELOAD|CUDA_)"
)


def manifest(settings: Settings) -> dict[str, Any]:
    """Return date, versions, machine, threads, commit, command and the thread environment, as JSON values."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "cpu": cpu(),
        "gpu": gpu() if settings.device == "cuda" else None,
        "threads": settings.threads,
        "torch_threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "memory_bytes": memory_bytes(),
        "commit": commit(),
        "command": command(sys.argv),
        "environment": environment(),
        "settings": {key: value for key, value in settings.to_json().items() if value not in ([], False)},
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def environment() -> dict[str, str]:
    """Return the variables that steer threads, allocators and compilers; of a path only its last part."""
    return {
        name: Path(value).name if value.startswith("/") else scrub(value)
        for name, value in sorted(os.environ.items())
        if _ENVIRONMENT.match(name) and name != "TORCHINDUCTOR_CACHE_DIR"
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that matter; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu() -> dict[str, Any]:
    """Return the CPU's model name, instruction set, matrix extensions, usable cores, nominal clock in Hz and modelled peaks.

    `family` is its name in the planner's table of rates, `peaks` are the modelled FLOP/s of all usable cores, by dtype.
    """
    from effcompile.core.processor import cpuinfo
    from effcompile.targets.detect import detect_cpu, read_clock, read_isa

    text = cpuinfo()
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    capability = str(torch.backends.cpu.get_cpu_capability())
    return {
        "model": name[1].strip() if name else platform.processor(),
        "isa": read_isa(text, capability, platform.machine()).compute,
        "torch_capability": capability,
        "extensions": [word for word in _EXTENSIONS if re.search(rf"\b{word}\b", text)],
        "cores": detect_cpu().cores,
        "family": machine_name("cpu"),
        "peaks": dict(detect_cpu().peak_flops),
        "clock": read_clock(text),
    }


def machine_name(device: str) -> str:
    """Return what the results of this machine are kept under: its family in the planner's table, or the name of its GPU."""
    if device == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", str(torch.cuda.get_device_properties(0).name).lower()).strip("-")
    from effcompile.lowering.rates import family
    from effcompile.targets.detect import detect_cpu

    return family(detect_cpu())


def gpu() -> dict[str, Any]:
    """Return the GPU's name, compute capability, memory and driver-side versions."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": str(properties.name),
        "capability": ".".join(str(part) for part in torch.cuda.get_device_capability(0)),
        "multiprocessors": int(properties.multi_processor_count),
        "memory_bytes": int(properties.total_memory),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def memory_bytes() -> int:
    """Return the machine's memory."""
    found = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def commit() -> dict[str, Any]:
    """Return the checkout's commit and whether files other than results differ from it."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return {"hash": git("rev-parse", "HEAD"), "modified": None if changed is None else bool(changed)}


def command(arguments: list[str]) -> str:
    """Return the command line as one would type it, the program by its name only."""
    return scrub(shlex.join([Path(arguments[0]).name, *arguments[1:]]))


def scrub(text: str) -> str:
    """Replace folders of this machine by what they are."""
    site = sysconfig.get_paths()["purelib"]
    known = {
        site: "site-packages",
        sys.prefix: "venv",
        str(ROOT): ".",
        tempfile.gettempdir(): "tmp",
        str(Path.home()): "~",
    }
    for place in sorted(known, key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(place, known[place])
    return text


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
