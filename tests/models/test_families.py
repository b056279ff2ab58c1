"""Check what each reference family promises: who sees whom, caches, conditioning, known formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.models import dit, encoder, llama, mixtral, nanogpt, seq2seq, vit, zoo
from effcompile.models.entry import random_normal, random_tokens

CAUSAL = ("llama-tiny", "mixtral-tiny", "mixtral-tiny-gathered", "nanogpt-tiny")


@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_do_not_reach_earlier_rows(name: str) -> None:
    model = zoo.load(name).model
    tokens = random_tokens(2, 12, 256)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert before.shape == (2, 12, 256)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    assert all((before[:, row] - after[:, row]).abs().max() > 1e-4 for row in range(7, 12))


def test_llama_padding_hides_keys() -> None:
    model = zoo.load("llama-tiny").model
    tokens = random_tokens(2, 12, 256)
    padding = torch.ones(2, 12, dtype=torch.long)
    padding[1, 9:] = 0
    with torch.no_grad():
        padded, plain, short = model(tokens, padding), model(tokens), model(tokens[1:, :9])
    torch.testing.assert_close(padded[0], plain[0])
    torch.testing.assert_close(padded[1, :9], short[0])
    assert (padded[1, 9:] - plain[1, 9:]).abs().max() > 1e-4


def test_llama_cache_gives_the_full_forward() -> None:
    model = llama.Llama(llama.LlamaConfig.tiny()).double().eval()
    tokens = random_tokens(2, 12, 256)
    decoder = llama.LlamaDecoder(model, batch=2, length=16)
    with torch.no_grad():
        full = model(tokens)
        parts = [decoder(tokens[:, :5], torch.arange(5))]
        parts += [decoder(tokens[:, step : step + 1], torch.tensor([step])) for step in range(5, 12)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-6, atol=1e-6)  # rotary tables are float32


def test_llama_decode_step_exports() -> None:
    decoder = llama.LlamaDecoder(llama.Llama(llama.LlamaConfig.tiny()).eval(), batch=1, length=16)
    args = (random_tokens(1, 1, 256), torch.tensor([3]))
    program = torch.export.export(decoder, args, strict=False)
    assert any("index_copy" in str(node.target) for node in program.graph.nodes)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q, k = random_normal(1, 1, 1, 16), random_normal(1, 1, 1, 16) + 0.5

    def score(at: int, other: int) -> Tensor:
        tables = [llama.rotary_tables(torch.tensor([place]), 16, 1e4) for place in (at, other)]
        return (llama.rotate(q, *tables[0]) * llama.rotate(k, *tables[1])).sum()

    torch.testing.assert_close(score(9, 4), score(25, 20))
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3


def test_encoder_padding_does_not_reach_the_embedding() -> None:
    model = zoo.load("encoder-tiny").model
    tokens = random_tokens(2, 12, 256)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    changed = tokens.clone()
    changed[1, 8:] = 7
    with torch.no_grad():
        out, other, short = model(tokens, mask), model(changed, mask), model(tokens[1:, :8], mask[1:, :8])
    torch.testing.assert_close(out, other)
    torch.testing.assert_close(out[1:], short)
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(2))


def test_pooling_is_the_masked_mean() -> None:
    inner = encoder.Encoder(encoder.EncoderConfig.tiny()).eval()
    tokens, mask = random_tokens(1, 6, 256), torch.tensor([[1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        states = inner(tokens, mask)
        out = encoder.MeanPooledEncoder(inner)(tokens, mask)
    torch.testing.assert_close(out, F.normalize(states[:, :4].mean(dim=1), dim=-1))


def test_token_types_matter() -> None:
    model = zoo.load("encoder-tiny").model
    tokens = random_tokens(1, 6, 256)
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        assert (model(tokens, mask) - model(tokens, mask, torch.ones_like(tokens))).abs().max() > 1e-3


def test_vit_attends_to_every_patch_and_layer_scale_gates() -> None:
    config = vit.ViTConfig.tiny()
    model = zoo.load("vit-tiny").model
    pixels = random_normal(1, 3, config.image, config.image)
    changed = pixels.clone()
    changed[..., -1, -1] += 1
    with torch.no_grad():
        before, after = model(pixels), model(changed)
        assert before.shape == (1, config.tokens, config.width)
        assert ((before - after).abs().amax(dim=-1) > 1e-6).all()
        for block in model.blocks:
            block.scale1.gamma.zero_()
            block.scale2.gamma.zero_()
        start = torch.cat((model.cls, model.patches(pixels).flatten(2).transpose(1, 2)), dim=1) + model.positions
        torch.testing.assert_close(model(pixels), model.norm(start))


def test_expert_forms_agree_with_a_loop() -> None:
    config = mixtral.MixtralConfig.tiny()
    moe = mixtral.SparseMoE(config)
    x = random_normal(2, 5, 64)
    with torch.no_grad():
        dense = moe(x)
        moe.experts.form = "gathered"
        gathered = moe(x)
        weights, chosen = moe.router(x.reshape(-1, 64))
        loop = torch.zeros(10, 64)
        for token in range(10):
            for weight, expert in zip(weights[token], chosen[token]):
                gate, up = (moe.experts.gate_up[expert] @ x.reshape(-1, 64)[token]).chunk(2)
                loop[token] += weight * (moe.experts.down[expert] @ (F.silu(gate) * up))
    torch.testing.assert_close(dense.reshape(-1, 64), loop, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gathered, dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(10))


def test_dit_starts_at_zero_when_trained_from_scratch() -> None:
    fresh = dit.DiT(dit.DiTConfig(latent=8, width=64, layers=2, heads=4, classes=3, frequencies=32))
    with torch.no_grad():
        assert fresh(random_normal(1, 4, 8, 8), torch.tensor([0.5]), torch.tensor([1])).abs().max() == 0


def test_dit_reads_time_and_class() -> None:
    model = zoo.load("dit-tiny").model
    latent = random_normal(1, 4, 16, 16)
    with torch.no_grad():
        base = model(latent, torch.tensor([0.3]), torch.tensor([1]))
        assert base.shape == latent.shape
        assert (base - model(latent, torch.tensor([0.9]), torch.tensor([1]))).abs().max() > 1e-3
        assert (base - model(latent, torch.tensor([0.3]), torch.tensor([10]))).abs().max() > 1e-3


def test_unpatchify_undoes_the_patch_order() -> None:
    model = zoo.load("dit-tiny").model
    latent = random_normal(2, 4, 16, 16)
    patches = F.unfold(latent, 2, stride=2).transpose(1, 2)  # [B, N, channels * patch**2]
    patches = patches.unflatten(-1, (4, 2, 2)).permute(0, 1, 3, 4, 2).flatten(2)
    torch.testing.assert_close(model.unpatchify(patches), latent)


def test_seq2seq_masks() -> None:
    model = zoo.load("seq2seq-tiny").model
    source, target = random_tokens(2, 10, 256), random_tokens(2, 6, 256)
    padding = torch.ones(2, 10, dtype=torch.long)
    padding[1, 7:] = 0
    later, hidden = target.clone(), source.clone()
    later[:, 4] += 1
    hidden[1, 7:] = 3
    with torch.no_grad():
        base = model(source, target, padding)
        moved = model(source, later % 256, padding)
        torch.testing.assert_close(base[:, :4], moved[:, :4])
        assert (base[:, 4:] - moved[:, 4:]).abs().max() > 1e-4
        torch.testing.assert_close(base, model(hidden, target, padding))
        torch.testing.assert_close(base[1:], model(source[1:, :7], target[1:], padding[1:, :7]))
        assert (base - model(source.flip(1), target, padding)).abs().max() > 1e-4


def test_position_buckets_are_exact_near_and_capped_far() -> None:
    offsets = torch.tensor([-1000, -3, -1, 0, 1, 3, 1000])
    one_way = seq2seq.position_buckets(offsets, 8, 32, bidirectional=False)
    assert one_way.tolist() == [7, 3, 1, 0, 0, 0, 0]
    two_way = seq2seq.position_buckets(offsets, 8, 32, bidirectional=True)
    assert two_way.tolist()[2:5] == [1, 0, 5]
    assert two_way.tolist()[0] == 3
    assert two_way.tolist()[-1] == 7


def test_position_buckets_agree_with_transformers() -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    offsets = torch.arange(-200, 201)
    for both in (True, False):
        ours = seq2seq.position_buckets(offsets, 32, 128, both)
        theirs = t5.T5Attention._relative_position_bucket(offsets, both, 32, 128)
        assert torch.equal(ours, theirs)


def test_hand_written_attention_is_sdpa() -> None:
    attention = nanogpt.CausalSelfAttention(nanogpt.NanoGPTConfig.tiny()).eval()
    x = random_normal(2, 9, 64)
    with torch.no_grad():
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / math.sqrt(16))
        torch.testing.assert_close(attention(x), attention.proj(expected.transpose(1, 2).flatten(2)))


def test_llama_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = llama.LlamaConfig.tiny()
    ours = llama.Llama(config).eval()
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
        )
    ).eval()
    names = {"embed.": "model.embed_tokens.", "norm.": "model.norm.", "layers.": "model.layers."}
    parts = {".attn_norm": ".input_layernorm", ".mlp_norm": ".post_attention_layernorm", ".attn.": ".self_attn."}
    state = {}
    for name, value in ours.state_dict().items():
        head = next(key for key in names if name.startswith(key))
        renamed = names[head] + name.removeprefix(head)
        for old, new in parts.items():
            renamed = renamed.replace(old, new)
        state[renamed] = value
    absent, surplus = theirs.load_state_dict(state, strict=False)
    assert absent == ["lm_head.weight"]
    assert not surplus
    tokens = random_tokens(2, 12, config.vocab)
    padding = torch.ones(2, 12, dtype=torch.long)
    padding[1, 9:] = 0
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
        padded = theirs(tokens, attention_mask=padding).logits
        torch.testing.assert_close(ours(tokens, padding), padded, rtol=1e-4, atol=1e-4)
