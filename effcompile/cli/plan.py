"""Decide, and write the decisions to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from effcompile.cli import parameters as given
from effcompile.cli.caches import with_cache
from effcompile.cli.console import command_line, dim, print_json, progress, stdout
from effcompile.cli.models import load_model
from effcompile.core.options import Options

Out = Annotated[Path | None, typer.Option("-o", "--out", help="Where to write the plan; without it, it is only shown.")]


def plan(
    context: typer.Context,
    model: given.Model,
    out: Out = None,
    shape: given.Shape = "",
    target: given.TargetName = None,
    dtype: given.Dtype = "",
    attention: given.Attention = None,
    kv: given.Kv = None,
    evict: given.Evict = None,
    option: given.OptionList = None,
    require: given.RequireList = None,
    passes: given.PassList = None,
    dynamic: given.Dynamic = False,
    real: given.Real = False,
    as_json: given.AsJson = False,
) -> int:
    """Write the plan of a model: every choice, every refusal, and a fingerprint of every site, graph by graph.

    Replay it with torch.compile(model, backend="eff", options={"plan": "plan.json"}); for another model that is an
    error.
    """
    from effcompile.cli.explain import explained
    from effcompile.cli.tables import draw_plan

    options = given.parse_options(option, require, passes, attention)
    contract = Options.parse(options).require
    options.pop("require", None)
    with progress("tracing", quiet=as_json):
        loaded = load_model(model, given.parse_shape(shape), given.parse_dtype(dtype), real=real)
        loaded = with_cache(loaded, kv, evict)
        found = explained(loaded, target, options, dynamic, real, command_line(context.obj))
    found.keep_contract(contract)
    made = found.plan
    if out is not None:
        out.write_text(made.to_json() + "\n", encoding="utf-8")
    if as_json:
        print_json(json.loads(made.to_json()))
        return 0
    draw_plan(stdout(), made, why_not=False)
    for graph in found.graphs:
        if graph.refusal is not None:
            stdout().print(
                dim(
                    f"  not in the plan, left to TorchInductor: a graph of {graph.owner or 'the model'}: {graph.refusal}"
                )
            )
    if out is not None:
        stdout().print(f"wrote {out}; next: eff show {out} --why-not")
    return 0
