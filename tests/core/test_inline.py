"""Check that a function that is written out into a graph is traced once for each kind of operands, and never taken for another."""

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from effcompile.core.rewrite import Editor


def _graph() -> tuple[Editor, fx.Node, fx.Node]:
    graph, mode = fx.Graph(), FakeTensorMode()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    with mode:
        x.meta["val"], y.meta["val"] = torch.empty(3, 4), torch.empty(3, 5)
    graph.output(x)
    return Editor(fx.GraphModule({}, graph)), x, y


def _scaled(edit: Editor, node: fx.Node, by: object) -> fx.Node:
    return edit.inline(lambda value: value * by, node)


def test_what_a_function_closes_over_and_its_operands_tell_traces_apart():
    edit, x, y = _graph()
    with edit.before(next(n for n in edit.graph.nodes if n.op == "output")):
        made = [_scaled(edit, node, by) for node, by in ((x, 2), (x, 2), (x, 3), (x, 2.0), (x, True), (y, 2))]
    assert [node.args[1] for node in made] == [2, 2, 3, 2.0, True, 2]
    assert [type(node.args[1]) for node in made] == [int, int, int, float, bool, int]
    assert [node.args[0] for node in made] == [x, x, x, x, x, y]
    assert made[-1].meta["val"].shape == (3, 5)
    assert len(edit._traced) == 5


def test_what_can_change_is_traced_each_time():
    edit, x, _ = _graph()
    given = [1]

    def added(value: Tensor) -> Tensor:
        return value + given[0]

    with edit.before(next(n for n in edit.graph.nodes if n.op == "output")):
        first = edit.inline(added, x)
        given[0] = 7
        second = edit.inline(added, x)
    assert (first.args[1], second.args[1]) == (1, 7)
    assert not edit._traced
