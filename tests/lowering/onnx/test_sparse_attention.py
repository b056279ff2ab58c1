"""Why no export holds SparseAttention: what docs/export.md says of ONNX Runtime's kernel, run.

Its numbers are right, but it wants the cache before and after the call in one piece of memory that the caller binds, also where an
allocation of ONNX Runtime itself is the cache. A test that fails here says that the form is worth writing.
"""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
HEADS, GROUPS, WIDTH, BLOCK, CAPACITY = 4, 2, 16, 16, 64
LAYOUTS = torch.stack(
    [torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]), torch.eye(4).long()]
).bool()
"""Two patterns of blocks, for heads in turn: sink and window, and chunks."""


def session(inner: bool) -> Any:
    """Return a session of the operator; with `inner` the cache is a tensor that the graph makes."""
    rows, columns = [], []
    for layout in LAYOUTS:
        rows.append([0, *layout.sum(1).cumsum(0).tolist()])
        columns.append(layout.nonzero()[:, 1].tolist())
    most = max(map(len, columns))
    csr = {"rows": rows, "columns": [[*each, *[-1] * (most - len(each))] for each in columns]}
    inits = [onnx.numpy_helper.from_array(numpy.array(value, numpy.int32), name) for name, value in csr.items()]
    helper = onnx.helper
    past = ["own_k", "own_v"] if inner else ["past_k", "past_v"]
    nodes = [helper.make_node("Neg", [f"past_{word}"], [f"own_{word}"]) for word in "kv"] if inner else []
    inputs = ["q", "k", "v", *past, "rows", "columns", "total", "lengths"]
    sizes = {"num_heads": HEADS, "kv_num_heads": GROUPS, "sparse_block_size": BLOCK, "scale": 0.25}
    outputs = ["out", "after_k", "after_v"]
    nodes.append(helper.make_node("SparseAttention", inputs, outputs, domain="com.microsoft", **sizes))
    kinds = dict.fromkeys(("q", "k", "v", "past_k", "past_v"), 1) | {"total": 6, "lengths": 6}
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
        [helper.make_tensor_value_info(name, 1, None) for name in outputs[: 1 if inner else 3]],
        inits,
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def call(tokens: int, past: int) -> dict[str, torch.Tensor]:
    """Return the inputs of a call."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"q": (2, tokens, HEADS * WIDTH), "k": (2, tokens, GROUPS * WIDTH), "v": (2, tokens, GROUPS * WIDTH)}
    shapes |= dict.fromkeys(("past_k", "past_v"), (2, GROUPS, CAPACITY, WIDTH))
    made = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    lengths = torch.full((2,), past + tokens, dtype=torch.int32)
    return {**made, "total": lengths[:1].clone(), "lengths": lengths}


@pytest.mark.parametrize(("tokens", "past"), [(64, 0), (50, 0), (7, 20), (1, 50)])
def test_its_numbers_are_right_over_memory_that_the_caller_binds(tokens: int, past: int) -> None:
    given = call(tokens, past)
    held = {word: given[f"past_{word}"].clone() for word in "kv"}
    runner = session(inner=False)
    binding = runner.io_binding()
    binding.bind_output("out")
    for name, value in given.items():
        binding.bind_input(name, "cpu", 0, value.numpy().dtype, list(value.shape), value.data_ptr())
    for word in "kv":
        shape, place = [2, GROUPS, CAPACITY, WIDTH], given[f"past_{word}"].data_ptr()
        binding.bind_output(f"after_{word}", "cpu", 0, numpy.float32, shape, place)
    runner.run_with_iobinding(binding)
    found = torch.from_numpy(binding.get_outputs()[0].numpy()).double()
    for word, value in held.items():
        new = given[word].unflatten(2, (GROUPS, WIDTH)).transpose(1, 2)
        value[:, :, past : past + tokens] = new
        assert torch.equal(value, given[f"past_{word}"])
    rows, keys = past + torch.arange(tokens)[:, None], torch.arange(CAPACITY)[None]
    keep = LAYOUTS[:, rows // BLOCK, keys // BLOCK] & (keys <= rows)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        given["q"].unflatten(2, (HEADS, WIDTH)).transpose(1, 2).double(), held["k"].double(), held["v"].double(),
        keep.repeat(HEADS // len(LAYOUTS), 1, 1)[None], scale=0.25, enable_gqa=True,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted.transpose(1, 2).flatten(2), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("inner", [False, True])
def test_it_refuses_any_other_memory(inner: bool) -> None:
    with pytest.raises(Exception, match="past_key->DataRaw"):
        session(inner).run(None, {name: value.numpy() for name, value in call(50, 0).items()})
