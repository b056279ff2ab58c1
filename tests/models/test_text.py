"""Check the text sources and the cutting into windows."""

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from effcompile.core.errors import EffError
from effcompile.models import text


class Letters:
    """Tokenize every character to its code point."""

    def __call__(self, words: str, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_special_tokens": False, "verbose": False}
        return {"input_ids": [ord(letter) for letter in words]}


class Words:
    """Tokenize long runs of letters to one token each, so that the first slice is not enough."""

    def __call__(self, words: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in words.split()]}


def test_pydoc_text_is_long_and_stable() -> None:
    found = text.pydoc_text()
    assert len(found) > 300_000
    assert "lambda" in found
    assert found == text.pydoc_text()


def test_windows_start_at_even_distances() -> None:
    letters = "".join(chr(32 + index % 90) for index in range(1000))
    windows = text.token_windows(Letters(), letters, 10, 4)
    assert windows.shape == (4, 10)
    assert windows.dtype == torch.int64
    for row, start in zip(windows, (0, 250, 500, 750)):
        assert row.tolist() == [ord(letter) for letter in letters[start : start + 10]]


def test_windows_read_on_when_tokens_are_long() -> None:
    assert text.token_windows(Words(), ("x" * 30 + " ") * 40, 10, 2).tolist() == [[30] * 10] * 2


def test_short_text_is_refused() -> None:
    with pytest.raises(EffError, match="part 0 has 5") as caught:
        text.token_windows(Letters(), "short text", 8, 2)
    assert caught.value.code == "EFF-U103"


def _record(version: int, strings: list[str | None]) -> bytes:
    data = b"X\n" + struct.pack(">iii", version, 0x040201, 0x020300)
    if version == 3:
        data += struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">ii", 16, len(strings))
    for item in strings:
        raw = b"" if item is None else item.encode()
        data += struct.pack(">ii", 0x00040009, -1 if item is None else len(raw)) + raw
    return struct.pack(">I", len(data)) + zlib.compress(data)


def test_strings_of_an_r_database() -> None:
    first, second = ["EMMA", "", "café"], ["one", None, "two"]
    found = list(text.read_strings(_record(3, [*first]) + _record(2, second)))
    assert found == [["EMMA", "", "café"], ["one", "", "two"]]


def test_missing_apt_names_the_fallback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EFF_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EffError, match="apt-get is not here") as caught:
        text.austen_text()
    assert caught.value.code == "EFF-U106"
    assert "pydoc_text" in str(caught.value)


@pytest.mark.network
def test_austen_is_six_novels() -> None:
    try:
        found = text.austen_text()
    except EffError as error:
        pytest.skip(str(error))
    assert 3_500_000 < len(found) < 4_500_000
    for title in ("EMMA", "MANSFIELD PARK", "NORTHANGER ABBEY", "Persuasion", "PRIDE AND PREJUDICE", "SENSE AND SENSI"):
        assert title in found
    assert "a single man in possession" in found
