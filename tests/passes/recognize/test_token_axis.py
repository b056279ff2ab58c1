"""Check the rules of the token axis: what they call row by row commutes with taking tokens, and what mixes tokens is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from effcompile.core.rewrite import Editor, copy_graph
from effcompile.ops.tokens import rows
from effcompile.passes.recognize.token_axis import Axis, Follower, Place, Reads
from effcompile.passes.tokens.remake import Cut, remade
from tests.support.check import trace

BATCH, TOKENS, WIDTH = 2, 6, 24
X = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KEPT = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]])
W = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

ROW_BY_ROW: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear, norms, activations": lambda x, w: F.gelu(F.layer_norm(F.linear(x, w), (WIDTH,))) * F.rms_norm(x, (WIDTH,)),
    "a product with one matrix": lambda x, w: torch.matmul(x, w) + x.sigmoid(),
    "heads and back": lambda x, w: x.view(BATCH, TOKENS, 4, 6).transpose(1, 2).permute(0, 2, 1, 3).reshape(x.shape),
    "rows of the batch as one dimension": lambda x, w: F.linear(x.reshape(-1, WIDTH), w).view(BATCH, TOKENS, WIDTH),
    "heads, turned and merged with the batch": lambda x, w: (
        x.view(BATCH, TOKENS, 4, 6).transpose(1, 2).reshape(BATCH * 4, TOKENS, 6).view(BATCH, 4, TOKENS, 6)
    ),
    "reductions of other dimensions": lambda x, w: x.view(BATCH, TOKENS, 4, 6).mean(2) - x.amax(-1, keepdim=True),
    "softmax, cumsum and topk along others": lambda x, w: x.softmax(-1).cumsum(2).topk(3, dim=-1).values,
    "parts and joints": lambda x, w: torch.cat([part * n for n, part in enumerate(x.split(8, -1))], -1),
    "a product for queries, keys and values": lambda x, w: torch.stack(
        [part.exp() for part in F.linear(x, torch.cat([w, w])).view(BATCH, TOKENS, 2, WIDTH).unbind(2)], 0
    ),
    "slices and picks of channels": lambda x, w: x[..., 3:7] + x.select(2, 4).unsqueeze(-1),
    "an expanded value": lambda x, w: x.unsqueeze(1).expand(BATCH, 3, TOKENS, WIDTH) * 2,
    "rotations by halves": lambda x, w: torch.cat([-x[..., 12:], x[..., :12]], -1),
    "where, by its own sign": lambda x, w: torch.where(x > 0, x, -x).masked_fill(x.abs() < 0.1, 0.0),
    "equal pieces that have all tokens": lambda x, w: sum(
        part * (n + 1)
        for n, part in enumerate(
            x.view(BATCH, TOKENS, 2, 12).transpose(1, 2).reshape(BATCH, 2 * TOKENS, 12).chunk(2, 1)
        )
    ),
}
READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all tokens are added up": lambda x, w: x.sum(1, keepdim=True) + x,
    "a mean of everything": lambda x, w: x - x.mean(),
    "tokens are sorted": lambda x, w: x.sort(1).values,
    "tokens are turned": lambda x, w: x.flip(1),
    "one token is picked": lambda x, w: x[:, :1] * x,
    "neighbors are paired": lambda x, w: x[:, 1:] - x[:, :-1],
    "a softmax over tokens": lambda x, w: x.softmax(1),
    "tokens attend": lambda x, w: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "a norm over tokens": lambda x, w: F.layer_norm(x, (TOKENS, WIDTH)),
    "windows": lambda x, w: x.reshape(BATCH * 3, 2, WIDTH).cumsum(0),
    "a product along tokens": lambda x, w: F.linear(x.transpose(1, 2), torch.ones(TOKENS, TOKENS, dtype=x.dtype)),
    "tokens and channels change places unseen": lambda x, w: x.transpose(1, 2).reshape(x.shape) + x,
    "tokens are joined to themselves": lambda x, w: torch.cat([x, x], 1),
    "pieces are cut between tokens": lambda x, w: x.reshape(BATCH, TOKENS * 2, 12).chunk(3, 1)[1],
}


def followed(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[fx.GraphModule, dict[fx.Node, Axis]]:
    """Follow all operations of a function of x `[B, N, C]`; raises `Reads` where one needs every token."""
    graph = trace(function, (X, W)).entries[0].graph
    start = next(node for node in graph.graph.nodes if node.op == "placeholder")
    rules, axis = Follower(TOKENS, BATCH), {start: Axis(Place(1), Place(0))}
    for node in graph.graph.nodes:
        known = {arg: axis[arg] for arg in node.all_input_nodes if arg in axis}
        if not known or node.op == "output":
            continue
        place, sides = rules.follow(node, known)
        assert place is not None
        assert not sides
        axis[node] = place
    return graph, axis


def shortened(module: fx.GraphModule, axis: dict[fx.Node, Axis], given: Tensor) -> Tensor:
    """Make every operation anew on fewer tokens, and run."""
    edit = Editor(copy_graph(module))
    twins = dict(zip(edit.graph.nodes, module.graph.nodes, strict=True))
    made: dict[fx.Node, fx.Node] = {}
    for node in list(edit.graph.nodes):
        if node.op == "placeholder" and twins[node] in axis:
            with edit.before(node.next):
                made[node] = edit.call(torch.ops.aten.slice.Tensor, node, 1, 0, given.shape[1])
        elif node.op == "output":
            node.args = (made[node.args[0]],)
        elif twins[node] in axis:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: made.get(arg, arg))
            with edit.before(node):
                made[node] = remade(edit, node, args, kwargs, Cut.of(axis[twins[node]], TOKENS, given.shape[1]))
    module = edit.finish()
    result: Tensor = module(given, W)
    return result


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_what_works_row_by_row_commutes_with_taking_tokens(name: str) -> None:
    module, axis = followed(ROW_BY_ROW[name])
    last = next(node for node in module.graph.nodes if node.op == "output").args[0]
    place = axis[last]
    assert place.tokens.alone
    assert place.batch.alone
    wanted = rows.take_along(ROW_BY_ROW[name](X, W), KEPT, place.batch.dim, place.tokens.dim)
    found = shortened(module, axis, rows.take(X, KEPT))
    assert torch.equal(found, wanted) or torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", READS)
def test_what_mixes_tokens_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(Reads) as told:
        followed(READS[name])
    assert str(told.value)


def test_side_operands_are_named() -> None:
    """A value of each position is shortened beside the tokens; one for all tokens, or for each sequence, is not."""
    places = torch.randn(1, TOKENS, 1, dtype=torch.float64)
    graph = trace(lambda x, a, b, c: x * a + b - c, (X, places, torch.randn(WIDTH), torch.randn(BATCH, 1, 1)))
    nodes = list(graph.entries[0].graph.graph.nodes)
    axis, rules, named = {nodes[0]: Axis(Place(1), Place(0))}, Follower(TOKENS, BATCH), []
    for node in nodes[4:-1]:
        axis[node], sides = rules.follow(node, {arg: axis[arg] for arg in node.all_input_nodes if arg in axis})
        named += [(arg.name, side.tokens.dim) for arg, side in sides.items()]
    assert named == [(nodes[1].name, 1)]
