"""Declare the arguments that several verbs share, and read their values."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from effcompile.core.errors import EffError, unknown

MODEL_HELP = (
    "zoo:NAME, package.module:callable, a Hugging Face folder (config.json and safetensors), or a .pt2 file. "
    "The callable returns a module, or (module, args) or (module, args, kwargs)."
)
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Shape = Annotated[str, typer.Option(help="Sizes of the inputs: b=1,s=32k (batch, tokens).", show_default=False)]
Dtype = Annotated[str, typer.Option(help="Of weights and floating inputs: float32, bf16, fp16.", show_default=False)]
TargetName = Annotated[
    str | None, typer.Option("--target", help="Device, or device:backend: sm_90, h100, cpu. Default: this machine.")
]
OptionList = Annotated[
    list[str] | None,
    typer.Option("--option", help="An option of the compiler, key=value; repeatable. inductor.KEY=value too."),
]
RequireList = Annotated[list[str] | None, typer.Option("--require", help="attention=all or attention=N, else exit 3.")]
PassList = Annotated[
    list[str] | None, typer.Option("--pass", help="A pass of your own, package.module:Class; repeatable.")
]
Attention = Annotated[
    str | None,
    typer.Option(help="Policy for attention, sink-window{window=1024}; eff passes lists them.", show_default=False),
]
Kv = Annotated[
    str | None,
    typer.Option(help="Format of the KV cache, kivi{bits=4}; eff passes lists them.", show_default=False),
]
Evict = Annotated[
    str | None,
    typer.Option(
        help="Which tokens stay in the KV cache, snapkv{budget=1024}; eff passes lists them.", show_default=False
    ),
]
Trust = Annotated[bool, typer.Option("--trust", help="Open machine code: it runs whatever its maker wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
Dynamic = Annotated[bool, typer.Option("--dynamic", help="Trace with symbolic sizes.")]
Real = Annotated[bool, typer.Option("--real", help="Run on the weights themselves, not on a copy without data.")]

_SIZES = {"b": "batch", "batch": "batch", "s": "seq", "seq": "seq"}
_SCALES = {"k": 1024, "m": 1024 * 1024}
_DTYPES = {"float32": "float32", "fp32": "float32", "f32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"} | {
    "float16": "float16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
}


def parse_shape(text: str) -> dict[str, int]:
    """Read `b=1,s=32k` into {"batch": 1, "seq": 32768}; raises EFF-U203 for an unknown size or a number below 1."""
    found: dict[str, int] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        word, sign, number = part.partition("=")
        if word.strip().lower() not in _SIZES:
            raise unknown("EFF-U203", "size", word.strip(), _SIZES, hint="--shape b=1,s=32k")
        digits = number.strip().lower()
        scale = _SCALES.get(digits[-1:], 1)
        digits = digits[:-1] if scale != 1 else digits
        if not sign or not digits.isdigit() or int(digits) < 1:
            raise EffError("EFF-U203", f"`{part}` is not a size", hint="--shape b=1,s=32k")
        found[_SIZES[word.strip().lower()]] = int(digits) * scale
    return found


def parse_dtype(text: str) -> Any:
    """Return the torch dtype of a word, or None for an empty one; raises EFF-U204."""
    import torch

    if not text:
        return None
    word = text.lower().removeprefix("torch.")
    if word not in _DTYPES:
        raise unknown("EFF-U204", "dtype", text, _DTYPES, hint="--dtype bf16")
    return getattr(torch, _DTYPES[word])


def parse_options(
    options: Iterable[str] | None,
    require: Iterable[str] | None = None,
    passes: Iterable[str] | None = None,
    attention: str | None = None,
) -> dict[str, Any]:
    """Return the mapping that `torch.compile(options=...)` takes; its keys are checked where they are used."""
    found: dict[str, Any] = {} if attention is None else {"attention": attention}
    for key, value in _pairs("--option", options):
        outer, dot, inner = key.partition(".")
        if dot:
            found.setdefault(outer, {})[inner] = _value(value)
        elif key in ("disable",):
            found[key] = (*found.get(key, ()), *value.split(","))
        else:
            found[key] = _value(value)
    asked = dict(_pairs("--require", require))
    if asked:
        found["require"] = asked
    if passes:
        found["passes"] = tuple(_pass(text) for text in passes)
    return found


def _pairs(flag: str, texts: Iterable[str] | None) -> list[tuple[str, str]]:
    pairs = []
    for text in texts or ():
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise EffError("EFF-U205", f"`{text}` is not key=value", hint=f"{flag} key=value")
        pairs.append((key.strip(), value.strip()))
    return pairs


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text


def import_name(text: str) -> Any:
    """Return what `package.module:name` names; raises EFF-U206 with the near matches of names that exist."""
    import sys

    place, sign, name = text.partition(":")
    if not sign or not name:
        raise EffError("EFF-U206", f"`{text}` is not package.module:name", hint="spell it like models.llama:make")
    if "" not in sys.path:
        sys.path.insert(0, "")  # an installed script does not search the folder that it is started in
    try:
        module = importlib.import_module(place)
    except ImportError as error:
        raise EffError(
            "EFF-U206", f"cannot import {place}: {error}", hint="run it where Python finds the package"
        ) from error
    if not hasattr(module, name):
        public = [word for word in vars(module) if not word.startswith("_")]
        raise unknown("EFF-U206", f"name in {place}", name, public)
    return getattr(module, name)


def _pass(text: str) -> Any:
    from effcompile.core.rewrite import Pass

    found = import_name(text)
    made = found() if isinstance(found, type) else found
    if not isinstance(made, Pass):
        raise EffError(
            "EFF-U207",
            f"{text} is no Pass but a {type(made).__name__}",
            hint="derive it from effcompile.core.rewrite.Pass",
        )
    return made


def merged(*mappings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mappings in one; later ones win."""
    return {key: value for mapping in mappings for key, value in mapping.items()}
