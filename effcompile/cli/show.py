"""Print a plan file, or what is in an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from effcompile.cli import parameters as given
from effcompile.cli.console import print_json, stdout

File = Annotated[
    Path, typer.Argument(help="A plan that `eff plan` wrote, or an artifact (folder or zip).", show_default=False)
]
WhyNot = Annotated[bool, typer.Option("--why-not", help="Also list what was declined, with the reasons.")]


def show(file: File, why_not: WhyNot = False, as_json: given.AsJson = False) -> int:
    """Show the decisions of a plan; --why-not adds every kernel and pass that was declined, and the reason.

    Of an artifact every file is hashed first, then its inputs, outputs, sites and files are shown.
    """
    from effcompile.cli.tables import draw_artifact, draw_plan
    from effcompile.core.bundle import read_artifact
    from effcompile.core.plan import Plan

    if file.is_dir() or file.suffix == ".zip":
        with read_artifact(file) as found:
            if as_json:
                print_json(found.manifest.to_json())
            else:
                draw_artifact(stdout(), found.manifest)
        return 0
    plan = Plan.read(file)
    if as_json:
        told = json.loads(plan.to_json())
        for graph in () if why_not else told["graphs"]:
            graph.pop("declined")
        print_json(told)
    else:
        draw_plan(stdout(), plan, why_not)
    return 0
