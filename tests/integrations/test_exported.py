"""Store the caches of exported programs in compressed forms, and refuse what cannot be, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import effcompile as eff
from effcompile.core.errors import EffError
from effcompile.models.llama import Llama, LlamaConfig, LlamaDecoder
from tests.integrations.test_prepare import llama, words

H, HKV, D, C = 4, 2, 32, 96


class Layer(nn.Module):
    """Attend over a cache of its own, in one of the spellings that people write."""

    def __init__(self, write: str = "index_copy", read: str = "whole", register: bool = True) -> None:
        super().__init__()
        self.write, self.read = write, read
        self.qkv = nn.Linear(H * D, (H + 2 * HKV) * D, bias=False)
        for name in ("keys", "values"):
            empty = torch.zeros(1, HKV, C, D)
            if register:
                self.register_buffer(name, empty)
            else:
                setattr(self, name, empty)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Return the attention `[B, H, S, D]` of x `[B, S, H * D]` at places `[S]`."""
        heads = self.qkv(x).unflatten(2, (-1, D)).transpose(1, 2)
        q, k, v = heads.split([H, HKV, HKV], 1)
        for held, new in ((self.keys, k), (self.values, v)):
            if self.write == "index_copy":
                held.index_copy_(2, places, new)
            elif self.write == "index_put":
                held[:, :, places] = new
            elif self.write == "slice":
                held[:, :, : x.shape[1]] = new
            else:
                held.masked_fill_(places[0] > 3, 1.0)
        mask = torch.arange(C)[None] <= places[:, None]
        keys, values = self.keys, self.values
        if self.read == "part":
            keys, values, mask = keys[:, :, 8:], values[:, :, 8:], mask[:, 8:]
        if self.read == "more":
            q = q + self.keys.mean()
        out = F.scaled_dot_product_attention(q, keys, values, None if self.read == "all" else mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


def exported(model: nn.Module, count: int) -> Any:
    return torch.export.export(model.eval().requires_grad_(False), (torch.randn(1, count, H * D), torch.arange(count)))


def inputs(count: int, first: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(1, count, H * D, generator=torch.Generator().manual_seed(first))
    return x, torch.arange(first, first + count)


@pytest.mark.parametrize("write", ["index_copy", "index_put"])
@pytest.mark.parametrize(("kv", "off"), [("plain", 1e-5), ("int8-per-token", 0.02), ("kivi{residual=32}", 0.2)])
def test_steps_say_what_the_model_says(write: str, kv: str, off: float) -> None:
    """One token at a time, over a context that begins again in the middle; the buffers are gone and the packed ones smaller."""
    torch.manual_seed(0)
    model = Layer(write)
    packed = eff.prepare(exported(model, 1), kv=kv)
    assert not [name for name, _ in packed.named_buffers() if name in ("keys", "values")]
    with torch.no_grad():
        for length in (70, 20):
            for n in range(length):
                found, wanted = packed(*inputs(1, n)), model(*inputs(1, n))
                assert float((found - wanted).abs().max()) < off * float(wanted.abs().max())
    (choice,) = [c for c in packed.plan.choices if c.family == "kv"]
    assert choice.policy == kv
    assert packed.nbytes() == sum(x.numel() * x.element_size() for _, x in packed.named_buffers())
    if kv == "int8-per-token":
        assert packed.nbytes() < 0.4 * 2 * HKV * C * D * 4
    packed.reset()
    with torch.no_grad():
        assert float((packed(*inputs(1, 0)) - model(*inputs(1, 0))).abs().max()) < 1e-5


def test_a_prompt_that_is_assigned_to_a_slice() -> None:
    model = Layer("slice")
    packed = eff.prepare(exported(model, 7), kv="int8-per-token")
    with torch.no_grad():
        for seed in (0, 1):
            x = inputs(7, seed)[0], torch.arange(7)
            assert float((packed(*x) - model(*x)).abs().max()) < 1e-5  # tokens of the same call are read as they are


def test_what_is_written_must_follow_what_is_held() -> None:
    packed = eff.prepare(exported(Layer(), 1), kv="int8-per-token")
    with torch.no_grad():
        for n in range(5):
            packed(*inputs(1, n))
        before = {name: x.clone() for name, x in packed.named_buffers()}
        with pytest.raises(EffError, match="EFF-K203"):
            packed(*inputs(1, 9))
        assert all(torch.equal(x, before[name]) for name, x in packed.named_buffers())
        packed(*inputs(1, 2))  # forgets what lies behind
        with pytest.raises(EffError, match="EFF-K203"):
            packed(*inputs(1, 4))
        for n in range(3, C):
            packed(*inputs(1, n))
        with pytest.raises(EffError, match="EFF-K201"):
            packed(*inputs(1, C))
    two = eff.prepare(exported(Layer(), 2), kv="int8-per-token")
    with pytest.raises(EffError, match=r"EFF-K203.*neighbors"), torch.no_grad():
        two(inputs(2, 0)[0], torch.tensor([0, 5]))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ({"read": "part"}, "reads a part of it|more than the cache"),
        ({"read": "more"}, "reads the cache too"),
        ({"read": "all"}, "without a mask"),
        ({"write": "fill"}, "masked_fill"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(layer: dict[str, str], reason: str) -> None:
    with pytest.raises(EffError, match=f"(?s)EFF-K208.*({reason})"):
        eff.prepare(exported(Layer(**layer), 1), kv="int8-per-token")


def test_a_cache_that_is_no_buffer_is_an_error_with_its_line() -> None:
    with pytest.raises(EffError, match=r"(?s)EFF-K208.*test_exported.py:\d+.*register_buffer"):
        eff.prepare(exported(Layer(register=False), 1), kv="int8-per-token")


@pytest.mark.parametrize("family", ["kv", "evict"])
def test_under_torch_compile_a_buffer_is_seen_by_others_and_the_door_is_named(family: str) -> None:
    """The graph is refused whether or not others read the buffer, since it cannot know; what Dynamo is given says which door."""
    asked = {"kv": "int8-per-token", "evict": "snapkv"}[family]
    model = Layer().eval()
    fast = torch.compile(model, backend="eff", options={family: asked})
    with (
        pytest.raises(BackendCompilerFailed, match=rf"(?s)EFF-U013 .*test_exported.py:\d+.*{family}={asked}.*export"),
        torch.no_grad(),
    ):
        fast(*inputs(1, 0))
    assert float(model.keys.abs().max()) == 0  # nothing has run


def test_a_cache_that_the_model_is_given_has_the_other_door() -> None:
    from transformers import StaticCache

    model = llama(num_hidden_layers=1)
    cache = StaticCache(config=model.config, max_cache_len=16)
    fast = torch.compile(model, backend="eff", options={"kv": "int8-per-token"}, dynamic=False)
    with torch.no_grad():
        model(words(1, 3), past_key_values=cache, use_cache=True)
        with pytest.raises(BackendCompilerFailed, match=r"(?s)EFF-U013.*use eff.prepare\(model, kv=...\)"):
            fast(words(1, 1), past_key_values=cache, use_cache=True)
    with pytest.raises(EffError, match=r"(?s)EFF-K205.*torch.export.export"):
        eff.prepare(Layer(), kv="int8-per-token")


def test_a_decoder_of_the_zoo_in_compiled_code() -> None:
    """Every layer by its own format, one left as it is; the module goes through torch.compile like any other."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab=64, width=64, layers=3, heads=2, kv_heads=1, head_dim=32, hidden=64)
    model = LlamaDecoder(Llama(config), 1, 64).eval()
    program = torch.export.export(model, (torch.tensor([[3]]), torch.tensor([0])))
    told = eff.explain(program)
    names = [row["id"] for row in told.to_json()["caches"]]
    assert len(names) == 3
    packed = eff.prepare(program, kv={names[0]: "int8-per-token", names[2]: "two-plane{stale=True}"})
    assert sorted(packed.caches) == [names[0], names[2]]
    fast = torch.compile(packed, backend="eff", dynamic=False, options={"strict": True})
    with torch.no_grad():
        for n in range(20):
            ids = torch.tensor([[n * 7 % 64]])
            wanted = model(ids, torch.tensor([n]))
            found = fast(ids, torch.tensor([n]))
            assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    with pytest.raises(EffError, match="EFF-K205"):
        eff.prepare(program, kv="int8-per-token", evict="sink-window")


class Cross(nn.Module):
    """Attend over keys and values of an encoder, which somebody has put into buffers."""

    def __init__(self, masked: bool = False, causal: bool = False, more: bool = False) -> None:
        super().__init__()
        self.masked, self.causal, self.more = masked, causal, more
        for number, name in enumerate(("keys", "values")):
            made = torch.randn(2, HKV, C, D, generator=torch.Generator().manual_seed(number))
            self.register_buffer(name, made)

    def forward(self, q: Tensor, lengths: Tensor) -> Tensor:
        """Return the attention of q `[2, H, S, D]` over the first `lengths` `[2]` places."""
        mask = torch.arange(C) < lengths[:, None, None, None] if self.masked else None
        keys = self.keys + 1 if self.more else self.keys
        return F.scaled_dot_product_attention(q, keys, self.values, mask, is_causal=self.causal, enable_gqa=True)


def asked(count: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(2, H, count, D, generator=torch.Generator().manual_seed(seed)), torch.tensor([50, C])


@pytest.mark.parametrize("fields", [{}, {"masked": True}, {"causal": True}])
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize(("kv", "off"), [("plain", 1e-5), ("int8-per-token", 0.02), ("kivi{residual=32}", 0.2)])
def test_a_cross_cache_is_written_once_and_read_each_step(
    fields: dict[str, bool], count: int, kv: str, off: float
) -> None:
    model = Cross(**fields)
    program = torch.export.export(model.eval(), asked(count))
    packed = eff.prepare(program, kv=kv)
    assert not [name for name, _ in packed.named_buffers() if name in ("keys", "values")]
    (site,) = packed.caches
    with torch.no_grad():
        for seed in range(3):
            found, wanted = packed(*asked(count, seed)), model(*asked(count, seed))
            assert float((found - wanted).abs().max()) < off * float(wanted.abs().max())
        packed.reset()  # what the program does not write it does not forget
        assert torch.equal(packed(*asked(count)), packed(*asked(count)))
        keys, values = (torch.randn(2, HKV, C, D, generator=torch.Generator().manual_seed(n)) for n in (7, 8))
        packed.fill(site, keys, values)
        model.keys.copy_(keys)
        model.values.copy_(values)
        found, wanted = packed(*asked(count)), model(*asked(count))
        assert float((found - wanted).abs().max()) < off * float(wanted.abs().max())
        for bad in ((keys[:, :, :-1], values[:, :, :-1]), (keys[:1], values[:1])):
            with pytest.raises(EffError, match="EFF-K202"):
                packed.fill(site, *bad)
        with pytest.raises(EffError, match=f"EFF-K208.*{site}"):
            packed.fill("other", keys, values)
    if kv == "int8-per-token":
        assert packed.nbytes() < 0.4 * 2 * 2 * HKV * C * D * 4


def test_a_cross_cache_that_is_written_behind_its_back_is_an_error() -> None:
    program = torch.export.export(Cross().eval(), asked())
    packed = eff.prepare(program, kv="plain")
    fast = torch.compile(packed, backend="eff", dynamic=False, options={"strict": True, "emit": "interpreter"})
    with torch.no_grad():
        assert float((fast(*asked()) - packed(*asked())).abs().max()) < 1e-5
        program.state_dict["keys"].add_(1)
        with pytest.raises(EffError, match=r"(?s)EFF-K208.*fill"):
            packed(*asked())


def test_what_is_made_of_a_cross_cache_is_no_cache() -> None:
    program = torch.export.export(Cross(more=True).eval(), asked())
    with pytest.raises(EffError, match=r"(?s)EFF-K208.*no attention reads"):
        eff.prepare(program, kv="int8-per-token")


class Other(nn.Module):
    """Keep tokens in a way that attention cannot read as they are, or write all of them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, H, C, D))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
        """Return the attention of q, k and v `[1, H, S, D]`."""
        mask = torch.arange(C)[None] <= places[:, None]
        if self.how == "whole":
            self.keys.copy_(k)
            self.values.copy_(v)
            return F.scaled_dot_product_attention(q, self.keys, self.values)
        if self.how == "slide":
            self.keys.copy_(torch.cat([self.keys[:, :, 1:], k], 2))
            self.values.copy_(torch.cat([self.values[:, :, 1:], v], 2))
            return F.scaled_dot_product_attention(q, self.keys, self.values, mask)
        for held, new in ((self.keys, k), (self.values, v)):
            rolled = held.roll(-1, 2)
            rolled[:, :, -1:] = new
            held.copy_(rolled)
        return F.scaled_dot_product_attention(q, self.keys, self.values, mask)


def test_a_prompt_that_fills_a_cache_as_a_whole_needs_no_mask() -> None:
    model = Other("whole")
    given = [torch.randn(1, H, C, D, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    packed = eff.prepare(torch.export.export(model.eval(), (*given[:3], torch.arange(C))), kv="int8-per-token")
    with torch.no_grad():
        for x in (given[:3], given[3:]):
            assert float((packed(*x, torch.arange(C)) - model(*x, torch.arange(C))).abs().max()) < 1e-5


@pytest.mark.parametrize("how", ["slide", "roll"])
def test_windows_that_move_are_refused_with_their_line(how: str) -> None:
    q, k, v = (torch.randn(1, H, 1, D) for _ in range(3))
    program = torch.export.export(Other(how).eval().requires_grad_(False), (q, k, v, torch.tensor([0])))
    with pytest.raises(EffError, match=r"(?s)EFF-K208.*test_exported.py:\d+.*moved at every call"):
        eff.prepare(program, kv="int8-per-token")


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("kind", ["gemma2", "t5"])
def test_programs_that_transformers_exports(kind: str) -> None:
    """Sliding layers, which its recipe keeps in whole static caches under a mask, and a decoder beside an encoder."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, T5Config, T5ForConditionalGeneration
    from transformers.integrations import executorch

    torch.manual_seed(0)
    if kind == "gemma2":
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = Gemma2Config(**sizes, vocab_size=64, num_key_value_heads=1, head_dim=32, sliding_window=8)
        model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
        model.generation_config.update(cache_implementation="static", use_cache=True)
        model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 96}
        program = executorch.convert_and_export_with_cache(model)
        steps = [
            {"input_ids": torch.tensor([[n * 7 % 63 + 1]]), "cache_position": torch.tensor([n])} for n in range(60)
        ]
        calls = [((), step) for step in steps]
    else:
        config = T5Config(vocab_size=64, d_model=64, d_ff=64, num_layers=2, num_heads=2, d_kv=32)
        model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
        encoded = torch.randn(1, 10, 64)
        program = executorch.Seq2SeqLMExportableModule(model, max_cache_length=32)._export_decoder(
            torch.tensor([[0]]), encoded, torch.tensor([0])
        )
        calls = [((torch.tensor([[n * 7 % 64]]), encoded, torch.tensor([n])), {}) for n in range(20)]
    own = program.module()
    packed = eff.prepare(program, kv="plain")
    assert len(packed.caches) == 2
    if kind == "gemma2":  # a layer with a window of 8 and room for 32 tokens, and one without
        assert sorted(new.ring for new in packed.caches.values()) == [0, 7 + 32]
    with torch.no_grad():
        for args, named in calls:
            found, wanted = packed(*args, **named), own(*args, **named)
            assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
