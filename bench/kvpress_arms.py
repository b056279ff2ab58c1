"""Put kvpress beside our evictions, on the same text and keys: it runs under an interpreter of its own.

kvpress asks for an older transformers than this project has, so no process can hold both. `EFF_KVPRESS_PYTHON` names the
interpreter of an environment with `torch`, `kvpress` and the transformers that it wants:

    python -m venv kvpress && kvpress/bin/pip install torch==2.13.0 kvpress==0.5.5 'transformers<5.3'
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.manifest import ROOT, scrub
from bench.quality import Hunt
from bench.stats import Spread

VARIABLE = "EFF_KVPRESS_PYTHON"
ARMS = {
    "kvpress-snapkv": "snapkv",
    "kvpress-expected-attention": "expected-attention",
    "kvpress-streaming-llm": "streaming-llm",
}
"""The press of each arm; all drop half of a prompt."""


def measure(
    model: Any, names: Sequence[str], windows: Tensor, prompt: int, keys: Sequence[Hunt], window: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Return for each arm what `kvpress_peer` found: seconds a step, bytes, quality, pass keys; or why it was skipped.

    `windows` `[n, S]` are token ids of which `prompt` are read at once, `keys` prompts of one length, `window` the last queries
    that snapkv looks at.
    """
    from safetensors.torch import save_file

    python = os.environ.get(VARIABLE, "")
    if not python:
        return {name: {"skipped": f"{VARIABLE} names no interpreter with kvpress"} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ids = torch.cat([hunt.ids for hunt in keys])
        save_file({"windows": windows.contiguous(), "keys": ids.contiguous()}, Path(folder, "job.safetensors"))
        job = {
            "prompt": prompt,
            "presses": [ARMS[name] for name in names],
            "answers": [hunt.answer for hunt in keys],
            "depths": [hunt.depth for hunt in keys],
            "window": window,
            "threads": threads,
        }
        Path(folder, "job.json").write_text(json.dumps(job), encoding="utf-8")
        words = [python, "-m", "bench.kvpress_peer", folder]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        found = Path(folder, "answer.json")
        if not found.is_file():
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
            return {
                name: {"skipped": scrub(f"kvpress ended with {done.returncode}: {last[0][:300]}")} for name in names
            }
        answer = json.loads(found.read_text(encoding="utf-8"))
    versions = " ".join(f"{name} {version}".strip() for name, version in answer["versions"].items())
    return {name: {**answer["presses"][ARMS[name]], "versions": versions} for name in names}


def told(arm: dict[str, Any], whole: int, dense: int) -> dict[str, Any]:
    """Return the entry of an arm in the results; `whole`: bytes of the cache in bfloat16, `dense`: keys found with it."""
    if "skipped" in arm:
        return arm
    return {
        "seconds": Spread(tuple(arm["seconds"])).to_json(),
        "bytes": arm["bytes"],
        "bytes_ratio": float(f"{arm['bytes'] / whole:.4g}"),
        "quality": {"pydoc": arm["quality"]},
        "pass_key": {**arm["pass_key"], "dense": dense},
        "versions": arm["versions"],
    }
