"""Check that `eff repro` finds a deliberate miscompile and clears a sound model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import run

WRONG = ("--pass", "tests.cli.samples:WrongActivation")


def test_a_sound_model(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "repro", "tests.cli.samples:plain", "--no-compile", "--json")
    assert (done.code, done.value["culprit"]) == (0, None)
    assert done.value["rows"]
    assert all(row["within"] for row in done.value["rows"])


def test_the_wrong_pass_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "repro", "tests.cli.samples:plain", *WRONG, "--json")
    assert done.code == 1
    assert (done.value["culprit"], done.value["confirmed"]) == ("wrong-activation", True)
    assert [row["within"] for row in done.value["rows"]] == [True] * (len(done.value["rows"]) - 1) + [False]
    assert f"EFF_FUEL={done.value['fuel']}" in done.value["next"][0]
    shown = run(capsys, "repro", "tests.cli.samples:plain", *WRONG)
    assert shown.code == 1
    assert "wrong-activation is the first to leave tolerance" in shown.out
    assert "without it the result is right again" in shown.out


def test_the_compiled_model_is_checked_too(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "repro", "tests.cli.samples:plain", "--json")
    assert (done.code, done.value["culprit"]) == (0, None)
    assert done.value["rows"][-1]["stage"] == "eff"


@pytest.mark.slow
def test_the_minifier_writes_a_launcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "repro", "tests.cli.samples:plain", *WRONG, "--no-compile", "--minify", tmp_path, "--json")
    assert done.code == 1
    launcher = Path(done.value["minifier"])
    assert launcher.is_file()
    assert "run_repro" in launcher.read_text()
    sound = run(capsys, "repro", "tests.cli.samples:plain", "--no-compile", "--minify", tmp_path / "none", "--json")
    assert (sound.code, sound.value["minifier"]) == (0, None)
