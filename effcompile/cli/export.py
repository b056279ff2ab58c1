"""Write a model to files that run without it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effcompile.cli import parameters as given
from effcompile.cli.console import dim, good, print_json, progress, stdout
from effcompile.cli.models import LoadedModel, load_model
from effcompile.cli.tables import draw_artifact

Out = Annotated[Path, typer.Option("-o", "--out", help="The folder to write, or a file that ends in .zip.")]
To = Annotated[str, typer.Option("--to", help="The form, a file of codegen/emitters: onnx.")]
TargetNames = Annotated[
    list[str] | None, typer.Option("--target", help="Chips to build for: sm_80,sm_89. Default: the form's own.")
]
Opset = Annotated[int, typer.Option("--opset", help="The opset of ONNX, 18 to 24; 0 takes the form's own.")]
Seconds = Annotated[float, typer.Option("--seconds", help="How long the build of one engine may take.")]
Profile = Annotated[
    str, typer.Option("--profile", help="Sizes that an engine takes: tokens.1=1:128:2048; several with `;` between.")
]
Flavor = Annotated[str, typer.Option("--flavor", help="portable, or ort for operators of ONNX Runtime.")]
Cache = Annotated[
    bool | None,
    typer.Option(
        "--cache/--no-cache", help="Take and return keys and values of a transformers decoder.", show_default="auto"
    ),
]
Buffers = Annotated[
    bool, typer.Option("--buffers", help="Let the cache be buffers of a capacity, which calls write into.")
]
PartName = Annotated[str, typer.Option("--part", help="encoder or decoder of an encoder-decoder, with its caches.")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="A plan to follow, as eff plan wrote it.")]
Static = Annotated[bool, typer.Option("--static", help="Fix every size to the given call's.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an artifact that is there.")]
Dropped = Annotated[bool, typer.Option("--allow-dropped", help="Accept sites whose policy has no form there.")]


def export(
    model: given.Model,
    out: Out,
    to: To = "onnx",
    target: TargetNames = None,
    shape: given.Shape = "",
    dtype: given.Dtype = "",
    attention: given.Attention = None,
    option: given.OptionList = None,
    opset: Opset = 0,
    seconds: Seconds = 600.0,
    profile: Profile = "",
    kv: given.Kv = None,
    plan: PlanFile = None,
    flavor: Flavor = "portable",
    cache: Cache = None,
    buffers: Buffers = False,
    part: PartName = "",
    static: Static = False,
    allow_dropped: Dropped = False,
    force: Force = False,
    as_json: given.AsJson = False,
) -> int:
    """Export a model, and check the result against eager before anything is written.

    The sizes of --shape may vary later unless --static is given; torch.export fixes a size of 1, so they are 2 and 16 by default.
    """
    from effcompile.exporting import export as export_model

    options = given.parse_options(option, None, None, attention)
    options |= {key: value for key, value in (("kv", kv), ("plan", plan)) if value is not None}
    sizes = {"batch": 2, "seq": 16, **given.parse_shape(shape)}
    with progress("loading", quiet=as_json) as say:
        # What a form has itself, `kernels:all`, is no model to load.
        named = model.startswith("kernels:")
        loaded = (
            LoadedModel(model, lambda: None, ())
            if named
            else load_model(model, sizes, given.parse_dtype(dtype), real=True)
        )
        made = export_model(
            model if named else loaded.model,
            loaded.args,
            loaded.kwargs,
            to=to,
            target=target,
            out=out,
            options=options,
            opset=opset,
            seconds=seconds,
            profile=profile,
            flavor=flavor,
            cache=cache,
            buffers=buffers,
            part=part,
            tokenizer=loaded.tokenizer,
            dynamic=not static,
            allow_dropped=allow_dropped,
            force=force,
            name=loaded.name,
            say=say,
        )
    if as_json:
        print_json(made.to_json())
        return 0
    draw_artifact(stdout(), made)
    worst = max((check.error for check in made.checks), default=0.0)
    stdout().print(good(f"wrote {out}: {len(made.checks)} comparisons with eager, the largest error {worst:.1e}"))
    words = '--text "..."' if loaded.tokenizer and dict(made.details).get("cache") else "--input inputs.npz"
    stdout().print(dim(f"next: eff run {out} {words}, or effcompile.load({str(out)!r})"))
    return 0
