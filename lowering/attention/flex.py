"""Lower to FlexAttention: the predicate becomes a `mask_mod` with a block map, softcap and bias become a `score_mod`.

TorchInductor generates the kernel (a C++ template on CPU, Triton on CUDA). The block map comes from interval arithmetic on the
predicate at run time, in an op that TorchInductor does not look into: index arithmetic on block lists makes its range analysis
fail ("vr must not be None", torch 2.13).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from effcompile.core import compat
from effcompile.core.attention_call import AttentionCall
from effcompile.core.density import extent
from effcompile.core.expr import TRUE
from effcompile.core.expr_eval import evaluate, to_json
from effcompile.core.kernel import Answer, AttentionKernel
from effcompile.core.mask import Mask
from effcompile.core.rewrite import Editor, fake_mode_of
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention import estimate

BLOCK = 128
CHEAP = 8  # operations of a score function per pair; T5's buckets need over 20, ALiBi 3


@dataclass(frozen=True)
class Flex(AttentionKernel):
    """Run any proved predicate, softcap and score addend."""

    name: ClassVar[str] = "flex"

    def supports(self, site: AttentionSite, target: Target) -> Answer:
        """Answer for proved masks whose empty rows give 0, in float32, bfloat16 and (on GPUs) float16."""
        mask = site.mask
        if not isinstance(mask, Mask):
            return Refusal("EFF-A103", f"the mask is opaque: {mask.reason}")
        if site.sinks:
            return Refusal("EFF-A202", "FlexAttention has no sink logits")
        if mask.empty_row not in ("zero", "never"):
            return Refusal("EFF-A204", "FlexAttention gives 0 for a row without keys, the source does not")
        if mask.is_full and not site.softcap:
            return Refusal("EFF-A203", "there is neither mask nor score function")
        on_cpu = target.device.kind == "cpu"
        if site.dtype not in ("float32", "bfloat16", *(() if on_cpu else ("float16",))):
            return Refusal("EFF-A209", f"no kernel for {site.dtype} here")
        if site.head_dim != site.value_dim or site.head_dim < 16:
            return Refusal("EFF-A210", f"head dimensions {site.head_dim} and {site.value_dim}")
        if on_cpu and _symbolic(site) and _captures(mask):
            why = "captured tensors of symbolic size break TorchInductor's C++ template (undeclared `ks`, torch 2.13)"
            return Refusal("EFF-A211", why, "compile with dynamic=False")
        if on_cpu and mask.bias is not None and _operations(mask) > CHEAP:
            return Refusal("EFF-A212", f"{_operations(mask)} operations a score cost more than reading the bias tensor")
        if on_cpu and (site.q_len == 1 or extent(site.kv_len) < BLOCK):
            return Refusal("EFF-A206", "shorter than one block")
        visited = estimate.density(site, (BLOCK, BLOCK))
        return estimate.price("flex", site, target, visited)

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the block map (once per mask) and the higher-order op."""
        call = AttentionCall.of(node)
        mask = site.mask
        assert isinstance(mask, Mask)
        q, k, v = call.q, call.k, call.v
        rows, columns = q.meta["val"].shape[2], k.meta["val"].shape[2]
        key = (to_json(mask.keep), call.loads, call.sizes, str(rows), str(columns))
        q_value = q.meta["val"]
        sizes = [edit.size(n) for n in (q_value.shape[0], q_value.shape[1], rows, columns)]
        lists = edit.shared(
            ("block-map", *key),
            (*call.loads, *call.sizes, *sizes),
            lambda: self._block_map(edit, call, to_json(mask.keep), sizes, q_value.device),
        )
        parts = [
            edit.shared(("block-map", *key, n), (lists,), partial(edit.call, operator.getitem, lists, n))
            for n in range(4)
        ]
        keep, mask_loads, mask_sizes = _operands(mask.keep, call)
        mask_mod = edit.shared(
            ("mask-mod", *key), (), lambda: edit.attach("eff_mask", self._mask_mod(edit, keep, mask_loads, mask_sizes))
        )
        score_mod = edit.attach("eff_score", self._score_mod(edit, call, mask))
        blocks = compat.flex_block_tuple(
            seq_lengths=(edit.size(rows), edit.size(columns)),
            kv_num_blocks=parts[0],
            kv_indices=parts[1],
            full_kv_num_blocks=parts[2],
            full_kv_indices=parts[3],
            BLOCK_SIZE=(BLOCK, BLOCK),
            mask_mod=mask_mod,
        )
        options = compat.flex_kernel_options(*(x.meta["val"] for x in (q, k, v)))
        _, bias_loads, bias_sizes = _operands(mask.bias or TRUE, call)
        op = torch.ops.higher_order.flex_attention
        mask_buffers, score_buffers = (*mask_loads, *mask_sizes), (*bias_loads, *bias_sizes)
        args = (q, k, v, score_mod, blocks, call.scale, options, score_buffers, mask_buffers)
        result = edit.graph.call_function(op, args)
        value = q.meta["val"]
        result.meta["val"] = (value, value.new_empty(value.shape[:3], dtype=torch.float32), value.new_empty(0))
        return edit.call(operator.getitem, result, 0, like=node)

    def _block_map(
        self, edit: Editor, call: AttentionCall, keep: str, sizes: list[Any], device: torch.device
    ) -> fx.Node:
        op = torch.ops.eff.block_map_v1.default
        return edit.call(op, list(call.loads), list(call.sizes), keep, *sizes, BLOCK, device)

    def _mask_mod(self, edit: Editor, keep: Any, loads: tuple[Any, ...], sizes: tuple[Any, ...]) -> fx.GraphModule:
        def mask_mod(b: Any, h: Any, q: Any, k: Any, *buffers: Any) -> Any:
            return evaluate(keep, (b, h, q, k), buffers[: len(loads)], buffers[len(loads) :])

        return _trace(edit, mask_mod, 0, (*loads, *sizes))

    def _score_mod(self, edit: Editor, call: AttentionCall, mask: Mask) -> fx.GraphModule:
        bias, loads, sizes = _operands(mask.bias or TRUE, call)

        def score_mod(score: Any, b: Any, h: Any, q: Any, k: Any, *buffers: Any) -> Any:
            if call.softcap:
                score = torch.tanh(score / call.softcap) * call.softcap
            if mask.bias is not None:
                score = score + evaluate(bias, (b, h, q, k), buffers[: len(loads)], buffers[len(loads) :])
            return score

        return _trace(edit, score_mod, 1, (*loads, *sizes))


