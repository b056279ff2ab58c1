"""Write a `.pt2` and its weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effcompile.codegen.layer_outputs import from_their_start
from effcompile.core.artifact import TensorInfo
from effcompile.core.errors import EffError

FILE, WEIGHTS = "model.pt2", "weights.safetensors"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep back what torch warns of its own parts: deprecations inside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def write_package(exported: Any, path: Path, weights: Path, constants_of: Any) -> None:
    """Compile an exported program to `path` and save what it reads to `weights`; `constants_of(path)` names these.

    Raises:
        EffError: EFF-E173 where AOTInductor or the C++ compiler refuses, with its words.
    """
    from safetensors.torch import save_file

    settings = {"aot_inductor.package_constants_in_so": False, "aot_inductor.metadata": {"made_by": "effcompile"}}
    try:
        with quietly(), from_their_start():
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=settings)
    except Exception as error:
        told = " ".join(str(error).split())
        raise EffError(
            "EFF-E173",
            f"AOTInductor does not compile this program: {type(error).__name__}: {told[:400]}",
            hint="eff doctor looks at the C++ compiler; --to onnx needs none",
        ) from error
    known: dict[str, Tensor] = {**exported.state_dict, **exported.constants}
    names = constants_of(path)
    if lost := [name for name in names if not isinstance(known.get(name), Tensor)]:
        raise EffError(
            "EFF-E173",
            f"AOTInductor made a constant `{lost[0]}` that is no weight of the model",
            hint="register_buffer(...) for tensors that the forward makes; --to onnx takes them",
        )
    # Weights that share memory are saved one by one: a file holds no views.
    save_file({name: known[name].detach().cpu().contiguous().clone() for name in names}, str(weights))


def tensors_of(exported: Any) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """Return the tensors that a call takes and gives, by the names of the exported program."""
    nodes = {node.name: node for node in exported.graph.nodes}
    signature = exported.graph_signature

    def info(names: Any) -> tuple[TensorInfo, ...]:
        found = [(name, nodes[name].meta.get("val")) for name in names if isinstance(name, str) and name in nodes]
        return tuple(_info(name, value) for name, value in found if isinstance(value, Tensor))

    return info(signature.user_inputs), info(signature.user_outputs)


def _info(name: str, value: Tensor) -> TensorInfo:
    sizes = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorInfo(name, str(value.dtype).removeprefix("torch."), sizes)
