"""Check the scores of a policy against direct formulas in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import quality_report
from bench.case import Settings, Watch
from bench.cases import sparse_quality
from bench.cases.sparse_quality import SparseQuality
from bench.quality import TAIL, Found, Hunt, Score, hunts
from bench.report import BEGIN, END
from bench.sparse_profile import pairs
from bench.stats import Spread
from effcompile.core.expr import KEY, QUERY, TRUE, apply, axis
from effcompile.core.expr_eval import to_json


class Letters:
    """Tokenize a letter at a time."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_a_score_is_that_of_float64() -> None:
    draw = torch.Generator().manual_seed(3)
    score, losses, tails, divergences, agreed = Score(), [], [], [], []
    for length in (700, TAIL + 300):
        logits, dense = (torch.randn(length, 11, generator=draw) * 3 for _ in range(2))
        ids = torch.randint(11, (length,), generator=draw)
        score.add(logits, dense, ids)
        mine, base = (x.double().log_softmax(-1)[:-1] for x in (logits, dense))
        loss = -mine[torch.arange(length - 1), ids[1:]]
        losses.append(loss)
        tails.append(loss[-TAIL:])
        divergences.append((base.exp() * (base - mine)).sum(-1))
        agreed.append(mine.argmax(-1) == base.argmax(-1))
    found = score.to_json()
    assert found["perplexity"] == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-4)
    assert found["tail_perplexity"] == pytest.approx(math.exp(torch.cat(tails).mean()), rel=1e-4)
    assert found["kl"] == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
    assert found["top1"] == pytest.approx(float(torch.cat(agreed).double().mean()), rel=1e-4)
    assert found["positions"] == 699 + TAIL + 299


def test_the_same_logits_agree_wholly() -> None:
    logits, score = torch.randn(90, 7), Score()
    score.add(logits, logits, torch.zeros(90, dtype=torch.long))
    assert (score.to_json()["kl"], score.to_json()["top1"]) == (0.0, 1.0)


def test_prompts_have_the_length_and_hide_the_key_where_they_say() -> None:
    text = "".join(chr(97 + n % 26) for n in range(40_000))
    prompts = list(hunts(Letters(), text, 600, 5))
    assert [round(hunt.depth, 2) for hunt in prompts] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len({tuple(hunt.ids[0].tolist()) for hunt in prompts}) == 5
    for hunt in prompts:
        letters = "".join(map(chr, hunt.ids[0].tolist()))
        key = letters[-5:]
        assert hunt.ids.shape == (1, 600)
        assert hunt.answer == 6  # a space and five digits
        assert key.isdigit()
        place = letters.index(f"The pass key is {key}. Remember it.")
        assert letters.count(key) == 3
        assert abs(place / (600 - 120) - hunt.depth) < 0.1
    again = [hunt.ids.tolist() for hunt in hunts(Letters(), text, 600, 5)]
    assert again == [hunt.ids.tolist() for hunt in prompts]
    with pytest.raises(ValueError, match="hold no prompt"):
        next(hunts(Letters(), text, 80, 5))
    with pytest.raises(ValueError, match="too few tokens"):
        next(hunts(Letters(), text, 60_000, 5))


def _naming(ids: Tensor, places: int) -> Tensor:
    """Return logits whose guess is right at the last `places` tokens, and wrong before."""
    logits = torch.zeros(1, ids.shape[1], 10)
    logits[0, :, 0] = 1.0
    for place in range(ids.shape[1] - places, ids.shape[1]):
        logits[0, place - 1, ids[0, place]] = 2.0
    return logits


def test_a_key_is_found_when_every_token_of_it_is_guessed() -> None:
    hunt, count = Hunt(torch.tensor([[1, 2, 3, 4, 5, 6]]), 3, 0.5), Found()
    count.add(hunt, _naming(hunt.ids, 3))
    count.add(hunt, _naming(hunt.ids, 2))
    assert count.to_json() == {"found": 1, "tries": 2, "missed_at": [0.5]}


