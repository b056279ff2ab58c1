"""Check discovery of verbs, usage errors with their near matches, exit codes, and JSON errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import effcompile.cli as package
from effcompile.cli import main as main_module
from effcompile.cli.main import verbs
from effcompile.core.errors import ContractError, EffError, RewriteError
from tests.cli.command import run

OURS = {"cache", "diff", "doctor", "explain", "passes", "plan", "repro", "show", "targets"}


def test_every_verb_is_a_file() -> None:
    assert set(verbs()) >= OURS
    assert {"main", "console", "models", "tables"} & set(verbs()) == set()


def test_a_new_file_is_a_new_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "say_hello.py").write_text(
        'def say_hello(name: str) -> int:\n    """Greet."""\n    print(name)\n    return 1\n'
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    done = run(capsys, "say-hello", "you")
    assert (done.code, done.out) == (1, "you\n")


@pytest.mark.parametrize("verb", sorted(OURS - {"cache"}))
def test_every_verb_has_json_and_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, verb, "--help")
    assert done.code == 0
    assert "--json" in done.out


@pytest.mark.parametrize(
    ("words", "code", "offer"),
    [
        (("exlain",), "EFF-U202", "did you mean explain"),
        (("explain", "zoo:llama-tiny", "--taget", "sm_90"), "EFF-U201", "did you mean --target"),
        (("cache", "verfy"), "EFF-U202", "did you mean verify"),
        (("explain",), "EFF-U200", "model"),
        (("explain", "zoo:lama-tiny"), "EFF-U101", "llama-tiny"),
        (("explain", "zoo:llama-tiny", "--target", "sm_9"), "EFF-T101", "sm_90"),
        (("explain", "zoo:llama-tiny", "--shape", "c=1"), "EFF-U203", "size"),
        (("explain", "zoo:llama-tiny", "--dtype", "float33"), "EFF-U204", "float32"),
        (("explain", "zoo:llama-tiny", "--option", "strickt=1"), "EFF-U001", "strict"),
        (("explain", "zoo:llama-tiny", "--option", "strict"), "EFF-U205", "key=value"),
        (("explain", "zoo:llama-tiny", "--option", "disable=selct-linear"), "EFF-U011", "select-linear"),
        (("explain", "zoo:llama-tiny", "--require", "attenton=all"), "EFF-U001", "attention"),
        (("passes", "selct-linear"), "EFF-U011", "select-linear"),
        (("targets", "h1000"), "EFF-T101", "h100"),
        (("show", "nothing.json"), "EFF-P503", "eff plan"),
    ],
)
def test_a_mistake_is_exit_code_2_with_near_matches(
    words: tuple[str, ...], code: str, offer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = run(capsys, *words)
    assert told.code == 2
    assert told.err.startswith(code)
    assert offer in told.err
    assert told.out == ""
    listed = run(capsys, *words, "--json")
    assert listed.code == 2
    assert listed.value["error"]["code"] == code
    assert listed.value["error"]["exit_code"] == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EffError("EFF-A1", "no", site="layers.0", source="m.py:3", hint="do this"), 2),
        (ContractError("EFF-P502", "broken"), 3),
        (RewriteError("EFF-X901", "ours"), 4),
        (ValueError("surprise"), 4),
    ],
)
def test_errors_become_exit_codes(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(main_module, "build_app", fail)
    done = run(capsys, "x")
    assert done.code == code
    if isinstance(error, EffError) and error.hint:
        for part in ("EFF-A1", "layers.0", "m.py:3", "do this"):
            assert part in done.err


def test_the_module_and_the_script_run() -> None:
    done = subprocess.run([sys.executable, "-m", "effcompile", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.1.0"


def test_colors_are_off_where_nobody_wants_them() -> None:
    environment = {**os.environ, "NO_COLOR": "1", "FORCE_COLOR": ""}
    done = subprocess.run(
        [sys.executable, "-m", "effcompile", "targets"], capture_output=True, text=True, check=True, env=environment
    )
    assert "\x1b[" not in done.stdout
    assert done.stderr == ""
