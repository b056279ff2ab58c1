"""Set up the rows of the case gpu-moe: experts of a layer at the sizes of known models, exact tokens, and the arms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu_arms import Arm, Operands
from bench.gpu_problems import Problem
from effcompile.core import compat
from effcompile.core.experts import ExpertsCall
from effcompile.lowering.moe.batched import fetched
from effcompile.lowering.moe.grouped import by_groups
from effcompile.ops import moe as op
from effcompile.ops import moe_quantized

GATE = ("silu", "concat", False, "out", 1.0, 0.0, 0.0)
SPANS = {"eff-int8": (torch.int8, 1, 0), "eff-fp8": (torch.float8_e4m3fn, 128, 128)}
"""Codes and spans of scales: one for each output, and the blocks of DeepSeek-V3's checkpoints."""
PEERS = {"grouped_mm": by_groups, "batched_mm": fetched}
HUGGING_FACE = {"hf-grouped": "grouped_mm", "hf-batched": "batched_mm"}
ARMS = ("eff", "eff-best", *SPANS, *PEERS, *HUGGING_FACE)
CHECKED = 12  # tokens that are compared with float64
ROUTINGS = 8  # a decode step hardly meets the experts of the step before


@dataclass(frozen=True)
class Layer:
    """Hold the sizes of the experts of one layer."""

    hidden: int
    inner: int
    experts: int
    top_k: int

    @property
    def weights(self) -> int:
        """Return how many numbers an expert has."""
        return 3 * self.hidden * self.inner


LAYERS = {
    "qwen3-30b-a3b": Layer(2048, 768, 128, 8),
    "mixtral-8x7b": Layer(4096, 14336, 8, 2),
    "deepseek-v3": Layer(7168, 2048, 256, 8),
}

Pick = Callable[[int], tuple[Tensor, Tensor]]
"""From the number of an expert to its weights `[2 I, H]` and `[H, I]` in the dtype of the tokens."""


@dataclass(frozen=True)
class Sample:
    """Hold some tokens of one set of operands, what they are in float64, and the error that is allowed.

    An arm may be twice as far off as `plain`, the same products step by step in the tokens' dtype, and a unit in the last place of
    the largest number more.
    """

    tokens: Tensor
    exact: Tensor
    plain: float
    floor: float

    def numerics(self, out: Tensor) -> dict[str, Any]:
        """Return the largest error of the sampled tokens, and whether it is allowed; NaN never is."""
        error = float((out[self.tokens].double() - self.exact).abs().max())
        allowed = 2 * self.plain + self.floor
        told = {"error": error, "allowed": allowed, "plain": self.plain}
        return {**{name: float(f"{value:.3g}") for name, value in told.items()}, "within": error <= allowed}


def sample(operands: Operands, pick: Pick) -> Sample:
    """Compute some tokens of (x `[T, H]`, ids, weights `[T, k]`) in float64, and in the dtype of x."""
    x, ids, shares = operands
    tokens = torch.linspace(0, x.shape[0] - 1, min(CHECKED, x.shape[0])).long().to(x.device)
    exact = torch.zeros((len(tokens), x.shape[1]), dtype=torch.float64, device=x.device)
    plain = torch.zeros_like(exact)
    for row, token in enumerate(tokens.tolist()):
        for place in range(ids.shape[1]):
            first, second = pick(int(ids[token, place]))
            share = shares[token, place].double()
            inner = op.gated(first.double() @ x[token].double(), "silu", "concat", 1.0, 0.0, 0.0)
            exact[row] += share * (second.double() @ inner)
            stepwise = op.gated(first @ x[token], "silu", "concat", 1.0, 0.0, 0.0)
            plain[row] += ((second @ stepwise) * share.to(x.dtype)).double()
    floor = torch.finfo(x.dtype).eps * float(exact.abs().max())
    return Sample(tokens, exact, float((plain - exact).abs().max()), floor)


def compared(run: Callable[..., Tensor], known: Sample) -> Arm:
    """Return an arm that is checked on the sampled tokens."""
    return Arm(run, lambda found: {"numerics": known.numerics(found)})


def problem(layer: Layer, tokens: int, device: str, names: Sequence[str], tuned: bool = False) -> Problem:
    """Set up the experts of a layer for a number of tokens, bfloat16, random; `tuned` adds the configs that are not the default."""
    draw = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "generator": draw, "dtype": torch.bfloat16}
    w1 = torch.randn((layer.experts, 2 * layer.inner, layer.hidden), **options).mul_(layer.hidden**-0.5)
    w2 = torch.randn((layer.experts, layer.hidden, layer.inner), **options).mul_(layer.inner**-0.5)
    sets = [_routed(layer, tokens, device, seed) for seed in range(ROUTINGS if tokens <= 1024 else 2)]
    whole = sample(sets[0], lambda expert: (w1[expert], w2[expert]))
    arms: dict[str, Arm] = {}
    for name in names:
        if name == "eff":
            arms[name] = compared(
                lambda x, ids, shares: torch.ops.eff.moe_blocks_v1(x, ids, shares, w1, None, w2, None, *GATE), whole
            )
        elif name in SPANS:
            arms[name] = _packed(sets[0], w1, w2, *SPANS[name])
        elif name in PEERS or name in HUGGING_FACE:
            arms[name] = _peer(name, layer, tokens, (w1, w2), whole)
    others = _configured(layer, tokens, (w1, w2), whole) if tuned and "eff-best" in names else {}
    return Problem(sets, arms, others, 2.0 * tokens * layer.top_k * layer.weights)


