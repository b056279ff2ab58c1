"""Declare policies of the family `tokens`: later layers work on fewer tokens.

A policy is asked once about a *stream*: the attentions of a graph that hand the same tokens on to each other. It says how many
tokens are left behind each of them; counts are numbers, so that shapes stay static. A plan holds one choice for each attention
behind which the stream gets shorter, spelled with that number: `tome{left=241}`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.errors import EffError
from effcompile.core.policy import Exactness, Method, refused_value
from effcompile.core.site import AttentionSite, Refusal

if TYPE_CHECKING:
    from effcompile.core.rewrite import Editor

FAMILY = "tokens"
SCHEDULED = "EFF-R109"  # the refusal of an attention behind which the policy's own schedule keeps all tokens
Pins = tuple[int | tuple[int, int], ...]


@dataclass(frozen=True)
class Kept:
    """Say which tokens go on: `index` `[B, L]` int64 in rising order, places among the tokens that came.

    Of a merge, `source` `[B, r]` are the places of those that go, and `into` `[B, r]` the places, among those that go on, of the
    tokens that they become part of. With `weights` `[B, N]` one more token goes on behind the others: the weighted sum of all.
    """

    index: fx.Node
    source: fx.Node | None = None
    into: fx.Node | None = None
    weights: fx.Node | None = None


@dataclass
class Step:
    """Hold what a policy sees behind one attention: operands of the shortened graph, at the number of `tokens` that came.

    `held` `[B, N]` bool are tokens that must stay, `real` `[B, N]` bool those that are no padding, None where all are. `sizes`
    `[B, N]` counts the tokens that each stands for, None before the first merge. `state` is the policy's own, carried from one
    attention of the stream to the next and shortened with the tokens: `[B, N]` values. `stream` is what is shortened, `[B, N, C]`.
    """

    edit: Editor
    call: AttentionCall
    site: AttentionSite
    number: int
    tokens: int
    left: int
    portable: bool
    held: fx.Node | None
    real: fx.Node | None
    sizes: fx.Node | None
    state: dict[str, fx.Node] = field(default_factory=dict)
    stream: fx.Node | None = None


class TokenReduction(Method):
    """Answer which tokens later layers work on.

    Subclasses are frozen dataclasses with at least the fields `pinned` (places and ranges of tokens that always stay, negative ones
    from the end) and `left` (the tokens behind one attention; 0: the policy's own schedule). `cache`, a field of policies that drop
    tokens, says that keys and values that the graph returns are those of the tokens that are left, in each layer its own.

    `merges` says that tokens are merged and not dropped, `placed` that every token has a position of its own, `watches` that
    `observe` wants to see also attentions behind which nothing is dropped. With `around` each attention stands alone: its sub-layer
    runs on `left` tokens, and all of them get its result. A policy with a field `heads` below 1 leaves fewer key heads as well,
    `heads_left` of them behind one attention (0: the policy's own schedule).
    """

    family: ClassVar[str] = FAMILY
    exactness: ClassVar[Exactness] = "lossy"
    merges: ClassVar[bool] = False
    placed: ClassVar[bool] = True
    watches: ClassVar[bool] = False
    around: ClassVar[bool] = False
    pinned: Pins
    left: int
    cache: bool = False
    heads: float = 1.0
    heads_left: int = 0

    @abstractmethod
    def counts(self, tokens: int, attentions: int) -> tuple[int, ...]:
        """Return how many of `tokens` are left behind each attention of a stream; never more than before it."""

    def head_counts(self, heads: int, attentions: int) -> tuple[int, ...]:
        """Return how many of `heads` key heads are left behind each attention of a stream; never more than before it."""
        return (heads,) * attentions

    def most(self, tokens: int) -> int:
        """Return how many of `tokens` can go behind one attention."""
        return tokens - 1

    def refuses(self, site: AttentionSite) -> Refusal | None:
        """Return why the policy cannot work behind an attention, else None."""
        return None

    def observe(self, step: Step) -> None:
        """Take note of an attention in `step.state`."""

    @abstractmethod
    def choose(self, step: Step) -> Kept:
        """Insert what chooses `step.left` of `step.tokens` tokens."""

    def settled(self, left: int, heads_left: int = 0) -> TokenReduction:
        """Return the policy as a plan names it behind one attention; `heads_left` is 0 where the policy leaves heads alone."""
        return replace(self, left=left, **({"heads_left": heads_left} if heads_left else {}))  # type: ignore[type-var]

    def holding(self, prefix: int) -> TokenReduction:
        """Return the policy with the first `prefix` tokens pinned too; a single one, a class token, is the user's to pin or not."""
        if prefix < 2:
            return self
        within = [n for n in self.pinned if (n if isinstance(n, int) else n[1] - 1) < prefix]
        beyond = [n for n in self.pinned if n not in within or (n if isinstance(n, int) else n[0]) < 0]
        return replace(self, pinned=((0, prefix), *beyond))  # type: ignore[type-var]

    def pins(self, tokens: int) -> int:
        """Return how many of `tokens` are pinned.

        Raises:
            EffError: EFF-R110 for a place outside the sequence.
        """
        held: set[int] = set()
        for begin, count in spans(self.pinned):
            if not -tokens <= begin < tokens or begin % tokens + count > tokens:
                raise EffError(
                    "EFF-R110",
                    f"`{self.spelled}` pins token {begin if count == 1 else begin + count - 1} of a sequence of {tokens}",
                    hint=f"places go from {-tokens} to {tokens - 1}",
                )
            held.update(range(begin % tokens, begin % tokens + count))
        return len(held)

    def check_counts(self, tokens: int, counts: Sequence[int]) -> None:
        """Raise EFF-R111 unless every count leaves the pinned tokens, and one at least."""
        least = max(1, self.pins(tokens))
        for count in counts:
            if count < least:
                raise EffError(
                    "EFF-R111",
                    f"`{self.spelled}` leaves {count} of {tokens} tokens; {least} must stay",
                    hint="a smaller ratio, or fewer pinned tokens",
                )


def check_ratio(policy: Method, field_name: str) -> None:
    """Raise EFF-U004 unless the field is a number in [0, 1)."""
    value = getattr(policy, field_name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise refused_value(policy, field_name, "at least 0 and below 1")


def check_flag(policy: Method, field_name: str) -> None:
    """Raise EFF-U004 unless the field is true or false."""
    if not isinstance(getattr(policy, field_name), bool):
        raise refused_value(policy, field_name, "true or false")


def check_pins(policy: Method, field_name: str) -> None:
    """Raise EFF-U004 unless the field is a list of places and of ranges `[begin, end]`, ends excluded; make tuples of ranges."""
    value: Any = getattr(policy, field_name)
    listed = tuple(tuple(n) if isinstance(n, list) else n for n in value) if isinstance(value, tuple) else None
    wanted = "a list of places and of ranges [begin, end], such as [0,[5,9],-1]"
    if listed is None:
        raise refused_value(policy, field_name, wanted)
    for item in listed:
        numbers = item if isinstance(item, tuple) else (item,)
        if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers) or not 1 <= len(numbers) <= 2:
            raise refused_value(policy, field_name, wanted)
        if len(numbers) == 2 and not (numbers[0] < numbers[1] and (numbers[0] < 0) == (numbers[1] <= 0)):
            raise refused_value(policy, field_name, wanted)
    object.__setattr__(policy, field_name, listed)


def spans(pinned: Pins) -> tuple[tuple[int, int], ...]:
    """Return (first place, how many) of each pinned place or range."""
    return tuple((n, 1) if isinstance(n, int) else (n[0], n[1] - n[0]) for n in pinned)


def behind(number: int, counts: Sequence[int], tokens: int) -> int:
    """Return how many tokens, or heads, reach attention `number` of a stream."""
    return tokens if number == 0 else counts[number - 1]
