"""Say what a model of the zoo is: how to build it, what to feed it, where it comes from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effcompile.core.errors import EffError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one forward call."""


@dataclass(frozen=True)
class ZooEntry:
    """Describe one named model without building it.

    Attributes:
        name: the word after `zoo:`.
        summary: one line for listings.
        source: where code or weights come from.
        license: SPDX identifier of the weights (of this project for random ones).
        build: (dtype, meta) -> module; with `meta` true nothing is allocated, downloaded or read.
        inputs: (batch, seq) -> example inputs on the CPU, floats in float32.
        default_seq: tokens per sequence when the caller names none.
        max_seq: the longest sequence the model takes, or None when `fixed_seq` is set.
        fixed_seq: token count that the architecture fixes (images, latents); `seq` cannot change it.
        tokenizer: makes the tokenizer of a text model with trained weights.
        trained: whether the weights come from training.
    """

    name: str
    summary: str
    source: str
    license: str
    build: Callable[[torch.dtype, bool], nn.Module]
    inputs: Callable[[int, int], Inputs]
    default_seq: int
    max_seq: int | None = None
    fixed_seq: int | None = None
    tokenizer: Callable[[], Any] | None = None
    trained: bool = False


@dataclass(frozen=True)
class ZooModel:
    """Hold a built model in eval mode together with what is needed to call it.

    `tokenizer` is None for models that take no text, have random weights, or were built on the meta device.
    """

    name: str
    model: nn.Module
    entry: ZooEntry
    dtype: torch.dtype
    device: torch.device
    tokenizer: Any | None = None

    @property
    def source(self) -> str:
        """Say where code and weights come from."""
        return self.entry.source

    @property
    def license(self) -> str:
        """Name the license of the weights."""
        return self.entry.license

    def example_inputs(self, batch: int = 1, seq: int | None = None) -> Inputs:
        """Make seeded inputs for one forward call.

        Args:
            batch: rows, at least 1.
            seq: tokens per row; None takes the entry's default. Models with `entry.fixed_seq` have their token count
                from the architecture, and `seq` does not reach them.

        Returns:
            (args, kwargs) on the model's device, floating tensors in the model's dtype.

        Raises:
            EffError: EFF-U103 when the batch is empty or the sequence does not fit.
        """
        length = self.entry.default_seq if seq is None else seq
        limit = self.entry.max_seq
        if batch < 1 or length < 1 or (limit is not None and length > limit):
            bound = "" if limit is None else f" and at most {limit}"
            raise EffError(
                "EFF-U103",
                f"zoo:{self.name} cannot take {batch} rows of {length} tokens",
                hint=f"use at least one row and one token{bound} tokens per row",
            )
        args, kwargs = self.entry.inputs(batch, length)
        return tuple(self._place(value) for value in args), {key: self._place(value) for key, value in kwargs.items()}

    def _place(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device=self.device, dtype=self.dtype if value.is_floating_point() else None)


def build_seeded(make: Callable[[], nn.Module], dtype: torch.dtype, meta: bool) -> nn.Module:
    """Build a module with weights drawn under a fixed seed, or on the meta device without any."""
    if meta:
        with torch.device("meta"):
            return make().to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().to(dtype)


def random_tokens(batch: int, seq: int, vocab: int) -> Tensor:
    """Draw seeded token ids `[batch, seq]` in `[0, vocab)`."""
    return torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(batch * 1009 + seq))


def random_normal(*shape: int) -> Tensor:
    """Draw seeded standard normal values in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def ragged_padding(batch: int, seq: int) -> Tensor:
    """Make a key padding mask `[batch, seq]` of 1 (real) and 0 (padding); row 0 is full, later rows end earlier."""
    lengths = torch.tensor([max(1, seq - row * seq // (2 * batch)) for row in range(batch)])
    return (torch.arange(seq)[None, :] < lengths[:, None]).long()
