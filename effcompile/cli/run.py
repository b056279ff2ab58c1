"""Run an artifact on arrays from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effcompile.cli import parameters as given
from effcompile.cli.console import good, print_json, stdout, table
from effcompile.core.errors import EffError

Place = Annotated[Path, typer.Argument(help="An artifact: a folder or a zip.", show_default=False)]
Input = Annotated[Path, typer.Option("--input", help="A .npz with an array for every input.", show_default=False)]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="A .npz for the outputs.")]
Provider = Annotated[str, typer.Option("--provider", help="What runs it: cpu, cuda, tensorrt.")]


def run(
    artifact: Place,
    input: Input,
    out: Out = None,
    provider: Provider = "cpu",
    trust: given.Trust = False,
    as_json: given.AsJson = False,
) -> int:
    """Run an artifact; its files are hashed first."""
    import time

    import numpy
    import torch

    from effcompile.exporting import load

    session = load(artifact, provider=provider, trust=trust)
    try:
        with numpy.load(input, allow_pickle=False) as file:
            values = {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError) as error:
        raise EffError("EFF-E111", f"{input} is no .npz of plain arrays: {error}") from None
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
