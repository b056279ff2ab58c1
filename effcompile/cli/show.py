"""Print a plan file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from effcompile.cli import parameters as given
from effcompile.cli.console import print_json, stdout

File = Annotated[Path, typer.Argument(help="A plan that `eff plan` wrote.", show_default=False)]
WhyNot = Annotated[bool, typer.Option("--why-not", help="Also list what was declined, with the reasons.")]


def show(file: File, why_not: WhyNot = False, as_json: given.AsJson = False) -> int:
    """Show the decisions of a plan; --why-not adds every kernel and pass that was declined, and the reason."""
    from effcompile.cli.tables import draw_plan
    from effcompile.core.plan import Plan

    plan = Plan.read(file)
    if as_json:
        told = json.loads(plan.to_json())
        for graph in () if why_not else told["graphs"]:
            graph.pop("declined")
        print_json(told)
    else:
        draw_plan(stdout(), plan, why_not)
    return 0
