"""Let an exported decoder write text: token by token, with the cache handed from one call to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from effcompile.codegen.onnx.memory import PAST, PRESENT
from effcompile.codegen.onnx.session import Session
from effcompile.core.artifact import Manifest
from effcompile.core.errors import EffError

_KINDS = {
    "float": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8,
    "uint8": torch.uint8, "double": torch.float64,
}  # fmt: skip


def continuation(
    session: Session, manifest: Manifest, prompt: Sequence[int], most: int, ends: Sequence[int] = ()
) -> Iterator[int]:
    """Yield up to `most` token ids after a prompt, each the likeliest one; stop behind one of `ends`.

    Raises:
        EffError: EFF-E117 for an artifact that takes no token ids with a cache.
    """
    if "input_ids" not in session.inputs or not any(name.startswith(PAST) for name in session.inputs):
        raise EffError(
            "EFF-E117", "the artifact is no decoder with a cache, which --text needs", hint="eff export MODEL --cache"
        )
    given = {t.name: t for t in manifest.inputs if t.name.startswith(PAST)}
    room = len(prompt) + most if dict(manifest.details).get("buffers") else 0
    held: dict[str, Tensor] = {
        name: torch.zeros([1, *(n if isinstance(n, int) else room for n in t.shape[1:])], dtype=_KINDS[t.dtype])
        for name, t in given.items()
    }
    ids, past = torch.tensor([list(prompt)]), 0
    for _ in range(most):
        length = ids.shape[1]
        call = {"input_ids": ids, "attention_mask": torch.ones(1, past + length, dtype=torch.int64), **held}
        if "position_ids" in session.inputs:
            call["position_ids"] = torch.arange(past, past + length)[None]
        found = session(call)
        held = {name: found[PRESENT + name.removeprefix(PAST)] for name in held}
        past += length
        token = int(found["logits"][0, -1].argmax())
        yield token
        if token in ends:
            return
        ids = torch.tensor([[token]])
