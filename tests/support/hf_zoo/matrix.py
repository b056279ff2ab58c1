"""Say what one model of the matrix is and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Kwargs = dict[str, Any]
Make = Callable[[int, int, int], Kwargs]

# A cache is state, not a result: what it holds is seen by the next decoding step.
CACHES = frozenset({"past_key_values", "mems"})


@dataclass(frozen=True)
class Decode:
    """Describe the single-token steps that follow a prefill.

    Attributes:
        cache: (config, batch, longest) -> a fresh cache, where `longest` counts prompt and steps.
        steps: (batch, length, seed) -> the keyword arguments of every step, without the cache. The tokens come from
            the seed and not from the logits, so that two runs that differ in rounding still see the same tokens.
        carry: the prefill's output -> more arguments for every step (an encoder's output).
    """

    cache: Callable[[Any, int, int], Any]
    steps: Callable[[int, int, int], tuple[Kwargs, ...]]
    carry: Callable[[Any], Kwargs] | None = None


@dataclass(frozen=True)
class Call:
    """Describe one way to call a model.

    Attributes:
        name: plain, nocache, left_pad, right_pad, decode, ...
        make: (batch, length, seed) -> keyword arguments; the first arguments of a decoding call.
        shapes: (batch, length) -> the expected shape of the outputs named; every decoding step gives them with one
            position instead of `length`.
        batch: the batch size that is used when none is given.
        length: the number of positions that is used when none is given; of text positions in a diffusion model.
        decode: present when the call is a prefill followed by steps.
    """

    name: str
    make: Make
    shapes: Callable[[int, int], Mapping[str, tuple[int, ...]]]
    batch: int = 2
    length: int = 24
    decode: Decode | None = None


@dataclass(frozen=True)
class MatrixCase:
    """Name a model with random weights and the calls that are made to it.

    Attributes:
        name: unique, and safe as a file name.
        family: decoder, moe, encoder, vision, seq2seq, speech or diffusion.
        build: returns a new module in eval mode; two builds hold equal weights.
        calls: the ways to call it; their names are unique.
        notes: what is special about the model, for a reader of a failing test.
        twin: another case that spells attention the same way; where time counts, one call of this case will do.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    calls: tuple[Call, ...]
    notes: str = ""
    twin: str | None = None

    def call(self, name: str) -> Call:
        """Return the call called `name`.

        Raises:
            KeyError: this model is not called in that way.
        """
        for found in self.calls:
            if found.name == name:
                return found
        raise KeyError(f"{self.name} has no call {name}; it has {', '.join(c.name for c in self.calls)}")


def outputs(result: Any) -> dict[str, Tensor]:
    """Flatten a model's result into named tensors, without caches and absent fields.

    Nested names are joined by dots (`hidden_states.0`); a bare tensor is called `output`.
    """
    if isinstance(result, Tensor):
        return {"output": result}
    found: dict[str, Tensor] = {}
    pairs = result.items() if isinstance(result, Mapping) else ((str(i), item) for i, item in enumerate(result))
    for name, item in pairs:
        if name in CACHES or item is None:
            continue
        if isinstance(item, Tensor):
            found[name] = item
        elif isinstance(item, (Mapping, tuple, list)):
            found.update({f"{name}.{key}": tensor for key, tensor in outputs(item).items()})
        else:
            raise TypeError(f"output {name} is a {type(item).__name__}")
    return found
