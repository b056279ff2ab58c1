"""Artifacts: what is written is read back; what was tampered with is refused by name, before anything of it is opened."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effcompile.core import bundle
from effcompile.core.artifact import NAME, Check, Manifest, SiteForm, TensorInfo, check_name
from effcompile.core.bundle import read_artifact, writing
from effcompile.core.errors import EffError

T = TypeVar("T")
MANIFEST = Manifest(
    form="onnx",
    model="zoo:tiny",
    target="cpu:onnx",
    plan_hash="0" * 64,
    versions=(("torch", "2.13.0"),),
    inputs=(TensorInfo("ids", "int64", ("batch", 7)),),
    sites=(SiteForm("layers.0", "same", "sdpa"),),
    checks=(Check((("batch", 2),), 1e-6, "logits"),),
)


def written(out: Path, force: bool = False) -> Path:
    """Write a small artifact."""
    with writing(out, force=force) as draft:
        draft.file("model.onnx").write_bytes(b"graph" * 99)
        draft.file("weights/a.bin").write_bytes(bytes(range(256)))
        draft.file("code/k.cubin", native=True).write_bytes(b"\x7fELF")
        draft.manifest = MANIFEST
    return out


@pytest.fixture(params=["a", "a.zip"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return where an artifact goes: a folder, or a zip."""
    return tmp_path / str(request.param)


def code_of(action: Callable[[], object]) -> str:
    """Return the code of the error that an action raises."""
    with pytest.raises(EffError) as caught:
        action()
    return caught.value.code


def outcome(action: Callable[[], T]) -> tuple[str, T | None]:
    """Return the code of the error that an action raises, or what it returns."""
    try:
        return "", action()
    except EffError as error:
        return error.code, None


def test_what_is_written_is_read(place: Path) -> None:
    with read_artifact(written(place)) as found:
        assert replace(found.manifest, files=()) == MANIFEST
        assert found.file("model.onnx").read_bytes() == b"graph" * 99
        assert [name for name, entry in found.manifest.files if entry.native] == ["code/k.cubin"]
        assert code_of(lambda: found.file("code/k.cubin")) == "EFF-E107"
        assert code_of(lambda: found.file("nothing")) == "EFF-E104"
        folder = found.folder
    assert folder.exists() == (place.suffix != ".zip")
    with read_artifact(place, trust=True) as found:
        assert found.file("code/k.cubin").read_bytes() == b"\x7fELF"


def test_equal_files_make_equal_zips(tmp_path: Path) -> None:
    assert written(tmp_path / "a.zip").read_bytes() == written(tmp_path / "b.zip").read_bytes()


def test_a_failed_write_leaves_nothing(place: Path) -> None:
    def fails() -> None:
        with writing(place) as draft:
            draft.file("half").write_bytes(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert list(place.parent.iterdir()) == []


def test_only_an_artifact_is_replaced_and_only_when_told(place: Path) -> None:
    written(place)
    assert code_of(lambda: written(place)) == "EFF-E101"
    read_artifact(written(place, force=True)).close()
    other = place.parent / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    assert code_of(lambda: written(other, force=True)) == "EFF-E101"
    assert (other / "thesis.txt").exists()
    assert len(list(place.parent.iterdir())) == 2


def change(folder: Path, **fields: object) -> None:
    """Rewrite fields of a manifest on disk."""
    data = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**data, **fields}))


TAMPERED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a flipped byte": ("EFF-E105", lambda f: (f / "model.onnx").write_bytes(b"Graph" + b"graph" * 98)),
    "a shorter file": ("EFF-E105", lambda f: (f / "model.onnx").write_bytes(b"graph")),
    "a missing file": ("EFF-E105", lambda f: (f / "model.onnx").unlink()),
    "one file more": ("EFF-E105", lambda f: (f / "more.so").write_bytes(b"")),
    "no manifest": ("EFF-E102", lambda f: (f / NAME).unlink()),
    "a file that is a link": ("EFF-E103", lambda f: ((f / "model.onnx").unlink(), (f / "model.onnx").symlink_to("/etc/hosts"))),
    "a folder that is a link": ("EFF-E103", lambda f: (f / "more").symlink_to("/etc")),
    "a pipe": ("EFF-E103", lambda f: os.mkfifo(f / "pipe")),
    "a manifest that is a link": ("EFF-E103", lambda f: ((f / NAME).rename(f.parent / "m"), (f / NAME).symlink_to(f.parent / "m"))),
    "no JSON": ("EFF-E104", lambda f: (f / NAME).write_text("{")),
    "deep JSON": ("EFF-E104", lambda f: (f / NAME).write_text("[" * 200_000)),
    "no UTF-8": ("EFF-E104", lambda f: (f / NAME).write_bytes(b"\xff\xfe")),
    "another schema": ("EFF-E104", lambda f: change(f, schema=99)),
    "an unknown field": ("EFF-E104", lambda f: change(f, colour="red")),
    "a wrong type": ("EFF-E104", lambda f: change(f, target=3)),
    "an unknown form": ("EFF-E104", lambda f: change(f, form="exe")),
    "an unknown status": ("EFF-E104", lambda f: change(f, sites=[{"site": "", "status": "lost", "form": "", "reason": ""}])),
    "a path that climbs": ("EFF-E103", lambda f: change(f, files={"../x": {"sha256": "0" * 64, "bytes": 0, "native": False}})),
    "a hash that is none": ("EFF-E104", lambda f: change(f, files={"x": {"sha256": "0", "bytes": 0, "native": False}})),
    "too much": ("EFF-E106", lambda f: change(f, files={"x": {"sha256": "0" * 64, "bytes": 1 << 50, "native": False}})),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_is_refused_by_name(what: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "a")
    code, act = TAMPERED[what]
    act(folder)
    assert code_of(lambda: read_artifact(folder, trust=True)) == code


