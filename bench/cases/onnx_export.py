"""Measure exports in ONNX Runtime: ours, and what torch's exporter makes of the same model, with and without a cache."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import effcompile as eff
from bench import table_case
from bench.cache_arms import shorten
from bench.case import Case, Row, Settings, Watch, grid
from bench.cases.moe import BLOCKS
from bench.table_case import Kernel, seeded
from effcompile.capture.decoder import cached_decoder
from effcompile.models import zoo
from effcompile.models.text import pydoc_text, token_windows

MODEL = "smollm2-135m"
FORMS = ("prefill", "prefill-cached", "olmoe", "qwen3-moe", "deepseek-v3")
ARMS = {
    "prefill": ("torch-onnx", "eff-portable", "eff"),
    "prefill-cached": ("optimum-style", "eff-portable", "eff"),
    "olmoe": ("dense", "eff-portable", "eff"),
}
QUICK_LAYERS = 2


@dataclass(frozen=True)
class OnnxExport(Case):
    """Run exports of one model or one block side by side."""

    name: ClassVar[str] = "onnx-export"
    title: ClassVar[str] = "Exports in ONNX Runtime"
    headline: ClassVar[bool] = False
    about: ClassVar[str] = (
        "float32, ONNX Runtime's CPU provider, all optimizations on. prefill: SmolLM2-135M over real text, logits of every "
        "position; torch-onnx is torch.onnx.export of the model without a cache. prefill-cached: the same with keys and values of "
        "every layer as inputs and outputs, empty here; optimum-style is torch.onnx.export over ids, mask, positions and these, as "
        "Optimum's decoders have them. eff-portable and eff (flavor ort) are ours. The others are mixture-of-experts blocks of "
        "transformers, `length` tokens: dense runs all experts on all tokens, eff-portable loops over those that were chosen; "
        "where ONNX Runtime's MoE holds, it does the work of eff. With --quick the model has two layers."
    )
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    form_words: ClassVar[tuple[str, ...]] = FORMS
    lengths: tuple[int, ...] = (2048,)
    dtypes: tuple[str, ...] = ("float32",)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the arms of all forms; the first that a form has is its baseline."""
        return tuple(dict.fromkeys(arm for arms in ARMS.values() for arm in arms))

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return tokens x form."""
        return grid(settings, (128,) if settings.quick else self.lengths, FORMS, self.dtypes)

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Export by every arm into a folder that is removed, and time the sessions in turns."""
        length, form = int(row.parameters["length"]), str(row.parameters["form"])
        names = [n for n in ARMS.get(form, ARMS["olmoe"]) if n in self.chosen_arms(settings)]
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            if form in BLOCKS:
                builders, flops = _block(form, length, Path(folder), settings.threads)
            else:
                layers = QUICK_LAYERS if settings.quick else 0
                builders, flops = _prefill(form != "prefill", length, Path(folder), settings.threads, layers)
            kernels: dict[str, Kernel | str] = {name: Kernel(builders[name], flops) for name in names}
            return [table_case.measure(row, kernels, settings, watch, useful_flops=flops)]


Builders = Mapping[str, Callable[[], Callable[[], Tensor]]]


def _prefill(cached: bool, length: int, folder: Path, threads: int, layers: int) -> tuple[Builders, float]:
    """Return the arms of a prompt, with a cache or without; `layers` shortens the model, 0 leaves it whole."""
    loaded = zoo.load(MODEL)
    if layers:
        shorten(loaded.model, layers)
    ids = token_windows(loaded.tokenizer, pydoc_text(), length, 1)
    call = cached_decoder(loaded.model)
    feeds = dict(zip(call.inputs, _prompt(call, ids), strict=True)) if cached else {"input_ids": ids}
    short = {"input_ids": ids[:, :16].repeat(2, 1), "use_cache": False}

    def ours(flavor: str) -> Callable[[], Tensor]:
        eff.export(loaded.model, (), short, to="onnx", out=folder / flavor, flavor=flavor, cache=cached)
        return _session(folder / flavor / "model.onnx", feeds, threads)

    auto = torch.export.Dim.AUTO

    def plain() -> Callable[[], Tensor]:
        shapes = {"input_ids": {0: auto, 1: auto}, "use_cache": None}
        return _plain(loaded.model, (), short, shapes, folder / "t", feeds, threads)

    def optimum() -> Callable[[], Tensor]:
        sizes = tuple({d: auto for d, name in enumerate(row) if name} for row in call.sizes)
        inputs = call.point(2, 5, 4).args
        return _plain(call.module, inputs, {}, (*sizes[:2], sizes[2:]), folder / "o", feeds, threads, call.inputs)

    weights = sum(p.numel() for p in loaded.model.parameters())
    peer = {"optimum-style": optimum} if cached else {"torch-onnx": plain}
    return {**peer, "eff-portable": lambda: ours("portable"), "eff": lambda: ours("ort")}, 2.0 * weights * length


def _prompt(call: Any, ids: Tensor) -> tuple[Tensor, ...]:
    positions = (torch.arange(ids.shape[1])[None],) if call.module.positions else ()
    return ids, torch.ones_like(ids), *positions, *call.empty


def _block(form: str, length: int, folder: Path, threads: int) -> tuple[Builders, float]:
    """Return the arms of a block of experts with random weights."""
    torch.manual_seed(0)
    module, config = BLOCKS[form]()
    config._experts_implementation = "grouped_mm"
    module = module.eval()
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.05)
    x = seeded((1, length, config.hidden_size), "float32", "cpu", 0)

    def ours(dispatch: str, flavor: str) -> Callable[[], Tensor]:
        given = {"flavor": flavor, "options": {"moe": dispatch}}
        made = eff.export(module, (x[:, :64].repeat(2, 1, 1),), to="onnx", out=folder / f"{dispatch}-{flavor}", **given)
        return _session(folder / f"{dispatch}-{flavor}" / "model.onnx", {made.inputs[0].name: x}, threads)

    top_k = int(config.num_experts_per_tok)
    wide = int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    return {
        "dense": lambda: ours("dense", "portable"),
        "eff-portable": lambda: ours("by-expert", "portable"),
        "eff": lambda: ours("by-expert", "ort"),
    }, 6.0 * length * top_k * wide * int(config.hidden_size)


def _plain(
    module: Any,
    args: Any,
    kwargs: Any,
    shapes: Any,
    folder: Path,
    feeds: Mapping[str, Tensor],
    threads: int,
    names: Any = None,
) -> Callable[[], Tensor]:
    """Export with torch's exporter as it comes: opset 20, its own optimization."""
    folder.mkdir()
    with _quietly():
        exported = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
        made: Any = torch.onnx.export(exported, (), dynamo=True, opset_version=20, verbose=False, input_names=names)
        made.save(str(folder / "model.onnx"), external_data=True)
    taken = {value.name for value in made.model.graph.inputs}
    return _session(folder / "model.onnx", {n: x for n, x in feeds.items() if n in taken}, threads)


@contextlib.contextmanager
def _quietly() -> Any:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _session(path: Path, feeds: Mapping[str, Tensor], threads: int) -> Callable[[], Tensor]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    values = {name: ort.OrtValue.ortvalue_from_numpy(x.contiguous().numpy()) for name, x in feeds.items()}
    first = session.get_outputs()[0].name
    return lambda: torch.from_numpy(session.run_with_ort_values([first], values)[0].numpy())
