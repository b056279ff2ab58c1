"""Ask this machine what it has; each answer carries what to type where something is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from effcompile.cli.artifacts import cache_folder, survey

State = Literal["ok", "missing", "warn", "broken"]


@dataclass(frozen=True)
class Check:
    """Hold one finding: `broken` makes `eff doctor` fail, `missing` is something optional that is not there."""

    name: str
    state: State
    text: str
    fix: str = ""


def all_checks() -> tuple[Check, ...]:
    """Return every finding, in the order in which to read them."""
    return (*_software(), *_hardware(), *_extras(), *_clashes(), *_cache(), *_own_cache(), *_environment())


def _software() -> Iterable[Check]:
    import torch

    good = sys.version_info >= (3, 11)
    yield Check("python", "ok" if good else "broken", platform.python_version(), "" if good else "Python 3.11 or later")
    version = str(torch.__version__)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    known = (2, 11) <= numbers < (2, 16)
    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU build"
    )
    yield Check(
        "torch",
        "ok" if known else "warn",
        f"{version} ({build})",
        "" if known else "python -m pip install 'torch>=2.11,<2.16'",
    )
    triton = _version("triton") or _version("pytorch-triton")
    text = triton or "not installed: no Triton kernels; the CPU path does not need it"
    yield Check("triton", "ok" if triton else "missing", text, "" if triton else "python -m pip install triton")
    yield _compiler()


def _compiler() -> Check:
    from torch._inductor import config

    asked = config.cpp.cxx if isinstance(config.cpp.cxx, tuple | list) else (config.cpp.cxx,)
    for word in (*asked, "g++", "clang++", "c++"):
        path = shutil.which(str(word)) if word else None
        if path:
            return Check("compiler", "ok", path)
    return Check(
        "compiler", "broken", "no C++ compiler: TorchInductor cannot build CPU code", "apt install g++, or set CXX"
    )


def _hardware() -> Iterable[Check]:
    import torch

    from effcompile.lowering.rates import family, rates_of
    from effcompile.targets.detect import detect

    cpu = detect("cpu").device
    yield Check(
        "cpu",
        "ok",
        f"{cpu.compute}, {cpu.cores} cores, {cpu.memory_bytes / 1e9:.0f} GB, {torch.get_num_threads()} torch threads",
    )
    rates = rates_of(cpu)
    yield Check(
        "kernel rates",
        "missing" if rates is None else "ok",
        f"none of {family(cpu)}: kernels are chosen by a cost model, linear layers stay with torch"
        if rates is None
        else f"measured: {rates.about}",
        "in a checkout: eff bench attention-table linear-table step-table moe-table && eff bench --install"
        if rates is None
        else "",
    )
    if not torch.cuda.is_available():
        yield Check("gpu", "missing", "torch sees none; explain and plan work for every target without one")
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        yield Check("gpu", "ok", f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, target {detect('cuda')}")


def _extras() -> Iterable[Check]:
    """Compare each extra of this distribution with what is installed, and give the exact command for what is not."""
    try:
        wanted = metadata.requires("effcompile") or []
    except metadata.PackageNotFoundError:
        yield Check("extras", "warn", "effcompile is not installed, only found", "python -m pip install -e .")
        return
    extras: dict[str, list[str]] = {}
    for line in wanted:
        found = re.match(r"\s*([A-Za-z0-9_.-]+).*;.*extra\s*==\s*['\"](\w+)['\"]", line)
        if found and found[1].lower() != "effcompile":
            extras.setdefault(found[2], []).append(found[1])
    for name in sorted(extras.keys() - {"dev"}):
        absent = [package for package in extras[name] if _version(package) is None]
        have = ", ".join(f"{package} {_version(package)}" for package in extras[name] if package not in absent)
        if absent:
            text = f"missing {', '.join(absent)}" + (f"; has {have}" if have else "")
            yield Check(f"[{name}]", "missing", text, f"python -m pip install 'effcompile[{name}]'")
        else:
            yield Check(f"[{name}]", "ok", have)


def _clashes() -> Iterable[Check]:
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if len(both) == 2:
        yield Check(
            "onnxruntime",
            "broken",
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
            "python -m pip uninstall -y onnxruntime onnxruntime-gpu && python -m pip install onnxruntime-gpu",
        )


def _cache() -> Iterable[Check]:
    found = survey(cache_folder())
    name = "torch cache"
    if not found.folder.is_dir():
        yield Check(name, "ok", f"{found.folder} (not made yet)")
        return
    facts = f"{found.folder}: {found.files} files, {found.bytes / 1e6:.0f} MB, mode {found.mode:04o}"
    fatal = [flaw for flaw in found.flaws if flaw.fatal]
    if not found.owner_is_me:
        yield Check(
            name,
            "broken",
            f"{facts}; it belongs to another user, and what is in it is loaded as code",
            "export TORCHINDUCTOR_CACHE_DIR=~/.cache/torchinductor",
        )
    elif fatal:
        yield Check(
            name,
            "broken",
            f"{facts}; {len(fatal)} damaged libraries, for example {fatal[0].path.name} {fatal[0].reason}",
            "eff cache verify --fix",
        )
    elif found.exposed:
        yield Check(name, "warn", f"{facts}; others may write into it", f"chmod go-w {found.folder}")
    elif found.flaws:
        yield Check(
            name,
            "warn",
            f"{facts}; {len(found.flaws)} damaged entries, which torch compiles anew",
            "eff cache verify --fix",
        )
    else:
        yield Check(name, "ok", facts)


def _own_cache() -> Iterable[Check]:
    from effcompile.core.errors import EffError
    from effcompile.models.cache import cache_root

    try:
        root = cache_root()
    except EffError as error:
        yield Check("eff cache", "broken", error.message, error.hint or "")
        return
    facts = root.stat()
    if hasattr(os, "getuid") and facts.st_uid != os.getuid():
        yield Check("eff cache", "broken", f"{root} belongs to another user", "export EFF_CACHE=<a folder>")
    elif facts.st_mode & 0o077:
        yield Check(
            "eff cache", "warn", f"{root} is open to others (mode {facts.st_mode & 0o777:04o})", f"chmod 700 {root}"
        )
    else:
        yield Check("eff cache", "ok", str(root))


def _environment() -> Iterable[Check]:
    for name, meaning in (
        ("TORCHDYNAMO_DISABLE", "torch.compile does nothing"),
        ("TORCH_COMPILE_DISABLE", "torch.compile does nothing"),
        ("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "nothing is cached, every run compiles anew"),
        ("EFF_FUEL", "rewriting stops after this many rewrites"),
        (
            "ATEN_CPU_CAPABILITY",
            "slower kernels; and wrong ones later, where code that the backend `inductor` puts into its cache now is taken for "
            "another instruction set (`eff` keeps them apart)",
        ),
    ):
        if os.environ.get(name, "0") not in ("", "0"):
            yield Check("environment", "warn", f"{name}={os.environ[name]}: {meaning}", f"unset {name}")


def abilities() -> list[dict[str, Any]]:
    """Return what each target can do on this machine; planning needs nothing, running needs the device."""
    import torch

    from effcompile.targets import devices
    from effcompile.targets.detect import detect

    cpu, gpu = detect("cpu").device, detect("cuda").device if torch.cuda.is_available() else None
    compiler = _compiler().state == "ok"
    triton = _version("triton") is not None
    rows = []
    for device in (cpu, *(item for item in devices() if item.kind != "cpu")):
        if device.kind == "cpu":
            runs, why = compiler, "" if compiler else "no C++ compiler"
        else:
            here = gpu is not None and gpu.compute == device.compute
            runs, why = here and triton, "no triton" if here else "not in this machine"
        rows.append(
            {
                "target": device.word,
                "device": device.name,
                "explain": True,
                "plan": True,
                "compile_and_run": runs,
                "why_not": "" if runs else why,
            }
        )
    return rows


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
