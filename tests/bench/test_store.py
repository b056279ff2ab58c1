"""Check the form of result files, and that a partial run replaces only its own rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import store
from bench.stats import Spread, ratios
from effcompile.core.errors import EffError


def facts(date: str) -> dict[str, Any]:
    """Return a manifest of one run."""
    return {
        "date": date,
        "versions": {"torch": "2.13.0", "openvino": None},
        "cpu": {"model": "Chip", "isa": "avx"},
        "gpu": None,
        "threads": 2,
        "memory_bytes": 1,
        "commit": {"hash": "abcdef0123456789", "modified": False},
        "command": "eff bench",
        "environment": {},
        "settings": {},
        "load": [0.0, 0.0, 0.0],
    }


def row(name: str, eager: float, eff: float) -> dict[str, Any]:
    """Return one measured row with a failed and a skipped arm."""
    spreads = {"eager": Spread((eager, eager)), "inductor": Spread((eager / 2, eager / 2)), "eff": Spread((eff, eff))}
    arms: dict[str, Any] = {arm: {"seconds": spread.to_json()} for arm, spread in spreads.items()}
    arms |= {"onnxruntime": {"error": "no | kernel <for it>"}, "openvino": {"skipped": "other dtype"}}
    return {"id": name, "parameters": {}, "rounds": 2, "arms": arms, "ratios": ratios(spreads, ["eager"], ["eff"])}


def document() -> dict[str, Any]:
    """Return two rows of one run."""
    made = store.empty("demo", "Demo", "About it.", "call", "cpu", "chip")
    return store.merge(made, facts("2030-01-01T00:00:00+00:00"), [row("a", 4.0, 1.0), row("b", 0.004, 0.001)])


def test_a_good_document_has_no_problems(tmp_path: Path) -> None:
    assert store.check(document()) == []
    path = store.path_of(tmp_path / "results", "chip", "demo")
    store.write(path, document())
    assert store.read(path) == document()
    assert [item.name for item in path.parent.iterdir()] == ["demo.json"]


def test_a_row_is_replaced_and_keeps_its_place() -> None:
    later = facts("2030-02-02T00:00:00+00:00")
    merged = store.merge(document(), later, [row("a", 5.0, 1.0), row("c", 1.0, 1.0)])
    assert [(item["id"], item["run"][:7]) for item in merged["rows"]] == [
        ("a", "2030-02"),
        ("b", "2030-01"),
        ("c", "2030-02"),
    ]
    again = store.merge(merged, later, [row("b", 1.0, 1.0)])
    assert list(again["runs"]) == [later["date"]]
    ordered = store.merge(merged, later, [row("d", 1.0, 1.0)], order=("c", "d", "a"))
    assert [item["id"] for item in ordered["rows"]] == ["c", "d", "a", "b"]


def test_two_runs_of_one_second_keep_their_commands() -> None:
    date = "2030-01-01T00:00:00+00:00"
    beside = {**facts(date), "command": "eff bench --threads 1"}
    merged = store.merge(document(), beside, [row("c", 1.0, 1.0)])
    merged = store.merge(merged, beside, [row("d", 1.0, 1.0)])
    told = {item["id"]: merged["runs"][item["run"]]["command"] for item in merged["rows"]}
    assert told == {"a": "eff bench", "b": "eff bench", "c": beside["command"], "d": beside["command"]}
    assert list(merged["runs"]) == [date, f"{date} 2"]
    assert store.check(merged) == []


def test_an_arm_is_added_to_a_row_of_a_table() -> None:
    later = facts("2030-02-02T00:00:00+00:00")
    one = row("a", 5.0, 1.0)
    one["arms"] = {"third": one["arms"].pop("eff")}
    one["ratios"] = []
    merged = store.merge(document(), later, [one], add_arms=True)
    found = {item["id"]: item for item in merged["rows"]}
    assert set(found["a"]["arms"]) == {*row("a", 4.0, 1.0)["arms"], "third"}
    assert found["a"]["run"] == "2030-01-01T00:00:00+00:00"
    assert found["a"]["arms"]["third"]["run"] == later["date"]
    assert later["date"] in merged["runs"]
    assert store.check(merged) == []


def test_a_row_that_is_measured_in_parts_keeps_each_arm_s_ratio_to_the_baseline_beside_it() -> None:
    first, later = document()["rows"][0]["run"], facts("2030-02-02T00:00:00+00:00")
    part = row("a", 5.0, 1.0)
    base = next(name for name in part["arms"] if name != "eff")
    part["arms"]["third"] = part["arms"].pop("eff")
    part["ratios"] = [{**item, "arm": "third"} for item in part["ratios"] if (item["arm"], item["to"]) == ("eff", base)]
    (found,) = [item for item in store.merge(document(), later, [part], add_arms=True)["rows"] if item["id"] == "a"]
    of = {item["arm"]: item for item in found["ratios"] if item["to"] == base}
    assert (of["eff"]["run"], of["eff"]["median"]) == (first, 4.0)
    assert of["third"]["run"] == found["arms"][base]["run"] == later["date"]
    again = store.merge(document(), later, [row("a", 6.0, 1.0)], add_arms=True)
    assert again["rows"][0] == {**row("a", 6.0, 1.0), "run": later["date"]}  # no arm of the first run is left
    assert store.check(again) == []


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("schema",), 99, "schema"),
        (("rows", 0, "arms", "eff"), {}, "neither a measurement nor a reason"),
        (("rows", 0, "arms", "eff", "seconds"), {"median": 1.0}, "min"),
        (("rows", 0, "run"), "nobody", "no manifest"),
        (("rows", 0, "id"), "b", "twice"),
        (("rows", 0, "ratios"), [{"arm": "eff"}], "to"),
        (("runs", "2030-01-01T00:00:00+00:00", "cpu"), None, "cpu"),
    ],
)
def test_each_defect_is_found(path: tuple[str | int, ...], value: object, expected: str) -> None:
    broken = json.loads(json.dumps(document()))
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert any(expected in problem for problem in store.check(broken))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text("{")
    for name in ("demo.json", "absent.json"):
        with pytest.raises(EffError, match=name) as caught:
            store.read(tmp_path / name)
        assert caught.value.code == "EFF-B106"
    (tmp_path / "demo.json").write_text("[]")
    with pytest.raises(EffError, match="no result file"):
        store.read(tmp_path / "demo.json")
