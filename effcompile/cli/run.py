"""Run an artifact on arrays from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effcompile.cli import parameters as given
from effcompile.cli.console import good, print_json, stdout, table
from effcompile.core.errors import EffError

Place = Annotated[Path, typer.Argument(help="An artifact: a folder or a zip.", show_default=False)]
Input = Annotated[
    Path | None, typer.Option("--input", help="A .npz with an array for every input.", show_default=False)
]
Text = Annotated[str | None, typer.Option("--text", help="A text that a decoder continues.", show_default=False)]
Tokens = Annotated[int, typer.Option("--tokens", help="How many tokens to add to --text.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="A .npz for the outputs.")]
Provider = Annotated[str, typer.Option("--provider", help="What runs it: cpu, cuda, tensorrt.")]


def run(
    artifact: Place,
    input: Input = None,
    text: Text = None,
    tokens: Tokens = 40,
    out: Out = None,
    provider: Provider = "cpu",
    trust: given.Trust = False,
    as_json: given.AsJson = False,
) -> int:
    """Run an artifact on arrays or on a text; its files are hashed first."""
    import time

    import numpy
    import torch

    from effcompile.exporting import load

    if (input is None) == (text is None):
        raise EffError(
            "EFF-E111", "give the inputs: either --input FILE.npz or --text TEXT", hint="eff show DIR lists them"
        )
    if text is not None:
        return _continue(artifact, text, tokens, provider, as_json)
    assert input is not None
    session = load(artifact, provider=provider, trust=trust)
    try:
        with numpy.load(input, allow_pickle=False) as file:
            values = {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError) as error:
        raise EffError(
            "EFF-E111", f"{input} is no .npz of plain arrays: {error}", hint="numpy.savez(FILE, NAME=array, ...)"
        ) from None
    begun = time.perf_counter()
    found = session(values)
    seconds = time.perf_counter() - begun
    if out is not None:
        numpy.savez(out, **{name: value.numpy() for name, value in found.items()})
    shapes = {name: list(value.shape) for name, value in found.items()}
    if as_json:
        print_json({"seconds": seconds, "outputs": shapes, "out": str(out) if out else None})
        return 0
    rows = [
        [name, str(value.dtype).removeprefix("torch."), " x ".join(map(str, value.shape))]
        for name, value in found.items()
    ]
    stdout().print(table("Outputs", ("name", "dtype", "shape"), rows))
    stdout().print(good(f"{seconds * 1e3:.1f} ms" + (f"; wrote {out}" if out else "")))
    return 0


def _continue(artifact: Path, text: str, most: int, provider: str, as_json: bool) -> int:
    import json
    import time

    from effcompile.codegen.onnx.generate import continuation
    from effcompile.codegen.onnx.session import Session
    from effcompile.core.bundle import read_artifact
    from effcompile.exporting import TOKENIZER
    from effcompile.models.trained import require

    with read_artifact(artifact) as found:
        if TOKENIZER not in dict(found.manifest.files):
            raise EffError(
                "EFF-E119", "the artifact has no tokenizer", hint="a model that has a tokenizer.json takes it along"
            )
        words = require("tokenizers", "hf").Tokenizer.from_str(found.file(TOKENIZER).read_text("utf-8"))
        ends = json.loads(dict(found.manifest.details).get("ends") or "[]")
        session = Session(found.file("model.onnx"), provider)
        begun = time.perf_counter()
        made = list(continuation(session, found.manifest, words.encode(text).ids, most, ends))
        seconds = time.perf_counter() - begun
    told = words.decode(made)
    if as_json:
        print_json({"text": told, "tokens": len(made), "seconds": seconds})
        return 0
    stdout().print(text + told, highlight=False, markup=False)
    stdout().print(good(f"{len(made)} tokens in {seconds:.1f} s"))
    return 0
