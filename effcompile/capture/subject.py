"""Say what is exported: a module with one call, which of its sizes may vary, its names, and the calls that it is compared at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from effcompile.capture.decoder import POINTS, Point, cached_decoder, is_decoder
from effcompile.core.cache import CacheFormat
from effcompile.core.errors import EffError

Points = Callable[[bool], Iterator[Point]]
CODED = 0.2
"""What outputs of a call may differ by that reads its own tokens as codes: a number between two codes may become either, and the
layers behind it see that. So this finds gross errors alone; each operator is compared on its own, to rounding."""


@dataclass(frozen=True)
class Subject:
    """Hold a model with the arguments of one call; `points` gives others to compare at, where the call alone does not."""

    model: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shapes: Any = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    sizes: tuple[tuple[str | None, ...], ...] = ()
    points: Points | None = None
    limit: float | None = None
    """Of the error that is accepted, where it is not the dtype's own."""

    def exported(self) -> torch.export.ExportedProgram:
        """Capture the model with torch.export.

        Raises:
            EffError: EFF-E114 where it cannot be captured.
        """
        if isinstance(self.model, torch.export.ExportedProgram):
            return self.model
        try:
            return torch.export.export(
                self.model, self.args, dict(self.kwargs), dynamic_shapes=self.shapes, strict=False
            )
        except Exception as error:
            told = " ".join(str(error).split())[:400]
            raise EffError(
                "EFF-E114",
                f"torch.export cannot capture the model: {type(error).__name__}: {told}",
                hint="eff explain MODEL names graph breaks; --static (dynamic=False) fixes every size",
            ) from error


def subject(
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: bool,
    cache: bool | None,
    format: CacheFormat | None = None,
    own: bool = True,
) -> Subject:
    """Return what to export: a decoder of transformers with its cache unless `cache` is False or the call is without one.

    With a `format` the cache holds codes; `own` says that a call reads its own tokens as they are.

    Raises:
        EffError: EFF-E117 where `cache` is asked for and the model has none, EFF-E118 for a format without a form in ONNX.
    """
    if cache or format is not None or (cache is None and dynamic and is_decoder(model) and _asks(args, kwargs)):
        call = cached_decoder(model, format, own=own)
        batch, length, past = POINTS[0]
        shapes = tuple({d: torch.export.Dim.AUTO for d, name in enumerate(row) if name} for row in call.sizes)
        return Subject(
            call.module,
            call.point(batch, length, past).args,
            {},
            (*shapes[:2], shapes[2:]),  # one entry for what `*more` takes
            call.inputs,
            call.outputs,
            call.sizes,
            call.points,
            CODED if format is not None and not own else None,
        )
    auto = torch.export.Dim.AUTO

    def free(value: Any) -> Any:
        return dict.fromkeys(range(value.ndim), auto) if isinstance(value, Tensor) else None

    shapes_of: Any = None
    if dynamic and not isinstance(model, torch.export.ExportedProgram):
        # torch.export takes one structure for all arguments, by name where some are keywords.
        places, words = pytree.tree_map(free, args), pytree.tree_map(free, kwargs)
        shapes_of = {**dict(zip(inspect.signature(model.forward).parameters, places)), **words} if kwargs else places
    return Subject(model, args, kwargs, shapes_of)


def _asks(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a call is for text and leaves the cache to the model."""
    return not args and set(kwargs) <= {"input_ids", "attention_mask", "position_ids"}
