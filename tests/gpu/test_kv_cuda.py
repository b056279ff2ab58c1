"""Check caches on a CUDA device: the kernel of packed tokens against the same attention on the CPU.

Run with `make gpu`. The kernel is checked in Triton's interpreter in tests/codegen/triton; here are the sizes, dtypes and binaries.
"""

import pytest
import torch

pytest.importorskip("triton")

from effcompile import ops
from tests.support.caches import STORAGES, draw, empty, shape_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", ["int8", "fp8", "4-32-128", "2-64-128", "rows-8", "planes", "plain"])
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
