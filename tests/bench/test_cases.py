"""Check what the cases offer, and run one of each kind with tiny models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from bench import run as runner
from bench import store
from bench.arms import default_arms, known_arms, known_names
from bench.case import Case, Row, Settings, Watch, cases, find_case
from bench.cases.attention_table import MASKS, AttentionTable
from bench.cases.compile_time import summary
from bench.cases.dit import DiT
from bench.cases.linear_table import LinearTable
from bench.cases.minilm import MiniLM
from bench.cases.smollm2_prefill import SmolLM2Prefill, SpreadRows, token_batch
from bench.model_case import ModelCase
from bench.workload import Workload
from effcompile.core.errors import EffError
from effcompile.models import zoo

NAMES = {
    "attention-table",
    "builds",
    "codebook",
    "compile-time",
    "dinov2",
    "dit",
    "duo",
    "gpu-attention",
    "gpu-decode",
    "gpu-dit",
    "gpu-moe",
    "kv-decode",
    "linear-table",
    "minilm",
    "moe",
    "moe-memory",
    "moe-table",
    "onnx-export",
    "peak-memory",
    "recursions",
    "schedules",
    "smollm2-decode",
    "smollm2-prefill",
    "sparse-attention",
    "sparse-quality",
    "step-table",
    "tokens-dinov2",
    "tokens-minilm",
    "tokens-smollm2",
    "versatile",
}
TINY = Settings(quick=True, rounds=2, warmup=1, threads=1, limit=120.0)


def test_every_file_is_a_case() -> None:
    assert {case.name for case in cases()} == NAMES
    files = {path.stem for path in (Path(runner.ROOT) / "bench" / "cases").glob("*.py")} - {"__init__"}
    assert {name.replace("-", "_") for name in NAMES} == files


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("quick", [False, True])
def test_rows_are_unique_and_complete(case: Case, quick: bool) -> None:
    rows = case.rows(Settings(quick=quick))
    assert len({row.id for row in rows}) == len(rows) > 0
    assert case.title
    assert case.about
    assert case.unit in ("call", "token", "compilation", "bytes")
    for device in case.devices:
        assert set(case.arms(device)) <= set(case.known_arms(device))


def test_lengths_forms_and_dtypes_choose_rows() -> None:
    rows = SmolLM2Prefill().rows(Settings(lengths=(512, 100), forms=("left-padded-1",), dtypes=("float32",)))
    assert [row.id for row in rows] == ["512-left-padded-1-float32", "100-left-padded-1-float32"]
    assert len(SmolLM2Prefill().rows(Settings())) == 30


def test_a_gpu_has_arms_of_its_own() -> None:
    assert "onnxruntime" in default_arms("cpu")
    assert default_arms("cuda") == ("eager", "inductor", "inductor-max-autotune", "eff", "eff-max-autotune")
    assert {"onnxruntime", "openvino"}.isdisjoint(known_names("cuda"))
    assert find_case("linear-table").devices == ("cpu",)
    assert "padded" not in AttentionTable().arms("cuda")


def test_unknown_words_are_errors_with_near_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EffError, match="did you mean dit") as caught:
        runner.choose(["dti"], Settings())
    assert caught.value.code == "EFF-B102"
    with pytest.raises(EffError, match="did you mean inductor") as caught:
        runner.choose(["dit"], Settings(arms=("inducter",)))
    assert caught.value.code == "EFF-B103"
    with pytest.raises(EffError, match="unknown dtype"):
        runner.choose(["dit"], Settings(dtypes=("float16",)))
    with pytest.raises(EffError, match="did you mean left-padded") as caught:
        runner.choose(["smollm2-prefill", "dit"], Settings(forms=("padded-left",)))
    assert caught.value.code == "EFF-B107"
    with pytest.raises(EffError, match="no row") as caught:
        runner.choose(["smollm2-prefill", "attention-table"], Settings(forms=("causal",)))
    assert caught.value.code == "EFF-B107"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(EffError, match="cpu only"):
        runner.choose(["linear-table"], Settings(device="cuda"))
    assert "linear-table" not in {case.name for case in runner.choose([], Settings(device="cuda"))}


def test_a_model_case_runs_and_its_file_is_good(tmp_path: Path) -> None:
    settings = dataclasses.replace(
        TINY, results=tmp_path, arms=("eager", "aot-eager", "onnxruntime"), dtypes=("bfloat16",)
    )
    shown: list[dict[str, Any]] = []
    runner.run([DiT()], settings, shown=shown.append)
    (path,) = tmp_path.glob("*/dit.json")
    found = store.read(path)
    assert found["rows"] == shown[0]["rows"]
    (row,) = found["rows"]
    assert row["id"] == "64-bfloat16"
    assert row["recompiled"] == 0
    assert len(row["load"]) == 2
    assert "bfloat16" in row["arms"]["onnxruntime"]["skipped"]
    for name in ("eager", "aot-eager"):
        arm = row["arms"][name]
        assert len(arm["seconds"]["samples"]) == 2
        assert arm["numerics"]["reference"] == "float64"
        assert arm["numerics"]["within"] is True
    assert "compile_seconds" not in row["arms"]["eager"]
    assert row["arms"]["aot-eager"]["compile_seconds"] > 0
    assert row["arms"]["aot-eager"]["details"]["graphs"] == 1
    assert [(item["arm"], item["to"]) for item in row["ratios"]] == [("aot-eager", "eager")]


def test_onnx_runtime_and_openvino_agree_with_eager() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    settings = dataclasses.replace(TINY, arms=("eager", "onnxruntime", "openvino"), dtypes=("float32",))
    case = MiniLM(model="encoder-tiny", length=32, short=12)
    (row,) = case.measure(case.rows(settings)[0], settings, Watch())
    for name in ("onnxruntime", "openvino"):
        assert row["arms"][name]["numerics"]["within"] is True, row["arms"][name]
        assert row["arms"][name]["details"]["threads"] == 1
    assert row["notes"] == ["88 of 128 tokens are real (68.8 %)"]


@dataclasses.dataclass(frozen=True)
class Failing(ModelCase):
    """Give a module that some arms cannot run."""

    name: ClassVar[str] = "failing"
    title: ClassVar[str] = "Failing"
    about: ClassVar[str] = "An arm fails."

    def rows(self, settings: Settings) -> list[Row]:
        return [Row("one", {})]

    def workload(self, row: Row, settings: Settings) -> Workload:
        return Workload(nn.Identity(), (torch.ones(3),), {}, torch.float32, no_export="it has no graph")


def test_an_arm_that_fails_or_cannot_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*given: object, **options: object) -> None:
        raise RuntimeError(f"nobody compiles\n{runner.ROOT}/bench")

    monkeypatch.setattr("torch.compile", nobody)
    settings = dataclasses.replace(TINY, arms=("eager", "aot-eager", "onnxruntime", "openvino"))
    document = runner.run([Failing()], settings)[0]
    assert store.check(document) == []
    arms = document["rows"][0]["arms"]
    assert list(arms) == ["eager", "aot-eager", "onnxruntime", "openvino"]
    assert arms["aot-eager"] == {"error": "RuntimeError: nobody compiles ./bench"}
    assert arms["onnxruntime"] == arms["openvino"] == {"skipped": "it has no graph"}
    assert arms["eager"]["seconds"]["median"] > 0


def test_preparing_an_arm_is_boxed(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    def slow(self: object, *rest: object) -> None:
        time.sleep(30)

    monkeypatch.setattr(type(known_arms()["openvino"]), "prepare", slow)
    settings = dataclasses.replace(TINY, limit=0.2, arms=("openvino",))
    case = DiT()
    (row,) = case.measure(case.rows(settings)[0], settings, Watch())
    assert row["arms"]["openvino"] == {"error": "OutOfTime: preparing it was not done after 0 s"}


def test_padded_tokens_fill_half_of_the_bucket() -> None:
    ids, mask = token_batch(zoo.load("llama-tiny"), "left-padded", 64)
    assert mask is not None
    assert ids.shape == mask.shape == (2, 64)
    assert mask.float().mean() == 0.5
    assert bool((mask.diff(dim=1) >= 0).all()), "padding is on the left"
    single, half = token_batch(zoo.load("llama-tiny"), "left-padded-1", 64)
    assert half is not None
    assert (single.shape, half.sum()) == ((1, 64), 32)
    assert token_batch(zoo.load("llama-tiny"), "default", 64)[1] is None


def test_only_real_positions_are_compared() -> None:
    real = torch.tensor([[False, True, True], [False, False, True]])
    logits = torch.arange(6.0).reshape(2, 3, 1)
    assert SpreadRows(real)(logits).flatten().tolist() == [1.0, 2.0, 5.0]


def test_prefill_of_a_tiny_model() -> None:
    settings = dataclasses.replace(TINY, arms=("eager", "aot-eager"), forms=("default",), dtypes=("float32",))
    case = SmolLM2Prefill(model="llama-tiny")
    (row,) = case.measure(case.rows(settings)[0], settings, Watch())
    assert row["arms"]["aot-eager"]["numerics"]["within"] is True


@pytest.mark.parametrize("mask", MASKS)
def test_attention_kernels_agree_on_every_mask(mask: str) -> None:
    settings = dataclasses.replace(
        TINY,
        rounds=1,
        warmup=0,
        lengths=(96,),
        forms=(mask,),
        dtypes=("float32",),
        arms=("dense", "sdpa", "sdpa-causal", "padded", "blocked", *(("math",) if mask in ("full", "decode") else ())),
    )
    case = AttentionTable(window=32)
    (row,) = case.measure(case.rows(settings)[0], settings, Watch())
    measured = {name: arm for name, arm in row["arms"].items() if "seconds" in arm}
    assert len(measured) >= (1 if mask == "decode-mask" else 2)
    for arm in measured.values():
        assert arm["max_error"] < 1e-5
        assert arm["gflops"] > 0
        assert arm["useful_gflops"] <= arm["gflops"] * 1.05
    assert not [arm for arm in row["arms"].values() if "error" in arm]


def test_linear_kernels_agree() -> None:
    settings = dataclasses.replace(TINY, rounds=1, dtypes=("float32",), forms=("minilm-qkv",))
    case = LinearTable()
    document = runner.run([case], settings)[0]
    assert store.check(document) == []
    assert document["headline"] is False
    assert document["rows"][0]["arms"]["eff-linear"]["max_error"] < 1e-4


def test_compile_summaries_keep_the_hits_of_every_process() -> None:
    answer: dict[str, Any] = {
        "compile_seconds": 1.0,
        "first_call_seconds": 1.23456,
        "steady_seconds": 0.2,
        "trivial_seconds": 3.0,
        "phases": {},
    }
    cold, warm = answer | {"details": {}}, answer | {"details": {"fxgraph_cache_hit": 2}}
    hits = summary([cold, warm])["cache_hits"]
    assert hits == [
        {"autograd_cache_hit": 0, "fxgraph_cache_hit": 0},
        {"autograd_cache_hit": 0, "fxgraph_cache_hit": 2},
    ]
