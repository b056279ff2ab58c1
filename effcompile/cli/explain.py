"""Dry-run a model: sites, decisions, reasons, predicted cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from effcompile.cli import parameters as given
from effcompile.cli.caches import with_cache
from effcompile.cli.console import command_line, print_json, progress, stdout
from effcompile.cli.models import LoadedModel, load_model
from effcompile.core.options import Options

Html = Annotated[Path | None, typer.Option("--html", help="Also write one self-contained page to this file.")]
Numerics = Annotated[
    bool, typer.Option("--numerics", help="Also run it on real weights and print the error each pass adds.")
]


def explain(
    context: typer.Context,
    model: given.Model,
    shape: given.Shape = "",
    target: given.TargetName = None,
    dtype: given.Dtype = "",
    attention: given.Attention = None,
    kv: given.Kv = None,
    evict: given.Evict = None,
    option: given.OptionList = None,
    require: given.RequireList = None,
    passes: given.PassList = None,
    html: Html = None,
    numerics: Numerics = False,
    dynamic: given.Dynamic = False,
    real: given.Real = False,
    as_json: given.AsJson = False,
) -> int:
    """Say what would be rewritten for a target, what would not and why, and what it would cost.

    Nothing is compiled, no weight is read and no GPU is needed: the model is traced on copies without data.
    """
    sizes, kind = given.parse_shape(shape), given.parse_dtype(dtype)
    options = given.parse_options(option, require, passes, attention)
    asked = Options.parse(options)
    contract = asked.require
    options["require"] = dict(asked.insisting().require)
    with progress("tracing", quiet=as_json):
        loaded = with_cache(load_model(model, sizes, kind, real=real), kv, evict)
        found = explained(loaded, target, options, dynamic, real, command_line(context.obj))
    ledgers = _ledgers(model, sizes, kind, options, as_json) if numerics else ()
    if html is not None:
        from effcompile.planning.html import page

        html.write_text(page(found, [(item.owner, item.ledger) for item in ledgers]), encoding="utf-8")
    if as_json:
        told = found.to_json()
        if numerics:
            told["numerics"] = [{"owner": item.owner, **item.ledger.to_json()} for item in ledgers]
        print_json(told)
    else:
        from effcompile.cli.tables import draw_explanation, draw_ledgers

        out = stdout()
        draw_explanation(out, found)
        draw_ledgers(out, ledgers)
        if html is not None:
            out.print(f"wrote {html}")
    if not as_json:
        found.keep_contract(contract)
    elif contract:
        from effcompile.core.errors import ContractError

        try:  # one JSON value only: the explanation, which lists what was missed
            found.keep_contract(contract)
        except ContractError as error:
            return error.exit_code
    return 0 if all(item.ledger.within for item in ledgers) and not found.stop else 1


def explained(
    loaded: LoadedModel, target: str | None, options: dict[str, Any], dynamic: bool, real: bool, command: str
) -> Any:
    """Return the explanation of a loaded model (an `Explanation`)."""
    from effcompile.explaining import explain as dry_run

    return dry_run(
        loaded.model,
        *loaded.args,
        target=target,
        options=options,
        dynamic=True if dynamic else None,
        real=real,
        name=loaded.name,
        command=command,
        **loaded.kwargs,
    )


def _ledgers(model: str, sizes: dict[str, int], dtype: Any, options: dict[str, Any], quiet: bool) -> Any:
    from effcompile.numerics import ledger

    with progress("numerics", quiet=quiet) as step:
        loaded = load_model(model, sizes, dtype, real=True)
        kept = {key: value for key, value in options.items() if key != "target"}
        return ledger(loaded.model, *loaded.args, options=kept, progress=step, **loaded.kwargs)
