"""Keep converted weights and texts in a private folder, written once and atomically.

A folder of the cache holds its files and a `manifest.json` with every file's size, plus the SHA-256 of files below
8 MiB (hashing half a gigabyte would cost more than loading it). What does not fit its manifest is built again.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from effcompile.core.errors import EffError

MANIFEST = "manifest.json"
HASHED_BELOW = 8 << 20


def cache_root() -> Path:
    """Return the cache folder, `$EFF_CACHE` or `~/.cache/effcompile`, made with mode 0700 where it is missing.

    Raises:
        EffError: EFF-U105 when the folder cannot be made or written to.
    """
    root = Path(os.environ.get("EFF_CACHE") or Path.home() / ".cache" / "effcompile")
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise EffError(
            "EFF-U105", f"the cache folder {root} cannot be made: {error.strerror}", hint="export EFF_CACHE=<a folder>"
        ) from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise EffError("EFF-U105", f"the cache folder {root} is not writable", hint="export EFF_CACHE=<a folder>")
    return root


def cached_folder(key: str, fill: Callable[[Path], None]) -> Path:
    """Return the cache folder `key`, calling `fill(folder)` to write its files the first time.

    `fill` gets an empty folder beside the final place; files are flushed to disk and the folder is renamed, so that a
    reader sees all of it or nothing. A folder that does not fit its manifest is built again, with one line on stderr.
    Processes wait for each other on a lock file. What `fill` raises is passed on and leaves nothing behind.
    """
    root = cache_root()
    final = root / key
    with FileLock(root / f"{key}.lock", mode=0o600):
        if final.is_dir():
            flaw = _flaw(final)
            if flaw is None:
                return final
            print(f"effcompile: rebuilding the cached {key}: {flaw}", file=sys.stderr)
            shutil.rmtree(final)
        with tempfile.TemporaryDirectory(prefix=f".{key}-", dir=root) as scratch:
            made = Path(scratch) / "made"
            made.mkdir(mode=0o700)
            fill(made)
            _seal(made)
            made.rename(final)
        _flush(root)
    return final


def discard(folder: Path) -> None:
    """Remove a cache folder whose content turned out to be unreadable, saying so on stderr."""
    print(f"effcompile: the cached {folder.name} is unreadable and is removed", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)


def _facts(path: Path) -> dict[str, int | str]:
    size = path.stat().st_size
    facts: dict[str, int | str] = {"size": size}
    if size < HASHED_BELOW:
        facts["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return facts


def _seal(folder: Path) -> None:
    files = {path.name: _facts(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1))
    for path in folder.iterdir():
        _flush(path)
    _flush(folder)


def _flaw(folder: Path) -> str | None:
    try:
        files = json.loads((folder / MANIFEST).read_text())
        for name, facts in files.items():
            if _facts(folder / name) != facts:
                return f"{name} changed since it was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} cannot be used ({type(error).__name__})"
    return None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
