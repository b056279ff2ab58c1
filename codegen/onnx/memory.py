"""Give ONNX Runtime one piece of memory for a cache before and after a call, where it is a buffer: what is there is not copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effcompile.core.errors import EffError

PAST, PRESENT = "past_key_values.", "present."


def shared(session: Any) -> dict[str, str]:
    """Return the output that has the memory of an input, by the input: a cache whose shape no call changes."""
    outputs = {item.name: item for item in session.get_outputs()}
    found = {}
    for item in session.get_inputs():
        after = outputs.get(PRESENT + item.name.removeprefix(PAST)) if item.name.startswith(PAST) else None
        if after is not None and list(item.shape) == list(after.shape) and not isinstance(item.shape[2], int):
            found[item.name] = after.name
    return found


def run(
    session: Any, given: Mapping[str, Tensor], pairs: Mapping[str, str], names: tuple[str, ...]
) -> dict[str, Tensor]:
    """Run a session; the tensors of `pairs` are written in place, and are the outputs of these names.

    Raises:
        EffError: EFF-E111 where a buffer is not contiguous, and so no memory that can be written.
    """
    tensors = {name: x.detach() if name in pairs else x.detach().cpu().contiguous() for name, x in given.items()}
    binding = session.io_binding()
    for name, x in tensors.items():
        if name in pairs and (not x.is_contiguous() or x.device.type != "cpu"):
            raise EffError("EFF-E111", f"the buffer `{name}` is no contiguous memory of the CPU", hint="x.contiguous()")
        kind = x.numpy().dtype
        binding.bind_input(name, "cpu", 0, kind, list(x.shape), x.data_ptr())
        if name in pairs:
            binding.bind_output(pairs[name], "cpu", 0, kind, list(x.shape), x.data_ptr())
    own = {after: tensors[name] for name, after in pairs.items()}
    for name in names:
        if name not in own:
            binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    made = iter(binding.get_outputs()[len(own) :])
    return {name: own[name] if name in own else torch.from_numpy(next(made).numpy()) for name in names}
