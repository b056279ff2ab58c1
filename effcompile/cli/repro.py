"""Find the pass behind a wrong result."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from effcompile.cli import parameters as given
from effcompile.cli.console import bad, good, print_json, progress, stdout
from effcompile.cli.models import LoadedModel, load_model

NoCompile = Annotated[bool, typer.Option("--no-compile", help="Only interpret the graphs; do not run TorchInductor.")]
Minify = Annotated[
    Path | None, typer.Option("--minify", help="Run torch's minifier on the compiled model; it writes here.")
]


def repro(
    context: typer.Context,
    model: given.Model,
    shape: given.Shape = "",
    dtype: given.Dtype = "",
    option: given.OptionList = None,
    passes: given.PassList = None,
    no_compile: NoCompile = False,
    minify: Minify = None,
    as_json: given.AsJson = False,
) -> int:
    """Name the first pass after which the outputs leave tolerance against eager, and print the shortest way to see it.

    The model runs on real weights on this machine. Exit code 1 where something is wrong, 0 where all is well.
    """
    from effcompile.cli.tables import draw_rows
    from effcompile.numerics import blame

    options = given.parse_options(option, None, passes)
    with progress("bisecting", quiet=as_json) as step:
        loaded = load_model(model, given.parse_shape(shape), given.parse_dtype(dtype), real=True)
        verdict = blame(
            loaded.model, *loaded.args, options=options, compiled=not no_compile, progress=step, **loaded.kwargs
        )
    advice = _advice(verdict.culprit, verdict.fuel, verdict.confirmed, context.obj, passes)
    launcher = _minify(loaded, options, minify) if minify is not None else None
    if as_json:
        print_json({**verdict.to_json(), "next": advice, "minifier": str(launcher) if launcher else None})
        return 1 if verdict.culprit else 0
    out = stdout()
    out.print(draw_rows("Interpreted after each rewrite", verdict.rows))
    out.print()
    if verdict.culprit is None:
        out.print(good("nothing leaves tolerance on these inputs"))
    else:
        where = f" in the graph of {verdict.graph}" if verdict.graph else ""
        out.print(
            bad(f"{verdict.culprit}{where} is the first to leave tolerance")
            + (f": {verdict.note}" if verdict.note else "")
        )
        if verdict.confirmed is not None:
            out.print(
                "  without it the result is right again"
                if verdict.confirmed
                else "  but leaving it out does not mend the result"
            )
    for line in advice:
        out.print(f"  {line}", soft_wrap=True)
    if minify is not None:
        out.print(
            f"  minifier: {launcher}"
            if launcher
            else "  minifier: the compiled model is within its tolerance, nothing written"
        )
    return 1 if verdict.culprit else 0


def _advice(
    culprit: str | None, fuel: int | None, confirmed: bool | None, argv: object, mine: list[str] | None
) -> list[str]:
    if culprit is None:
        return []
    words = [word for word in argv if word not in ("--json",)] if isinstance(argv, tuple) else []
    again = shlex.join(["eff", *words])
    if culprit in ("kernels", "emission", "inductor"):
        return [f"see it again: {again}", "look at each stage: EFF_DUMP=dump " + again]
    lines = [f"see it again: EFF_FUEL={fuel} stops after it, EFF_FUEL={(fuel or 1) - 1} before it"]
    if confirmed and not mine:
        lines.append(f'until it is mended: options={{"disable": ["{culprit}"]}}')
    return [*lines, f"or: {again}"]


def _minify(loaded: LoadedModel, options: dict[str, Any], folder: Path) -> Path | None:
    """Compile once with torch's accuracy minifier on, and return the launcher that it wrote.

    Forward only: with the backward pass the minifier skips a backend that returns a plain function, without a word.
    """
    import copy

    import torch
    import torch._dynamo

    folder.mkdir(parents=True, exist_ok=True)
    torch._dynamo.reset()
    settings = {"repro_after": "dynamo", "repro_level": 4, "repro_forward_only": True, "debug_dir_root": str(folder)}
    args, kwargs = copy.deepcopy((loaded.args, loaded.kwargs))
    with torch._dynamo.config.patch(settings), torch.no_grad():
        try:
            torch.compile(loaded.runnable, backend="eff", options=options or None)(*args, **kwargs)
        except Exception as error:  # the minifier reports a failed check by raising
            if "Accuracy" not in type(error).__name__ and "accuracy" not in str(error).lower():
                raise
    found = sorted(folder.rglob("minifier_launcher.py"))
    return found[-1] if found else None
