"""Call an encoder-decoder of transformers with its caches as plain tensors, in two graphs.

`encoder` reads the source once and gives what every layer of the decoder attends to in it, keys and values. `decoder` takes token
ids, those, and keys and values of the tokens so far, and gives logits and the latter, grown. So no step projects the source again,
and none copies it. Names are those that users of ONNX exports know: `past_key_values.N.decoder.key`, `present.N.decoder.key`, and
`past_key_values.N.encoder.key` for the source.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effcompile.capture.decoder import BATCH, LENGTH, PAST, Point
from effcompile.core.errors import EffError

CODE = "EFF-E176"
PARTS: tuple[str, ...] = ("encoder", "decoder")
SOURCE = "source_length"
POINTS = ((2, 5, 4, 0), (3, 1, 7, 1), (1, 6, 0, 0), (2, 1, 3, 2))
"""(batch, length, past, source tokens that are cut off) that a decoder is compared at."""
_IDS, _MASK = "input_ids", "attention_mask"


class Encoder(nn.Module):
    """Take what the encoder reads, in the order of `names`; return keys and values of the source for every layer in turn."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *source: Tensor) -> tuple[Tensor, ...]:
        """Run the model over one token, of which nothing is kept."""
        token = torch.zeros(source[0].shape[0], 1, dtype=torch.long, device=source[0].device)
        made = self.model(**dict(zip(self.names, source, strict=True)), decoder_input_ids=token, use_cache=True)
        layers = made.past_key_values.cross_attention_cache.layers
        return tuple(x for layer in layers for x in (layer.keys, layer.values))


class Decoder(nn.Module):
    """Take token ids, the mask of the source where there is one, and (key, value) of tokens and of the source, layer by layer."""

    def __init__(self, model: nn.Module, masked: bool) -> None:
        super().__init__()
        self.model, self.masked = model, masked
        config: Any = model.config
        self.width = int(getattr(config, "d_model", None) or config.hidden_size)

    def forward(self, decoder_input_ids: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """Return logits, and keys and values of all tokens."""
        from transformers.cache_utils import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        held = list(more)
        given = {_MASK: held.pop(0)} if self.masked else {}
        layers = [held[place : place + 4] for place in range(0, len(held), 4)]
        cache: Any = EncoderDecoderCache(_cache([x[:2] for x in layers]), _cache([x[2:] for x in layers]))
        cache.is_updated = dict.fromkeys(range(len(layers)), True)
        keys = layers[0][2]
        unread = keys.new_zeros(keys.shape[0], keys.shape[2], self.width)  # the layers have its projections already
        made = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=unread),
            decoder_input_ids=decoder_input_ids,
            past_key_values=cache,
            use_cache=True,
            **given,
        )
        kept = made.past_key_values.self_attention_cache.layers
        return made.logits, *(x for layer in kept for x in (layer.keys, layer.values))


def _cache(pairs: Sequence[Sequence[Tensor]]) -> Any:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


