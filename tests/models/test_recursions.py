"""Check Mixture-of-Recursions against plain loops: routing, what is left unchanged, causality, and decoding with a threshold."""

import itertools

import pytest
import torch
from torch import Tensor

from effcompile.models.llama import rotary_tables
from effcompile.models.recursions import RecursionConfig, Recursions
from effcompile.models.recursive_decoder import RecursiveDecoder

TOKENS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(3))


def model(recursions: int = 3, **changes: object) -> Recursions:
    torch.manual_seed(0)
    made = Recursions(RecursionConfig.tiny(recursions, **changes)).eval().double()
    for router in made.routers:  # random routers score everything near 0
        torch.nn.init.normal_(router.weight, std=2.0)
    return made.requires_grad_(False)


def looped(made: Recursions, tokens: Tensor, routing: list[Tensor]) -> Tensor:
    """Run one sequence after the other, each recursion on a sequence that really has its tokens alone."""
    llama, config = made.config.llama, made.config
    out = []
    for row, ids in enumerate(tokens):
        cos, sin = rotary_tables(torch.arange(len(ids)), llama.head_dim, llama.rope_theta)
        x = made.first(made.embed(ids[None]), (cos, sin), None)
        shared = None
        for number, index in enumerate(routing):
            at = index[row]
            part, rope = x[:, at], (cos[at], sin[at])
            if config.share_keys and shared is not None:
                mask = (torch.arange(len(ids))[None, :] <= at[:, None])[None, None]
                fed, _ = made.run(part, rope, mask, shared)
            else:
                fed, keys = made.run(part, rope, None, None)
                shared = keys if config.share_keys else None
            share = config.alpha * torch.sigmoid(made.score(number, part))
            x = x.index_copy(1, at, part + share[..., None] * fed)
        out.append(torch.nn.functional.linear(made.norm(made.last(x, (cos, sin), None)), made.embed.weight))
    return torch.cat(out)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("recursions", [2, 3, 4])
def test_masked_execution_is_that_of_the_kept_tokens_alone(recursions: int, share: bool) -> None:
    made = model(recursions, share_keys=share)
    logits, routing = made.trace(TOKENS)
    assert [len(index[0]) for index in routing] == list(made.config.kept(24))
    assert torch.allclose(logits, looped(made, TOKENS, routing), atol=1e-6)
    assert torch.equal(logits, made(TOKENS, routing))


def test_kept_tokens_are_nested_and_rise() -> None:
    routing = model(4).route(TOKENS)
    for before, after in itertools.pairwise(routing):
        assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(after, before))
    assert all((index.diff(dim=1) > 0).all() for index in routing)


def test_full_capacity_is_a_plain_loop() -> None:
    """With nothing left out the model is a recursive one with weights; one recursion is a stack that is run once."""
    for recursions in (1, 3):
        made = model(recursions, capacity=(1.0,) * recursions)
        everything = [torch.arange(24).expand(4, -1)] * recursions
        assert torch.allclose(made(TOKENS), looped(made, TOKENS, everything), atol=1e-6)


def test_a_batch_is_its_sequences() -> None:
    made, order = model(), torch.tensor([2, 0, 3, 1])
    assert torch.allclose(made(TOKENS)[order], made(TOKENS[order]), atol=1e-6)


def test_the_past_does_not_see_the_future_under_one_routing() -> None:
    made = model()
    routing = made.route(TOKENS)
    changed = TOKENS.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 256
    before, after = made(TOKENS, routing), made(changed, routing)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15:], after[:, 15:])


def test_layers_of_recursions_share_slots() -> None:
    config = RecursionConfig.tiny(3)  # 8 layers deep: the first, 3 times 2, the last
    assert [config.slot(layer) for layer in range(8)] == [0, 1, 2, 1, 2, 1, 2, 3]
    assert RecursionConfig.base(3).depth == 10
    for wrong in ({"recursions": 5}, {"capacity": (0.5, 1.0, 0.2)}, {"capacity": (1.0,)}):
        with pytest.raises(ValueError, match=r"layers|capacities"):
            RecursionConfig(config.llama, **{"recursions": 3, **wrong})


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.1])
def test_steps_are_a_pass_over_all_tokens_with_the_same_depths(threshold: float) -> None:
    """What a threshold chose, token by token, is given to the whole model as its routing; 0 and 1.1 are full and least depth."""
    made = model()
    together = RecursiveDecoder(made, 4, 32, threshold)
    steps = [together.step(TOKENS[:, p : p + 1], p) for p in range(12)]
    for row in range(4):
        alone = RecursiveDecoder(made, 1, 32, threshold)
        counts = torch.tensor([alone.step(TOKENS[row : row + 1, p : p + 1], p)[1] for p in range(12)])
        routing = [counts[:, number].nonzero().T for number in range(3)]
        found = torch.cat([logits[row : row + 1] for logits, _ in steps], 1)
        assert torch.allclose(found, made(TOKENS[row : row + 1, :12], routing), atol=1e-6)
    seconds = [counts[1] for _, counts in steps]
    assert seconds == [4] * 12 if threshold == 0.0 else seconds == [0] * 12 if threshold > 1 else 0 < sum(seconds) < 48


def test_sizes_of_batches_change_nothing() -> None:
    made = model()
    results = []
    for sizes in ((1, 2), (4,), (1, 2, 3)):
        decoder = RecursiveDecoder(made, 4, 32, sizes=sizes)
        decoder.prefill(TOKENS[:, :16])
        results.append(torch.cat([decoder.step(TOKENS[:, p : p + 1], p)[0] for p in range(16, 24)], 1))
    assert torch.allclose(results[0], results[1], atol=1e-6)
    assert torch.allclose(results[0], results[2], atol=1e-6)


def test_a_prefill_fills_the_caches_of_steps() -> None:
    """At full depth a prompt and the steps behind it are one pass."""
    made = model(capacity=(1.0, 1.0, 1.0))
    decoder = RecursiveDecoder(made, 4, 32, threshold=0.0)
    head = decoder.prefill(TOKENS[:, :16])
    tail = [decoder.step(TOKENS[:, p : p + 1], p)[0] for p in range(16, 24)]
    assert torch.allclose(torch.cat([head, *tail], 1), made(TOKENS), atol=1e-6)


def test_recursions_with_keys_of_their_own_have_no_decoder() -> None:
    with pytest.raises(ValueError, match="keys of their own"):
        RecursiveDecoder(model(share_keys=False), 1, 8)
