"""Give a small mixture-of-experts language model with trained weights, to measure on routing that training made and not chance.

A Mixtral over bytes: 3 layers of width 96, 16 experts of which 2 run. `examples/train_pydoc_moe.py` trained it, in minutes on a
CPU, on Python's own documentation (`text.pydoc_text`); its weights lie beside this file in float16. Text that training did not see
costs it 1.78 bits a byte, and the busiest expert of a layer gets 1.6 to 2 times an even share.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from effcompile.models.entry import Inputs, ZooEntry
from effcompile.models.llama import LlamaConfig
from effcompile.models.mixtral import Mixtral, MixtralConfig
from effcompile.models.text import pydoc_text

WEIGHTS = Path(__file__).with_name("pydoc_moe.safetensors")
HELD_OUT = 0.1
"""The share of the text, at its end, that training did not see."""


def config() -> MixtralConfig:
    """Return the sizes."""
    llama = LlamaConfig(
        vocab=256, width=96, layers=3, heads=6, kv_heads=2, head_dim=16, hidden=48, rope_theta=1e4, max_seq=1024
    )
    return MixtralConfig(llama, experts=16, top_k=2)


def held_out(batch: int, seq: int) -> Tensor:
    """Return bytes `[batch, seq]` of the part of the text that training did not see."""
    text = pydoc_text().encode()
    text = text[int(len(text) * (1 - HELD_OUT)) :]
    # At even distances, the text again where it is too short.
    starts = [row * max(1, (len(text) - seq) // batch) % max(1, len(text) - seq) for row in range(batch)]
    return torch.tensor([list(text[start : start + seq]) for start in starts])


def build(dtype: torch.dtype, meta: bool) -> nn.Module:
    """Build the model with its trained weights; on the meta device with none."""
    from safetensors.torch import load_file

    with torch.device("meta"):
        model = Mixtral(config())
    if not meta:
        model.load_state_dict({name: value.to(dtype) for name, value in load_file(WEIGHTS).items()}, assign=True)
    return model.to(dtype)


def _inputs(batch: int, seq: int) -> Inputs:
    return (held_out(batch, seq),), {}


ENTRIES = (
    ZooEntry(
        name="pydoc-moe",
        summary="Mixtral over bytes, 16 experts, top 2, trained on Python's documentation",
        source="examples/train_pydoc_moe.py",
        license="Apache-2.0",
        build=partial(build),
        inputs=_inputs,
        default_seq=256,
        max_seq=config().llama.max_seq,
        trained=True,
    ),
)
