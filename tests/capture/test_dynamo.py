"""Check what capture makes of a Dynamo graph, and what it refuses by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import effcompile as eff
from effcompile.capture.dynamo import capture_dynamo, module_path
from effcompile.core.program import Program

CHEAP = {"emit": "interpreter", "strict": True}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def captured(function: Any, *args: Any, **how: Any) -> list[Program]:
    programs = []

    def backend(gm: Any, inputs: Any) -> Any:
        before = gm.code
        programs.append(capture_dynamo(gm, inputs))
        assert gm.code == before, "the module that Dynamo gave was changed"
        return gm.forward

    torch.compile(function, backend=backend, **how)(*args)
    return programs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.silu(block(x)) * self.scale
        return F.scaled_dot_product_attention(x, x, x)


def test_the_graph_is_whole_aten_with_names_and_kinds() -> None:
    with torch.no_grad():
        (program,) = captured(Net(), torch.randn(1, 2, 3, 8))
    (entry,) = program.entries
    targets = {str(node.target) for node in entry.graph.graph.nodes if node.op == "call_function"}
    assert {"aten.linear.default", "aten.silu.default", "aten.scaled_dot_product_attention.default"} <= targets
    kinds = {item.name: item.kind for item in entry.inputs}
    assert kinds["blocks.0.weight"] == kinds["blocks.1.bias"] == "parameter"
    assert kinds["scale"] == "buffer"
    assert kinds["x"] == "user"
    assert not program.requires_grad
    sources = [node.meta.get("eff.source", "") for node in entry.graph.graph.nodes if node.op == "call_function"]
    assert all("test_dynamo.py:" in source for source in sources)


def test_training_is_known() -> None:
    (program,) = captured(Net(), torch.randn(1, 2, 3, 8))
    assert program.requires_grad


def test_symbolic_sizes_stay() -> None:
    with torch.no_grad():
        (program,) = captured(Net(), torch.randn(1, 2, 3, 8), dynamic=True)
    (entry,) = program.entries
    assert any(item.kind == "size" for item in entry.inputs)
    shapes = [node.meta["val"].shape for node in entry.graph.graph.nodes if "scaled_dot" in str(node.target)]
    assert not isinstance(shapes[0][2], int)


def test_writes_stay_in_place_and_in_order() -> None:
    def step(cache: Tensor, x: Tensor) -> Tensor:
        cache[:, 1] = x
        y = cache.sum()
        cache.add_(1)
        return y + cache.sum()

    (program,) = captured(step, torch.zeros(2, 3), torch.ones(2))
    graph = program.entries[0].graph
    given = [torch.zeros(2, 3), torch.ones(2)]
    wanted = [torch.zeros(2, 3), torch.ones(2)]
    (found,) = graph(*given)
    torch.testing.assert_close(found, step(*wanted))
    torch.testing.assert_close(given[0], wanted[0])


def test_a_call_outside_dynamo_is_refused() -> None:
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(eff.EffError, match="EFF-G302"):
        capture_dynamo(graph, [torch.ones(2)])


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['blk']._modules['0']._parameters['weight']", "blk.0.weight"),
        ("L['self']._buffers['scale']", "scale"),
        ("L['x']", "x"),
        ("L['self'].model.layers.0.self_attn", "model.layers.0.self_attn"),
    ],
)
def test_names_are_the_users(source: str, path: str) -> None:
    assert module_path(source) == path


class Halves(Tensor):
    """Hold a weight as twice its half, as a quantized weight holds its parts."""

    half: Tensor
    __slots__ = ["half"]

    @staticmethod
    def __new__(cls, half: Tensor) -> Halves:
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, device=half.device)

    def __init__(self, half: Tensor) -> None:
        self.half = half

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["half"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> Halves:
        return Halves(inner["half"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Halves(args[0].half.detach())
        plain = tree_map(lambda x: x.half * 2 if isinstance(x, Halves) else x, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def test_a_tensor_subclass_is_refused_by_name_and_right() -> None:
    weight = Halves(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))

    def model(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w)
        return F.scaled_dot_product_attention(y, y, y)

    x = torch.randn(1, 2, 3, 8)
    with torch.no_grad():
        found = torch.compile(model, backend="eff", options=CHEAP)(x, weight)
        torch.testing.assert_close(found, model(x, weight))
    report = eff.report()
    assert report["counters"] == {"refused EFF-G304": 1}
    assert "Halves" in report["notices"][0]


def test_random_numbers_are_drawn_once() -> None:
    """A retrace must not consume the generator."""

    def model(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, True) + torch.rand_like(x)

    x = torch.ones(64)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.compile(model, backend="eff", options=CHEAP)(x), expected)


def test_inputs_that_overlap() -> None:
    """Two inputs that are views of one tensor, one of them written in the graph."""

    def model(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        a.fill_(True)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=b)

    results = []
    for run in (model, torch.compile(model, backend="eff", options=CHEAP)):
        base = torch.ones(5, 5, dtype=torch.bool).tril()
        x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            results.append(run(base[:, 3:], base, x))
    torch.testing.assert_close(results[1], results[0])
