"""Let kvpress drop half of a prompt and continue from it: the other end of `bench/kvpress_arms.py`, under its own interpreter.

    PYTHON -m bench.kvpress_peer FOLDER

PYTHON has torch, kvpress and the transformers that kvpress wants, which is older than this project's. FOLDER holds the model as
`save_pretrained` wrote it and `job.safetensors` with `windows` `[n, S]` and `keys` `[m, T]`, token ids; `job.json` has the length
of the prompts, of each key's answer, and the presses. `answer.json` is written beside them.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.quality import Found, Hunt, Score


def press_of(name: str, ratio: float, window: int) -> Any:
    """Return a press by its name."""
    import kvpress  # type: ignore[import-not-found, unused-ignore]

    made = {
        "snapkv": lambda: kvpress.SnapKVPress(compression_ratio=ratio, window_size=window),
        "expected-attention": lambda: kvpress.ExpectedAttentionPress(compression_ratio=ratio),
        "streaming-llm": lambda: kvpress.StreamingLLMPress(compression_ratio=ratio),
    }
    return made[name]()


def read(model: Any, press: Any, ids: Tensor, cut: int) -> tuple[Tensor, int]:
    """Read `cut` tokens of `[B, S]` under a press (None: whole), feed the rest one by one; return logits and the cache's bytes."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    if press is None:
        model(ids[:, :cut], past_key_values=cache, use_cache=True, logits_to_keep=1)
    else:
        with press(model):
            model(ids[:, :cut], past_key_values=cache, use_cache=True, logits_to_keep=1)
    found = []
    for place in range(cut, ids.shape[1]):
        given = {"past_key_values": cache, "use_cache": True, "position_ids": torch.full((ids.shape[0], 1), place)}
        found.append(model(ids[:, place : place + 1], **given).logits)
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    return torch.cat(found, 1), held


def answer(folder: Path) -> dict[str, Any]:
    """Do the job of a folder."""
    import transformers
    from safetensors.torch import load_file

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "job.safetensors")
    torch.set_num_threads(int(job["threads"]))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt, told = int(job["prompt"]), {}
    with torch.no_grad():
        wanted = [read(model, None, ids[None], prompt)[0][0] for ids in tensors["windows"]]
        for name in job["presses"]:
            press, score, count, seconds, held = press_of(name, 0.5, int(job["window"])), Score(), Found(), [], 0
            for ids, dense in zip(tensors["windows"], wanted):
                begun = time.perf_counter()
                logits, held = read(model, press, ids[None], prompt)
                seconds.append((time.perf_counter() - begun) / (len(ids) - prompt))
                score.add(logits[0], dense, ids[prompt:])
            for ids, last, depth in zip(tensors["keys"], job["answers"], job["depths"]):
                count.add(Hunt(ids[None], last, depth), read(model, press, ids[None], len(ids) - last - 1)[0])
            told[name] = {"seconds": seconds, "bytes": held, "quality": score.to_json(), "pass_key": count.to_json()}
    versions = {name: importlib.metadata.version(name) for name in ("kvpress", "transformers")}
    return {"presses": told, "versions": versions}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "answer.json").write_text(json.dumps(answer(place)), encoding="utf-8")
