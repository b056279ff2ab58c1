"""Find how a transformers model turns queries and keys by their places, from the functions that it uses itself."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effcompile.core.errors import EffError
from effcompile.core.eviction import Rotation


@dataclass
class _Own:
    """Call a model's own functions; a copy of the model gets a copy of this, which holds the copy's module."""

    module: nn.Module
    apply: Any
    depth: int

    def angles(self, places: Tensor) -> tuple[Tensor, Tensor]:
        blank = torch.zeros(1, 1, self.depth, device=places.device)
        cosines, sines = self.module(blank, places[None])
        return cosines[0].float(), sines[0].float()

    def turn(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        turned: Tensor = self.apply(x, x, cosines[None], sines[None])[0]
        return turned


def rotation(model: nn.Module, depth: int) -> Rotation | None:
    """Return the rotation of a model with heads of `depth` channels; None for a model that has no rotary module.

    Raises:
        EffError: EFF-K206 where it has one that does not turn all layers in one way.
    """
    found = [(name, module) for name, module in model.named_modules() if "Rotary" in type(module).__name__]
    if not found:
        return None
    module = found[0][1]
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    own = _Own(module, apply, depth)
    made = Rotation(own.angles, own.turn)
    if len(found) > 1 or apply is None or not _sound(made, depth, model.device):
        raise EffError(
            "EFF-K206",
            f"the way in which {type(model).__name__} turns queries by their places is not known",
            hint="an eviction that does not need it: snapkv, keyformer, sink-window",
        )
    return made


def _sound(made: Rotation, depth: int, device: torch.device) -> bool:
    """Tell whether turning by places and back gives what was there, and turning moves with the place."""
    if device.type == "meta":
        return True
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 1, 2, depth, generator=draw).to(device) for _ in range(2))
    places = torch.tensor([3, 41], device=device)
    try:
        with torch.no_grad():
            turned = made.turn(x, *made.angles(places))
            back = made.back(turned, places)
            products = [
                float((made.turn(x, *made.angles(places + by)) * made.turn(y, *made.angles(places + by))).sum())
                for by in (0, 100)
            ]
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    near = float((back - x).abs().max()) < 1e-3 and abs(products[0] - products[1]) < 1e-2 * max(1.0, abs(products[0]))
    return near and turned.shape == x.shape


def needed(model: nn.Module, config: Any) -> Rotation | None:
    """Return the rotation of a model's decoder, asked for by its configuration."""
    text = config.get_text_config(decoder=True)
    depth = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return rotation(model, int(depth))
