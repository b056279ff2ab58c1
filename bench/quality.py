"""Score a language model against another run of it: perplexity, KL divergence, top-1 agreement, pass keys.

Everything is computed from the logits of whole windows, in float32 and a few hundred rows at a time, so that scoring stays small
beside the logits themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_ROWS = 256
TAIL = 1024
"""Rows at the end of a window that are scored apart: they see the longest past, which is what a pattern cuts."""
QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclass
class Score:
    """Add up windows of one text. KL is in nats, from the dense distribution to the other, a mean over positions."""

    loss: float = 0.0
    tail_loss: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    rows: int = 0
    tail_rows: int = 0

    def add(self, logits: Tensor, dense: Tensor, ids: Tensor) -> None:
        """Take the logits `[S, V]` of a window, the dense ones, and its token ids `[S]`."""
        length = len(ids) - 1
        for part in range(0, length, _ROWS):
            rows = slice(part, min(part + _ROWS, length))
            mine, base = (x[rows].float().log_softmax(-1) for x in (logits, dense))
            loss = -mine.gather(1, ids[rows.start + 1 : rows.stop + 1, None]).squeeze(1)
            self.loss += float(loss.double().sum())
            late = max(0, length - TAIL - rows.start)
            self.tail_loss += float(loss[late:].double().sum())
            self.tail_rows += max(0, len(loss) - late)
            self.divergence += float((base.exp() * (base - mine)).sum(-1).double().sum())
            self.agreed += int((mine.argmax(-1) == base.argmax(-1)).sum())
        self.rows += length

    def to_json(self) -> dict[str, Any]:
        """Return the figures of all windows together."""
        return {
            "perplexity": _short(math.exp(self.loss / self.rows)),
            "tail_perplexity": _short(math.exp(self.tail_loss / self.tail_rows)),
            "kl": _short(self.divergence / self.rows),
            "top1": _short(self.agreed / self.rows),
            "positions": self.rows,
        }


@dataclass(frozen=True)
class Hunt:
    """Hold one pass-key prompt: `ids` `[1, S]` with the answer at its end, whose tokens take the last `answer` places.

    The key counts as found when every token of it is the most probable one after the prompt and the tokens before it, which is
    what greedy decoding would print.
    """

    ids: Tensor
    answer: int
    depth: float

    def found(self, logits: Tensor) -> bool:
        """Tell whether logits `[1, S, V]` name the key."""
        guesses = logits[0, -self.answer - 1 : -1].argmax(-1)
        return bool((guesses == self.ids[0, -self.answer :]).all())


def hunts(tokenizer: Any, text: str, length: int, tries: int, digits: int = 5) -> Iterator[Hunt]:
    """Yield prompts of exactly `length` tokens: prose with a key hidden in it, at evenly spread depths, and the question.

    Keys and places are seeded; every try has its own part of the text.
    """
    draw = torch.Generator().manual_seed(20241)
    question = _encode(tokenizer, QUESTION)
    for number in range(tries):
        key = "".join(str(int(torch.randint(10, (1,), generator=draw))) for _ in range(digits))
        answer = _encode(tokenizer, f" {key}.")[: len(_encode(tokenizer, f" {key}"))]
        needle = _encode(tokenizer, f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")
        room = length - len(needle) - len(question) - len(answer)
        if room < 1:
            raise ValueError(f"{length} tokens hold no prompt; it needs {length - room + 1}")
        start = number * len(text) // tries
        prose = _encode(tokenizer, text[start : start + room * 8])[:room]
        if len(prose) < room:
            raise ValueError(f"the text has too few tokens for {tries} prompts of {length}")
        depth = number / max(1, tries - 1)
        place = round(depth * room)
        ids = prose[:place] + needle + prose[place:] + question + answer
        yield Hunt(torch.tensor([ids]), len(answer), depth)


@dataclass
class Found:
    """Count the keys that were found."""

    found: int = 0
    tries: int = 0
    missed_at: list[float] = field(default_factory=list)

    def add(self, hunt: Hunt, logits: Tensor) -> None:
        """Take the logits of one prompt."""
        self.tries += 1
        if hunt.found(logits):
            self.found += 1
        else:
            self.missed_at.append(_short(hunt.depth))

    def to_json(self) -> dict[str, Any]:
        """Return the count, and the depths (0: at the beginning) at which keys were missed."""
        return {"found": self.found, "tries": self.tries, "missed_at": self.missed_at}


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _short(value: float) -> float:
    return float(f"{value:.5g}")
