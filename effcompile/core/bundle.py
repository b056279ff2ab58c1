"""Write and read the files of an artifact: a folder, or a zip of the same files.

Writing is atomic: files gather in a folder beside the place, which takes its name when all of them are hashed. Reading trusts
nothing: names, kinds, counts and sizes are looked at first, then hashes, and only then can a file be opened. What is machine code
(`.pt2`, engines, cubins) is handed out on an explicit `trust` alone, since running it is running whatever its maker wrote.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from effcompile.core.artifact import NAME, FileEntry, Manifest, broken, check_name
from effcompile.core.errors import EffError

MOST_FILES = 10_000
MOST_BYTES = 1 << 40
MOST_MANIFEST = 16 << 20
_BLOCK = 1 << 20
_SAME_TIME = (1980, 1, 1, 0, 0, 0)  # so that equal files make equal zips


@dataclass
class Draft:
    """Gather the files of an artifact that is being written: put them into `folder`, then set `manifest`."""

    folder: Path
    native: set[str] = field(default_factory=set)
    manifest: Manifest | None = None

    def file(self, name: str, *, native: bool = False) -> Path:
        """Return where a file goes; `native` ones hold machine code."""
        path = self.folder / check_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if native:
            self.native.add(name)
        return path


@contextmanager
def writing(out: Path, *, force: bool = False) -> Iterator[Draft]:
    """Give a draft, and put it at `out` (a folder, or a file `*.zip`) when the block ends well; else nothing is left.

    Raises:
        EffError: EFF-E101 where something is there already, and is no artifact or `force` is not given.
    """
    out = Path(os.path.abspath(out))
    _check_free(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        folder.chmod(0o755)
        draft = Draft(folder)
        yield draft
        assert draft.manifest is not None, "an artifact was written without a manifest"
        entries = {
            name: FileEntry(*_hashed(path), name in draft.native) for name, path in _files_of(folder) if name != NAME
        }
        manifest = replace(draft.manifest, files=tuple(sorted(entries.items())))
        (folder / NAME).write_text(manifest.text(), encoding="utf-8")
        _place(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Artifact:
    """Hold a checked artifact; a zip lies in a folder of its own until the artifact is closed."""

    def __init__(self, manifest: Manifest, folder: Path, trust: bool, held: Path | None = None) -> None:
        self.manifest, self.folder, self.trust, self._held = manifest, folder, trust, held
        self._entries: Mapping[str, FileEntry] = dict(manifest.files)

    def file(self, name: str, *, runs: bool = False) -> Path:
        """Return the path of a file; `runs` says that it will be loaded as machine code, whatever the manifest calls it.

        Raises:
            EffError: EFF-E104 where there is none, EFF-E107 where it is machine code and the artifact is not trusted.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise EffError(
                "EFF-E104",
                f"the artifact has no `{name}`; it has {', '.join(self._entries) or 'no file'}",
                hint="eff show DIR lists its files",
            )
        if entry.native or runs:
            self.check_trust(f"`{name}`")
        return self.folder / name

    def check_trust(self, what: str) -> None:
        """Raise EFF-E107 unless the artifact is trusted; what decides is what is done with a file, never its manifest alone."""
        if not self.trust:
            raise EffError(
                "EFF-E107",
                f"{what} is machine code: opening it runs whatever its maker wrote",
                hint="add --trust (trust=True) if you trust where it comes from",
            )

    @property
    def packed(self) -> bool:
        """Tell whether the artifact is a zip, whose files are there until it is closed."""
        return self._held is not None

    def close(self) -> None:
        """Remove what was unpacked."""
        if self._held is not None:
            shutil.rmtree(self._held, ignore_errors=True)

    def __enter__(self) -> Artifact:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_artifact(path: Path, *, trust: bool = False) -> Artifact:
    """Check an artifact, a folder or a zip, down to the hash of every file.

    Raises:
        EffError: EFF-E102 where it is none, EFF-E103 for a name, link or kind of file that does not belong there, EFF-E104 for a
            broken manifest, EFF-E105 for a file that is missing, too much, or not what the manifest says, EFF-E106 beyond the
            limits.
    """
    if path.is_symlink() or not path.exists():
        raise EffError(
            "EFF-E102",
            f"{path} is no artifact: {'it is a link' if path.is_symlink() else 'nothing is there'}",
            hint=f"eff export MODEL --to onnx -o {path} makes one",
        )
    if path.is_dir():
        return _checked(path, trust, None)
    held = Path(tempfile.mkdtemp(prefix="eff-artifact-"))
    try:
        _unpack(path, held)
        return _checked(held, trust, held)
    except BaseException:
        shutil.rmtree(held, ignore_errors=True)
        raise


