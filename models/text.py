"""Give real text that ordinary packages carry, and cut it into windows of tokens."""

import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.models.cache import cached_folder

DEBIAN_PACKAGE = "r-cran-janeaustenr"
DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
CHARACTERS_PER_TOKEN = 8
"""More than any tokenizer here averages on English prose, so that one slice is usually enough."""


def pydoc_text() -> str:
    """Return the topics of Python's own documentation, about 465,000 characters of English and code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def austen_text() -> str:
    """Return Jane Austen's six novels, about four million characters, fetched once with apt.

    Raises:
        EffError: EFF-U106 where apt or the package cannot be had.
    """
    return (cached_folder("austen-1", _fill_austen) / "austen.txt").read_text(encoding="utf-8")


def token_windows(tokenizer: Any, text: str, length: int, count: int) -> Tensor:
    """Cut `count` windows of `length` tokens out of a text, at even distances and without overlap.

    Args:
        tokenizer: a transformers tokenizer; no special tokens are added.
        text: the text; window i starts at character `i * len(text) // count`.
        length: tokens per window.
        count: windows.

    Returns:
        Token ids `[count, length]`, int64.

    Raises:
        EffError: EFF-U103 when a part of the text is too short.
    """
    rows = []
    for index in range(count):
        start, stop = index * len(text) // count, (index + 1) * len(text) // count
        ids = _encode(tokenizer, text[start : min(stop, start + length * CHARACTERS_PER_TOKEN)])
        if len(ids) <= length:  # the last token of a slice may be cut, so one more is wanted
            ids = _encode(tokenizer, text[start:stop])
        if len(ids) < length:
            raise EffError(
                "EFF-U103",
                f"the text has no {count} windows of {length} tokens: part {index} has {len(ids)}",
                hint="ask for fewer or shorter windows, or give more text",
            )
        rows.append(ids[:length])
    return torch.tensor(rows)


def read_strings(database: bytes) -> Iterator[list[str]]:
    """Yield the character vectors of an R lazy-load database (`.rdb`), in file order.

    A record is a big-endian length of 4 bytes and a zlib stream; inside is R's XDR serialization, of which this reads
    what a plain character vector needs: header, native encoding, STRSXP, and CHARSXP elements.
    """
    place = 0
    while place < len(database):
        inflate = zlib.decompressobj()
        data = inflate.decompress(database[place + 4 :])
        place = len(database) - len(inflate.unused_data)
        # "X\n", version, writer, minimal reader; version 3 adds the name of the native encoding.
        (version,) = struct.unpack_from(">i", data, 2)
        offset = 14 + (4 + struct.unpack_from(">i", data, 14)[0] if version == 3 else 0)
        kind, count = struct.unpack_from(">ii", data, offset)
        if kind & 0xFF != 16:  # STRSXP
            continue
        offset += 8
        strings = []
        for _ in range(count):
            _, size = struct.unpack_from(">ii", data, offset)
            text = data[offset + 8 : offset + 8 + size] if size > 0 else b""  # -1 is NA
            strings.append(text.decode("utf-8"))
            offset += 8 + max(size, 0)
        yield strings


def _encode(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is the normal case here.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _fill_austen(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _run(["apt-get", "download", DEBIAN_PACKAGE], scratch)
        packages = list(Path(scratch).glob("*.deb"))
        _run(["dpkg-deb", "-x", str(packages[0]) if packages else "*.deb", "tree"], scratch)
        novels = read_strings((Path(scratch) / "tree" / DATABASE).read_bytes())
        text = "\n\n".join("\n".join(lines) for lines in novels)
    (folder / "austen.txt").write_text(text, encoding="utf-8")


def _run(command: list[str], folder: str) -> None:
    fallback = "use effcompile.models.text.pydoc_text(), which needs nothing"
    if shutil.which(command[0]) is None:
        raise EffError(
            "EFF-U106", f"Austen's novels come from a Debian package, and {command[0]} is not here", hint=fallback
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()[-1:]
        raise EffError(
            "EFF-U106",
            f"`{' '.join(command[:2])}` failed: {' '.join(lines) or done.returncode}",
            hint=f"apt-get update   (as root), or {fallback}",
        )
