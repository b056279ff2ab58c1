"""Check that repeated layers are found by structure, called once each, and left alone where they differ."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effcompile as eff


class Layer(nn.Module):
    def __init__(self, width, act=F.gelu):
        super().__init__()
        self.norm, self.up, self.down, self.act = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            act,
        )

    def forward(self, x, scale):
        x = x + self.down(self.act(self.up(self.norm(x)))) * scale
        return x - torch.tanh(self.norm(x)) * scale


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(16, 5)

    def forward(self, x):
        scale = torch.sigmoid(x.mean(-1, keepdim=True))
        for layer in self.layers:
            x = layer(x, scale)
        return self.head(x)


def outlined(model, *inputs, emit="interpreter", dynamic=None):
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eff", options={"strict": True, "emit": emit}, dynamic=dynamic)
    with torch.no_grad():
        result = fast(*inputs)
    (note,) = [n for n in eff.report()["graphs"][-1]["notes"] if n.startswith("outline")]
    return result, note, fast


def stack(count=5, **fields):
    torch.manual_seed(0)
    return Stack(*(Layer(16, **fields) for _ in range(count))).eval()


@pytest.mark.parametrize("emit", ["interpreter", "inductor"])
def test_equal_layers_are_outlined(emit):
    model, x = stack(), torch.randn(3, 70, 16)
    result, note, _ = outlined(model, x, emit=emit)
    assert note.startswith("outline-layers: 5 layers")
    with torch.no_grad():
        torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)


def test_each_layer_keeps_its_own_weights():
    model, x = stack(), torch.randn(3, 70, 16)
    _, _, fast = outlined(model, x)
    with torch.no_grad():
        for index, layer in enumerate(model.layers):
            layer.down.weight.mul_(index + 2)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_layer_of_another_kind_ends_the_run():
    torch.manual_seed(0)
    layers = [Layer(16), Layer(16), Layer(16), Layer(16, act=F.silu), Layer(16)]
    model, x = Stack(*layers).eval(), torch.randn(3, 70, 16)
    result, note, _ = outlined(model, x)
    assert note.startswith("outline-layers: 3 layers")
    with torch.no_grad():
        torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)


def test_alternating_layers_are_one_block():
    torch.manual_seed(0)
    layers = [Layer(16, act=F.gelu if n % 2 else F.silu) for n in range(8)]
    model, x = Stack(*layers).eval(), torch.randn(3, 70, 16)
    result, note, _ = outlined(model, x)
    assert note.startswith("outline-layers: 4 layers") or note.startswith("outline-layers: 3 layers")
    with torch.no_grad():
        torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)


def test_two_layers_stay():
    _, note, _ = outlined(stack(2), torch.randn(3, 70, 16))
    assert "no repeated layers" in note


def test_swapped_wiring_is_not_outlined():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ParameterList(nn.Parameter(torch.randn(16, 16)) for _ in range(4))

        def forward(self, x, y):
            for number, weight in enumerate(self.a):
                p, q = (x, y) if number != 2 else (y, x)
                x = torch.tanh(p @ weight) - torch.sigmoid(q @ weight) + torch.cos(p) * torch.sin(q) + p.abs()
                y = y + 1
            return x

    torch.manual_seed(0)
    model, x, y = Swapped().eval(), torch.randn(4, 16), torch.randn(4, 16)
    result, _, _ = outlined(model, x, y)
    with torch.no_grad():
        torch.testing.assert_close(result, model(x, y), rtol=1e-5, atol=1e-5)


def test_layers_that_write_in_place_stay():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer(16) for _ in range(4))

        def forward(self, x, log):
            for number, layer in enumerate(self.layers):
                x = layer(x, 1.0)
                log[number].copy_(x.sum(0).sum(0))
            return x

    torch.manual_seed(0)
    model, x = Writing().eval(), torch.randn(3, 70, 16)
    log, expected = torch.zeros(4, 16), torch.zeros(4, 16)
    result, note, _ = outlined(model, x, log)
    assert "writes in place" in note or "no repeated layers" in note
    with torch.no_grad():
        torch.testing.assert_close(result, model(x, expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log, expected, rtol=1e-5, atol=1e-4)


class Cached(Layer):
    """Write a row of this layer's own cache, then read all of it, as attention over a static KV cache does."""

    def forward(self, x, cache, place, count):
        key = torch.tanh(self.norm(x))
        where = torch.arange(x.shape[1]) + place
        count.add_(x.shape[1])
        cache.index_copy_(1, where, key)
        weights = torch.softmax(x @ cache.transpose(1, 2), -1)
        x = x + weights @ cache
        return x + self.down(self.act(self.up(self.norm(x))))


class Fused(Cached):
    """Take query and key from one product, as GPT-2 and Phi-3 do: where layers are cut at the write, both go to the next call."""

    def __init__(self, width):
        super().__init__(width)
        self.both = nn.Linear(width, 2 * width)

    def forward(self, x, cache, place, count):
        query, key = self.both(self.norm(x)).chunk(2, -1)
        count.add_(x.shape[1])
        cache.index_copy_(1, torch.arange(x.shape[1]) + place, key)
        x = x + torch.softmax(query @ cache.transpose(1, 2), -1) @ cache
        return x + self.down(self.act(self.up(self.norm(x))))


