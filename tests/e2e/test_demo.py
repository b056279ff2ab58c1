"""Check the demo: arms in processes of their own, judged, drawn, and told to the caller by the exit code."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from effcompile.cli import demo as verb
from effcompile.cli.main import main
from effcompile.core.errors import EffError
from effcompile.demo import arm, measure, results
from effcompile.demo.circumstances import Load, Reading, between, versions
from effcompile.demo.measure import Job, real_windows
from effcompile.demo.page import MEASURED, SITES, measured, page, sites
from effcompile.demo.picture import draw
from effcompile.demo.process import ArmProcess
from effcompile.demo.results import Cell, Results, site_groups
from effcompile.models import llama

LENGTH = 40


def windows(rounds: int = 3) -> measure.Windows:
    draw_from = torch.Generator().manual_seed(0)
    return {LENGTH: torch.randint(0, 128, (rounds, LENGTH), generator=draw_from).tolist()}


def cell(name: str, length: int = 8, nats: float = 3.0, seconds: tuple[float, ...] = (1.0, 1.1, 1.2)) -> Cell:
    scores = tuple((-nats,) * (length - 1) for _ in seconds)
    return Cell(name, length, seconds, first_seconds=5.0, scores=scores, peak=2 * 10**9, rise=10**8)


def made(*cells: Cell, others: float = 0.0) -> Results:
    return Results(
        model="some-model",
        source="made up",
        text="none",
        cells=cells,
        report={"graphs": [], "notices": [], "counters": {}},
        process_peaks={},
        machine={"cpu": "a CPU", "isa": "AVX2", "cores": 2, "threads": 2, "memory": 8 * 10**9, "system": "Linux"},
        versions=versions(),
        loads=(Load(0.1, 0.5, others, 2),),
        seconds=1.0,
    )


@pytest.fixture(scope="module")
def real() -> Results:
    """Measure a tiny model for real; TorchInductor is left out for time's sake, eff goes through it anyway."""
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    try:
        return measure.measure(Job("llama-tiny", windows(), "random tokens", arms=("eager", "eff")), lambda text: None)
    finally:
        patch.undo()


def test_arms_agree_on_the_logits_of_the_timed_calls(real: Results) -> None:
    assert real.agreed
    assert 0.0 <= real.token_difference(LENGTH) < 1e-3
    eager, eff = real.at("eager", LENGTH), real.at("eff", LENGTH)
    assert [len(scores) for scores in eager.scores] == [LENGTH - 1] * 3
    assert len({scores[0] for scores in eager.scores}) == 3  # one window a round, not one for all
    assert eager.compile_seconds is None
    assert eff.compile_seconds is not None
    assert eff.compile_seconds > eff.latency
    assert eager.peak > eager.rise >= 0


def test_scores_are_those_of_the_model(real: Results) -> None:
    """The arm scores in blocks of rows; here it is done in one."""
    from effcompile.models import zoo

    ids = windows()[LENGTH][0]
    model = zoo.load("llama-tiny")
    with torch.no_grad():
        logits = model.model(torch.tensor([ids]))
    logits = getattr(logits, "logits", logits)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
    torch.testing.assert_close(torch.tensor(real.at("eager", LENGTH).scores[0]), -loss, rtol=1e-4, atol=1e-4)


def test_eff_arm_reports_its_sites(real: Results) -> None:
    (group,) = site_groups(real.report)
    assert group.count == 2
    assert "{0-1}" in group.places
    assert group.kernel
    assert len(group.source.split("/")) <= 3  # no folder of this machine


def test_picture_and_page_are_complete(real: Results, tmp_path: Path) -> None:
    draw(real, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    text = page(real, tmp_path / "demo.png", [("explain.html", "why & how")])
    for line in (*MEASURED, *SITES, real.verdict(), "data:image/png;base64,", "why &amp; how"):
        assert line in text
    assert "<script" not in text
    assert str(Path.home()) not in text
    assert len(measured(real)) == 2
    assert len(sites(real)) == 1
    json.dumps(real.to_json())


def test_scoring_in_blocks_equals_scoring_at_once() -> None:
    draw_from = torch.Generator().manual_seed(1)
    length, vocab = 2 * 256 + 7, 11
    logits = torch.randn(1, length, vocab, generator=draw_from)
    ids = torch.randint(0, vocab, (length,), generator=draw_from)
    expected = logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(arm._scores(logits, ids.tolist())), expected)


