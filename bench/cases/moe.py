"""Measure mixture-of-experts blocks of transformers, scaled to a CPU, against transformers' own ways of running them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench import table_case, trained_moe
from bench.case import Case, Row, Settings, Watch, grid
from bench.gshard import GShard
from bench.table_case import Kernel, seeded

Build = Callable[[], tuple[nn.Module, Any]]
ARMS = {  # name: (experts implementation, backend of torch.compile or None)
    "eager": ("eager", None),
    "loop-inductor": ("eager", "inductor"),
    "grouped-inductor": ("grouped_mm", "inductor"),
    "batched-inductor": ("batched_mm", "inductor"),
    "eff": ("grouped_mm", "eff"),
    "eff-prepared": ("eff", "eff"),
}
FETCHED = 2e9  # bytes of weights that batched products may fetch
INPUTS = 8  # steps of a timed call of few tokens; a step hardly meets the experts of the step before


def _mixtral() -> tuple[nn.Module, Any]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=1024, intermediate_size=1792, num_local_experts=8, num_experts_per_tok=2)
    return MixtralSparseMoeBlock(config), config


def _qwen3() -> tuple[nn.Module, Any]:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    fields = {"num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True}
    config = Qwen3MoeConfig(hidden_size=512, moe_intermediate_size=256, **fields)
    return Qwen3MoeSparseMoeBlock(config), config


def _olmoe() -> tuple[nn.Module, Any]:
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = OlmoeConfig(hidden_size=512, intermediate_size=256, num_experts=64, num_experts_per_tok=8)
    return OlmoeSparseMoeBlock(config), config


def _deepseek() -> tuple[nn.Module, Any]:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    fields = {"n_routed_experts": 64, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "n_shared_experts": 1}
    config = DeepseekV3Config(hidden_size=896, moe_intermediate_size=256, **fields)
    return DeepseekV3MoE(config), config


def _gpt_oss() -> tuple[nn.Module, Any]:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = GptOssConfig(hidden_size=720, intermediate_size=720, num_local_experts=32, num_experts_per_tok=4)
    return GptOssMLP(config), config


def _trained() -> tuple[nn.Module, Any]:
    return trained_moe.block(), trained_moe.config()


def _gshard() -> tuple[nn.Module, Any]:
    from types import SimpleNamespace

    sizes = {"hidden_size": 512, "intermediate_size": 256, "num_experts_per_tok": 2}
    return GShard(512, 256, 16), SimpleNamespace(**sizes)


BLOCKS: dict[str, Build] = {
    "mixtral": _mixtral,
    "qwen3-moe": _qwen3,
    "olmoe": _olmoe,
    "deepseek-v3": _deepseek,
    "gpt-oss": _gpt_oss,
    "pydoc-moe": _trained,
    "gshard": _gshard,
}
TRAINED = "pydoc-moe"  # the zoo's small model: its own weights, and what a layer of it gets for text
LEAST = 64  # tokens of a prefill: of fewer, an expert with a capacity takes none, and weights, not products, are what takes time
EINSUM = "gshard"  # a block that is no transformers' one: the einsum itself under torch.compile is what there is to compare with


@dataclass(frozen=True)
class MoE(Case):
    """Time one block, router and shared experts included, from one token to a prefill."""

    name: ClassVar[str] = "moe"
    title: ClassVar[str] = "Mixture-of-experts blocks"
    headline: ClassVar[bool] = False
    adds_arms: ClassVar[bool] = True
    about: ClassVar[str] = (
        "Blocks of transformers with random weights and routing, the shapes of each family scaled to a CPU; `length` is "
        "tokens; a timed call of few tokens is eight steps in a row on eight inputs, as a decode loop makes them, and its time is "
        "that of one step; times_copy holds it against copying the weights of the experts that were chosen. eager: transformers' "
        "loop over experts. grouped-inductor, batched-inductor: its grouped_mm and batched_mm under torch.compile. eff: the block "
        "as transformers sets it up by default. eff-prepared: after eff.prepare. pydoc-moe: a layer of the zoo's trained model on "
        "text. gshard: two choices a token over 16 experts with a capacity, in one-hot einsums; loop-inductor is these einsums "
        "under torch.compile."
    )
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    form_words: ClassVar[tuple[str, ...]] = tuple(BLOCKS)
    lengths: tuple[int, ...] = (1, 8, 512, 2048)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def arms(self, device: str) -> tuple[str, ...]:
        """Return transformers' implementations and ours; the eager loop is the baseline."""
        return ("eager", "grouped-inductor", "batched-inductor", "eff")

    def known_arms(self, device: str) -> tuple[str, ...]:
        """Return the above, the loop under torch.compile, and the prepared block."""
        return tuple(ARMS)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return tokens x block x dtype."""
        forms = ("qwen3-moe",) if settings.quick else tuple(form for form in BLOCKS if form != EINSUM)
        rows = grid(settings, (8,) if settings.quick else self.lengths, forms, self.dtypes)
        lengths = (256,) if settings.quick else (4096,)
        einsums = grid(settings, lengths, (EINSUM,), self.dtypes[:1])
        return [*rows, *(row for row in einsums if int(row.parameters["length"]) >= LEAST)]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure all arms on one block."""
        torch._dynamo.reset()
        tokens, form, dtype = int(row.parameters["length"]), str(row.parameters["form"]), str(row.parameters["dtype"])
        block, inputs = build(form, tokens, dtype, settings.device)
        _, config = BLOCKS[form]()
        inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        slot = (2 if form == EINSUM else 3) * config.hidden_size * inner
        slots = tokens * config.num_experts_per_tok
        shared = tokens * (getattr(config, "n_shared_experts", 0) or 0)
        read = distinct(block, inputs) * slot * block_width(dtype) if tokens < LEAST else 0.0
        kernels: dict[str, Kernel | str] = {}
        chosen = self.chosen_arms(settings)
        for name in chosen if form != EINSUM or settings.arms else dict.fromkeys((*chosen, "loop-inductor")):
            if form == EINSUM and ARMS[name][0] in ("grouped_mm", "batched_mm") and name != "eff":
                kernels[name] = "its experts are no module of transformers"
                continue
            fetched = slots * slot * block_width(dtype)
            if ARMS[name][0] == "batched_mm" and fetched > FETCHED:
                kernels[name] = f"it would fetch {fetched / 1e9:.0f} GB of weights"
                continue
            kernels[name] = Kernel(lambda name=name: call(block, inputs, *ARMS[name]), 2.0 * (slots + shared) * slot)
        from torch._dynamo import config as dynamo

        with dynamo.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
            flops = 2.0 * (slots + shared) * slot
            limits = {"useful_flops": flops, "useful_bytes": read}
            return [table_case.measure(row, kernels, settings, watch, **limits, steps=len(inputs))]


