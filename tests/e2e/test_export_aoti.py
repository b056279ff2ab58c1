"""AOTInductor packages: eager's numbers at other sizes, no call before the weights, no machine code without trust."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

import effcompile as eff
from effcompile.cli.models import load_model
from effcompile.codegen.aoti.session import AotiSession, check_package
from effcompile.codegen.emitters import aoti
from effcompile.core import processor
from effcompile.core.errors import EffError
from tests.cli.command import run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a package of a small encoder."""
    given = load_model("zoo:encoder-tiny", {"batch": 2, "seq": 16}, None, real=True)
    out = tmp_path_factory.mktemp("aoti") / "a"
    eff.export(given.model, given.args, given.kwargs, to="aoti", out=out, name="zoo:encoder-tiny")
    return out


@pytest.mark.slow
def test_a_package_gives_eagers_numbers(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = json.loads(
        run(capsys, "verify", str(made), "--model", "zoo:encoder-tiny", "--shape", "b=3,s=21", "--trust", "--json").out
    )
    assert checked["ok"], checked
    refused = run(capsys, "verify", str(made), "--model", "zoo:encoder-tiny")
    assert refused.code == 2
    assert "EFF-E107" in refused.err
    given = load_model("zoo:encoder-tiny", {"batch": 2, "seq": 9}, None, real=True)
    session = eff.load(made, trust=True)
    values = {name: x.numpy() for name, x in zip(session.inputs, [*given.args, *given.kwargs.values()], strict=True)}
    numpy.savez(tmp_path / "x.npz", **values)
    command = ("run", str(made), "--input", str(tmp_path / "x.npz"), "-o", str(tmp_path / "y.npz"), "--trust")
    assert run(capsys, *command).code == 0
    with torch.no_grad():
        wanted = given.runnable(*given.args, **given.kwargs)
    numpy.testing.assert_allclose(next(iter(numpy.load(tmp_path / "y.npz").values())), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_no_call_before_the_weights(made: Path) -> None:
    session = AotiSession(made / "model.pt2", ["x"], ["y"])
    with pytest.raises(EffError, match="EFF-E171"):
        session({"x": torch.zeros(2, 16, dtype=torch.int64)})
    with pytest.raises(EffError, match="EFF-E172"):
        session.load_constants({})
    with pytest.raises(EffError, match="EFF-E171"):
        session({"x": torch.zeros(2, 16, dtype=torch.int64)})


@pytest.mark.slow
def test_packages_that_are_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("no zip")
    shutil.copyfile(made / "model.pt2", tmp_path / "climbs.pt2")
    with zipfile.ZipFile(tmp_path / "climbs.pt2", "a") as archive:
        archive.writestr("model/../../../evil.txt", "x")
    for name in ("text.pt2", "climbs.pt2"):
        with pytest.raises(EffError, match="EFF-E174"):
            check_package(tmp_path / name)
        with pytest.raises(EffError, match="EFF-E174"):
            AotiSession(tmp_path / name, [], [])


@pytest.mark.slow
def test_another_kind_of_cpu_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    details = dict(json.loads((made / "manifest.json").read_text())["details"])
    assert details["instructions"].split() == list(processor.instructions())
    monkeypatch.setattr(aoti, "instructions", lambda: (*processor.instructions(), "avx1024"))
    assert eff.load(made, trust=True)  # more than was asked for
    monkeypatch.setattr(aoti, "instructions", lambda: processor.instructions()[1:])
    with pytest.raises(EffError, match=rf"EFF-E112.*CPU with {processor.instructions()[0]},"):
        eff.load(made, trust=True)


def test_a_cpu_without_the_instructions() -> None:
    aoti._check_processor(processor.instructions())
    aoti._check_processor(())  # a package of before
    with pytest.raises(EffError, match=r"EFF-E112.*with avx1024, and this one has not"):
        aoti._check_processor((*processor.instructions(), "avx1024"))


def test_a_chip_that_is_not_here(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(EffError, match="EFF-E170"):
        eff.export(torch.nn.Linear(2, 2).eval(), (torch.ones(3, 2),), to="aoti", target="sm_90", out=tmp_path / "a")
