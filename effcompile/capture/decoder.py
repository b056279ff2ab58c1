"""Call a decoder of transformers with its cache as plain tensors: one graph for a prompt, a step, and a prompt behind a cache.

Inputs and outputs have the names that users of ONNX exports know: `input_ids`, `attention_mask`, `position_ids`,
`past_key_values.N.key`, and `logits`, `present.N.key`. A layer's tensors grow by concatenation, `[batch, heads, length, width]`,
also where it slides: its mask says what it reads. With a format they hold codes of 8 or 4 bits instead, whose scales are constants;
with buffers (`buffers.py`) they do not grow, and tokens are written into them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effcompile.capture import buffers
from effcompile.core.cache import CacheFormat
from effcompile.core.errors import EffError
from effcompile.core.site import CacheSite, Refusal
from effcompile.ops.kv.fixed import Fixed
from effcompile.ops.kv.fixed import dequantize as read_codes
from effcompile.ops.kv.fixed import quantize as make_codes

CODE = "EFF-E117"
BATCH, LENGTH, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL, COVERED, CAPACITY = f"{PAST} + {LENGTH}", "total_sequence_length", "max_sequence_length"
ROOM = 3
"""How many tokens more than there are the buffers of a comparison hold."""
POINTS = ((2, 5, 4), (3, 1, 7), (1, 6, 0), (2, 9, 3), (2, 8, 0))
"""(batch, length, past) that an export is compared at: behind a cache, a step, a first prompt, and two padded from the left."""
SINGLE = ((1, 5, 4), (3, 1, 7), (2, 6, 0), (2, 1, 6), (2, 8, 0))
"""The same for operators that take several tokens behind a cache for one sequence alone."""
PADDED = 2
"""How many of them, the last ones, have padding."""


def quantize(x: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Do the same as `ops.kv.fixed.quantize`, without shifts of bytes, which torch's exporter translates to other types."""
    if bits == 8:
        return make_codes(x, scales, bits)
    codes = (x.float() / scales[:, None]).round().clamp(-8, 7).nan_to_num(nan=0.0) + 8
    pair = codes.unflatten(3, (-1, 2))
    return (pair[..., 0] + pair[..., 1] * 16).to(torch.uint8)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Do the same as `ops.kv.fixed.dequantize`, likewise."""
    if codes.dtype == torch.int8:
        return read_codes(codes, scales)
    wide = codes.float()
    high = (wide / 16).floor()
    return (torch.stack([wide - high * 16, high], -1).flatten(3) - 8) * scales[:, None]


def distance(x: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    """Return how far numbers `[B, H, S, D]` are from codes that are said to be theirs, in steps: at most 1/2 where they are."""
    low, high = (-128, 127) if codes.dtype == torch.int8 else (-8, 7)
    steps = (x.float() / scales[:, None]).clamp(low, high).nan_to_num(nan=0.0)
    return (steps - read_codes(codes, torch.ones_like(scales))).abs()


@functools.cache
def _coded_layer() -> Any:
    """Return the class of a cache layer that holds codes; it is made here, since importing this module imports no transformers."""
    from transformers.cache_utils import DynamicLayer

    class Coded(DynamicLayer):  # type: ignore[misc]
        """Hold codes of keys and values; attention reads what they stand for."""

        def __init__(
            self,
            codes: Sequence[Tensor],
            scales: Sequence[Tensor],
            bits: int,
            own: bool,
            answers: Sequence[Tensor] | None = None,
        ) -> None:
            super().__init__()
            self.codes, self.scales, self.bits, self.own = list(codes), list(scales), bits, own
            self.answers, self.distances = answers, list[Tensor]()
            self.keys, self.values = (dequantize(x, s) for x, s in zip(codes, scales))
            self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Append tokens; those of this call are read as they are made with `own`, else from their codes."""
            new = (key_states, value_states)
            before = self.keys, self.values
            held, past = self.codes, self.codes[0].shape[2]
            if self.answers is None:
                made = (quantize(x, scale, self.bits) for x, scale in zip(new, self.scales))
                self.codes = [torch.cat([codes, more], 2) for codes, more in zip(held, made)]
            else:
                self.codes = list(self.answers)
                for x, scale, codes, before_it in zip(new, self.scales, self.codes, held):
                    apart = distance(x, scale, codes[:, :, past:])
                    same = torch.equal(codes[:, :, :past], before_it)
                    self.distances.append(apart if same else apart + torch.inf)
            if self.own:
                self.keys, self.values = (torch.cat([old.to(x.dtype), x], 2) for old, x in zip(before, new))
            else:
                self.keys, self.values = (
                    dequantize(codes, scale).to(x.dtype) for codes, scale, x in zip(self.codes, self.scales, new)
                )
            return self.keys, self.values

    return Coded