def _checked(folder: Path, trust: bool, held: Path | None) -> Artifact:
    place = folder / NAME
    if not os.path.lexists(place):
        raise broken("EFF-E102", f"{folder} is no artifact: it has no {NAME}")
    kind = os.lstat(place)
    if not stat.S_ISREG(kind.st_mode):
        raise broken("EFF-E103", f"{NAME} is no plain file")
    if kind.st_size > MOST_MANIFEST:
        raise broken("EFF-E106", f"{NAME} has {kind.st_size} bytes")
    try:
        manifest = Manifest.read(place.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise broken("EFF-E104", f"{NAME} is no UTF-8") from None
    listed = dict(manifest.files)
    _check_amount(len(listed), sum(entry.bytes for entry in listed.values()))
    there = dict(_files_of(folder))
    for name in sorted(set(there) - set(listed) - {NAME}):
        raise broken("EFF-E105", f"`{name}` is in the artifact and not in its manifest")
    for name, entry in sorted(listed.items()):
        if name not in there:
            raise broken("EFF-E105", f"`{name}` is missing")
        if there[name].stat().st_size != entry.bytes:
            raise broken("EFF-E105", f"`{name}` has {there[name].stat().st_size} bytes, {entry.bytes} are recorded")
        if _hashed(there[name])[0] != entry.sha256:
            raise broken("EFF-E105", f"`{name}` is not the file that was written: its SHA-256 differs")
    return Artifact(manifest, folder, trust, held)


def _unpack(path: Path, into: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_amount(len(members), sum(member.file_size for member in members))
            names: set[str] = set()
            for member in members:
                kind = stat.S_IFMT(member.external_attr >> 16)
                if kind not in (0, stat.S_IFREG):
                    raise broken("EFF-E103", f"{member.filename[:80]!r} in {path.name} is no plain file")
                if check_name(member.filename).lower() in names:
                    raise broken("EFF-E103", f"{member.filename!r} is in {path.name} twice")
                if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise broken("EFF-E103", f"{member.filename!r} in {path.name} is encrypted or packed in an odd way")
                names.add(member.filename.lower())
            for member in members:
                to = into / member.filename
                to.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, to.open("xb") as sink:
                    left = member.file_size
                    while block := source.read(min(_BLOCK, left + 1)):
                        left -= len(block)
                        if left < 0:
                            raise broken("EFF-E106", f"{member.filename!r} is larger than {path.name} says")
                        sink.write(block)
    except EffError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, NotImplementedError, zlib.error) as error:
        raise broken("EFF-E102", f"{path} is no artifact: {error}") from None


def _check_amount(count: int, size: int) -> None:
    if count > MOST_FILES or size > MOST_BYTES:
        raise broken("EFF-E106", f"{count} files of {size} bytes are beyond the limits ({MOST_FILES}, {MOST_BYTES})")


def _files_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield every file under a folder with its name in it; raise EFF-E103 for what is neither a plain file nor a folder."""
    stack = [folder]
    while stack:
        for path in sorted(stack.pop().iterdir()):
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise broken("EFF-E103", f"`{path.relative_to(folder)}` is no plain file")
            if path.is_dir():
                stack.append(path)
            else:
                yield path.relative_to(folder).as_posix(), path


def _hashed(path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def _check_free(out: Path, force: bool) -> None:
    if not os.path.lexists(out):
        return
    if not force:
        raise EffError("EFF-E101", f"{out} is there already", hint="--force (force=True) replaces an artifact")
    is_zip = out.is_file() and not out.is_symlink() and zipfile.is_zipfile(out)
    if not is_zip and not (out.is_dir() and not out.is_symlink() and (out / NAME).is_file()):
        raise EffError(
            "EFF-E101",
            f"{out} is there already and is no artifact, so it stays",
            hint="-o with another place, or remove it",
        )


def _place(folder: Path, out: Path) -> None:
    if out.suffix == ".zip":
        packed = folder.with_name(folder.name + ".zip")
        try:
            with zipfile.ZipFile(packed, "w") as archive:
                for name, path in sorted(_files_of(folder)):
                    member = zipfile.ZipInfo(name, _SAME_TIME)
                    member.external_attr = (stat.S_IFREG | 0o644) << 16
                    with path.open("rb") as source, archive.open(member, "w", force_zip64=True) as sink:
                        shutil.copyfileobj(source, sink, _BLOCK)
            os.replace(packed, out)
        finally:
            packed.unlink(missing_ok=True)
        return
    old = folder.with_name(folder.name + ".old")
    if out.exists():
        os.replace(out, old)  # no system call puts a folder in the place of one that is not empty
    try:
        os.replace(folder, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
