"""Load a Hugging Face folder without the hub, and make inputs for a transformers model from its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effcompile.core.errors import EffError, unknown

_DEFAULT_TOKENS = 128


def load_folder(
    path: Path, sizes: Mapping[str, int], dtype: Any, real: bool
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Build the model of `config.json`; with `real` its safetensors are read, and never a pickle or remote code.

    Raises:
        EffError: EFF-U114 for a folder without a transformers configuration or weights; EFF-U104 without transformers.
    """
    import torch

    from effcompile.models.trained import require
    from effcompile.skeleton import parameters_on_meta

    name = _architecture(path)
    transformers = require("transformers", "hf")
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    kind = getattr(transformers, name, None)
    if kind is None:
        models = [word for word in dir(transformers) if word.endswith(("LM", "Model", "Classification"))]
        raise unknown("EFF-U114", "architecture", name, models, hint=f"this is transformers {transformers.__version__}")
    chosen = dtype or getattr(config, "dtype", None) or torch.float32
    if not real:
        with parameters_on_meta():
            model = kind(config).to(chosen).eval()
    else:
        if not any(path.glob("*.safetensors")):
            raise EffError(
                "EFF-U114", f"{path} holds no .safetensors", hint="convert its weights; pickles are not loaded"
            )
        model = kind.from_pretrained(
            path, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=chosen
        ).eval()
    args, kwargs = example_inputs(model, sizes)
    return model, args, kwargs


def _architecture(path: Path) -> str:
    file = path / "config.json"
    if not file.is_file():
        also = (
            "; model_index.json is a whole diffusers pipeline: give one of its folders"
            if (path / "model_index.json").is_file()
            else ""
        )
        raise EffError("EFF-U114", f"{path} holds no config.json{also}", hint="a folder that save_pretrained wrote")
    try:
        found = json.loads(file.read_text())
        names = found.get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise EffError("EFF-U114", f"{file} is not a configuration: {error}") from error
    if not names:
        raise EffError(
            "EFF-U114",
            f"{file} names no architecture",
            hint='add "architectures": ["LlamaForCausalLM"], or use package.module:callable',
        )
    return str(names[0])


def example_inputs(model: Any, sizes: Mapping[str, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make seeded inputs `[batch, seq]` of tokens, or images, as the model's configuration asks for them.

    Raises:
        EffError: EFF-U115 for a kind of input that a configuration does not describe.
    """
    import torch

    config, draw = model.config, torch.Generator().manual_seed(0)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    batch, seq = sizes.get("batch", 1), sizes.get("seq")
    name = str(getattr(model, "main_input_name", "input_ids"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if name == "input_ids":
        limit = getattr(text, "max_position_embeddings", None)
        length = seq or min(_DEFAULT_TOKENS, limit or _DEFAULT_TOKENS)
        tokens = torch.randint(0, int(text.vocab_size), (batch, length), generator=draw)
        more = (
            {"decoder_input_ids": tokens[:, : max(1, length // 2)]}
            if getattr(config, "is_encoder_decoder", False)
            else {}
        )
        return (), {"input_ids": tokens, **more}
    if name == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        image = torch.randn(batch, int(getattr(config, "num_channels", 3)), height, width, generator=draw)
        return (), {"pixel_values": image.to(dtype)}
    bins, places = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if name == "input_features" and bins and places:  # Whisper: two frames a position, neither more nor fewer
        frames = torch.randn(batch, int(bins), 2 * int(places), generator=draw).to(dtype)
        tokens = torch.randint(0, int(text.vocab_size), (batch, seq or 4), generator=draw)
        return (), {"input_features": frames, "decoder_input_ids": tokens}
    raise EffError(
        "EFF-U115", f"the input `{name}` cannot be made from its configuration", hint="use package.module:callable"
    )
