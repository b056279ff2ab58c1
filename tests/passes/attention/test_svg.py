"""Check both Sparse VideoGen policies: dense where all is kept, the right order for each head, what clusters read is kept."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import effcompile as eff
from effcompile import ops
from effcompile.core.errors import EffError
from effcompile.core.policy import Estimate, read_policy
from effcompile.ops.selectors.clusters import cluster_blocks, cluster_pairs, clusters
from effcompile.passes.attention.svg import Svg
from effcompile.passes.attention.svg2 import Svg2
from effcompile.passes.attention.video import place_major
from tests.support.check import CPU, all_catalog, check_policy, check_refusal, raise_attention

TEXT, FRAMES, PLACES = 5, 6, 24
TOKENS = TEXT + FRAMES * PLACES
SVG = Svg(keep=0.3, frames=FRAMES, text=TEXT, block=16)
SVG2 = Svg2(mass=0.6, queries=8, keys=10, floor=0.0, rounds=3, text=TEXT, block=16)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def under(kept: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to the kept pairs `[B, H, N, N]` of the tokens as they came."""
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~kept, -math.inf)
    return scores.softmax(-1) @ v


def qkv(seed: int = 0, heads: int = 3, tokens: int = TOKENS) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, tokens, 16, generator=draw) for _ in range(3)]


def planted(frames: int = FRAMES, places: int = PLACES) -> list[Tensor]:
    """Return q, k, v of which heads 0 and 2 read their frame, and head 1 its place in all frames."""
    draw = torch.Generator().manual_seed(3)
    video = torch.arange(frames * places)
    frame, place = video // places, video % places

    def signature(of: Tensor, count: int) -> Tensor:
        names = F.normalize(torch.randn(count, 16, generator=draw), dim=-1)
        return torch.cat((torch.zeros(TEXT, 16), 5 * names[of]))

    sides = torch.stack([signature(frame, frames), signature(place, places), signature(frame, frames)])
    q = sides.expand(2, -1, -1, -1).clone()
    return [q, q.clone(), torch.randn(2, 3, TEXT + frames * places, 16, generator=draw)]


def widened(chosen: Tensor, block: int, q_order: Tensor, k_order: Tensor) -> Tensor:
    """Return the pairs of tokens `[B, H, N, N]` that a map over places keeps, in the order in which the tokens came."""
    tokens = q_order.shape[-1]
    pairs = chosen.repeat_interleave(block, -2).repeat_interleave(block, -1)[..., :tokens, :tokens]
    batch, heads = q_order.shape[:2]
    pairs = pairs.expand(batch, heads, tokens, tokens)
    rows = torch.zeros_like(pairs).scatter(2, q_order[..., None].expand_as(pairs), pairs)
    return torch.zeros_like(pairs).scatter(3, k_order[:, :, None].expand_as(pairs), rows)


def svg_pairs(policy: Svg, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    temporal = policy.temporal(q, k, v, 1 / math.sqrt(q.shape[-1]))
    major = place_major(TOKENS, policy.text, policy.frames, q.device)
    order = torch.where(temporal[..., None], major, torch.arange(TOKENS))
    return widened(policy.band(TOKENS, q.device), policy.block, order, order)


def svg2_pairs(policy: Svg2, q: Tensor, k: Tensor) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1])
    settings = (policy.mass, policy.floor, policy.queries, policy.keys, policy.rounds, policy.text, policy.block)
    q_order, k_order, chosen = cluster_blocks(q, k, scale, *settings)
    return widened(chosen, policy.block, q_order, k_order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "policy", [Svg(keep=1.0, frames=FRAMES, text=TEXT, block=16), Svg2(mass=1.0, queries=8, keys=10)]
)
def test_keeping_everything_is_dense(policy: Svg | Svg2, dtype: torch.dtype) -> None:
    check_policy(policy, attend, [x.to(dtype) for x in qkv()], attend)


