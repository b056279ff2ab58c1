"""Count the tokens in front that no input changes: joined as models join them, and where that stops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.passes.recognize.prefix import prefix_of
from tests.support.check import raise_attention

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
CLS, REGISTERS, PLACES, W = (
    nn.Parameter(torch.randn(shape)) for shape in ((1, 1, 16), (1, 4, 16), (1, 7, 16), (16, 16))
)


def cls_first(x: Tensor, cls: Tensor, places: Tensor) -> Tensor:
    return torch.cat([cls.expand(2, -1, -1), x], 1) + places


SEQUENCES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], int]] = {
    "a class token": (lambda x, c, r, p: cls_first(x, c, p), 1),
    "registers behind the positions": (
        lambda x, c, r, p: torch.cat([(t := cls_first(x, c, p))[:, :1], r.expand(2, -1, -1), t[:, 1:]], 1),
        5,
    ),
    "registers at the end": (lambda x, c, r, p: torch.cat([cls_first(x, c, p), r.expand(2, -1, -1)], 1), 1),
    "two of them, normed": (
        lambda x, c, r, p: F.layer_norm(torch.cat([c.expand(2, -1, -1), r.expand(2, -1, -1), x], 1), (16,)),
        5,
    ),
    "a class token that sees the image": (
        lambda x, c, r, p: torch.cat([c.expand(2, -1, -1) + x.mean(1, keepdim=True), r.expand(2, -1, -1), x], 1),
        0,
    ),
    "text": (lambda x, c, r, p: x + p[:, :6], 0),
    "latents, all of them the same": (lambda x, c, r, p: r.expand(2, -1, -1) + 0.0, 0),
    "turned": (lambda x, c, r, p: cls_first(x, c, p).flip(1), 0),
    "the class token is cut off": (lambda x, c, r, p: cls_first(x, c, p)[:, 1:], 0),
    "registers without the class token": (
        lambda x, c, r, p: torch.cat([c.expand(2, -1, -1), r.expand(2, -1, -1), x], 1)[:, 1:],
        4,
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_tokens_that_no_input_changes_are_counted(name: str) -> None:
    sequence, wanted = SEQUENCES[name]

    def run(x: Tensor, cls: Tensor, registers: Tensor, places: Tensor, weight: Tensor) -> Tensor:
        tokens = sequence(x, cls, registers, places)
        q = F.linear(tokens, weight).view(2, -1, 2, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q)

    (entry,) = raise_attention(run, (X, CLS, REGISTERS, PLACES, W)).program.entries
    (attention,) = [n for n in entry.graph.graph.nodes if n.target is torch.ops.eff.attention_v1.default]
    assert prefix_of(entry, attention) == wanted
