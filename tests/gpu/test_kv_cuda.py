"""Check caches on a CUDA device: the kernel of packed tokens against the same attention on the CPU.

Run with `make gpu`. The kernel is checked in Triton's interpreter in tests/codegen/triton; here are the sizes, dtypes and binaries.
"""

import pytest
import torch

pytest.importorskip("triton")

from effcompile import ops
from effcompile.core.site import CacheSite
from effcompile.ops.kv import mixed
from effcompile.passes.kv.zipvl_mixed import ZipVLMixed
from effcompile.runtime.mixed import MixedCache
from tests.support.caches import STORAGES, draw, empty, shape_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", ["int8", "fp8", "4-32-128", "2-64-128", "rows-8", "rows-4", "planes", "plain"])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_on_the_device_is_that_on_the_cpu(name, rows):
    ops.register()
    storage, dims = STORAGES[name], (128, 128)
    shape = shape_of(storage, 3000, 2, 2, dims, torch.bfloat16)
    here, there = empty(storage, shape), {part: x.cuda() for part, x in empty(storage, shape).items()}
    for seed, count in enumerate((2500, 1, rows)):
        k, v = (draw(2, 2, count, 128, dtype=torch.bfloat16, seed=2 * seed + n).contiguous() for n in (0, 1))
        storage.append(here, k, v)
        storage.append(there, k.cuda(), v.cuda())
    for part, x in here.items():
        assert torch.equal(x, there[part].cpu()), part
    q = draw(2, 8, rows, 128, dtype=torch.bfloat16, seed=9)
    mask = torch.rand(2, 1, rows, shape.capacity, generator=torch.Generator().manual_seed(0)) > 0.3
    for given in (None, mask):
        wanted, lse, _ = storage.attend(here, q, k, v, given, given is None, 0.09, 0.0, 0, "")
        asked = (None if given is None else given.cuda(), given is None, 0.09, 0.0, 0, "")
        found, other, _ = storage.attend(there, q.cuda(), k.cuda(), v.cuda(), *asked)
        torch.testing.assert_close(found.cpu().float(), wanted.float(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(other.cpu(), lse, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_over_both_parts_of_a_mixed_cache(rows):
    ops.register()
    form = ZipVLMixed(mass=0.6)
    cache = MixedCache(form, CacheSite("layers.0.cache", "cache", "decode", "", kv_heads=2, capacity=2500))
    q, k, v = (draw(2, heads, 2000, 128, dtype=torch.bfloat16, seed=n) for n, heads in enumerate((8, 2, 2)))
    cache.append(k, v)
    cache.attend(q, k, v, None, True, 0.09)
    held = [cache.state[name] for name in (*mixed.PACKED, *mixed.RECENT)]
    q, k, v = (draw(2, heads, rows, 128, dtype=torch.bfloat16, seed=9 + n) for n, heads in enumerate((8, 2, 2)))
    mask = torch.rand(2, 1, rows, 2500, generator=torch.Generator().manual_seed(0)) > 0.3
    asked = (False, 0.09, 0.0, *form.tiers.bits, 0, "")
    op = torch.ops.eff.kv_attention_mixed_v1
    found = op(*(x.cuda() for x in (q, k, v, *held, mask)), *asked)
    for other, wanted, near in zip(found, op(q, k, v, *held, mask, *asked), (2e-2, 1e-2, 1e-2)):
        torch.testing.assert_close(other.cpu().float(), wanted.float(), rtol=near, atol=near)
