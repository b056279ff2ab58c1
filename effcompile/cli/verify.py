"""Check an artifact: its hashes, and its numbers against eager where the model is given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from effcompile.cli import parameters as given
from effcompile.cli.console import bad, dim, good, print_json, progress, stdout

Place = Annotated[Path, typer.Argument(help="An artifact: a folder or a zip.", show_default=False)]
Model = Annotated[str | None, typer.Option("--model", help="The model that it was made of, to compare with eager.")]
Polygraphy = Annotated[bool, typer.Option("--polygraphy", help="Let Polygraphy run it too, optimizations off.")]


def verify(
    artifact: Place,
    model: Model = None,
    polygraphy: Polygraphy = False,
    shape: given.Shape = "",
    dtype: given.Dtype = "",
    trust: given.Trust = False,
    as_json: given.AsJson = False,
) -> int:
    """Hash every file; with --model run the artifact and the model on the same inputs. Exit code 1 where they differ."""
    from effcompile.cli.models import load_model
    from effcompile.core.bundle import read_artifact
    from effcompile.core.errors import EffError
    from effcompile.export_checks import LIMITS, compare_call
    from effcompile.exporting import load, second_opinion

    if polygraphy and model is None:
        raise EffError("EFF-E175", "a second opinion is of numbers", hint="--model MODEL, the one that was exported")
    with read_artifact(artifact) as found:
        manifest = found.manifest
    told: dict[str, object] = {"files": len(manifest.files), "model": model, "errors": {}}
    wrong = False
    if model is not None:
        errors: dict[str, tuple[float, Any]] = {}
        with progress("comparing", quiet=as_json):
            sizes = {"batch": 2, "seq": 16, **given.parse_shape(shape)}
            loaded = load_model(model, sizes, given.parse_dtype(dtype), real=True)
            for word in ("", "polygraphy: ") if polygraphy else ("",):
                runner = second_opinion(artifact) if word else load(artifact, trust=trust)
                each = compare_call(runner, manifest, loaded.runnable, loaded.args, loaded.kwargs)
                errors |= {word + name: error for name, error in each.items()}
        told["errors"] = {name: error for name, (error, _) in errors.items()}
        wrong = any(not error <= LIMITS.get(kind, 0.0) for error, kind in errors.values())
        for name, (error, kind) in () if as_json else errors.items():
            line = f"{name}: {error:.2e} away from eager"
            stdout().print(good(line) if error <= LIMITS.get(kind, 0.0) else bad(line))
    if as_json:
        print_json({**told, "ok": not wrong})
    else:
        stdout().print(good(f"{len(manifest.files)} files are what was written"))
        if model is None:
            stdout().print(
                dim(f"{len(manifest.checks)} comparisons with eager were made at export; --model compares anew")
            )
    return int(wrong)
