"""Hold how large keys and values of a model get, channel by channel, as a file that cache formats read their scales from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.core.site import CacheSite

SCHEMA = 1


@dataclass(frozen=True)
class Ranges:
    """Hold the largest magnitudes of keys `[Hkv, D]` and values `[Hkv, Dv]`, float32, by the number of the layer."""

    layers: Mapping[int, tuple[Tensor, Tensor]]

    def save(self, path: str | Path) -> None:
        """Write them as JSON."""
        told = {str(layer): [x.tolist() for x in pair] for layer, pair in self.layers.items()}
        Path(path).write_text(json.dumps({"schema": SCHEMA, "layers": told}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Ranges:
        """Read what `save` wrote.

        Raises:
            EffError: EFF-K207 where the file is missing or is no such file.
        """
        try:
            told = json.loads(Path(path).read_text(encoding="utf-8"))
            assert told["schema"] == SCHEMA
            layers = {
                int(layer): (torch.tensor(pair[0]), torch.tensor(pair[1])) for layer, pair in told["layers"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AssertionError, IndexError) as error:
            raise EffError(
                "EFF-K207",
                f"cannot read ranges of keys and values from {path}: {type(error).__name__}",
                hint="eff.calibrate_kv(model, samples, path) writes them",
            ) from error
        return cls(layers)

    def of(self, site: CacheSite) -> tuple[Tensor, Tensor]:
        """Return those of a site.

        Raises:
            EffError: EFF-K207 where there are none of its shape, or where they are no numbers.
        """
        found = self.layers.get(site.layer)
        wanted = [(site.kv_heads, site.head_dim), (site.kv_heads, site.value_dim)]
        if found is None or [tuple(x.shape) for x in found] != wanted:
            shapes = "none" if found is None else " and ".join(str(list(x.shape)) for x in found)
            raise EffError(
                "EFF-K207",
                f"ranges of keys and values are needed for {site.kv_heads} heads of {site.head_dim}/{site.value_dim} channels, and "
                f"there are {shapes}",
                site=site.id,
                hint="eff.calibrate_kv on this model",
            )
        if not all(bool(torch.isfinite(x).all()) for x in found):
            raise EffError("EFF-K207", "the samples gave keys or values that are no numbers", site=site.id)
        return found