@dataclass(frozen=True)
class Seq2Seq:
    """Hold both parts of a model, and a source to compare with."""

    encoder: Encoder
    decoder: Decoder
    source: tuple[Tensor, ...]
    across: tuple[Tensor, ...]
    """Keys and values of the source, layer by layer."""
    mask: Tensor | None
    vocabulary: int

    @property
    def layers(self) -> int:
        """Return the layers of the decoder."""
        return len(self.across) // 2

    def encoder_outputs(self) -> tuple[str, ...]:
        """Return the names of what the encoder gives: the inputs of the decoder that they are."""
        return tuple(f"past_key_values.{n}.encoder.{word}" for n in range(self.layers) for word in ("key", "value"))

    def decoder_inputs(self) -> tuple[str, ...]:
        """Return the names of the decoder's inputs."""
        pairs = [(n, kind, word) for n in range(self.layers) for kind in PARTS[::-1] for word in ("key", "value")]
        masks = ["encoder_attention_mask"] if self.mask is not None else []
        return ("decoder_input_ids", *masks, *(f"past_key_values.{n}.{kind}.{word}" for n, kind, word in pairs))

    def decoder_outputs(self) -> tuple[str, ...]:
        """Return the names of the decoder's outputs."""
        return ("logits", *(f"present.{n}.decoder.{word}" for n in range(self.layers) for word in ("key", "value")))

    def sizes(self) -> tuple[tuple[str | None, ...], ...]:
        """Return what each size of each input of the decoder is called."""
        masks: list[tuple[str | None, ...]] = [(BATCH, SOURCE)] if self.mask is not None else []
        layer = [(BATCH, None, PAST, None)] * 2 + [(BATCH, None, SOURCE, None)] * 2
        return ((BATCH, LENGTH), *masks, *(layer * self.layers))

    def point(self, batch: int, length: int, past: int, cut: int) -> Point:
        """Return a call of the decoder behind `past` tokens, `cut` tokens of the source left out."""
        draw = torch.Generator().manual_seed(1000 * batch + 10 * length + past)
        ids = torch.randint(min(4, self.vocabulary - 1), self.vocabulary, (batch, past + length), generator=draw)
        rows = torch.arange(batch) % self.across[0].shape[0]
        tokens = max(2, self.across[0].shape[2] - cut)
        across = [x[rows, :, :tokens].contiguous() for x in self.across]
        masks = [self.mask[rows, :tokens].contiguous()] if self.mask is not None else []
        held = [x[:, :, :0] for x in across]
        if past:
            held = list(self.decoder(ids[:, :past], *masks, *_woven(held, across))[1:])
        args = (ids[:, past:].contiguous(), *masks, *_woven(held, across))
        real = torch.ones(batch, past + length, dtype=torch.bool)
        return Point({BATCH: batch, LENGTH: length, PAST: past, SOURCE: tokens}, args, real)

    def points(self, single: bool = False) -> Iterator[Point]:
        """Yield a call for every point at which the decoder is compared."""
        for batch, length, past, cut in POINTS:
            if not single or batch == 1 or length == 1:
                yield self.point(batch, length, past, cut)


def _woven(held: Sequence[Tensor], across: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return keys and values of tokens and of the source, layer by layer."""
    found = []
    for place in range(0, len(held), 2):
        found += [*held[place : place + 2], *across[place : place + 2]]
    return tuple(found)


def _padding(ids: Tensor) -> Tensor:
    """Return a mask `[batch, tokens]` that leaves out the last token of every other text."""
    mask = torch.ones_like(ids)
    mask[1::2, -1] = 0
    return mask


def is_seq2seq(model: Any) -> bool:
    """Tell whether a model of transformers reads with an encoder and writes with a decoder that has a cache."""
    config = getattr(model, "config", None)
    return (
        isinstance(model, nn.Module)
        and bool(getattr(config, "is_encoder_decoder", False))
        and {"decoder_input_ids", "past_key_values", "encoder_outputs"}
        <= set(inspect.signature(model.forward).parameters)
    )


def seq2seq(model: nn.Module, kwargs: Mapping[str, Any]) -> Seq2Seq:
    """Return both parts of a model; `kwargs` are those of a call of the whole, of which the encoder's are taken.

    Raises:
        EffError: EFF-E176 for a model without both, and for a call without a source.
    """
    if not is_seq2seq(model):
        raise EffError(CODE, f"{type(model).__name__} has no encoder and decoder with a cache", hint="leave --part out")
    source = {
        name: x for name, x in kwargs.items() if isinstance(x, Tensor) and not name.startswith(("decoder_", "labels"))
    }
    if not source:
        raise EffError(CODE, "the call has nothing for the encoder to read", hint="pass input_ids=..., by name")
    if _IDS in source and _MASK in inspect.signature(model.forward).parameters:
        source.setdefault(_MASK, _padding(source[_IDS]))
    encoder = Encoder(model, tuple(source)).eval()
    across = encoder(*source.values())
    if any(x.dim() != 4 for x in across) or not across:
        raise EffError(CODE, f"the cache of {type(model).__name__} is not keys and values", hint="leave --part out")
    mask = source.get(_MASK)
    if mask is not None and mask.shape[1] != across[0].shape[2]:
        raise EffError(
            CODE, "the encoder shortens its mask, which its decoder is to be given again", hint="a call without a mask"
        )
    config: Any = model.config
    return Seq2Seq(
        encoder, Decoder(model, mask is not None).eval(), tuple(source.values()), across, mask, int(config.vocab_size)
    )