class CachedStack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, place, caches, counts):
        for layer, cache, count in zip(self.layers, caches, counts):
            x = layer(x, cache, place, count)
        return x


def cached_arguments(layers, rows=1):
    torch.manual_seed(1)
    caches = [torch.randn(2, 9, 16) for _ in range(layers)]
    return torch.randn(2, rows, 16), torch.tensor(3), caches, [torch.zeros((), dtype=torch.int64) for _ in caches]


@pytest.mark.parametrize("layer", [Cached, Fused])
@pytest.mark.parametrize("emit", ["interpreter", "inductor"])
def test_layers_are_cut_where_they_write_to_a_cache(emit, layer):
    """Six layers that write in place: five calls lie between the writes, and results and caches are eager's over two steps."""
    torch.manual_seed(0)
    model = CachedStack([layer(16) for _ in range(6)]).eval()
    mine, theirs = cached_arguments(6), cached_arguments(6)
    result, note, fast = outlined(model, *mine, emit=emit)
    assert note.startswith("outline-layers: 5 layers")
    with torch.no_grad():
        torch.testing.assert_close(result, model(*theirs), rtol=1e-5, atol=1e-5)
        for step in range(4, 6):
            for arguments in (mine, theirs):
                arguments[1].fill_(step)
            torch.testing.assert_close(fast(*mine), model(*theirs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine[2:], theirs[2:], rtol=1e-5, atol=1e-5)


class Halves(nn.Module):
    """Return what lies in the middle of a buffer: the halves of one product, and what was also put behind earlier keys."""

    def __init__(self):
        super().__init__()
        self.both, self.key, self.out = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, past):
        first, second = self.both(x).chunk(2, -1)
        key = torch.tanh(self.key(x))
        keys = torch.cat([past, key], 1)
        return x + torch.tanh(self.out(x * keys.mean(1, keepdim=True))), (first, second, key, keys)


class HalvesStack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Halves() for _ in range(4))

    def forward(self, x, pasts):
        found = []
        for layer, past in zip(self.layers, pasts):
            x, parts = layer(x, past)
            found.append(parts)
        # Behind all layers, so that no layer computes it.
        return x, [a * b + key.sin() + keys[:, -1:].cos() + b[..., 3:4] for a, b, key, keys in found]


@pytest.mark.parametrize("rows", [1, 5])
def test_what_lies_in_the_middle_of_a_buffer_is_read_from_its_start(rows):
    """TorchInductor adds the offset of a view that a sub-graph returns twice, and reads past the end."""
    torch.manual_seed(0)
    model = HalvesStack().eval()
    x, pasts = torch.randn(2, rows, 16), [torch.randn(2, 3, 16) for _ in range(4)]
    result, note, _ = outlined(model, x, pasts, emit="inductor")
    assert note.startswith("outline-layers: 4 layers")
    with torch.no_grad():
        torch.testing.assert_close(result, model(x, pasts), rtol=1e-5, atol=1e-5)


def test_a_cache_that_two_layers_share_is_written_between_their_calls():
    torch.manual_seed(0)
    model = CachedStack([Cached(16) for _ in range(6)]).eval()
    mine, theirs = cached_arguments(2), cached_arguments(2)
    for arguments in (mine, theirs):
        arguments[2][:], arguments[3][:] = arguments[2] * 3, arguments[3] * 3
    result, _, _ = outlined(model, *mine)
    with torch.no_grad():
        torch.testing.assert_close(result, model(*theirs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine[2:], theirs[2:], rtol=1e-5, atol=1e-5)


def test_a_layer_that_reads_between_two_writes_stays():
    class Twice(Layer):
        def forward(self, x, cache, place, count):
            cache.mul_(0.5)
            x = torch.tanh(x + torch.sin(cache[:, :1]) + self.down(self.act(self.up(self.norm(x)))))
            cache.add_(x.mean(1, keepdim=True))
            return x * torch.cos(cache[:, :1]) + torch.sigmoid(self.norm(x))

    torch.manual_seed(0)
    model = CachedStack([Twice(16) for _ in range(6)]).eval()
    mine, theirs = cached_arguments(6), cached_arguments(6)
    result, note, _ = outlined(model, *mine)
    assert "reads what the same layer has just written in place" in note
    with torch.no_grad():
        torch.testing.assert_close(result, model(*theirs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine[2:], theirs[2:], rtol=1e-5, atol=1e-5)


def test_symbolic_lengths_share_one_graph():
    model = stack()
    _, note, fast = outlined(model, torch.randn(3, 70, 16), dynamic=True)
    assert note.startswith("outline-layers: 5 layers")
    graphs = len(eff.report()["graphs"])
    with torch.no_grad():
        for length in (64, 71, 90, 133):
            x = torch.randn(3, length, 16)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(eff.report()["graphs"]) == graphs


def test_off_switch():
    model, x = stack(), torch.randn(3, 70, 16)
    torch._dynamo.reset()
    fast = torch.compile(
        model, backend="eff", options={"strict": True, "emit": "interpreter", "disable": ["outline-layers"]}
    )
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert not any("outline" in note for note in eff.report()["graphs"][-1]["notes"])
