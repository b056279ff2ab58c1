"""Compare caches with fixed scales with ONNX Runtime's GroupQueryAttention, which takes the same tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effcompile import ops
from effcompile.core.cache import CacheShape
from effcompile.ops.kv.fixed import Fixed, dequantize, quantize
from tests.support.caches import empty

ops.register()
B, HQ, HKV, D = 1, 4, 2, 32


def run_ort(bits: int, per: str, tensors: dict[str, Tensor]) -> list[Any]:
    """Run the operator on past codes and one new token; return the output and both caches."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    kinds = {torch.float32: 1, torch.int8: 3, torch.uint8: 2, torch.int32: 6}
    names = ["q", "k", "v", "pk", "pv", "sl", "tl", "", "", "", "", "", "ks", "vs"]
    node = onnx.helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", "keys", "values"],
        domain="com.microsoft",
        num_heads=HQ,
        kv_num_heads=HKV,
        k_quant_type=per,
        v_quant_type=per,
        kv_cache_bit_width=bits,
    )
    info = onnx.helper.make_tensor_value_info
    given = [info(name, kinds[x.dtype], list(x.shape)) for name, x in tensors.items()]
    codes = kinds[tensors["pk"].dtype]
    results = [info("out", 1, None), info("keys", codes, None), info("values", codes, None)]
    graph = onnx.helper.make_graph([node], "g", given, results)
    sets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=sets)
    model.ir_version = 9
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: x.numpy() for name, x in tensors.items()}))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("per", ["PER_CHANNEL", "PER_TENSOR"])
def test_the_tensors_are_those_of_onnx_runtime(bits: int, per: str) -> None:
    """Codes bit for bit, also where they are clipped; attention to the rounding of float32."""
    draw = torch.Generator().manual_seed(bits)
    storage, past = Fixed(bits), 100
    state = empty(storage, CacheShape(B, HKV, past + 1, D, D, torch.float32, torch.device("cpu")))
    for name in storage.constants:
        scales = torch.rand(HKV, D, generator=draw) * (0.02 if bits == 8 else 0.4) + 0.01
        state[name].copy_(scales if per == "PER_CHANNEL" else scales[:1, :1].expand(HKV, D))
    k, v = (torch.randn(B, HKV, past + 1, D, generator=draw) for _ in range(2))
    storage.append(state, k[:, :, :past], v[:, :, :past])
    q = torch.randn(B, HQ, 1, D, generator=draw)
    shape = (1, HKV, 1, D) if per == "PER_CHANNEL" else (1,)
    scales = {name: state[name].flatten()[: 1 if len(shape) == 1 else None].view(shape) for name in storage.constants}
    new = [x[:, :, past:].transpose(1, 2).flatten(2).contiguous() for x in (k, v)]
    # ORT's attention reads the new token from the cache, so ours is given what that holds.
    for n, (name, x) in enumerate((("k_scales", k), ("v_scales", v))):
        codes = quantize(x[:, :, past:], state[name], bits)
        new_held = dequantize(codes, state[name])
        k, v = (new_held, v) if n == 0 else (k, new_held)
    out, keys, values = run_ort(
        bits,
        per,
        {
            "q": q.transpose(1, 2).flatten(2).contiguous(),
            "k": new[0],
            "v": new[1],
            "pk": state["k_codes"][:, :, :past].contiguous(),
            "pv": state["v_codes"][:, :, :past].contiguous(),
            "sl": torch.tensor([past], dtype=torch.int32),
            "tl": torch.tensor([past + 1], dtype=torch.int32),
            "ks": scales["k_scales"].contiguous(),
            "vs": scales["v_scales"].contiguous(),
        },
    )
    storage.append(state, k, v)
    assert torch.equal(torch.from_numpy(keys), state["k_codes"])
    assert torch.equal(torch.from_numpy(values), state["v_codes"])
    found, *_ = storage.attend(state, q, k, v, None, False, D**-0.5, 0.0, 0, "")
    assert float((found.transpose(1, 2).flatten(2) - torch.from_numpy(out)).abs().max()) < 2e-5


def test_four_bits_lie_in_halves_of_bytes() -> None:
    """Two codes a byte, of which the even channel's is the low half, 8 more than it is."""
    codes = quantize(torch.tensor([[[[-9.0, 3.4, 0.0, 7.6]]]]), torch.ones(1, 4), 4)
    assert codes.tolist() == [[[[0 | 11 << 4, 8 | 15 << 4]]]]
    assert dequantize(codes, torch.full((1, 4), 2.0)).tolist() == [[[[-16.0, 6.0, 0.0, 14.0]]]]
