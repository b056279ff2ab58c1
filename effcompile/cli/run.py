"""Run an artifact on arrays from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effcompile.cli import parameters as given
from effcompile.cli.console import good, print_json, stdout, table
from effcompile.core.errors import EffError

if TYPE_CHECKING:
    from torch import Tensor

Place = Annotated[Path, typer.Argument(help="An artifact: a folder or a zip.", show_default=False)]
Input = Annotated[
    Path | None, typer.Option("--input", help="A .npz with an array for every input.", show_default=False)
]
Text = Annotated[str | None, typer.Option("--text", help="A text that a decoder continues.", show_default=False)]
Tokens = Annotated[int, typer.Option("--tokens", help="How many tokens to add to --text.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="A .npz for the outputs.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the noise that a sampler draws.")]
Batch = Annotated[int, typer.Option("--batch", help="How many results a sampler makes, where no input says it.")]
Provider = Annotated[str, typer.Option("--provider", help="What runs it: cpu, cuda, tensorrt.")]


def run(
    artifact: Place,
    input: Input = None,
    text: Text = None,
    tokens: Tokens = 40,
    seed: Seed = 0,
    batch: Batch = 1,
    out: Out = None,
    provider: Provider = "cpu",
    trust: given.Trust = False,
    as_json: given.AsJson = False,
) -> int:
    """Run an artifact on arrays or on a text, or the loop of an exported sampler; its files are hashed first."""
    import time

    from effcompile.exporting import load
    from effcompile.integrations.sampler_files import SCHEDULE

    if (artifact / SCHEDULE).is_file():
        return _sample(artifact, input, seed, batch, out, provider, trust, as_json)
    if (input is None) == (text is None):
        raise EffError(
            "EFF-E111", "give the inputs: either --input FILE.npz or --text TEXT", hint="eff show DIR lists them"
        )
    if text is not None:
        return _continue(artifact, text, tokens, provider, as_json)
    assert input is not None
    session = load(artifact, provider=provider, trust=trust)
    values = _arrays(input)
    begun = time.perf_counter()
    found = session(values)
    return _tell(found, time.perf_counter() - begun, out, as_json)


def _arrays(path: Path) -> dict[str, Tensor]:
    import numpy
    import torch

    try:
        with numpy.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError) as error:
        raise EffError(
            "EFF-E111", f"{path} is no .npz of plain arrays: {error}", hint="numpy.savez(FILE, NAME=array, ...)"
        ) from None


def _tell(found: Mapping[str, Tensor], seconds: float, out: Path | None, as_json: bool) -> int:
    import numpy

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


def _sample(
    folder: Path, input: Path | None, seed: int, batch: int, out: Path | None, provider: str, trust: bool, as_json: bool
) -> int:
    import time

    import torch

    from effcompile.integrations.sampler_files import load_sampler, read_loop

    loop = read_loop(folder)
    given = {} if input is None else _arrays(input)
    if odd := [name for name in given if name not in (*loop.arguments, "noise")]:
        raise EffError(
            "EFF-E111",
            f"the denoiser takes no `{odd[0]}`; it takes {', '.join(loop.arguments) or 'nothing'}",
            hint="eff show DIR lists its inputs",
        )
    if lacking := [name for name in loop.arguments if name not in given]:
        raise EffError("EFF-E111", f"input `{lacking[0]}` is missing", hint="--input FILE.npz; `noise` is drawn")
    args = [given[name] for name in loop.arguments]
    rows = next((len(value) for value in args if value.dim()), batch)
    sampler = load_sampler(folder, provider=provider, trust=trust)
    noise = given.get("noise", (rows, loop.channels))
    begun = time.perf_counter()
    found = sampler(noise, *args, generator=torch.Generator().manual_seed(seed))
    return _tell({"result": found}, time.perf_counter() - begun, out, as_json)


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
