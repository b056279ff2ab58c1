"""Build a transformers model from a folder of converted weights, without touching a hub and without random weights."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effcompile.core.errors import EffError
from effcompile.models.cache import discard

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


def require(module: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        EffError: EFF-U104 with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EffError(
            "EFF-U104", f"this model needs the package {module}", hint=f"python -m pip install 'effcompile[{extra}]'"
        ) from error


def build_trained(
    make: Callable[[], nn.Module],
    folder: Callable[[], Path],
    restore: Callable[[nn.Module], None],
    dtype: torch.dtype,
    meta: bool,
) -> nn.Module:
    """Build a module on the meta device and, unless `meta`, put the cached weights into it.

    Args:
        make: builds the module; its random initialization costs nothing on the meta device.
        folder: gives the cache folder with `model.safetensors`, converting it the first time.
        restore: rebuilds what no checkpoint holds: non-persistent buffers and tied weights.
        dtype: of the weights. Buffers that `restore` makes keep their own, as in transformers.
        meta: stop before any weight is read.

    A checkpoint that cannot be read is discarded and converted once more.
    """
    with torch.device("meta"):
        model = make()
    if meta:
        return model.to(dtype)
    state = _read_weights(folder)
    assign = {name: value.to(dtype) for name, value in state.items()}
    absent, surplus = model.load_state_dict(assign, strict=False, assign=True)
    assert not surplus, f"weights without a place: {surplus[:3]}"
    restore(model)
    left = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    assert not left, f"weights that were not loaded: {left[:3]} of {absent[:3]}"
    return model


def load_tokenizer(folder: Path) -> Any:
    """Load the fast tokenizer of a cache folder."""
    transformers = require("transformers", "hf")
    options = json.loads((folder / TOKENIZER_CONFIG).read_text())
    options.pop("tokenizer_class")
    # The constructor reads one local file; from_pretrained might ask the hub.
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER), **options)


def save_tokenizer_config(folder: Path, **options: Any) -> None:
    """Write the special tokens beside `tokenizer.json`, in the form that transformers reads too."""
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **options}, indent=1)
    (folder / TOKENIZER_CONFIG).write_text(text)


def _read_weights(folder: Callable[[], Path]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place = folder()
    try:
        return load_file(place / WEIGHTS)
    except (SafetensorError, OSError):
        discard(place)
        return load_file(folder() / WEIGHTS)