def test_disagreement_is_found() -> None:
    fine = made(cell("eager"), cell("inductor"), cell("eff", nats=3.0 + 5e-4))
    assert fine.agreed
    wrong = made(cell("eager"), cell("inductor"), cell("eff", nats=3.0 + 2e-3))
    assert not wrong.agreed
    assert "DISAGREE" in wrong.verdict()
    assert wrong.to_json()["agreed"] is False


@pytest.mark.parametrize("nats", [math.nan, 1e6, -math.inf])
def test_a_model_that_returns_no_numbers_disagrees(nats: float) -> None:
    assert not made(cell("eager"), cell("eff", nats=nats)).agreed


def test_noise_is_told() -> None:
    assert made(cell("eager"), cell("eff")).noise() == ()
    assert "other processes used 1.5 of 2 cores" in made(cell("eager"), cell("eff"), others=1.5).noise()[0]
    assert "eff at 8 tokens" in made(cell("eager"), cell("eff", seconds=(1.0, 1.5, 3.0))).noise()[0]


def test_load_of_others_is_what_is_not_ours() -> None:
    load = between(Reading(0.0, 100.0, 50.0, 0.2), Reading(10.0, 125.0, 65.0, 1.9))
    assert load.others == pytest.approx(1.0)  # 25 s busy, 15 s of them ours, in 10 s
    assert (load.before, load.after) == (0.2, 1.9)


def test_an_arm_that_dies_says_why(tmp_path: Path) -> None:
    with ArmProcess("no-such-model", "eager", tmp_path) as process, pytest.raises(EffError) as caught:
        process.wait_ready()
    assert caught.value.code == "EFF-D001"
    assert "eager" in caught.value.message


def test_an_arm_ends_with_its_context(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ArmProcess("llama-tiny", "eager", tmp_path) as process:
        raise KeyboardInterrupt
    assert process._process.returncode is not None


def test_text_falls_back_to_python_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise EffError("EFF-U106", "no apt here")

    monkeypatch.setattr("effcompile.models.text.austen_text", absent)
    monkeypatch.setattr("effcompile.models.text.pydoc_text", lambda: "abcdefgh " * 200)

    def tokenizer(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    found, name, remarks = real_windows(tokenizer, (16, 32), 2)
    assert {length: [len(ids) for ids in rows] for length, rows in found.items()} == {16: [16, 16], 32: [32, 32]}
    assert "documentation" in name
    assert "no apt here" in remarks[0]


@pytest.mark.parametrize(("nats", "code"), [(3.0, 0), (3.1, 1)])
def test_verb_writes_everything_and_judges(
    nats: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The measurement and the model are replaced, the rest of the verb is not."""
    asked: list[Job] = []

    def fake(job: Job, progress: measure.Progress) -> Results:
        asked.append(job)
        return replace(made(cell("eager"), cell("inductor"), cell("eff", nats=nats)), model=job.model)

    monkeypatch.setattr(verb, "MODEL", "llama-tiny")
    monkeypatch.setattr(verb, "QUICK", (32,))
    entries = tuple(replace(entry, tokenizer=lambda: None) for entry in llama.ENTRIES)
    monkeypatch.setattr(llama, "ENTRIES", entries)
    monkeypatch.setattr(measure, "measure", fake)
    monkeypatch.setattr(measure, "real_windows", lambda tokenizer, lengths, rounds: ({}, "a text", ()))
    assert main(["demo", "--quick", "--json", "-o", str(tmp_path / "out")]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["agreed"] is (code == 0)
    assert told["cells"][2]["perplexity"] == pytest.approx(math.exp(nats))
    assert asked[0].model == "llama-tiny"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"demo.png", "report.html", "explain.html", "results.json"}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == told
    assert "{0-1}" in (tmp_path / "out" / "explain.html").read_text()


def test_table_is_readable_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    verb._show(made(cell("eager"), cell("inductor"), cell("eff", nats=3.1)), Path("out"))
    out = capsys.readouterr().out
    assert "DISAGREE" in out
    assert "TorchInductor" in out
    assert "out/report.html" in out


@pytest.mark.slow
@pytest.mark.network
def test_quick_demo_on_real_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "--json", "-o", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {c["arm"] for c in told["cells"]} == {"eager", "inductor", "eff"}
    assert all(15 < c["perplexity"] < 45 for c in told["cells"])  # 28.5 on Austen; random weights would give 49,152
    assert max(told["perplexity_difference"].values()) < results.AGREEMENT
