"""Change weights after compiling, in every way that training and adapters do: the compiled model sees the new ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import effcompile as eff

CHEAP = {"emit": "interpreter", "strict": True}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """Attend causally; `down` and `up` are a low-rank adapter (LoRA, arXiv:2106.09685) once they are there."""

    down: Tensor | None
    up: Tensor | None

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.down = self.up = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        places = torch.arange(x.shape[1])
        mask = torch.where(places[None] <= places[:, None], 0.0, torch.finfo(x.dtype).min)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        more = y @ self.down @ self.up if self.down is not None and self.up is not None else 0.0
        return x + self.out(y) + more

    def adapt(self, seed: int, *, frozen: bool = True) -> None:
        """Give the block a fresh adapter of rank 2."""
        for name, shape in (("down", (16, 2)), ("up", (2, 16))):
            self.__dict__.pop(name, None)
            setattr(self, name, nn.Parameter(draw(*shape, seed=seed), requires_grad=not frozen))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(layers: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(layers))).eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def add(model: nn.Sequential) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.add_(0.01 * (number + 1))


def load(model: nn.Sequential) -> None:
    model.load_state_dict({name: 1.1 * value + 0.02 for name, value in model.state_dict().items()})


def assign(model: nn.Sequential) -> None:
    """Swap the parameter objects themselves."""
    model.load_state_dict({name: 1.1 * value + 0.02 for name, value in model.state_dict().items()}, assign=True)


def data(model: nn.Sequential) -> None:
    model[1].out.weight.data = model[1].out.weight.data * 2


def replace(model: nn.Sequential) -> None:
    model[2].out.weight = nn.Parameter(draw(16, 16, seed=5))


def swap_layers(model: nn.Sequential) -> None:
    model[0], model[2] = model[2], model[0]


def step(model: nn.Sequential) -> None:
    """Take one step of AdamW, computed without the compiled model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with torch.enable_grad():
        model(draw(2, 5, 16, seed=9)).square().mean().backward()
    optimizer.step()


CHANGES = [add, load, assign, data, replace, swap_layers, step]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_seen(change: Callable[[nn.Sequential], None]) -> None:
    model, x = build(), draw(2, 5, 16)
    run = torch.compile(model, backend="eff", options=CHEAP)
    before = run(x)
    close(before, model(x))
    change(model)
    after = model(x)
    assert float((after - before).abs().max()) > 1e-3, "the change changes nothing"
    close(run(x), after)


@torch.no_grad()
def test_changed_weights_are_seen_through_inductor() -> None:
    model, x = build(), draw(2, 5, 16)
    run = torch.compile(model, backend="eff", options={"strict": True})
    close(run(x), model(x))
    graphs = len(eff.report()["graphs"])
    for change in (add, load, step):
        before = model(x)
        change(model)
        assert float((model(x) - before).abs().max()) > 1e-3
        close(run(x), model(x))
    assert len(eff.report()["graphs"]) == graphs, "new values of the same weights compile nothing"


def test_training_through_the_compiled_model_moves_it() -> None:
    model = build()
    twin, x = copy.deepcopy(model), draw(2, 5, 16)
    for run, weights in ((model, model), (torch.compile(twin, backend="eff", options=CHEAP), twin)):
        optimizer = torch.optim.SGD(weights.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
    for found, expected in zip(twin.parameters(), model.parameters(), strict=True):
        close(found, expected)


@torch.no_grad()
def test_adapters_come_change_and_go() -> None:
    model, x = build(), draw(2, 5, 16)
    run = torch.compile(model, backend="eff", options=CHEAP)
    plain = run(x)
    seen = [plain]
    for seed in (1, 2):
        for block in model:
            block.adapt(seed)
        close(run(x), model(x))
        seen.append(run(x))
    model[1].up.mul_(3)
    close(run(x), model(x))
    seen.append(run(x))
    assert all(float((a - b).abs().max()) > 1e-3 for n, a in enumerate(seen) for b in seen[n + 1 :])
    for block in model:
        block.down = block.up = None
    close(run(x), plain)


@torch.no_grad()
@pytest.mark.parametrize("emit", ["interpreter", "inductor"])
def test_a_triangle_that_is_changed_in_place(emit: str) -> None:
    """The mask was proved causal from the buffer's content; after a change the graph runs as it was written."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keep", torch.ones(8, 8, dtype=torch.bool).tril())

        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[2]
            return (x @ x.transpose(-1, -2)).masked_fill(~self.keep[:n, :n], float("-inf")).softmax(-1) @ x

    model, x = Masked(), draw(2, 2, 6, 8)
    run = torch.compile(model, backend="eff", options={"strict": True, "emit": emit})
    before = run(x)
    close(before, model(x))
    (site,) = eff.report()["graphs"][0]["sites"]
    assert site["mask"] == "causal"
    assert "stale" not in eff.report()["counters"]
    model.keep[3, 0] = False
    assert float((model(x) - before).abs().max()) > 1e-3
    close(run(x), model(x))
    assert eff.report()["counters"]["stale"] == 1
    close(run(x + 1), model(x + 1))


# --- tensor subclasses ---


class Halves(torch.Tensor):
    """Hold a matrix as two tensors, as quantized weights hold values and scales."""

    low: Tensor
    high: Tensor

    @staticmethod
    def __new__(cls, low: Tensor, high: Tensor) -> Halves:
        return torch.Tensor._make_wrapper_subclass(cls, low.shape, dtype=low.dtype, device=low.device)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["low", "high"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> Halves:
        return Halves(inner["low"], inner["high"])

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Halves({self.low}, {self.high})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Halves(args[0].low.detach(), args[0].high.detach())
        plain = torch.utils._pytree.tree_map_only(Halves, lambda x: x.low + x.high, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


@torch.no_grad()
@pytest.mark.parametrize("emit", ["interpreter", "inductor"])
def test_a_subclass_weight_is_refused_by_name(emit: str) -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(Halves(draw(8, 8), draw(8, 8, seed=1)), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight
            return F.scaled_dot_product_attention(y, x, x)

    model, x = Quantized(), draw(2, 2, 6, 8)
    expected = F.scaled_dot_product_attention(x @ (draw(8, 8) + draw(8, 8, seed=1)), x, x)
    close(model(x), expected)
    close(torch.compile(model, backend="eff", options={"strict": True, "emit": emit})(x), expected)
    report = eff.report()
    assert report["counters"] == {"refused EFF-G304": 1}
    (notice,) = report["notices"]
    assert "Halves" in notice


@torch.no_grad()
def test_a_subclass_input_is_refused_by_name() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x @ w, x, x)

    x, w = draw(2, 2, 6, 8), Halves(draw(8, 8), draw(8, 8, seed=1))
    close(torch.compile(model, backend="eff", options=CHEAP)(x, w), model(x, w.low + w.high))
    assert eff.report()["counters"] == {"refused EFF-G304": 1}


@torch.no_grad()
def test_a_distributed_weight_is_refused_by_name(tmp_path: Path) -> None:
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor, init_device_mesh

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(self.q(x) @ x.transpose(-1, -2), -1) @ x

    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        mesh, model, whole = init_device_mesh("cpu", (1,)), Attend(), draw(2, 2, 6, 8)
        expected = model(whole)
        distribute_module(model, mesh)
        found = torch.compile(model, backend="eff", options=CHEAP)(distribute_tensor(whole, mesh, [Replicate()]))
        assert isinstance(found, DTensor)
        close(found.full_tensor(), expected)
    finally:
        dist.destroy_process_group()
    report = eff.report()
    assert report["counters"] == {"refused EFF-G304": 1}
    assert "DTensor" in report["notices"][0]