def _operations(mask: Mask) -> int:
    from effcompile.core.expr import walk

    return sum(1 for node in walk(mask.bias or TRUE) if node.args)


def _symbolic(site: AttentionSite) -> bool:
    return any(isinstance(extent, str) for extent in (site.batch, site.heads, site.q_len, site.kv_len))


def _captures(mask: Mask) -> bool:
    from effcompile.core.expr import walk

    return any(node.op in ("load", "size") for expr in (mask.keep, mask.bias or TRUE) for node in walk(expr))


def _operands(expr: Any, call: AttentionCall) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """Return the expression with its slots renumbered to the operands that it uses, and those operands."""
    from effcompile.core.expr import Expr, walk

    loads = sorted({int(n.value or 0) for n in walk(expr) if n.op == "load"})
    sizes = sorted({int(n.value or 0) for n in walk(expr) if n.op == "size"})

    def renumber(node: Expr) -> Expr:
        args = tuple(renumber(arg) for arg in node.args)
        value = node.value
        if node.op in ("load", "size"):
            value = (loads if node.op == "load" else sizes).index(int(node.value or 0))
        return Expr(node.op, args, value, node.dtype)

    return renumber(expr), tuple(call.loads[n] for n in loads), tuple(call.sizes[n] for n in sizes)


def _trace(edit: Editor, function: Callable[..., Any], scores: int, operands: tuple[Any, ...]) -> fx.GraphModule:
    """Trace a score or mask function on scalars and fake operands."""
    mode = fake_mode_of(edit.graph)
    assert mode is not None
    values = [operand.meta["val"] if isinstance(operand, fx.Node) else operand for operand in operands]
    device = next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu"))
    device = next(
        (n.meta["val"].device for n in edit.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)), device
    )
    with mode:
        scalars = [torch.empty((), device=device) for _ in range(scores)]
        scalars += [torch.empty((), dtype=torch.int32, device=device) for _ in range(4)]
        return make_fx(function)(*scalars, *values)
