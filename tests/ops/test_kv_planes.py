"""Check keys in two planes: what reads the lower one, and that both together are integers of 12 bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from effcompile import ops
from effcompile.ops.kv import native, two_plane
from effcompile.ops.kv.two_plane import TwoPlane
from tests.support.caches import draw, empty, exact, shape_of

ops.register()
OLD, DIMS = 700, (64, 32)


@pytest.fixture(params=[True, False], ids=["compiled", "composed"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(native, "takes", lambda *tensors: False)
    return bool(request.param)


def filled(storage: TwoPlane, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    state = empty(storage, shape_of(storage, k.shape[2], k.shape[0], k.shape[1], (k.shape[3], v.shape[3]), k.dtype))
    storage.append(state, k[:, :, :-1], v[:, :, :-1])
    storage.append(state, k[:, :, -1:], v[:, :, -1:])
    return state


def attend(storage: TwoPlane, state: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return storage.attend(state, q, k[:, :, -1:], v[:, :, -1:], None, False, 0.1, 0.0, 0, "")[0]


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Return queries of which the heads of the first key head are flat over the keys, and those of the second are not."""
    k, v = (draw(2, 2, OLD, d, dtype=torch.float32, seed=seed).contiguous() for d, seed in zip(DIMS, (1, 2)))
    q = draw(2, 6, 1, DIMS[0], dtype=torch.float32, seed=3).contiguous()
    q[:, :3] *= 1e-2
    q[:, 3:] = k[:, 1:2, 300:301] * 3  # they all mean one key
    return q, k, v


def test_both_planes_are_the_whole_integer(compiled: bool) -> None:
    """With operands for which float32 holds every product and sum, scores are those of int64, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-2047, 2048, (1, 2, OLD, DIMS[0]), generator=generator)
    codes[..., 0] = 2047  # so that the scale is 2^-8 for every token
    k, v = codes.float() * 2.0**-8, torch.randn(1, 2, OLD, DIMS[1], generator=generator)
    q = torch.randint(-8, 9, (1, 4, 1, DIMS[0]), generator=generator)
    storage = TwoPlane(2.0)
    state = filled(storage, k, v)
    high, low = two_plane.split(codes.to(torch.int16))
    assert torch.equal(two_plane.join(high, low).long(), codes)
    assert torch.equal(two_plane._tokens(state["k_codes"], 0, OLD), high)
    assert torch.equal(two_plane._tokens(state["k_low"], 0, OLD), low)
    given = (q.float(), k[:, :, -1:], v[:, :, -1:], None, False, 1.0, 0.0, 0, "")
    scores = storage.attend(state, *given, scored=True)[2]
    assert scores is not None
    wanted = (q.view(1, 2, 2, DIMS[0]) @ codes.transpose(2, 3)).view(1, 4, 1, OLD)
    found = torch.cat([scores[..., : OLD - 1], scores[..., -1:]], -1)
    assert torch.equal((found.double() * 2**8).long(), wanted)


def test_the_lower_plane_is_read_by_flat_heads_alone(compiled: bool) -> None:
    """Heads that are sure of a key come out the same when the lower plane is overwritten, flat ones do not; with 0 none is read."""
    q, k, v = tokens()
    whole, none, some = (attend(s, filled(s, k, v), q, k, v) for s in (TwoPlane(2.0), TwoPlane(0.0), TwoPlane(0.2)))
    assert torch.equal(some[:, :3], whole[:, :3])
    assert torch.equal(some[:, 3:], none[:, 3:])
    assert not torch.equal(whole[:, 3:], none[:, 3:])
    for storage, heads in ((TwoPlane(0.0), 6), (TwoPlane(0.2), 3)):
        state = filled(storage, k, v)
        before = attend(storage, state, q, k, v)
        state["k_low"].bitwise_not_()
        after = attend(storage, state, q, k, v)
        assert torch.equal(before[:, 6 - heads :], after[:, 6 - heads :])
        assert heads == 6 or not torch.equal(before[:, :3], after[:, :3])


def test_the_error_without_the_lower_plane_is_bounded() -> None:
    """Scores are off by at most 8 scales of a key times the 1-norm of the query, so probabilities by that in the exponent."""
    q, k, v = tokens()
    storage = TwoPlane(0.0)
    state = filled(storage, k, v)
    given = (q, k[:, :, -1:], v[:, :, -1:], None, False, 0.1, 0.0, 0, "")
    found = storage.attend(state, *given, scored=True)[2]
    wanted = TwoPlane(2.0).attend(state, *given, scored=True)[2]
    assert found is not None
    assert wanted is not None
    old = slice(0, OLD - 1)
    scale = state["k_scales"][:, :, old].float().repeat_interleave(3, 1)[:, :, None]
    limit = 0.1 * 8 * scale * q.abs().sum(-1)[..., None] * (1 + 1e-5)
    off = (found[..., old] - wanted[..., old]).abs()
    assert bool((off <= limit).all())
    assert float(off.max()) > 0


def test_a_stale_step_decides_by_the_one_before(compiled: bool) -> None:
    """The first step reads both planes; each later one what the probabilities of the one before ask for."""
    q, k, v = tokens()
    storage, stale = TwoPlane(0.2), TwoPlane(0.2, stale=True)
    state = filled(stale, k, v)
    sure, flat = q[:, 3:].repeat(1, 2, 1, 1), q[:, :3].repeat(1, 2, 1, 1)
    whole, none = (lambda x, s=s: attend(s, filled(s, k, v), x, k, v) for s in (TwoPlane(2.0), TwoPlane(0.0)))
    assert torch.equal(attend(stale, state, sure, k, v), whole(sure))
    peaks = state["peak"].clone()
    assert bool((peaks[:, 1] >= 0.2).all())
    found = attend(stale, state, flat, k, v)
    assert torch.equal(found[:, 3:], none(flat)[:, 3:])  # the second head was sure
    assert bool((state["peak"] < 0.2).all())
    assert torch.equal(attend(stale, state, sure, k, v), whole(sure))
    assert "peak" not in filled(storage, k, v)


def test_masked_rows_ask_for_nothing(compiled: bool) -> None:
    q, k, v = tokens()
    storage = TwoPlane(0.2)
    state = filled(storage, k, v)
    mask = torch.zeros(2, 1, 1, state["k_scales"].shape[2], dtype=torch.bool)
    mask[1] = True
    out, lse, _ = storage.attend(state, q, k[:, :, -1:], v[:, :, -1:], mask, False, 0.1, 0.0, 0, "")
    assert bool((out[0] == 0).all())
    assert bool((lse[0] == -math.inf).all())
    assert torch.equal(out[1], attend(storage, state, q, k, v)[1])
    keys, values = storage.read(state, 0, OLD, torch.float32)
    wanted, _ = exact(q[1:, :3], keys[1:, :1], values[1:, :1, :, : DIMS[1]], None, False, 0.1)
    assert float((out[1:, :3].double() - wanted).abs().max()) < 1e-4