ODD = [
    "",
    "/etc/passwd",
    "../x",
    "a/../b",
    "a//b",
    "./a",
    "a\\b",
    "C:x",
    "a/.hidden",
    "nul",
    "com1.txt",
    "a.",
    "b ",
    "x\n",
    "é",
]


@pytest.mark.parametrize("name", [*ODD, "a" * 600, 3])
def test_odd_names(name: object) -> None:
    assert code_of(lambda: check_name(name)) == "EFF-E103"


def packed(path: Path, members: dict[str, bytes], mode: int = stat.S_IFREG | 0o644) -> Path:
    """Write a zip with names as they are."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, data)
    return path


def test_hostile_zips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = lambda path: code_of(lambda: read_artifact(path))  # noqa: E731
    assert read(packed(tmp_path / "climbs.zip", {"../../x": b""})) == "EFF-E103"
    assert read(packed(tmp_path / "absolute.zip", {"/tmp/x": b""})) == "EFF-E103"
    assert read(packed(tmp_path / "link.zip", {"x": b"/etc/hosts"}, stat.S_IFLNK | 0o777)) == "EFF-E103"
    assert read(packed(tmp_path / "case.zip", {"a": b"", "A": b""})) == "EFF-E103"
    monkeypatch.setattr(bundle, "MOST_BYTES", 1000)
    bomb = packed(tmp_path / "bomb.zip", {"x": bytes(100_000)})
    assert read(bomb) == "EFF-E106"
    monkeypatch.setattr(bundle, "MOST_FILES", 3)
    assert read(packed(tmp_path / "many.zip", {str(n): b"" for n in range(5)})) == "EFF-E106"
    (tmp_path / "text.zip").write_text("no zip")
    assert read(tmp_path / "text.zip") == "EFF-E102"
    assert read(tmp_path / "nothing") == "EFF-E102"
    (tmp_path / "to").symlink_to(tmp_path / "bomb.zip")
    assert read(tmp_path / "to") == "EFF-E102"
    assert not (tmp_path.parent / "x").exists()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
    end=st.integers(0, 2000),
)
def test_a_damaged_zip_is_refused_or_whole(cuts: list[tuple[int, int]], end: int, tmp_path: Path) -> None:
    """Whatever bytes are damaged: an error of ours, or the files exactly as they were."""
    good = tmp_path / "good.zip"
    if not good.exists():
        written(good)
    data = bytearray(good.read_bytes())
    for at, value in cuts:
        data[at % len(data)] = value
    bad = tmp_path / "bad.zip"
    bad.write_bytes(bytes(data[: len(data) - end] if end < len(data) // 2 else data))
    code, found = outcome(lambda: read_artifact(bad, trust=True))
    if found is None:
        assert code.startswith("EFF-E10")
        return
    with found:
        assert found.file("model.onnx").read_bytes() == b"graph" * 99


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["form", "files", "x"]), inner, max_size=4),
        max_leaves=12,
    ),
    st.sampled_from([None, "form", "versions", "inputs", "outputs", "sites", "checks", "details", "files", "schema"]),
)  # fmt: skip
def test_a_manifest_of_anything_is_refused_by_name(value: object, field: str | None) -> None:
    data: object = value if field is None else {**MANIFEST.to_json(), field: value}
    assert outcome(lambda: Manifest.read(json.dumps(data)))[0] in ("", "EFF-E103", "EFF-E104")


def test_a_manifest_that_calls_machine_code_something_else(tmp_path: Path) -> None:
    """What is run needs trust, whatever the manifest says of it: its writer is whom trust is about."""
    folder = written(tmp_path / "a")
    data = json.loads((folder / NAME).read_text())
    data["files"]["code/k.cubin"]["native"] = False
    (folder / NAME).write_text(json.dumps(data))
    with read_artifact(folder) as found:
        assert code_of(lambda: found.file("code/k.cubin", runs=True)) == "EFF-E107"
        assert code_of(lambda: found.check_trust("it")) == "EFF-E107"
    with read_artifact(folder, trust=True) as found:
        assert found.file("code/k.cubin", runs=True).exists()