def test_pairs_are_counted_under_the_predicate() -> None:
    chosen = torch.tensor([[[[1, 0, 0], [0, 1, 0], [1, 0, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]).bool()
    causal = to_json(apply("le", axis(KEY), axis(QUERY)))
    kept, allowed = pairs(causal, chosen, (1, 2, 10, 10), (), (), (4, 4))
    # Blocks of 4: a diagonal one has 10 pairs, a whole one 16, the last ones are 2 rows high: 8 and 3.
    assert (kept, allowed) == (10 + 10 + (8 + 3) + 55, 2 * 55)
    assert pairs(to_json(TRUE), torch.ones(1, 1, 2, 2).bool(), (2, 4, 7, 8), (), (), (4, 4)) == (8 * 56, 8 * 56)


@pytest.mark.slow
def test_a_policy_is_scored_against_dense() -> None:
    """Two arms of the trained model on short windows: dense agrees with itself, a narrow window does not."""
    pytest.importorskip("transformers")
    case = SparseQuality(
        policies={"narrow": "sink-window{window=32}"},
        decoding={"few": "block-topk{budget=64,dense_layers=0}"},
        tries=2,
        steps=6,
    )
    settings = Settings(lengths=(256,), rounds=2, threads=1)
    rows = {row.parameters["form"]: row for row in case.rows(settings)}
    forms = ("text", "pass-key", "decode")
    text, keys, steps = (case.measure(rows[form], settings, Watch())[0] for form in forms)
    for name in ("pydoc", "austen"):
        same, few = (steps["arms"][arm]["quality"][name] for arm in ("dense", "few"))
        assert (same["kl"], same["top1"]) == (0.0, 1.0)
        assert few["kl"] > 0.001
        dense, narrow = (text["arms"][arm]["quality"][name] for arm in ("dense", "narrow"))
        assert (dense["kl"], dense["top1"]) == (0.0, 1.0)
        assert narrow["kl"] > 0.01
        assert narrow["perplexity"] > dense["perplexity"]
    # In so short a prompt the dense model itself misses a key here and there; behind a window of 32 it can find none.
    assert keys["arms"]["dense"]["pass_key"]["found"] >= 1
    assert keys["arms"]["narrow"]["pass_key"]["found"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "pass-key", "decode"])
def test_every_arm_runs_compiled(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No arm of any form falls back: each is compiled, on tokens of the trained model, and reads what it was given."""
    pytest.importorskip("transformers")
    import effcompile as eff
    from effcompile.report import log

    case = SparseQuality(tries=2, steps=3)
    # A length above every budget and window, so that each policy has something to leave out.
    settings = Settings(lengths=(1100,), forms=(form,), rounds=1, threads=1, quick=True)
    log().graphs.clear()
    monkeypatch.setattr(sparse_quality, "release", lambda: None)  # which forgets the report with the compiled code
    (row,) = case.rows(settings)
    (found,) = case.measure(row, settings, Watch())
    policies = case.decoding if form == "decode" else case.policies
    assert set(found["arms"]) == {"dense", *policies}
    assert all("seconds" in arm for arm in found["arms"].values())
    ran = {site["policy"].partition("{")[0] for graph in eff.report()["graphs"] for site in graph["sites"]}
    assert {policy.partition("{")[0] for policy in policies.values()} <= ran


def _row() -> dict[str, object]:
    def arm(policy: str, perplexity: float, **more: object) -> dict[str, object]:
        quality = {"perplexity": perplexity, "tail_perplexity": perplexity, "kl": 0.1, "top1": 0.9, "positions": 9}
        return {"policy": policy, "seconds": Spread((1.0, 2.0)).to_json(), "quality": {"pydoc": quality}, **more}

    arms = {"dense": arm("", 10.0), "w": arm("sink-window{window=8}", 11.0), "t": arm("block-topk{density=0.5}", 10.1)}
    arms["t"] |= {"density": 0.5, "selector_share": 0.03, "selector_of_saved": 0.08}
    return {
        "id": "8-text",
        "run": "2026-01-02",
        "parameters": {"length": 8, "form": "text", "dtype": "float32"},
        "arms": arms,
        "ratios": [{"arm": "w", "to": "dense", "median": 1.5}, {"arm": "t", "to": "dense", "median": 1.25}],
    }


def test_the_page_shows_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "sparse_attention.md").write_text(f"# Page\n{BEGIN}\n{END}\nend\n")
    cpu = {"model": "Chip", "isa": "avx2"}
    run = {"date": "2026-01-02", "cpu": cpu, "threads": 1, "versions": {}, "commit": {"hash": "abc"}}
    document = {"about": "about", "rows": [_row()], "runs": {"2026-01-02": run}}
    earlier = {**document, "rows": [{**_row(), "run": "2026-01-01", "arms": {}}]}
    documents = [earlier, document]  # of equal rows the last run counts
    assert quality_report.write(tmp_path, documents)
    page = (tmp_path / "sparse_attention.md").read_text()
    assert "| `block-topk{density=0.5}` | 1.50 s | 1.25x | 0.500 | 3.0 % | 8.0 % | 10.10 (+1.0 %) |" in page
    assert quality_report.curve(_row()) == [
        ("sink-window", "window=8", pytest.approx(10.0), 1.5),
        ("block-topk", "density=0.5", pytest.approx(1.0), 1.25),
    ]
    assert (tmp_path / quality_report.PICTURE).stat().st_size > 5000
    assert not quality_report.write(tmp_path, documents)
