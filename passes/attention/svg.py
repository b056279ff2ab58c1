"""Let each head of a video model read frames or places, whichever it needs (Sparse VideoGen)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.density import extent
from effcompile.core.policy import Kernels, Proposal, check_share, check_whole
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.passes.attention.video import OrderedPattern, place_major


@dataclass(frozen=True)
class Svg(OrderedPattern):
    """Keep a band of `keep` of the pairs: over tokens frame by frame in spatial heads, place by place in temporal ones.

    Which a head is decide `samples` of its queries, at each call: the band whose result is nearer to theirs of all keys, by the
    squared error. In its own order each head has the same band, so one map of blocks serves all. The tokens of a video are `frames`
    of equal size behind `text` tokens; text rows and columns stay. The dense first steps of the paper are for the loop that calls
    the model, its dense layers `dense_layers`.
    """

    keep: float = 0.25
    frames: int = 0
    text: int = 0
    samples: int = 64

    name: ClassVar[str] = "svg"
    paper: ClassVar[str] = "arXiv:2502.01776"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "keep")
        check_whole(self, "frames")
        check_whole(self, "text")
        check_whole(self, "samples", least=1)

    def half(self, tokens: int) -> int:
        """Return how far the band reaches to each side, such that it holds `keep` of the pairs of the video."""
        video = tokens - self.text
        return video if self.keep >= 1 else math.ceil(video * (1 - math.sqrt(1 - self.keep)))

    def least(self, site: AttentionSite) -> int:
        """Return the tokens up to which blocks and text hold everything."""
        return self.text + 2 * self.block

    def expected(self, site: AttentionSite) -> float:
        """Return the share of blocks in the map, which is no matter of data."""
        return float(self.band(extent(site.kv_len), torch.device("cpu")).float().mean())

    def search(self, site: AttentionSite) -> float:
        """Return the FLOP of the sampled queries' attention: over all keys, and of both bands."""
        rows = extent(site.batch) * extent(site.heads) * self.samples
        return 2.0 * rows * extent(site.kv_len) * (site.head_dim + 3 * site.value_dim)

    def estimate(self, site: AttentionSite, target: Target, kernels: Kernels) -> Proposal:
        """Refuse sites whose tokens are not so many equal frames."""
        if isinstance(site.kv_len, int):
            video = site.kv_len - self.text
            if self.frames < 2 or video <= 0 or video % self.frames:
                said = f"{self.frames} equal frames" if self.frames else "frames, of which `frames` gives no number"
                return Refusal("EFF-A504", f"{video} tokens behind the text are no {said}", "svg{frames=13,text=226}")
        return super().estimate(site, target, kernels)

    def band(self, tokens: int, device: torch.device) -> Tensor:
        """Return the map `[1, 1, Nb, Nb]` of the blocks in which the band, or text, keeps a pair of ordered tokens."""
        first = torch.arange(0, tokens, self.block, device=device)
        last = (first + self.block - 1).clamp(max=tokens - 1)
        near = (first[:, None] - last <= self.half(tokens)) & (first - last[:, None] <= self.half(tokens))
        text = first < self.text
        return (near | text[:, None] | text)[None, None]

    def orders(self, call: AttentionCall, edit: Editor) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Insert the choice of each head, as torch operations, and the order that follows from it."""

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            tokens = q.shape[2]
            major = place_major(tokens, self.text, self.frames, q.device)
            temporal = self.temporal(q, k, v, call.scale)
            order = torch.where(temporal[..., None], major, torch.arange(tokens, device=q.device))
            return order, self.band(tokens, q.device)

        order, chosen = edit.inline_all(run, call.q, call.k, call.v)
        return order, order, chosen

    def temporal(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return which heads `[B, H]` are nearer to attention over all keys when they read places than when they read frames.

        q, k `[B, H, N, D]`, v `[B, H, N, Dv]`. A head that either serves as well is spatial, which needs no other order.
        """
        tokens = q.shape[2]
        count = min(self.samples, tokens - self.text)
        rows = self.text + ((torch.arange(count, device=q.device) + 0.5) * (tokens - self.text) / count).long()
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        scores = torch.matmul(q[:, :, rows], k.transpose(-1, -2)).to(wide) * scale
        probs, values = scores.softmax(-1), v.to(wide)
        whole = torch.matmul(probs, values)
        places = torch.arange(tokens, device=q.device)
        errors = []
        for order in (places, place_major(tokens, self.text, self.frames, q.device).argsort()):
            near = (order[rows][:, None] - order).abs() <= self.half(tokens)
            kept = probs * (near | (places < self.text))
            part = torch.matmul(kept, values) / kept.sum(-1, keepdim=True)
            errors.append((part - whole).square().mean((-1, -2)))
        return errors[1] < errors[0]
