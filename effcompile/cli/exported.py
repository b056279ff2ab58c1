"""Load a `.pt2` file without running anything that it holds.

`torch.export.load` falls back to full unpickling of the sample inputs, so a file can run code when it is opened. Here
the archive is copied without them, and whatever else could run code is refused: pickled objects, compiled binaries, and
symbolic sizes or operator names that are more than that.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from effcompile.core.errors import EffError

_LIMIT = 200_000  # members; an honest archive has one a weight and a few more
_SAFE_OPERATOR = re.compile(r"(torch\.ops\.\w+(\.\w+)+|_operator\.\w+|math\.\w+|torch\.sym_\w+|torch\._?sym_\w+)")
_SAFE_SIZE = re.compile(r"([\w\s+\-*/%(),.<>=]|'\w+')*")  # sympy's own spelling: Symbol('s0', positive=True)
_FUNCTIONS = re.compile(r"(\w+)\s*\(")
_ATTRIBUTE = re.compile(r"\.\s*[A-Za-z_]|__")


def load_exported(path: Path, sizes: Mapping[str, int]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return the exported program, and inputs of the recorded shapes (dynamic sizes take `sizes`, else their example).

    Raises:
        EffError: EFF-U116 for a file that is missing, damaged, or would run code.
    """
    import torch

    if not path.is_file():
        raise EffError("EFF-U116", f"no file {path}", hint="torch.export.save(program, 'model.pt2')")
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / "model.pt2"
        try:
            with zipfile.ZipFile(path) as archive:
                _copy(archive, clean, path)
            program = torch.export.load(clean)
        except EffError:
            raise
        except Exception as error:
            raise EffError("EFF-U116", f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
        args, kwargs = _inputs(program, sizes)
        program.example_inputs = (args, kwargs)  # torch derives the module's guards from them
        return program, args, kwargs


def _copy(archive: zipfile.ZipFile, to: Path, path: Path) -> None:
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(members) > _LIMIT or len(set(names)) != len(names):
        raise _refused(path, "too many or repeated members")
    with zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as clean:
        for member in members:
            if member.filename.startswith("/") or ".." in member.filename.split("/"):
                raise _refused(path, f"a member called {member.filename}")
            local = member.filename.partition("/")[2]
            if local.startswith("data/sample_inputs/"):
                clean.writestr(member.filename, _no_inputs())
                continue
            _check(archive, member, local, path)
            with archive.open(member) as source, clean.open(member.filename, "w", force_zip64=True) as target:
                while block := source.read(1 << 20):
                    target.write(block)


def _no_inputs() -> bytes:
    """Return the record of an empty call, which is what a program saved without sample inputs has."""
    import torch

    buffer = io.BytesIO()
    torch.save(((), {}), buffer)
    return buffer.getvalue()


def _check(archive: zipfile.ZipFile, member: zipfile.ZipInfo, local: str, path: Path) -> None:
    if local.startswith(("data/aotinductor/", "data/executorch/")):
        raise _refused(path, "compiled code")
    if local.endswith("_config.json"):
        config = json.loads(archive.read(member)).get("config", {})
        for name, entry in config.items():
            if entry.get("use_pickle"):
                raise _refused(path, f"a pickle for `{name}`")
    elif local.startswith(("data/weights/", "data/constants/")) and local.endswith(".pt"):
        raise _refused(path, "weights in the pickled form of torch 2.8 and before")
    elif local.startswith("models/") and local.endswith(".json"):
        _check_graph(json.loads(archive.read(member)), path)


def _check_graph(value: Any, path: Path) -> None:
    for key, text in _strings(value):
        if key == "expr_str":
            unknown = [word for word in _FUNCTIONS.findall(text) if not _is_expression(word)]
            if not _SAFE_SIZE.fullmatch(text) or _ATTRIBUTE.search(text) or unknown:
                raise _refused(path, f"the size `{text[:60]}`")
        elif key == "target" and text.startswith(("torch", "_operator", "math")) and not _SAFE_OPERATOR.fullmatch(text):
            raise _refused(path, f"the operator `{text[:60]}`")


def _is_expression(word: str) -> bool:
    """Tell whether calling `word` builds a sympy expression and does nothing else."""
    import sympy
    import torch.utils._sympy.functions as functions

    found = getattr(functions, word, None) or getattr(sympy, word, None)
    return isinstance(found, type) and issubclass(found, sympy.Basic)


def _strings(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, str):
                yield key, item
            else:
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _refused(path: Path, what: str) -> EffError:
    return EffError(
        "EFF-U116",
        f"{path} holds {what}, which may run code when loaded; refused",
        hint="export the model again with torch.export.save",
    )


def _inputs(program: Any, sizes: Mapping[str, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    import torch
    from torch.utils import _pytree as pytree

    draw = torch.Generator().manual_seed(0)
    names = set(program.graph_signature.user_inputs)
    wanted = [sizes[word] for word in ("batch", "seq") if word in sizes]
    leaves: list[Any] = []
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in names:
            continue
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            leaves.append(value if isinstance(value, int | float | bool | str | None) else None)
            continue
        shape = _sizes(value.shape, wanted)
        if value.is_floating_point():
            leaves.append(torch.randn(shape, generator=draw).to(value.dtype))
        elif value.dtype == torch.bool:
            leaves.append(torch.ones(shape, dtype=torch.bool))
        else:
            leaves.append(torch.randint(0, 2, shape, generator=draw).to(value.dtype))
    spec = program.call_spec.in_spec
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return tuple(args), dict(kwargs)


def _sizes(shape: Any, wanted: list[int]) -> list[int]:
    """Give dynamic sizes what `--shape` asks for, in order; the others their recorded example."""
    left = list(wanted) if sum(not isinstance(size, int) for size in shape) == len(wanted) else []
    found = []
    for size in shape:
        if isinstance(size, int):
            found.append(size)
        elif left:
            found.append(left.pop(0))
        else:
            found.append(int(size.node.hint) if size.node.has_hint() else 2)
    return found
