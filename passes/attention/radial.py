"""Keep less of a frame the further away it is (Radial Attention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.expr import KEY, Expr, apply, axis, const
from effcompile.core.narrow import Alignment
from effcompile.core.policy import Kernels, Proposal, check_whole, refused_value
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.passes.attention.pattern import StaticPattern


@dataclass(frozen=True)
class Radial(StaticPattern):
    """Read frames at distance D in a band around a query's place, of `decay` S / 2^n places where 2^n <= D < 2^(n+1).

    The tokens of a video are `frames` of S each, behind `text` tokens; text rows and columns stay, as does a query's own frame and
    those beside it. Where the band would be narrower than `least` places it is that wide, and only every 2^m-th distance is read,
    so that the share of pairs is the same. `first` keeps all of the first frame for every query. What is kept grows as N log N.
    """

    frames: int = 0
    text: int = 0
    decay: float = 0.95
    least: int = 64
    first: bool = True

    name: ClassVar[str] = "radial"
    paper: ClassVar[str] = "arXiv:2506.19852"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "frames")
        check_whole(self, "text")
        check_whole(self, "least", least=1)
        if not 0 < self.decay <= 2:
            raise refused_value(self, "decay", "above 0 and at most 2")

    @property
    def sink(self) -> bool:
        """Tell whether key 0 is one of those that every query keeps."""
        return bool(self.text) or self.first

    @property
    def reach(self) -> int:
        """Return the text, which every query reads."""
        return self.text

    def estimate(self, site: AttentionSite, target: Target, kernels: Kernels) -> Proposal:
        """Refuse sites whose tokens are not so many equal frames."""
        length = site.kv_len
        if not isinstance(length, int) or str(site.q_len) != str(length):
            return Refusal(
                "EFF-A504", f"{site.q_len} queries and {length} keys are not the tokens of a video", "dynamic=False"
            )
        video = length - self.text
        if self.frames < 1 or video <= 0 or video % self.frames:
            said = f"{self.frames} equal frames" if self.frames else "frames, of which `frames` gives no number"
            return Refusal("EFF-A504", f"{video} tokens behind the text are no {said}", "radial{frames=13,text=226}")
        return super().estimate(site, target, kernels)

    def bands(self, span: int) -> tuple[tuple[int, int, int, int], ...]:
        """Return (nearest distance, farthest distance, every which, places to each side) of frames of `span` tokens."""
        found, near = [], 2
        while near < self.frames:
            width, every = self.decay * span / near, 1
            while width * every < min(self.least, span):
                every *= 2
            far = min(2 * near, self.frames) - 1
            found.append((near, far, every, int(max(width, min(self.least, span))) // 2))
            near *= 2
        return tuple(found)

    def pattern(self, at: Alignment) -> Expr:
        """Return the union of the bands."""
        assert at.k_len.is_const, "sites of unknown length are refused"
        span = (int(at.k_len.value or 0) - self.text) // self.frames
        first = const(self.text)
        tokens = [apply("sub", token, first) for token in (at.own, axis(KEY))]
        frame = [apply("floordiv", token, const(span)) for token in tokens]
        place = [apply("mod", token, const(span)) for token in tokens]
        apart = apply("sub", frame[0], frame[1])
        kept = _between(apart, 1)
        for near, far, every, half in self.bands(span):
            ring = apply("and", _between(apart, far), apply("not", _between(apart, near - 1)))
            ring = apply("and", ring, _between(apply("sub", place[0], place[1]), half))
            if every > 1:
                ring = apply("and", ring, apply("eq", apply("mod", apart, const(every)), const(0)))
            kept = apply("or", kept, ring)
        head = self.text + (span if self.first else 0)
        if head:
            kept = apply("or", kept, apply("le", axis(KEY), const(head - 1)))
        return apply("or", kept, apply("le", at.own, const(self.text - 1))) if self.text else kept


def _between(value: Expr, most: int) -> Expr:
    """Return |value| <= most."""
    return apply("and", apply("le", const(-most), value), apply("le", value, const(most)))
