"""Attend to a narrow band, and take from an earlier denoising step what the band leaves out (Re-ttention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from effcompile.core.expr import KEY, QUERY, Expr, apply, axis, const
from effcompile.core.mask import Mask
from effcompile.core.policy import Kernels, Proposal, check_share, check_whole, refused_value
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.passes.attention.pattern import AttentionPattern

Phase = Literal["dense", "refresh", "sparse"]


@dataclass(frozen=True)
class ReTtention(AttentionPattern):
    """Keep the keys within `keep` of a query's place on sparse steps; mass and residual of the others come from a refresh.

    A refresh step computes O of all keys and O' of the band, rho = exp(LSE' - LSE), at most 1, and R = O - rho O'; on CPU from O'
    and what the other keys give, O", each pair once: rho = sigmoid(LSE' - LSE"), R = (1 - rho) O". A sparse step gives rho O' +
    R, and each adds `growth` to rho, up to 1. The first `warmup` steps of a run or stage are dense, then every `period`-th
    refreshes. Work of attention falls to (dense + refresh steps (1 + d) + sparse steps d) / steps for a band of density d
    (without the d of a refresh on CPU), and no further. Images in raster order (`frames=0`): a band over the tokens. Video:
    `frames` of equal size behind `text` tokens, whose rows and columns stay; the band is over places within a frame, of all
    frames, and tokens go place by place. The state is R and rho of each layer. `keep=1` leaves everything dense, bit for bit. For
    loops (`eff.sampler`), not single calls.
    """

    keep: float = 0.03125
    warmup: int = 5
    period: int = 5
    growth: float = 0.04
    text: int = 0
    frames: int = 0

    name: ClassVar[str] = "re-ttention"
    paper: ClassVar[str] = "arXiv:2505.22918"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "keep")
        check_whole(self, "warmup")
        check_whole(self, "period", least=1)
        check_whole(self, "text")
        check_whole(self, "frames")
        if not 0 <= self.growth <= 1:
            raise refused_value(self, "growth", "from 0 to 1")

    def phase(self, number: int) -> Phase:
        """Return what call `number` of a run or stage does, 0 being the first."""
        if self.keep >= 1 or number < self.warmup:
            return "dense"
        return "sparse" if (number - self.warmup) % self.period else "refresh"

    def refuses(self, site: AttentionSite) -> Refusal | None:
        """Return why a site has nothing that could be replayed, else None."""
        if site.layer < self.dense_layers:
            return Refusal("EFF-A501", f"layer {site.layer} is one of the first {self.dense_layers}, which stay dense")
        if site.cross or str(site.q_len) != str(site.kv_len):
            return Refusal("EFF-A504", "cross attention: distance between query and key means nothing")
        if not isinstance(site.mask, Mask) or not site.mask.is_full or site.mask.bias is not None:
            return Refusal("EFF-A103", f"the mask {site.mask} is not full")
        if site.softcap or site.sinks:
            return Refusal("EFF-A201", "no kernel replays attention with softcap or sink logits")
        if not all(isinstance(size, int) for size in (site.batch, site.heads, site.q_len)):
            return Refusal("EFF-D112", "the state needs sizes that are known", "dynamic=False")
        assert isinstance(site.q_len, int)
        if self.frames and (site.q_len - self.text) % self.frames:
            return Refusal("EFF-A502", f"{site.q_len - self.text} tokens are no {self.frames} equal frames")
        if self.half(site.q_len) * 2 + 1 >= self._span(site.q_len):
            return Refusal("EFF-A502", f"too short: the band covers all of {site.q_len} tokens")
        return None

    def _span(self, tokens: int) -> int:
        return (tokens - self.text) // self.frames if self.frames else tokens

    def half(self, tokens: int) -> int:
        """Return how many places the band reaches to each side."""
        return int(self._span(tokens) * self.keep) // 2

    def band(self, tokens: int) -> Expr:
        """Return the predicate over tokens as `place_major` orders them."""
        q, k = axis(QUERY), axis(KEY)
        half = const(self.half(tokens))
        if not self.frames:
            near = apply("le", apply("sub", q, half), k)
            return apply("and", near, apply("le", k, apply("add", q, half)))
        first = const(self.text)
        places = [apply("floordiv", apply("sub", token, first), const(self.frames)) for token in (q, k)]
        near = apply("le", apply("sub", places[0], half), places[1])
        near = apply("and", near, apply("le", places[1], apply("add", places[0], half)))
        if not self.text:
            return near
        words = apply("or", *(apply("le", token, const(self.text - 1)) for token in (q, k)))
        return apply("or", words, near)

    def estimate(self, site: AttentionSite, target: Target, kernels: Kernels) -> Proposal:
        """Refuse: a graph sees one call, and the state goes from call to call."""
        return Refusal(
            "EFF-D112",
            "what is replayed comes from an earlier step, and a compiled graph sees one",
            'eff.sampler(denoiser, of, replay="re-ttention{...}")',
        )

    def apply(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Do nothing: `replay.py` rewrites a graph for each phase."""
        raise AssertionError("re-ttention is refused in single graphs")
