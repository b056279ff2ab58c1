"""Look through TorchInductor's cache folder for files that would break a later run.

A damaged graph entry heals itself: torch warns and compiles again. A truncated shared library does not: it is loaded
because it is there, and every later run of that graph fails. So binaries are checked against what their own headers
promise.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BINARIES = (".so", ".o", ".cubin", ".hsaco", ".dylib")
_QUARANTINE = "effcompile-quarantine"


@dataclass(frozen=True)
class Flaw:
    """Name a damaged file; `fatal` ones make later runs fail, the others cost a new compilation."""

    path: Path
    reason: str
    fatal: bool


@dataclass(frozen=True)
class Survey:
    """Hold what a cache folder has: files, bytes, damage, and whose it is."""

    folder: Path
    files: int
    bytes: int
    flaws: tuple[Flaw, ...]
    owner_is_me: bool = True
    mode: int = 0o700

    @property
    def exposed(self) -> bool:
        """Tell whether others may write here: what lies in the folder is loaded as code."""
        return bool(self.mode & 0o022)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "folder": str(self.folder),
            "files": self.files,
            "bytes": self.bytes,
            "mode": f"{self.mode:04o}",
            "owner_is_me": self.owner_is_me,
            "flaws": [{"path": str(f.path), "reason": f.reason, "fatal": f.fatal} for f in self.flaws],
        }


def cache_folder() -> Path:
    """Return TorchInductor's cache folder without making it."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())


def survey(folder: Path, step: Callable[[str], None] = lambda text: None) -> Survey:
    """Check every file of a cache folder; one that does not exist is empty and sound."""
    if not folder.is_dir():
        return Survey(folder, 0, 0, ())
    count = total = 0
    flaws = []
    for path in _files(folder):
        try:
            size = path.stat().st_size
            flaw = check(path, size)
        except FileNotFoundError:  # another process tidied up between listing and reading
            continue
        except OSError as error:
            size, flaw = 0, Flaw(path, f"cannot be read: {error.strerror}", False)
        count += 1
        total += size
        if flaw is not None:
            flaws.append(flaw)
        step("")
    facts = folder.stat()
    mine = not hasattr(os, "getuid") or facts.st_uid == os.getuid()
    return Survey(folder, count, total, tuple(flaws), mine, facts.st_mode & 0o777)


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        if _QUARANTINE in folders:
            folders.remove(_QUARANTINE)
        for name in sorted(names):
            path = Path(place) / name
            if path.is_file() and not path.is_symlink():
                yield path


def check(path: Path, size: int) -> Flaw | None:
    """Return what is wrong with one file, or None."""
    if path.suffix in _BINARIES:
        reason = _binary_flaw(path, size)
        return Flaw(path, reason, True) if reason else None
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return Flaw(path, f"is not JSON ({str(error)[:40]})", False)
    elif size == 0 and path.suffix in (".py", ".cpp", ".h"):
        return Flaw(path, "is empty", False)
    return None


def _binary_flaw(path: Path, size: int) -> str | None:
    """Compare an ELF file with its own section and program headers (64-bit, either byte order)."""
    with path.open("rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:4] != b"\x7fELF":
            return None if head[:4] in (b"\xcf\xfa\xed\xfe", b"MZ\x90\x00") else "is no binary"
        order = "<" if head[5] == 1 else ">"
        if head[4] != 2:
            return None
        program_at, section_at = struct.unpack_from(order + "QQ", head, 32)
        program_size, programs, section_size, sections = struct.unpack_from(order + "HHHH", head, 54)
        ends = [section_at + section_size * sections, program_at + program_size * programs]
        if max(ends) > size:
            return f"is truncated: {size} bytes, its headers end at {max(ends)}"
        file.seek(section_at)
        table = file.read(section_size * sections)
    for number in range(sections):
        kind = struct.unpack_from(order + "I", table, number * section_size + 4)[0]
        start, length = struct.unpack_from(order + "QQ", table, number * section_size + 24)
        if kind not in (0, 8) and start + length > size:  # 8 (NOBITS) takes no room in the file
            return f"is truncated: {size} bytes, a section ends at {start + length}"
    return None


def quarantine(found: Survey) -> tuple[Path, ...]:
    """Move damaged files out of the way, into a folder beside them, and return where they are now."""
    moved = []
    for flaw in found.flaws:
        to = found.folder / _QUARANTINE / flaw.path.relative_to(found.folder)
        to.parent.mkdir(parents=True, exist_ok=True)
        flaw.path.replace(to)
        moved.append(to)
    return tuple(moved)


def remove(folder: Path) -> None:
    """Remove a cache folder; it is renamed first, so that another process never meets half of it."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    folder.rename(scratch / "gone")
    shutil.rmtree(scratch, ignore_errors=True)