def build(form: str, tokens: int, dtype: str, device: str) -> tuple[nn.Module, list[Tensor]]:
    """Return a block with random weights, and its inputs `[1, T, H]`: several where tokens are few."""
    torch.manual_seed(0)
    block, config = BLOCKS[form]()
    if form != TRAINED:
        _fill(block)
    block = block.eval().to(dtype=getattr(torch, dtype), device=device)
    count = INPUTS if tokens < LEAST else 1
    if form == TRAINED:
        return block, [x.to(dtype=getattr(torch, dtype), device=device) for x in trained_moe.inputs(tokens, count)]
    return block, [seeded((1, tokens, config.hidden_size), dtype, device, seed) for seed in range(count)]


def distinct(block: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Return how many experts a step reads, those that are shared among them: the mean over the inputs."""
    experts = next(module for name, module in block.named_modules() if name.split(".")[-1] == "experts")
    found: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and not x.is_floating_point())
        found.append(ids.unique().numel())

    hook = experts.register_forward_pre_hook(count, with_kwargs=True)
    with torch.no_grad():
        for x in inputs:
            block(x)
    hook.remove()
    shared = next((m.config.n_shared_experts for m in block.modules() if hasattr(m, "shared_experts")), 0)
    return sum(found) / len(found) + float(shared)


def block_width(dtype: str) -> int:
    """Return the bytes of one number."""
    return 2 if dtype == "bfloat16" else 4


def _fill(block: nn.Module) -> None:
    """Give weights that transformers leaves empty values of the size that trained ones have."""
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.02)
    for buffer in block.buffers():
        nn.init.zeros_(buffer)


def call(block: nn.Module, inputs: Sequence[Tensor], implementation: str, backend: str | None) -> Callable[[], Tensor]:
    """Return a call of a copy of the block, which has weights and a configuration of its own."""
    import effcompile as eff

    own = copy.deepcopy(block)
    for module in own.modules():
        if hasattr(module, "config"):
            module.config = copy.deepcopy(module.config)
            module.config._experts_implementation = implementation
    if implementation == "eff":
        eff.prepare(own)
    run: Callable[..., Any] = own if backend is None else torch.compile(own, backend=backend, dynamic=False)

    def steps() -> Tensor:
        for x in inputs:
            found = run(x)
        result: Tensor = found[0] if isinstance(found, tuple) else found
        return result

    steps()  # compile
    return steps
