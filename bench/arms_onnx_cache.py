"""Decode with exports in ONNX Runtime: the cache goes in and comes out, and stays in the runtime's own memory between steps."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import effcompile as eff
from effcompile.capture import decoder
from effcompile.compiler import all_methods
from effcompile.core.policy import read_policy

EXPORTS: Mapping[str, tuple[str, str]] = {
    "onnx": ("", "ort"),
    "onnx-static-8": ("static-channel{bits=8}", "ort"),
    "onnx-static-4": ("static-channel{bits=4}", "ort"),
    "onnx-portable-8": ("static-channel{bits=8}", "portable"),
    "onnx-portable-4": ("static-channel{bits=4}", "portable"),
}
"""Format of the cache (empty: the model's own dtype) and flavor of an arm."""
Past = Sequence[tuple[Tensor, Tensor]]


def title(name: str) -> str:
    """Return what an arm is called in a table."""
    format, flavor = EXPORTS[name]
    return f"ONNX ({flavor}): {format or 'float32'}"


@dataclass
class Exported:
    """Hold a session of an export and the cache that the next step gets."""

    session: Any
    call: decoder.DecoderCall
    held: Mapping[str, Any]
    prompt: Mapping[str, Any]
    tokens: int = 0
    before: int = 0

    def fill(self, past: Past) -> None:
        """Let the cache hold keys and values `[1, Hkv, S, D]` of every layer, as codes where it has these."""
        flat = [x for pair in past for x in pair]
        if bits := self.call.module.bits:
            scales = [getattr(self.call.module, f"scale_{place}") for place in range(len(flat))]
            flat = [decoder.quantize(x, scale, bits) for x, scale in zip(flat, scales)]
        self.prompt = {name: _ort(x) for name, x in zip(self.call.inputs[-len(flat) :], flat, strict=True)}
        self.before = past[0][0].shape[2]
        self.rewind()

    def rewind(self) -> None:
        """Forget what came behind the prompt."""
        self.held, self.tokens = self.prompt, self.before

    def step(self, ids: Tensor) -> Tensor:
        """Return the logits `[1, n, V]` of ids `[1, n]`."""
        after = self.tokens + ids.shape[1]
        given = {"input_ids": _ort(ids), "attention_mask": _ort(torch.ones(1, after, dtype=torch.long)), **self.held}
        if "position_ids" in self.call.inputs:
            given["position_ids"] = _ort(torch.arange(self.tokens, after)[None])
        logits, *kept = self.session.run_with_ort_values(list(self.call.outputs), given)
        self.held, self.tokens = dict(zip(self.held, kept, strict=True)), after
        return torch.from_numpy(logits.numpy())

    def nbytes(self) -> int:
        """Return the bytes of the cache, and of the scales of its codes."""
        held = sum(value.tensor_size_in_bytes() for value in self.held.values())
        return held + sum(x.nbytes for name, x in self.call.module.named_buffers() if name.startswith("scale_"))


def make(name: str, model: Any, past: Past, ranges: str) -> Exported:
    """Export a model for an arm, and let its cache hold a prompt."""
    format, flavor = EXPORTS[name]
    options = {"kv": format.replace("}", f",ranges={ranges}}}")} if format else {}
    folder = tempfile.mkdtemp()
    out = Path(folder, "a")
    eff.export(model, (), {}, to="onnx", out=out, cache=True, flavor=flavor, options=options)
    kind = read_policy("kv", options["kv"], all_methods()) if options else None
    call = decoder.cached_decoder(model, kind, own=flavor == "portable")
    made = Exported(_session(out / "model.onnx"), call, {}, {})
    weakref.finalize(
        made, shutil.rmtree, folder, ignore_errors=True
    )  # weights are read from it while the session lives
    made.fill(past)
    return made


def _session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _ort(x: Tensor) -> Any:
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(x.detach().contiguous().numpy())
