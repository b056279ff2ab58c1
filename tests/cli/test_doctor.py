"""Check `eff doctor`, `eff targets` and `eff passes`."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from effcompile.cli import checks
from effcompile.cli.checks import Check
from effcompile.compiler import all_dispatches, all_methods, all_passes, catalog
from effcompile.core.options import Options
from effcompile.targets import devices
from tests.cli.command import run


def found(name: str) -> Check:
    return next(check for check in checks.all_checks() if check.name == name)


def test_doctor_tells_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "none"))
    done = run(capsys, "doctor", "--json")
    names = {check["name"] for check in done.value["checks"]}
    assert names >= {
        "python",
        "torch",
        "triton",
        "compiler",
        "cpu",
        "kernel rates",
        "gpu",
        "[hf]",
        "[onnx]",
        "torch cache",
        "eff cache",
    }
    assert done.code == (1 if done.value["broken"] else 0)
    assert {row["target"] for row in done.value["targets"]} == {device.word for device in devices()}
    assert all(row["explain"] and row["plan"] for row in done.value["targets"])
    shown = run(capsys, "doctor")
    assert shown.code == done.code
    assert "What each target can do here" in shown.out


def test_a_missing_extra_has_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks._version
    monkeypatch.setattr(checks, "_version", lambda name: None if name == "onnxscript" else real(name))
    check = found("[onnx]")
    assert check.state == "missing"
    assert "onnxscript" in check.text
    assert check.fix == "python -m pip install 'effcompile[onnx]'"
    assert "onnxscript" in str(metadata.requires("effcompile"))


def test_two_onnxruntimes_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [check for check in checks.all_checks() if check.name == "onnxruntime"]
    monkeypatch.setattr(checks, "_version", lambda name: "1.0")
    check = found("onnxruntime")
    assert check.state == "broken"
    assert "pip uninstall" in check.fix


def test_a_truncated_library_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "broken.so").write_bytes(b"\x7fELF")
    assert found("torch cache").state == "broken"
    done = run(capsys, "doctor")
    assert done.code == 1
    assert "eff cache verify --fix" in done.out


def test_no_compiler_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda word: None)
    assert found("compiler").state == "broken"


def test_switched_off_compilation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert "does nothing" in found("environment").text


def test_another_instruction_set_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert found("environment").fix == "unset ATEN_CPU_CAPABILITY"


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    listed = run(capsys, "targets", "--json").value["devices"]
    assert [device["name"] for device in listed] == [device.name for device in devices()]
    assert run(capsys, "targets", "h100", "--json").value["compute"] == "sm_90"
    assert "modelled" in run(capsys, "targets", "h100").out
    assert "data sheet" in run(capsys, "targets").out


def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    items = run(capsys, "passes", "--json").value["items"]
    kinds = {
        kind: [item["name"] for item in items if item["kind"] == kind]
        for kind in ("pass", "kernel", "policy", "dispatch")
    }
    assert kinds["pass"] == [item.name for item in all_passes(Options())]
    assert kinds["kernel"] == [item.name for item in (*catalog().exact, *catalog().sparse)]
    assert kinds["policy"] == [item.name for item in all_methods()]
    assert kinds["dispatch"] == [item.name for item in all_dispatches()]
    assert run(capsys, "passes", "sink-window", "--json").value["items"][0]["parameters"][-1] == "sinks=4"
    assert all(item["summary"].endswith(".") for item in items)
    one = run(capsys, "passes", "wrong-activation", "--pass", "tests.cli.samples:WrongActivation", "--json").value
    assert one["items"][0]["module"] == "tests.cli.samples"
