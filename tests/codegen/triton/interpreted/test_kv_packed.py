"""Check the kernel of packed caches in the interpreter: every format, splits, masks, and what is not packed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effcompile import ops
from effcompile.codegen.triton import kv_packed as kernel
from effcompile.ops.kv.grouped import Grouped
from tests.support.caches import STORAGES, draw, empty, exact, shape_of

ops.register()
NAMES = {"int8": (48, 40), "fp8": (32, 32), "4-32-128": (64, 32), "2-64-128": (64, 64)}


def run(name: str, state: dict[str, Tensor], *given: object, splits: int = 0) -> tuple[Tensor, Tensor]:
    storage = STORAGES[name]
    if isinstance(storage, Grouped):
        return kernel.attend_grouped(*given[:3], *state.values(), *given[3:], storage.bits, splits=splits)  # type: ignore[arg-type]
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
