"""Say what is exported: a module with one call, which of its sizes may vary, its names, and the calls that it is compared at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from effcompile.capture.decoder import POINTS, Point, cached_decoder, is_decoder
from effcompile.capture.seq2seq import PARTS, is_seq2seq, seq2seq
from effcompile.capture.seq2seq import POINTS as SEQ2SEQ_POINTS
from effcompile.core.cache import CacheFormat
from effcompile.core.errors import EffError, unknown
from effcompile.core.rewrite import impure

Points = Callable[[bool], Iterator[Point]]
Follow = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, list[Tensor]]]
"""Run eager on a call over the codes that another runtime made; see `CachedDecoder.follow`."""


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
    follow: Follow | None = None
    """For a cache of codes."""
    trim: bool = False
    """Whether the model computes more than it returns."""

    def exported(self) -> torch.export.ExportedProgram:
        """Capture the model with torch.export.

        Raises:
            EffError: EFF-E114 where it cannot be captured.
        """
        if isinstance(self.model, torch.export.ExportedProgram):
            return self.model
        try:
            made = torch.export.export(
                self.model, self.args, dict(self.kwargs), dynamic_shapes=self.shapes, strict=False
            )
            if self.trim:
                made.graph.eliminate_dead_code(impure)
                made.graph_module.recompile()
            return made
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
    part: str = "",
    buffers: bool = False,
) -> Subject:
    """Return what to export: a decoder of transformers with its cache unless `cache` is False or the call is without one.

    With a `format` the cache holds codes; `own` says that a call reads its own tokens as they are. `part` names one of the two
    graphs of an encoder-decoder with its caches. `buffers` asks for a cache of a fixed capacity.

    Raises:
        EffError: EFF-E117 where `cache` is asked for and the model has none, EFF-E118 for a format without a form in ONNX,
            EFF-E176 for a part that the model does not have.
    """
    if buffers and not is_decoder(model):
        raise EffError("EFF-E117", f"{type(model).__name__} is no decoder with a cache", hint="leave --buffers out")
    if part or (cache and is_seq2seq(model)):
        if format is not None:
            raise EffError("EFF-E118", "a format is for decoders alone", hint="leave --kv out")
        return _part(model, kwargs, part, dynamic)
    if (
        cache
        or buffers
        or format is not None
        or (cache is None and dynamic and is_decoder(model) and _asks(args, kwargs))
    ):
        call = cached_decoder(model, format, own=own, buffered=buffers)
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
            call.module.follow if format is not None else None,
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


def _part(model: Any, kwargs: Mapping[str, Any], part: str, dynamic: bool) -> Subject:
    """Return the encoder of an encoder-decoder with what it gives to its decoder, or that decoder."""
    if part not in PARTS:
        if part:
            raise unknown("EFF-E176", "part of a model", part, PARTS)
        raise EffError(
            "EFF-E176", "an encoder-decoder with caches is two graphs", hint="--part encoder, --part decoder"
        )
    found = seq2seq(model, kwargs)
    auto = torch.export.Dim.AUTO
    if part == "encoder":
        names = found.encoder.names
        free = tuple(dict.fromkeys(range(x.ndim), auto) for x in found.source)
        shapes = (free,) if dynamic else None
        return Subject(found.encoder, found.source, {}, shapes, names, found.encoder_outputs(), trim=True)
    batch, length, past, cut = SEQ2SEQ_POINTS[0]
    sizes = found.sizes()
    spans = tuple({d: auto for d, name in enumerate(row) if name} for row in sizes)
    return Subject(
        found.decoder,
        found.point(batch, length, past, cut).args,
        {},
        (spans[0], spans[1:]) if dynamic else None,
        found.decoder_inputs(),
        found.decoder_outputs(),
        sizes,
        found.points,
    )


def _asks(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a call is for text and leaves the cache to the model."""
    return not args and set(kwargs) <= {"input_ids", "attention_mask", "position_ids"}