@pytest.mark.parametrize("args", [planted(), qkv()], ids=["planted", "random"])
def test_svg_is_attention_over_the_band_of_each_head(args: list[Tensor]) -> None:
    kept = svg_pairs(SVG, *args)
    assert 0.2 < float(kept.float().mean()) < 0.8
    check_policy(SVG, attend, args, lambda q, k, v: under(kept, q, k, v))
    (site,) = raise_attention(attend, args).sites
    answer = SVG.propose(site, CPU, all_catalog())
    assert isinstance(answer, Estimate)
    assert answer.density == pytest.approx(float(kept.float().mean()), abs=0.05)


def test_heads_read_what_they_were_made_for() -> None:
    q, k, v = planted()
    temporal = SVG.temporal(q, k, v, 0.25)
    assert temporal.tolist() == [[False, True, False]] * 2
    # The choice is the smaller of two errors, counted pair by pair in float64 on the same rows.
    rows = TEXT + ((torch.arange(64) + 0.5) * (TOKENS - TEXT) / 64).long()
    wide = [x.double() for x in (q, k, v)]
    dense = attend(*wide)[:, :, rows]
    errors = []
    for order in (torch.arange(TOKENS), place_major(TOKENS, TEXT, FRAMES, q.device)):
        place = order.argsort()
        kept = (place[:, None] - place).abs() <= SVG.half(TOKENS)
        kept = kept | (torch.arange(TOKENS) < TEXT)
        errors.append((under(kept, *wide)[:, :, rows] - dense).square().mean((-1, -2)))
    assert torch.equal(temporal, errors[1] < errors[0])
    assert float((errors[0] / errors[1])[0, 1]) > 10, "the example tells the two apart"
    nearly, exact = under(svg_pairs(SVG, q, k, v), q, k, v), attend(q, k, v)
    assert float((nearly - exact).norm() / exact.norm()) < 0.1


def test_the_band_keeps_its_share_and_all_text() -> None:
    policy = Svg(keep=0.25, frames=16, text=0, block=16)
    tokens = 16 * 64
    half, places = policy.half(tokens), torch.arange(tokens)
    share = ((places[:, None] - places).abs() <= half).float().mean()
    assert float(share) == pytest.approx(0.25, abs=0.01)
    chosen = SVG.band(TOKENS, torch.device("cpu"))[0, 0]
    assert bool(chosen[0].all())
    assert bool(chosen[:, 0].all())
    assert not bool(chosen.all())


def test_clusters_are_those_of_k_means() -> None:
    draw = torch.Generator().manual_seed(1)
    centers = 20 * torch.randn(4, 8, generator=draw)
    label = torch.arange(80) // 20
    x = (centers[label] + torch.randn(1, 2, 80, 8, generator=draw)).double()
    ids, means, sizes = clusters(x, 4, 5)
    for head in range(2):
        found = {(int(a), int(b)) for a, b in zip(ids[0, head], label)}
        assert len(found) == 4, "clusters that are far apart are found"
    assert torch.equal(sizes, torch.full((1, 2, 4), 20.0).double())
    distances = torch.cdist(x, means)
    assert torch.equal(distances.argmin(-1), ids)
    assert torch.allclose(means[0, 0, ids[0, 0, 0]], x[0, 0, ids[0, 0] == ids[0, 0, 0]].mean(0))
    few = torch.randn(1, 1, 8, 4, generator=draw)[:, :, [0, 0, 0, 0, 1, 1, 1, 1]]
    _, kept, counts = clusters(few, 4, 3)  # two tokens in four clusters: some are empty, and none is NaN
    assert counts.sum() == 8
    assert kept.isfinite().all()


def test_clusters_read_the_mass_that_was_asked_for() -> None:
    q, k, _ = qkv(5)
    of_queries, means, counts = clusters(q, 8, 3)
    _, centers, sizes = clusters(k, 10, 3)
    for mass in (0.5, 0.9):
        read = cluster_pairs(means, centers, counts, sizes, 0.25, mass, 0.0)
        probs = (means @ centers.transpose(-1, -2) * 0.25 + sizes.log()[:, :, None]).softmax(-1)
        held = (probs * read).sum(-1)
        assert bool((held[counts > 0] >= mass - 1e-5).all())
        smallest = probs.masked_fill(~read, 2.0).amin(-1)
        assert bool((held - smallest < mass)[counts > 0].all()), "without its smallest cluster too little is left"
    floor = cluster_pairs(means, centers, counts, sizes, 0.25, 0.01, 0.5)
    assert bool((floor.sum(-1)[counts > 0] >= 5).all())
    assert of_queries.shape == q.shape[:3]


