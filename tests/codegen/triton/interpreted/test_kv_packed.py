"""Check the kernel of packed caches in the interpreter: every format, splits, masks, and what is not packed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effcompile import ops
from effcompile.codegen.triton import kv_steps as kernel
from effcompile.core.site import CacheSite
from effcompile.ops.kv import mixed, two_plane
from effcompile.ops.kv.fixed import Fixed
from effcompile.ops.kv.grouped import Grouped
from effcompile.ops.kv.two_plane import TwoPlane
from effcompile.passes.kv.zipvl_mixed import ZipVLMixed
from effcompile.runtime.mixed import MixedCache
from tests.support.caches import STORAGES, draw, empty, exact, shape_of

ops.register()
NAMES = {
    "int8": (48, 40),
    "fp8": (32, 32),
    "4-32-128": (64, 32),
    "2-64-128": (64, 64),
    "rows-8": (48, 32),
    "rows-4": (32, 48),
    "planes": (48, 40),
}


def run(name: str, state: dict[str, Tensor], *given: object, splits: int = 0) -> tuple[Tensor, Tensor]:
    storage = STORAGES[name]
    if isinstance(storage, Grouped):
        return kernel.attend_grouped(*given[:3], *state.values(), *given[3:], storage.bits, splits=splits)  # type: ignore[arg-type]
    if isinstance(storage, Fixed):
        return kernel.attend_rows(*given[:3], *state.values(), *given[3:], splits=splits)  # type: ignore[arg-type]
    if isinstance(storage, TwoPlane):
        return kernel.attend_planes(*given[:3], *state.values(), *given[3:], None, storage.theta, splits=splits)[:2]  # type: ignore[arg-type]
    return kernel.attend_token8(*given[:3], *state.values(), *given[3:], splits=splits)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize(("rows", "masked", "softcap"), [(1, True, 0.0), (3, False, 2.0)])
def test_the_kernel_is_attention_over_what_is_held(name: str, rows: int, masked: bool, softcap: float) -> None:
    """Over a prompt and tokens after it; a masked token may hold anything."""
    storage, dims = STORAGES[name], NAMES[name]
    state = empty(storage, shape_of(storage, 420, 2, 2, dims, torch.float32))
    for seed, count in enumerate((390, 1, rows)):
        k, v = (draw(2, 2, count, d, dtype=torch.float32, seed=seed * 2 + n) for n, d in enumerate(dims))
        storage.append(state, k, v)
    q = draw(2, 6, rows, dims[0], dtype=torch.float32, seed=9)
    length = int(state["length"])
    mask = None
    old = storage.read(state, 0, length - rows, torch.float32)
    keys, values = (torch.cat([x[..., :d], y], 2) for x, y, d in zip(old, (k, v), dims))
    if masked:
        mask = torch.rand(2, 1, rows, 450, generator=torch.Generator().manual_seed(1)) > 0.4
        mask[..., :64] = False
        if state["v_scales"].dim() > 2:
            state["v_scales"][..., 5] = torch.nan
    wanted, norm = exact(q, keys, values, mask, mask is None, 0.1, softcap)
    for splits in (1, 3):
        out, lse = run(name, state, q, k, v, mask, mask is None, 0.1, softcap, splits=splits)
        assert float((out.double() - wanted).abs().max()) < 1e-4 * (1 + float(wanted.abs().max()))
        assert float((lse.double() - norm).abs().max()) < 1e-4


def test_an_empty_cache_and_calls_that_the_kernel_does_not_take() -> None:
    storage = STORAGES["int8"]
    state = empty(storage, shape_of(storage, 64, 1, 1, (32, 32), torch.float32))
    q, k, v = (draw(1, 1, 1, 32, dtype=torch.float32, seed=seed) for seed in range(3))
    storage.append(state, k, v)
    out, _ = run("int8", state, q, k, v, None, False, 0.1, 0.0)
    assert float((out - v).abs().max()) < 1e-6
    # A mask that is added, and many queries, go to the op's own body.
    mask = torch.zeros(1, 1, 1, 64)
    found = [run("int8", state, q, k, v, x, False, 0.1, 0.0)[0] for x in (mask, mask == 0)]
    assert float((found[0] - found[1]).abs().max()) < 1e-5


@pytest.mark.parametrize("theta", [0.0, 0.2, 2.0])
@pytest.mark.parametrize("stale", [False, True])
def test_heads_read_the_lower_plane_where_they_are_flat(theta: float, stale: bool) -> None:
    """As the op's own body says, head by head: by the probabilities of this step, or of the one before."""
    storage, dims = TwoPlane(theta), (32, 48)
    state = empty(storage, shape_of(storage, 200, 2, 3, dims, torch.float32))
    for seed, count in enumerate((150, 2)):
        k, v = (draw(2, 3, count, d, dtype=torch.float32, seed=seed * 2 + n) for n, d in enumerate(dims))
        storage.append(state, k, v)
    q = (
        draw(2, 6, 2, 32, dtype=torch.float32, seed=9)
        * torch.tensor([4.0, 0.2, 1.0]).repeat_interleave(2)[:, None, None]
    )
    mask = torch.rand(2, 1, 2, 192, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[0, :, 1] = False  # a row that sees nothing
    peak = torch.tensor([[0.1, 0.5, 0.0], [1.0, 0.19, 0.3]]) if stale else None
    keys = (*storage.read(state, 0, 150, torch.float32),)
    operands = (q, k, v, *state.values(), mask, False, 0.1, 0.0, peak, theta)
    out, lse, now = kernel.attend_planes(*operands, splits=2)
    native = two_plane.attend(*(x.double() if x is q else x for x in operands), scored=False)
    assert float((out.double() - native[0].double()).abs().max()) < 1e-4
    assert torch.equal(lse == -torch.inf, native[1] == -torch.inf)
    assert float((lse - native[1]).nan_to_num(nan=0.0).abs().max()) < 1e-4
    assert float((now - native[3]).abs().max()) < 1e-5
    if theta == 2.0:
        both = [torch.cat([x[..., :d], y], 2) for x, y, d in zip(keys, (k, v), dims)]
        wanted, _ = exact(q, *both, mask, False, 0.1)
        assert float((out.double() - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize(("rows", "masked", "softcap"), [(1, True, 0.0), (3, False, 2.0)])
def test_both_parts_of_a_mixed_cache_and_its_last_tokens(rows: int, masked: bool, softcap: float) -> None:
    """Beside what each token was read, by which it gets its bits later."""
    form = ZipVLMixed(mass=0.6, residual=40, interval=64, recent=16, spread=16)
    cache = MixedCache(form, CacheSite("layers.0.cache", "cache", "decode", "", kv_heads=2, capacity=700))
    for seed, count in enumerate((600, 1)):
        q, k, v = (draw(2, h, count, 64, dtype=torch.float32, seed=9 * seed + n) for n, h in enumerate((4, 2, 2)))
        cache.append(k, v)
        cache.attend(q, k, v, None, count > 1, 0.1)
    q, k, v = (draw(2, h, rows, 64, dtype=torch.float32, seed=40 + n) for n, h in enumerate((4, 2, 2)))
    keys, values = (torch.cat([x, y], 2) for x, y in zip(cache.read(), (k, v)))
    mask = None
    if masked:
        mask = torch.rand(2, 4, rows, 700, generator=torch.Generator().manual_seed(1)) > 0.4
    held = [cache.state[name] for name in (*mixed.PACKED, *mixed.RECENT)]
    assert all(int(cache.state[f"{part}packed"]) for part in mixed.PARTS)
    operands = (q, k, v, *held, mask, mask is None, 0.1, softcap, *form.tiers.bits, 0, "")
    out, lse, gain = kernel.attend_mixed(*operands, splits=2)
    wanted, norm = exact(q, keys, values, mask, mask is None, 0.1, softcap)
    assert float((out.double() - wanted).abs().max()) < 1e-4
    assert float((lse.double() - norm).abs().max()) < 1e-4
    assert float((gain - mixed.attend(*operands)[2]).abs().max()) < 1e-4
