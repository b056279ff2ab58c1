"""Define `eff::versatile_ffn_v1`: a feed-forward layer that is repeated for deep tokens and cut into experts for the others.

VersatileFFN has two paths over one set of weights. The deep one applies h + FFN(norm h) up to D times, and a token takes what it
has after its own number of loops. The wide one takes slices of the inner width as experts. What a token gets is
(1 - lam) * deep + lam * wide, lam = (D - loops) / D.

`written` is how the layer is spelled in a graph of fixed shapes: all loops and all experts for every token. The op computes the
same up to rounding with less: a token runs its own loops only, and since expert e's hidden is slice e of what the first loop
computes, all experts together are one more product with W2; a few tokens run slices of their own, by the kernel of experts
(arXiv:2512.14531 describes the layer; the rewrite is ours).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.ops import native_moe
from effcompile.ops.attention import define

NAME = "eff::versatile_ffn_v1"
SCHEMA = "(Tensor x, Tensor last, Tensor shares, Tensor norm, Tensor gate, Tensor up, Tensor down, int depth, float eps) -> Tensor"


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x scaled to root mean square 1 in float32, times a weight."""
    high = x.float()
    scaled = high * torch.rsqrt(high.pow(2).mean(dim=-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def written(
    x: Tensor,
    depth_router: Tensor,
    width_router: Tensor,
    norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    top_k: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the layer with all loops and all experts for every token.

    x `[B, S, C]`, routers `[D, C]` and `[E, C]`, norm `[C]`, gate and up `[I, C]`, down `[C, I]`. Returns the layer's result `[B,
    S, C]`, the last loop of each token `[B, S]`, and the weights of its experts, 0 for those that it has not, `[B, S, E]`.
    """
    depth, experts = depth_router.shape[0], width_router.shape[0]
    last = F.linear(x, depth_router).argmax(dim=-1)
    logits = F.linear(x, width_router)
    values, ids = torch.topk(logits, top_k, dim=-1)
    shares = torch.zeros_like(logits).scatter(-1, ids, F.softmax(values, dim=-1))

    state, states = x, []
    for _ in range(depth):
        n = normalized(state, norm, eps)
        state = state + F.linear(F.silu(F.linear(n, gate)) * F.linear(n, up), down)
        states.append(state)
    deep = torch.stack(states, dim=-2)
    deep = deep.gather(-2, last[..., None, None].expand(*last.shape, 1, x.shape[-1])).squeeze(-2)

    n = normalized(x, norm, eps)
    size = gate.shape[0] // experts
    wide = torch.zeros_like(x)
    for expert in range(experts):
        first, end = expert * size, (expert + 1) * size
        inner = F.silu(F.linear(n, gate[first:end])) * F.linear(n, up[first:end])
        wide = wide + shares[..., expert : expert + 1] * (x + F.linear(inner, down[:, first:end]))
    lam = ((depth - (last + 1)) / depth).to(x.dtype)[..., None]
    return (1 - lam) * deep + lam * wide, last, shares


def versatile_ffn(
    x: Tensor,
    last: Tensor,
    shares: Tensor,
    norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    depth: int,
    eps: float,
) -> Tensor:
    """Compute what `written` returns, from its last loops and the weights of its experts.

    Tokens lie in the order of their loops, the most first, so that each loop runs on a prefix. The products with `down` of the
    first loop and of all experts are one. Reads on the host how many tokens each loop has.

    Raises:
        EffError: EFF-M210 for shapes that do not fit each other.
    """
    check(x, last, shares, norm, gate, up, down)
    flat = x.reshape(-1, x.shape[-1])
    loops, order = torch.sort(last.reshape(-1) + 1, descending=True, stable=True)
    counts = torch.bincount(loops, minlength=depth + 1)[: depth + 1].tolist()
    # running[l]: how many tokens run loop l + 1.
    running = [sum(counts[loop + 1 :]) for loop in range(depth)]
    state = flat[order]
    if len(flat) <= native_moe.FEW_ROWS and len(flat) and native_moe.adds(state, gate, up, down):
        share = shares.reshape(-1, shares.shape[-1])[order]
        made = _few(state, loops, running, share, norm, gate, up, down, eps)
        return torch.empty_like(made).index_copy_(0, order, made).reshape(x.shape)
    inner = _inner(state, norm, gate, up, eps)
    skipped = counts[depth]  # lam is 0 where a token runs all loops: it has no wide path
    share = shares.reshape(-1, shares.shape[-1])[order[skipped:]]
    sliced = (inner[skipped:].unflatten(1, (share.shape[1], -1)) * share[:, :, None]).flatten(1)
    both = F.linear(torch.cat([inner, sliced]), down)
    wide = state[skipped:] * share.sum(1, keepdim=True) + both[len(state) :]
    state = state + both[: len(state)]
    for count in running[1:]:
        if not count:
            break
        part = state[:count]
        state[:count] = part + F.linear(_inner(part, norm, gate, up, eps), down)
    lam = ((depth - loops[skipped:]) / depth).to(x.dtype)[:, None]
    state[skipped:] = (1 - lam) * state[skipped:] + lam * wide
    return torch.empty_like(state).index_copy_(0, order, state).reshape(x.shape)


def _few(
    state: Tensor,
    loops: Tensor,
    running: Sequence[int],
    share: Tensor,
    norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
) -> Tensor:
    """Compute the same of a few tokens `[T, C]`, sorted by their loops, with the kernel of experts.

    One loop is a mixture of one expert; the wide path one of slices, of which a token runs those that it has.
    """
    depth, count = len(running), share.shape[1]
    ids, ones = torch.zeros((len(state), 1), dtype=torch.int64), state.new_ones((len(state), 1))
    n = normalized(state, norm, eps)
    skipped = running[-1]  # lam is 0 where a token runs all loops: it has no wide path
    rest = share[skipped:]
    wide = state[skipped:] * rest.sum(1, keepdim=True)
    most = int((rest != 0).sum(1).max()) if len(rest) else 0
    if most:
        which = rest.abs().topk(most, 1).indices
        part = rest.gather(1, which)
        slices = gate.unflatten(0, (count, -1)), up.unflatten(0, (count, -1))
        columns = down.unflatten(1, (count, -1)).transpose(0, 1)
        which = torch.where(part != 0, which, -1)
        native_moe.add_swiglu(wide, n[skipped:], which, part.contiguous(), *slices, columns)
    for loop, tokens in enumerate(running):
        if not tokens:
            break
        n = n if loop == 0 else normalized(state[:tokens], norm, eps)
        whole = gate[None], up[None], down[None]
        native_moe.add_swiglu(state[:tokens], n, ids[:tokens], ones[:tokens], *whole)
    lam = ((depth - loops[skipped:]) / depth).to(state.dtype)[:, None]
    state[skipped:] = (1 - lam) * state[skipped:] + lam * wide
    return state


def _inner(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, eps: float) -> Tensor:
    n = normalized(x, norm, eps)
    return F.silu(F.linear(n, gate)) * F.linear(n, up)


def check(x: Tensor, last: Tensor, shares: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> None:
    """Raise EFF-M210 unless the weights fit each other, the tokens and the experts; token counts are not compared."""
    wide, inner = x.shape[-1], gate.shape[0]
    fits = norm.shape == (wide,) and gate.shape == up.shape == (inner, wide) and down.shape == (wide, inner)
    if not fits or last.dim() != x.dim() - 1 or shares.dim() != x.dim() or inner % shares.shape[-1]:
        shapes = [list(t.shape) for t in (x, last, shares, norm, gate, up, down)]
        raise EffError("EFF-M210", f"operands of a versatile layer: {shapes}", hint="experts divide the inner width")


def _fake(
    x: Tensor,
    last: Tensor,
    shares: Tensor,
    norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    depth: int,
    eps: float,
) -> Tensor:
    check(x, last, shares, norm, gate, up, down)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def register() -> None:
    """Register the op, once."""
    define(NAME, SCHEMA, versatile_ffn, _fake)
