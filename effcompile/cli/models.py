"""Turn the word MODEL of a command line into a module and the arguments of one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effcompile.core.errors import EffError


@dataclass(frozen=True)
class LoadedModel:
    """Hold a model in eval mode (or an exported program) with the arguments of one call."""

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = ""
    """The JSON of its tokenizer, where there is one."""

    @property
    def runnable(self) -> Callable[..., Any]:
        """Return the model as something to call."""
        return self.model.module() if hasattr(self.model, "graph_signature") else self.model  # type: ignore[attr-defined]


def load_model(text: str, sizes: Mapping[str, int], dtype: Any, *, real: bool) -> LoadedModel:
    """Build MODEL; without `real` its parameters are on the meta device and nothing is downloaded or read.

    Raises:
        EffError: EFF-U110 for a word of no known form; EFF-U111 to EFF-U116 where a form cannot be loaded.
    """
    if text.startswith("zoo:"):
        return _zoo(text, sizes, dtype, real)
    path = Path(text)
    if path.is_dir():
        from effcompile.cli.huggingface import load_folder

        model, args, kwargs = load_folder(path, sizes, dtype, real)
        words = path / "tokenizer.json"
        return LoadedModel(text, model, args, kwargs, words.read_text("utf-8") if real and words.is_file() else "")
    if path.suffix == ".pt2":
        from effcompile.cli.exported import load_exported

        model, args, kwargs = load_exported(path, sizes)
        return LoadedModel(text, model, args, kwargs)
    if ":" in text:
        return _callable(text, sizes, dtype, real)
    raise EffError(
        "EFF-U110",
        f"`{text}` is no model: {_what(path)}",
        hint="zoo:NAME, package.module:callable, a folder, or a .pt2 file",
    )


def _what(path: Path) -> str:
    if path.is_file():
        return "a file that is not .pt2"
    return "no such folder or file"


def _zoo(text: str, sizes: Mapping[str, int], dtype: Any, real: bool) -> LoadedModel:
    import torch

    from effcompile.models import zoo
    from effcompile.models.entry import ZooModel
    from effcompile.skeleton import parameters_on_meta

    entry = zoo.find(text)
    kind = dtype or torch.float32
    if real:
        loaded = zoo.load(text, dtype=kind)
    elif entry.trained:
        loaded = zoo.load(text, dtype=kind, meta=True)
    else:
        with parameters_on_meta():
            model = entry.build(kind, False).eval()
        loaded = ZooModel(entry.name, model, entry, kind, torch.device("cpu"))
    inputs = ZooModel(entry.name, loaded.model, entry, kind, torch.device("cpu"))
    args, kwargs = inputs.example_inputs(sizes.get("batch", 1), sizes.get("seq"))
    fast = getattr(loaded.tokenizer, "backend_tokenizer", None)
    return LoadedModel(f"zoo:{entry.name}", loaded.model, args, kwargs, fast.to_str() if fast is not None else "")


def _callable(text: str, sizes: Mapping[str, int], dtype: Any, real: bool) -> LoadedModel:
    from torch import nn

    from effcompile.cli.parameters import import_name
    from effcompile.skeleton import parameters_on_meta

    make = import_name(text)
    if not callable(make):
        raise EffError(
            "EFF-U111", f"{text} is a {type(make).__name__}, not a callable", hint="give a function without arguments"
        )
    given = {**sizes, **({"dtype": dtype} if dtype is not None else {})}
    taken = inspect.signature(make).parameters
    if stray := [name for name in given if name not in taken]:
        raise EffError(
            "EFF-U112",
            f"{text} takes no `{stray[0]}`; it takes {', '.join(taken) or 'nothing'}",
            hint="--shape and --dtype reach a callable that has parameters batch, seq, dtype",
        )
    with nullcontext() if real else parameters_on_meta():
        made = make(**given)
    model, args, kwargs = _split(text, made)
    if isinstance(model, nn.Module):
        model.eval()
        if dtype is not None and "dtype" not in taken:
            model.to(dtype)
    return LoadedModel(text, model, args, kwargs)


def _split(text: str, made: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Accept a module alone (its inputs are guessed from its config), (module, args) and (module, args, kwargs)."""
    if isinstance(made, tuple):
        if not 2 <= len(made) <= 3 or not callable(made[0]):
            raise EffError(
                "EFF-U113",
                f"{text} returned {len(made)} values",
                hint="return (module, args) or (module, args, kwargs)",
            )
        args = made[1] if isinstance(made[1], tuple) else (made[1],)
        return made[0], args, dict(made[2]) if len(made) == 3 else {}
    if not hasattr(made, "config") or not hasattr(made, "main_input_name"):
        raise EffError(
            "EFF-U113",
            f"{text} returned a {type(made).__name__} and no inputs",
            hint="return (module, args) or (module, args, kwargs)",
        )
    from effcompile.cli.huggingface import example_inputs

    args, kwargs = example_inputs(made, {})
    return made, args, kwargs
