"""Check that damage in TorchInductor's cache is found, moved away, and mended by the next compilation."""

from __future__ import annotations

import _ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from effcompile.cli.artifacts import check, survey
from tests.cli.command import run

QUICK = {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}  # a header of 10 s pays only for many kernels
COMPILE = """
import torch
x = torch.linspace(-2, 2, 100)
print(float((torch.compile(lambda x: torch.sin(x) * 2 + x)(x) - (torch.sin(x) * 2 + x)).abs().max()))
"""


def compiled(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **QUICK, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    return subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder laid out as TorchInductor's, with a real library."""
    place = tmp_path / "inductor"
    for part in ("fxgraph/ab", "ab", "locks"):
        (place / part).mkdir(parents=True)
    shutil.copy(_ctypes.__file__, place / "ab" / "cabinet.so")
    (place / "fxgraph" / "ab" / "entry.json").write_text(json.dumps({"a": 1}))
    (place / "ab" / "cabinet.cpp").write_text("int main() {}")
    return place


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def test_a_sound_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "cache", "verify", "--folder", folder, "--json")
    assert (done.code, done.value["files"], done.value["flaws"]) == (0, 3, [])
    assert run(capsys, "cache", "verify", "--folder", folder / "none").code == 0


def test_a_truncated_library_is_moved_away(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = folder / "ab" / "cabinet.so"
    truncate(library)
    seen = run(capsys, "cache", "verify", "--folder", folder)
    assert seen.code == 1
    assert "truncated" in seen.out
    assert library.exists()
    fixed = run(capsys, "cache", "verify", "--folder", folder, "--fix", "--json")
    assert fixed.code == 0
    assert [Path(path).name for path in fixed.value["quarantined"]] == ["cabinet.so"]
    assert not library.exists()
    assert run(capsys, "cache", "verify", "--folder", folder, "--json").value["flaws"] == []


def test_others_must_not_write_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.chmod(0o777)
    assert "chmod go-w" in run(capsys, "cache", "verify", "--folder", folder).out


@pytest.mark.slow
def test_torch_mends_what_was_moved_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = compiled(tmp_path)
    assert done.returncode == 0, done.stderr
    assert survey(tmp_path).flaws == ()
    for path in tmp_path.rglob("*.so"):
        truncate(path)
    assert compiled(tmp_path).returncode != 0  # torch does not heal this by itself
    assert run(capsys, "cache", "verify", "--folder", tmp_path, "--fix").code == 0
    again = compiled(tmp_path)
    assert again.returncode == 0, again.stderr
    assert float(again.stdout) < 1e-5


@pytest.mark.parametrize(
    ("name", "data", "fatal"),
    [("a.so", b"", True), ("a.so", b"hello" * 100, True), ("a.json", b"{", False), ("a.cpp", b"", False)],
)
def test_kinds_of_damage(name: str, data: bytes, fatal: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    flaw = check(path, len(data))
    assert flaw is not None
    assert flaw.fatal is fatal


def test_every_truncation_is_seen(tmp_path: Path) -> None:
    data = Path(_ctypes.__file__).read_bytes()
    cut = tmp_path / "cut.so"
    for share in range(0, 100, 7):
        cut.write_bytes(data[: len(data) * share // 100])
        assert check(cut, cut.stat().st_size) is not None, share
    cut.write_bytes(data[:-1])
    assert check(cut, len(data) - 1) is not None
    cut.write_bytes(data)
    assert check(cut, len(data)) is None


def test_clear(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = run(capsys, "cache", "clear", "--folder", folder)
    assert refused.code == 2
    assert "--yes" in refused.err
    assert folder.is_dir()
    done = run(capsys, "cache", "clear", "--folder", folder, "--yes", "--json")
    assert (done.code, done.value["removed"]) == (0, True)
    assert not folder.exists()
    assert run(capsys, "cache", "clear", "--folder", folder, "--yes", "--json").value["removed"] is False


def test_clear_spares_what_is_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis").write_text("years of work")
    done = run(capsys, "cache", "clear", "--folder", tmp_path, "--yes")
    assert done.code == 2
    assert "EFF-C804" in done.err
    assert (tmp_path / "thesis").exists()


@pytest.mark.slow
def test_export(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    environment = {**os.environ, **QUICK, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    words = [sys.executable, "-m", "effcompile", "cache", "export", "tests.cli.samples:plain", "-o", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 1000
    load = f"found = torch.compiler.load_cache_artifacts(open({str(out)!r}, 'rb').read())"
    load = f"import torch; {load}; print(sum(map(len, found.artifacts.values())))"
    fresh = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "other")}
    loaded = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, env=fresh, check=True)
    assert int(loaded.stdout) > 0