class CachedDecoder(nn.Module):
    """Take token ids, mask, positions and (key, value) of every layer; return logits and the same, grown.

    With `bits` keys and values are codes, and `scales` has those of both, float32 `[heads, width]`, layer by layer. With
    `buffered` they are buffers, and are returned with the tokens of the call written into them.
    """

    def __init__(
        self, model: nn.Module, scales: Sequence[Tensor] = (), bits: int = 0, own: bool = True, buffered: bool = False
    ) -> None:
        super().__init__()
        self.model, self.bits, self.own, self.buffered = model, bits, own, buffered
        self.positions = "position_ids" in inspect.signature(model.forward).parameters
        for place, scale in enumerate(scales):
            self.register_buffer(f"scale_{place}", scale)

    def cache(self, held: Sequence[Tensor], answers: Sequence[Tensor] = (), past: Any = 0) -> Any:
        """Return transformers' cache of keys and values, or of their codes; `answers` are what these become.

        `past` is how many tokens there are in buffers.
        """
        from transformers import DynamicCache
        from transformers.cache_utils import Cache, DynamicLayer

        pairs = list(zip(held[::2], held[1::2]))
        if self.bits:
            scales = [getattr(self, f"scale_{place}") for place in range(len(held))]
            both = list(zip(scales[::2], scales[1::2]))
            become: Sequence[Any] = list(zip(answers[::2], answers[1::2])) or [None] * len(pairs)
            kinds = zip(pairs, both, become, strict=True)
            return Cache(layers=[_coded_layer()(x, s, self.bits, self.own, after) for x, s, after in kinds])
        if self.buffered:
            return Cache(layers=[buffers.layer_of(keys, values, past) for keys, values in pairs])
        cache = DynamicCache()
        for keys, values in pairs:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values  # not through `update`, which would copy them
            cache.layers.append(layer)
        return cache

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """Run the model; `more` are position ids, where it takes them, then keys and values in turn."""
        made = self._made(input_ids, attention_mask, more)
        layers = made.past_key_values.layers
        kept = [x for layer in layers for x in (layer.codes if self.bits else (layer.keys, layer.values))]
        return made.logits, *kept

    def follow(self, args: Sequence[Tensor], answers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run the model over codes that another runtime made in this call, `answers`, in the place of its own.

        A number that lies between two codes may become either, and the layers behind it see which; so what follows the same codes
        can be compared to rounding. Returns the logits, and for every codes tensor how far the numbers `[B, H, S, D]` of this
        call were from their codes, in steps: infinite where codes of earlier tokens were changed.
        """
        made = self._made(args[0], args[1], args[2:], answers)
        return made.logits, [x for layer in made.past_key_values.layers for x in layer.distances]

    def _made(
        self, input_ids: Tensor, attention_mask: Tensor, more: Sequence[Tensor], answers: Sequence[Tensor] = ()
    ) -> Any:
        held = list(more)
        given = {"position_ids": held.pop(0)} if self.positions else {}
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=self.cache(held, answers, attention_mask.shape[1] - input_ids.shape[1]),
            use_cache=True,
            **given,
        )


@dataclass(frozen=True)
class Point:
    """Hold a call to compare at; `real` is `[batch, past + length]`, False where a token is padding."""

    sizes: Mapping[str, int]
    args: tuple[Tensor, ...]
    real: Tensor


@dataclass(frozen=True)
class DecoderCall:
    """Hold a decoder as something to export: the module, its names, and calls of any size."""

    module: CachedDecoder
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: tuple[tuple[str | None, ...], ...]
    """What each size of each input is called, None where it is fixed."""
    vocabulary: int
    empty: tuple[Tensor, ...]
    """Keys and values, or codes, of no token."""

    def point(self, batch: int, length: int, past: int, *, padded: bool = False) -> Point:
        """Return a call with what the model made of `past` tokens; `padded` from the left, row by row."""
        draw = torch.Generator().manual_seed(1000 * batch + 10 * length + past)
        ids = torch.randint(min(4, self.vocabulary - 1), self.vocabulary, (batch, past + length), generator=draw)
        pads = torch.arange(batch) % 3 if padded else torch.zeros(batch, dtype=torch.long)
        mask = (torch.arange(past + length)[None] >= pads[:, None]).long()
        places = (mask.cumsum(1) - 1).clamp(min=0)
        held: Sequence[Tensor] = [x.expand(batch, *x.shape[1:]) for x in self.empty]
        if self.module.buffered:
            held = [x.new_zeros(batch, x.shape[1], past + length + ROOM, x.shape[3]) for x in self.empty]
        if past:
            first = (places[:, :past],) if self.module.positions else ()
            held = self.module(ids[:, :past], mask[:, :past], *first, *held)[1:]
        positions = (places[:, past:].contiguous(),) if self.module.positions else ()
        args = (ids[:, past:].contiguous(), mask, *positions, *(x.contiguous() for x in held))
        sizes = {BATCH: batch, LENGTH: length, PAST: past}
        if self.module.buffered:
            sizes[CAPACITY] = past + length + ROOM
        return Point(sizes, args, mask.bool())

    def points(self, single: bool = False) -> Iterator[Point]:
        """Yield a call for every point at which the export is compared."""
        for place, (batch, length, past) in enumerate(SINGLE if single else POINTS):
            yield self.point(batch, length, past, padded=place >= len(POINTS) - PADDED)


def is_decoder(model: Any) -> bool:
    """Tell whether a model of transformers decodes token by token with a cache."""
    config = getattr(model, "config", None)
    can = getattr(model, "can_generate", None)
    return (
        isinstance(model, nn.Module)
        and callable(can)
        and bool(can())
        and not getattr(config, "is_encoder_decoder", False)
        and "past_key_values" in inspect.signature(model.forward).parameters
    )


def cached_decoder(
    model: nn.Module, format: CacheFormat | None = None, *, own: bool = True, buffered: bool = False
) -> DecoderCall:
    """Return a decoder with its cache as inputs and outputs, in a format where one is given.

    `own` says that attention reads the tokens of a call as the model made them, and not from their codes; `buffered` that keys and
    values are buffers of a capacity.

    Raises:
        EffError: EFF-E117 for a model without a cache of keys and values, such as one with a recurrent state; EFF-E118 for a format
            that ONNX has no form of, or that has none in buffers.
    """
    if buffered and format is not None:
        raise EffError("EFF-E118", f"`{format.name}` grows by concatenation", hint="leave --buffers or --kv out")
    if not is_decoder(model):
        raise EffError(
            CODE, f"{type(model).__name__} is no decoder with a cache", hint="leave the cache out: --no-cache"
        )
    from transformers import DynamicCache

    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary, tokens = int(text.vocab_size), 4
    with torch.no_grad():
        ids = torch.randint(min(4, vocabulary - 1), vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
        made = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
    layers: Sequence[Any] = getattr(made.past_key_values, "layers", ())
    held = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not held or any(
        not isinstance(x, Tensor) or x.dim() != 4 or x.shape[2] != tokens for pair in held for x in pair
    ):
        raise EffError(
            CODE, f"the cache of {type(model).__name__} is not keys and values of every token", hint="--no-cache"
        )
    scales, bits = _scales(format, held) if format is not None else ([], 0)
    module = CachedDecoder(model, scales, bits, own, buffered).eval()
    flat: list[Tensor] = [x for pair in held for x in pair if x is not None]
    if bits:
        flat = [quantize(x, scale, bits) for x, scale in zip(flat, scales)]
    names = [f"{n}.{word}" for n in range(len(held)) for word in ("key", "value")]
    positions = ["position_ids"] if module.positions else []
    sizes: list[tuple[str | None, ...]] = [(BATCH, LENGTH), (BATCH, COVERED if buffered else TOTAL)]
    sizes += [(BATCH, LENGTH)] * len(positions)
    sizes += [(BATCH, None, CAPACITY if buffered else PAST, None)] * len(names)
    return DecoderCall(
        module,
        ("input_ids", "attention_mask", *positions, *(f"past_key_values.{name}" for name in names)),
        ("logits", *(f"present.{name}" for name in names)),
        tuple(sizes),
        vocabulary,
        tuple(x[:, :, :0].detach() for x in flat),
    )


def _scales(format: CacheFormat, held: Sequence[tuple[Any, Any]]) -> tuple[list[Tensor], int]:
    """Return the scales of keys and values of every layer, and the bits of a code."""
    found: list[Tensor] = []
    bits = 0
    for layer, (keys, values) in enumerate(held):
        site = CacheSite(
            f"layers.{layer}.cache", "cache", "decode", "", kv_heads=keys.shape[1], head_dim=keys.shape[3],
            value_dim=values.shape[3], dtype=str(keys.dtype).removeprefix("torch."),
        )  # fmt: skip
        storage = format.storage(site)
        if isinstance(storage, Refusal):
            raise EffError(storage.code, f"`{format.spelled}`: {storage.reason}", site=site.id, hint=storage.hint)
        if not isinstance(storage, Fixed):
            raise EffError(
                "EFF-E118",
                f"`{format.name}` has no form in ONNX: where a token lies depends on how many there are",
                hint="static-channel{ranges=FILE}, whose codes grow by concatenation",
            )
        constants = format.constants(site)
        found += [constants["k_scales"], constants["v_scales"]]
        bits = storage.bits
    return found, bits