def _routed(layer: Layer, tokens: int, device: str, seed: int) -> Operands:
    draw = torch.Generator(device).manual_seed(seed)
    x = torch.randn((tokens, layer.hidden), device=device, generator=draw, dtype=torch.bfloat16)
    scores = torch.rand((tokens, layer.experts), device=device, generator=draw)
    shares, ids = scores.softmax(1).topk(layer.top_k, 1)
    return x, ids, shares / shares.sum(1, keepdim=True)


def _packed(operands: Operands, w1: Tensor, w2: Tensor, codes: torch.dtype, span_out: int, span_in: int) -> Arm:
    """Return our kernels on weights in 8 bits, compared with what these stand for."""
    spans = (span_out, span_in)
    both = []
    for w in (w1, w2):  # some experts at a time: all of them in float32 may be too large
        packed = [moe_quantized.quantize(part, False, codes, *spans) for part in w.split(8)]
        both.append(
            (torch.cat([p[0].view(torch.uint8) for p in packed]).view(codes), torch.cat([p[1] for p in packed]))
        )
    (c1, s1), (c2, s2) = both

    def pick(expert: int) -> tuple[Tensor, Tensor]:
        one = slice(expert, expert + 1)
        first, second = (
            moe_quantized.dequantize(c[one], s[one], False, *spans, torch.float32)[0] for c, s in ((c1, s1), (c2, s2))
        )
        return first, second

    x, ids, shares = operands
    exact = sample((x.float(), ids, shares), pick)
    rounded = sample(operands, lambda expert: tuple(w.to(x.dtype) for w in pick(expert)))  # type: ignore[arg-type, return-value]
    known = Sample(exact.tokens, exact.exact, rounded.plain, rounded.floor)
    args = (c1, s1, None, c2, s2, None, *spans, *GATE)
    return compared(lambda x, ids, shares: torch.ops.eff.moe_quantized_v1(x, ids, shares, *args), known)


def _peer(name: str, layer: Layer, tokens: int, weights: tuple[Tensor, Tensor], known: Sample) -> Arm:
    """Return torch's or transformers' products, compiled on a GPU; or why not."""
    w1, w2 = weights
    number = tokens * layer.top_k * layer.weights * w1.element_size()
    if name.endswith(("batched_mm", "batched")) and number > 16e9:
        return Arm(None, reason=f"it would fetch {number / 1e9:.0f} GB of weights")
    if name.endswith(("grouped_mm", "grouped")) and not compat.has_grouped_mm():
        return Arm(None, reason="this torch has no grouped products")
    if name in PEERS:
        gate = dict(zip(("act", "layout", "transposed", "side", "alpha", "beta", "limit"), GATE))
        call = ExpertsCall(*[None] * 7, **gate)  # type: ignore[arg-type]

        def run(x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
            return PEERS[name](x, ids, shares, w1, None, w2, None, call)
    else:
        try:
            module = hugging_face(layer, HUGGING_FACE[name], weights)
        except ImportError as error:
            return Arm(None, reason=f"no experts of transformers 5 here: {error}")

        def run(x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
            found: Tensor = module(x, ids, shares)
            return found

    return compared(torch.compile(run, dynamic=False) if w1.is_cuda else run, known)


def hugging_face(layer: Layer, implementation: str, weights: tuple[Tensor, Tensor]) -> torch.nn.Module:
    """Return transformers' own module of experts around the weights; raises ImportError without transformers 5."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    sizes = {"hidden_size": layer.hidden, "intermediate_size": layer.inner}
    config = MixtralConfig(num_local_experts=layer.experts, num_experts_per_tok=layer.top_k, **sizes)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module: torch.nn.Module = MixtralExperts(config)
    for name, weight in zip(("gate_up_proj", "down_proj"), weights):
        assert getattr(module, name).shape == weight.shape, name
        setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    return module.eval()


def _configured(layer: Layer, tokens: int, weights: tuple[Tensor, Tensor], known: Sample) -> dict[str, Arm]:
    """Return our kernels with other rows in a block, and with the configs that are not the default."""
    from effcompile.codegen.triton import launch, moe, moe_first, moe_second
    from effcompile.codegen.triton.moe_parts import Weight

    w1, w2 = weights
    arch = launch.architecture_of(w1)
    usual = moe.block_rows(tokens, layer.top_k, layer.experts)
    found = {}
    for block in (16, 64, 128):
        first = moe_first.configs(moe_first.form("bf16", arch, Weight.of(w1, False), layer.top_k, block), arch)
        second = moe_second.configs(moe_second.form("bf16", arch, Weight.of(w2, False), block), arch)
        for number, pair in enumerate(zip(first, second)):
            if (number == 0) == (block == usual):
                continue  # the default is `eff`; of other blocks the default only

            def run(x: Tensor, ids: Tensor, shares: Tensor, block: int = block, pair: Any = pair) -> Tensor:
                return moe.experts(x, ids, shares, w1, None, w2, None, *GATE, block=block, config=pair)

            found[f"m{block}: {pair[0].name} {pair[1].name}"] = compared(run, known)
    return found
