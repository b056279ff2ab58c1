"""Look at a module tree: which modules look like attention, and whose code a line belongs to."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

_NAMED = re.compile(r"attention|attn", re.IGNORECASE)
# Children of one module that together are projections of attention, as the common libraries name them.
_PROJECTIONS = (
    {"q_proj", "k_proj", "v_proj"},
    {"query", "key", "value"},
    {"to_q", "to_k", "to_v"},
    {"q_lin", "k_lin", "v_lin"},
    {"q", "k", "v"},
    {"c_attn"},
    {"qkv"},
    {"qkv_proj"},
    {"query_key_value"},
)


def attention_modules(model: Any) -> tuple[tuple[str, nn.Module], ...]:
    """Return (path, module) of every innermost module that looks like attention, by its children or its class name.

    A wrapper around another attention does not count, and neither does a class that only shares the word (a norm, an
    output projection): a module named so must hold a product or do its own work.
    """
    if not isinstance(model, nn.Module):
        return ()
    found = [(path, module) for path, module in model.named_modules() if _looks(module)]
    paths = [path for path, _ in found]
    return tuple(
        (path, module)
        for path, module in found
        if not any(other != path and other.startswith(path + "." if path else "") for other in paths)
    )


def _looks(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    children = {name for name, _ in module.named_children()}
    if any(names <= children for names in _PROJECTIONS):
        return True
    name = type(module).__name__
    if not _NAMED.search(name) or isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return False
    # The word in the middle of a model's own name (`AttentionFreeBlock`) is no evidence; at the end it is.
    return bool(re.search(r"(attention|attn)(2d|v\d|layer)?$", name, re.IGNORECASE)) and bool(children)


def holders(model: Any, source: str) -> tuple[str, ...]:
    """Return the paths of the modules whose class defines the function that `file:line` lies in, innermost first."""
    if not isinstance(model, nn.Module) or ":" not in source:
        return ()
    file, _, line = source.rpartition(":")
    if not line.isdigit():
        return ()
    known: dict[type, bool] = {}
    found = []
    for path, module in model.named_modules():
        kind = type(module)
        if kind not in known:
            known[kind] = _defines(kind, file, int(line))
        if known[kind]:
            found.append(path)
    return tuple(sorted(found, key=lambda path: -path.count(".")))


def _defines(kind: type, file: str, line: int) -> bool:
    for value in vars(kind).values():
        code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
        if code is None or code.co_filename != file:
            continue
        lines = [number for _, _, number in code.co_lines() if number is not None]
        if lines and min(lines) <= line <= max(lines):
            return True
    return False


_EXPERTS = re.compile(r"experts?$|MoE$|Moe$|SparseMLP$|FFN$", re.IGNORECASE)


def expert_modules(model: Any) -> tuple[tuple[str, nn.Module], ...]:
    """Return (path, module) of every module that holds the weights of several experts: 3-D tensors, or a list of equal modules."""
    if not isinstance(model, nn.Module):
        return ()
    found = [(path, module) for path, module in model.named_modules() if _holds_experts(module)]
    paths = [path for path, _ in found]
    return tuple(
        (path, module)
        for path, module in found
        if not any(other != path and other.startswith(path + "." if path else "") for other in paths)
    )


def _holds_experts(module: nn.Module) -> bool:
    named = bool(_EXPERTS.search(type(module).__name__))
    own = [parameter for _, parameter in module.named_parameters(recurse=False)]
    if named and sum(parameter.dim() == 3 for parameter in own) >= 2:
        return True
    several = [
        child for child in module.children() if isinstance(child, nn.ModuleList | nn.ModuleDict) and len(child) > 1
    ]
    listed = getattr(module, "experts", None)
    if isinstance(listed, nn.Module) and any(child is listed for child in several):
        return len({type(item) for item in listed.children()}) == 1
    # Experts packed into tall matrices, and linear layers of all experts at once.
    packed = any(
        {"w1", "v1", "w2"} <= {name for name, _ in part.named_parameters(recurse=False)} for part in module.children()
    )
    return (named and packed) or type(module).__name__.endswith("ParallelExperts")
