"""Check that padded rows are dropped exactly where the graph proves that nobody reads them, and nowhere else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effcompile as eff


class Layer(nn.Module):
    def __init__(self, width=32, heads=4, fused=False):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width) if fused else nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out, self.norm1, self.norm2 = nn.Linear(width, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, mask):
        batch, length, width = x.shape
        parts = self.qkv(x).split(width, -1) if self.fused else [project(x) for project in self.qkv]
        q, k, v = (p.view(batch, length, self.heads, -1).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.norm1(x + self.out(y.transpose(1, 2).reshape(batch, length, width)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    def __init__(self, read, depth=2, fused=False, additive=False):
        super().__init__()
        self.embed, self.place = nn.Embedding(50, 32), nn.Embedding(64, 32)
        self.layers = nn.ModuleList(Layer(fused=fused) for _ in range(depth))
        self.head = nn.Linear(32, 3)
        self.read, self.additive = read, additive

    def forward(self, ids, padding):
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))[None]
        mask = padding[:, None, None, :].bool().expand(-1, 1, ids.shape[1], -1)
        if self.additive:
            mask = (1.0 - padding[:, None, None, :].float()) * torch.finfo(torch.float32).min
        for layer in self.layers:
            x = layer(x, mask)
        return getattr(self, self.read)(x, padding)

    def mean(self, x, padding):
        weight = padding.unsqueeze(-1).expand(x.shape).float()
        return self.head((x * weight).sum(1) / weight.sum(1).clamp(min=1e-9))

    def first(self, x, padding):
        return self.head(x[:, 0])

    def both(self, x, padding):
        return self.mean(x, padding) + self.first(x, padding)

    def hidden(self, x, padding):
        return x

    def plain_mean(self, x, padding):
        return self.head(x.mean(1))

    def last(self, x, padding):
        return self.head(x[:, -1])

    def wrong_weight(self, x, padding):
        return self.head((x * (padding + 1).unsqueeze(-1)).sum(1))

    def mixed_rows(self, x, padding):
        return self.mean(x + x.roll(1, 1), padding)


def paddings(kind, batch, length):
    lengths = torch.tensor([length, length // 2, 1, length - 1])[:batch]
    places = torch.arange(length)
    if kind == "right":
        return (places[None] < lengths[:, None]).long()
    if kind == "left":
        return (places[None] >= length - lengths[:, None]).long()
    if kind == "holes":
        generator = torch.Generator().manual_seed(3)
        kept = torch.rand(batch, length, generator=generator) < 0.6
        kept[:, 1] = True
        return kept.long()
    if kind == "none":
        return torch.ones(batch, length, dtype=torch.long)
    kept = (places[None] < lengths[:, None]).long()
    kept[1] = 0
    return kept


def run(model, ids, padding, **options):
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eff", options={"strict": True, "emit": "interpreter", **options})
    with torch.no_grad():
        return fast(ids, padding), fast


def notes():
    return " | ".join(note for graph in eff.report()["graphs"] for note in graph["notes"] if note.startswith("unpad"))


def model_for(read, **fields):
    torch.manual_seed(0)
    return Encoder(read, **fields).eval()


@pytest.mark.parametrize("read", ["mean", "first", "both"])
@pytest.mark.parametrize("kind", ["right", "left", "holes", "none", "empty sequence"])
def test_result_is_the_same(read, kind):
    model = model_for(read)
    ids = torch.randint(0, 50, (4, 24), generator=torch.Generator().manual_seed(1))
    padding = paddings(kind, 4, 24)
    _, fast = run(model, ids, paddings("right", 4, 24))
    assert "dropped around 2" in notes()
    with torch.no_grad():
        torch.testing.assert_close(fast(ids, padding), model(ids, padding), rtol=1e-5, atol=1e-5)


def test_fused_projection_and_additive_mask():
    ids, padding = torch.randint(0, 50, (4, 24)), paddings("right", 4, 24)
    for model in (model_for("mean", fused=True), model_for("mean", additive=True)):
        result, _ = run(model, ids, padding)
        with torch.no_grad():
            torch.testing.assert_close(result, model(ids, padding), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_rows_are_really_dropped():
    model = model_for("mean")
    ids, padding = torch.randint(0, 50, (4, 24)), paddings("right", 4, 24)
    _, fast = run(model, ids, padding)
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        fast(ids, padding)
    # Where a layer's operand stands: whether oneDNN or torch runs it depends on the CPU.
    places = {"mkldnn::_linear_pointwise": 0, "aten::mm": 0, "aten::addmm": 1}
    linear = [event.input_shapes[places[event.name]] for event in profile.events() if event.name in places]
    inside = [rows for rows, _ in linear if rows != len(ids)]  # the head reads one row a sequence
    assert inside == [int(padding.sum())] * 12


@pytest.mark.parametrize("read", ["hidden", "plain_mean", "last", "wrong_weight", "mixed_rows"])
def test_near_misses_keep_their_rows(read):
    model = model_for(read)
    ids, padding = torch.randint(0, 50, (4, 24)), paddings("right", 4, 24)
    result, _ = run(model, ids, padding)
    assert "EFF-A401" in notes(), notes()
    with torch.no_grad():
        torch.testing.assert_close(result, model(ids, padding), rtol=1e-5, atol=1e-5)


def test_cls_of_an_all_padding_sequence_with_additive_mask_is_refused():
    model = model_for("first", additive=True)
    ids, padding = torch.randint(0, 50, (4, 24)), paddings("empty sequence", 4, 24)
    result, _ = run(model, ids, padding)
    assert "EFF-A402" in notes()
    with torch.no_grad():
        torch.testing.assert_close(result, model(ids, padding), rtol=1e-5, atol=1e-5)


def test_another_mask_in_one_layer_is_refused():
    class Mixed(Encoder):
        def forward(self, ids, padding):
            x = self.embed(ids)
            mask = padding[:, None, None, :].bool()
            places = torch.arange(ids.shape[1])
            x = self.layers[0](x, mask)
            x = self.layers[1](x, mask & (places[None] <= places[:, None]))
            return self.mean(x, padding)

    torch.manual_seed(0)
    model = Mixed("mean").eval()
    ids, padding = torch.randint(0, 50, (4, 24)), paddings("right", 4, 24)
    result, _ = run(model, ids, padding)
    assert "EFF-A402" in notes()
    with torch.no_grad():
        torch.testing.assert_close(result, model(ids, padding), rtol=1e-5, atol=1e-5)


class FlatLayer(Layer):
    """Work on rows `[B * S, C]`, norm and scale each head, and turn dimensions that are not rows."""

    def __init__(self):
        super().__init__()
        self.gain, self.per_head = nn.Parameter(torch.rand(4, 1, 1) + 0.5), nn.LayerNorm(8)
        self.gate = nn.Linear(32, 4)

    def forward(self, x, mask):
        batch, length, width = x.shape
        rows = x.reshape(-1, width)
        parts = [project(rows).view(batch, length, 4, 8).permute(0, 2, 1, 3) for project in self.qkv]
        q, k = (self.per_head(part) * self.gain for part in parts[:2])
        y = F.scaled_dot_product_attention(q, k, parts[2], attn_mask=mask)
        y = (y * self.gate(x).transpose(1, 2).unsqueeze(-1).sigmoid()).transpose(1, 2)
        y = torch.cat([y[..., 4:], y[..., :4]], -1).transpose(-1, -2).transpose(-2, -1)
        x = self.norm1(x + self.out(y.reshape(batch * length, width)).view(batch, length, width))
        a, b = self.up(x).view(batch, length, 2, 64).unbind(2)
        return self.norm2(x + self.down(torch.stack([a.softmax(-1), b - b.amax(-1, keepdim=True)], 2).flatten(2)))


@pytest.mark.parametrize("read", ["mean", "first"])
def test_rows_are_followed_through_any_layout(read):
    """Every operation that the rules of the token axis know runs on packed rows: the same rules as for token policies."""
    model = model_for(read)
    torch.manual_seed(1)
    model.layers = nn.ModuleList(FlatLayer() for _ in range(2)).eval()
    ids, padding = torch.randint(0, 50, (4, 24)), paddings("right", 4, 24)
    result, _ = run(model, ids, padding)
    assert "dropped around 2" in notes(), notes()
    with torch.no_grad():
        torch.testing.assert_close(result, model(ids, padding), rtol=1e-5, atol=1e-5)


def test_lengths_may_differ_as_they_like():
    model, lengths = model_for("mean"), torch.tensor([64, 1, 2, 63, 1, 1, 17, 40])
    ids, padding = torch.randint(0, 50, (8, 64)), (torch.arange(64)[None] < lengths[:, None]).long()
    result, fast = run(model, ids, padding)
    assert "dropped around 2" in notes()
    with torch.no_grad():
        torch.testing.assert_close(result, model(ids, padding), rtol=1e-5, atol=1e-5)
        order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
        torch.testing.assert_close(fast(ids[order], padding[order]), result[order], rtol=1e-5, atol=1e-5)


class Decoder(nn.Module):
    """Read a padded encoder's tokens by cross attention; `mode` says what is wrong with its mask, if anything."""

    def __init__(self, mode="same"):
        super().__init__()
        self.encoder = Encoder("hidden")
        self.own, self.q, self.kv, self.out = Layer(), nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 32)
        self.norm, self.mode = nn.LayerNorm(32), mode

    def forward(self, ids, padding, target):
        memory, (batch, length) = self.encoder(ids, padding), target.shape
        order = torch.ones(length, length, dtype=torch.bool).tril()
        x = self.own(self.encoder.embed(target), order[None, None])
        keep = padding[:, None, None, :].bool()
        if self.mode == "none":
            keep = torch.ones_like(keep)
        if self.mode == "shifted":
            keep = keep.roll(1, -1)
        if self.mode == "window":
            keep = keep & (torch.arange(ids.shape[1])[None, :] <= 2 + torch.arange(length)[:, None])
        if self.mode == "queries":
            x = x + memory[:, :length]
        q = self.q(x).view(batch, length, 4, 8).transpose(1, 2)
        k, v = (p.view(batch, -1, 4, 8).transpose(1, 2) for p in self.kv(memory).split(32, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return self.norm(x + self.out(y.transpose(1, 2).reshape(batch, length, 32)))


def decoded(mode, kind="right"):
    torch.manual_seed(0)
    model = Decoder(mode).eval()
    ids, target, padding = torch.randint(0, 50, (4, 24)), torch.randint(0, 50, (4, 6)), paddings(kind, 4, 24)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eff", options={"strict": True, "emit": "interpreter"})
    with torch.no_grad():
        wanted, found = model(ids, padding, target), fast(ids, padding, target)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
    return notes()


@pytest.mark.parametrize("mode", ["same", "window"])
@pytest.mark.parametrize("kind", ["right", "left", "holes", "empty sequence"])
def test_a_decoder_that_hides_padding_reads_none(mode, kind):
    """Projections to its keys and values are part of what runs without padding; more may be hidden."""
    assert "dropped around 2" in decoded(mode, kind)


@pytest.mark.parametrize("mode", ["none", "shifted", "queries"])
def test_a_decoder_that_may_read_padding_keeps_it(mode):
    assert "EFF-A401" in decoded(mode)


def test_through_inductor():
    model = model_for("mean")
    ids = torch.randint(0, 50, (4, 24))
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eff", options={"strict": True})
    with torch.no_grad():
        for kind in ("right", "left", "none"):
            padding = paddings(kind, 4, 24)
            torch.testing.assert_close(fast(ids, padding), model(ids, padding), rtol=1e-5, atol=1e-5)
    assert "dropped around 2" in notes()