@pytest.mark.parametrize("args", [planted(), qkv()], ids=["planted", "random"])
def test_svg2_is_attention_over_what_clusters_read(args: list[Tensor]) -> None:
    kept = svg2_pairs(SVG2, args[0], args[1])
    check_policy(SVG2, attend, args, lambda q, k, v: under(kept, q, k, v))
    assert bool(kept[:, :, :TEXT].all())
    assert bool(kept[..., :TEXT].all())
    # Every pair of tokens whose clusters were chosen is in a block that is computed.
    q, k = (x[:, :, TEXT:] for x in args[:2])
    of_queries, means, counts = clusters(q, SVG2.queries, SVG2.rounds)
    of_keys, centers, sizes = clusters(k, SVG2.keys, SVG2.rounds)
    read = cluster_pairs(means, centers, counts, sizes, 0.25, SVG2.mass, SVG2.floor)
    pairs = read.gather(2, of_queries[..., None].expand(-1, -1, -1, SVG2.keys))
    pairs = pairs.gather(3, of_keys[:, :, None].expand(-1, -1, pairs.shape[2], -1))
    assert bool((kept[:, :, TEXT:, TEXT:] | ~pairs).all())


def test_clusters_find_what_lies_apart() -> None:
    """Head 1 reads the same place of all frames: far apart as they came, together in clusters."""
    q, k, v = planted(frames=32, places=6)
    policy = Svg2(mass=0.9, queries=6, keys=6, floor=0.0, rounds=6, text=TEXT, block=16)
    kept, tokens = svg2_pairs(policy, q, k), q.shape[2]
    share = float(kept[:, 1].float().mean())
    assert share < 0.6
    got, dense = under(kept, q, k, v)[:, 1], attend(q, k, v)[:, 1]
    band = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs() < tokens * (1 - (1 - share) ** 0.5)
    near = under(band.expand(2, 3, -1, -1), q, k, v)[:, 1]
    assert float((got - dense).norm()) < 0.3 * float((near - dense).norm())


def test_what_has_no_order_is_refused() -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    for policy in (SVG, SVG2):
        check_refusal(policy, causal, qkv(), "EFF-A504")
    q, k, v = qkv(heads=4)
    check_refusal(SVG, grouped, [q, k[:, :2], v[:, :2]], "EFF-A507")
    check_refusal(SVG, attend, [q[:, :, :9], k, v], "EFF-A504")
    check_refusal(Svg(frames=7, text=TEXT), attend, qkv(), "EFF-A504")
    check_refusal(Svg(), attend, qkv(), "EFF-A504")
    check_refusal(Svg2(), attend, qkv(), "EFF-A502")
    for wrong in ("svg{keep=0}", "svg{samples=0}", "svg{block=10}", "svg2{mass=0}", "svg2{keys=0}", "svg2{floor=2}"):
        with pytest.raises(EffError, match="EFF-U004"):
            read_policy("attention", wrong, (Svg, Svg2))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("policy", [SVG, SVG2])
def test_compiled_graphs_do_as_they_say(policy: Svg | Svg2) -> None:
    ops.register()
    args = planted()
    kept = svg_pairs(policy, *args) if isinstance(policy, Svg) else svg2_pairs(policy, args[0], args[1])
    torch._dynamo.reset()
    asked = {"attention": policy.spelled, "require": {"attention": "all"}, "strict": True}
    run = torch.compile(attend, backend="eff", options=asked, dynamic=False)
    assert torch.allclose(run(*args), under(kept, *args), atol=1e-4)
    assert eff.report()["graphs"]
