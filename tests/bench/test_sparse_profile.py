"""Counting the pairs of a block map equals counting them one by one."""

from __future__ import annotations

import pytest
import torch

from bench.sparse_profile import pairs
from effcompile.core.expr import BATCH, BOOL, KEY, Expr, apply, axis, load
from effcompile.core.expr_eval import evaluate, to_json
from effcompile.core.mask import CAUSAL


def real_keys() -> Expr:
    """Return a predicate that differs between batch elements: key padding read from a tensor `[B, S]`."""
    return apply("and", CAUSAL.keep, load(0, (axis(BATCH), axis(KEY)), BOOL))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("rows", "keys", "block", "groups"), [(70, 70, 16, 2), (128, 128, 32, 4), (33, 33, 1, 1)])
def test_kept_and_allowed_pairs_are_those_of_the_whole_mask(
    padded: bool, rows: int, keys: int, block: int, groups: int
) -> None:
    draw = torch.Generator().manual_seed(3)
    predicate = real_keys() if padded else CAUSAL.keep
    loads = [torch.rand(2, keys, generator=draw) < 0.7] if padded else []
    chosen = torch.rand(2, groups, -(-rows // block), -(-keys // block), generator=draw) < 0.4
    index = [torch.arange(n).reshape([-1 if i == d else 1 for i in range(4)]) for d, n in enumerate((2, 4, rows, keys))]
    inside = evaluate(predicate, tuple(index), loads, ()).expand(2, 4, rows, keys)
    wide = chosen.repeat_interleave(4 // groups, 1).repeat_interleave(block, 2).repeat_interleave(block, 3)
    kept, allowed = pairs(to_json(predicate), chosen, (2, 4, rows, keys), loads, [], (block, block))
    assert (kept, allowed) == (int((inside & wide[:, :, :rows, :keys]).sum()), int(inside.sum()))
