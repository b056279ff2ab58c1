"""List every pass, kernel and policy."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from effcompile.cli import parameters as given
from effcompile.cli.console import dim, print_json, stdout, table
from effcompile.core.errors import unknown

Name = Annotated[str | None, typer.Argument(help="One of them, for its whole description.", show_default=False)]


def passes(name: Name = None, user: given.PassList = None, as_json: given.AsJson = False) -> int:
    """List passes in the order in which they run, the kernels that may run an attention, and the policies to ask for."""
    rows = catalog(given.parse_options(None, None, user))
    if name is not None:
        known = {row["name"]: row for row in rows}
        if name not in known:
            raise unknown("EFF-U011", "pass, kernel or policy", name, known, hint="eff passes")
        rows = [known[name]]
    if as_json:
        print_json({"items": rows})
        return 0
    out = stdout()
    if name is not None:
        shown = [
            [key, ", ".join(map(str, value)) if isinstance(value, list) else value] for key, value in rows[0].items()
        ]
        out.print(table(name, ("field", "value"), shown))
        return 0
    for kind, title, columns in (
        ("pass", "Passes, in their order", ("name", "phase", "gradients", "summary")),
        ("kernel", "Attention kernels", ("name", "gradients", "summary")),
        ("dispatch", "Dispatches of experts", ("name", "gradients", "summary")),
        ("policy", "Policies", ("name", "family", "exactness", "paper", "parameters", "summary")),
    ):
        found = [row for row in rows if row["kind"] == kind]
        if found:
            out.print(
                table(
                    title,
                    columns,
                    [[_shown(row[column]) for column in columns] for row in found],
                )
            )
            out.print()
    out.print(dim('leave out: options={"disable": ["NAME"]}, or --option disable=NAME; your own: --pass package:Class'))
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def catalog(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one mapping an item: kind, name, summary, parameters with defaults, and where it is written."""
    from effcompile.compiler import all_dispatches, all_methods, all_passes
    from effcompile.compiler import catalog as compiler_catalog
    from effcompile.core.experts import FAMILY
    from effcompile.core.options import Options

    rows = []
    for item in all_passes(Options.parse(options)):
        more = {"phase": item.phase, "after": list(item.after), "gradients": item.differentiable}
        rows.append({"kind": "pass", **_described(item), **more})
    catalog = compiler_catalog()
    for kernel in catalog.exact:
        rows.append({"kind": "kernel", **_described(kernel), "gradients": kernel.differentiable})
    for sparse in catalog.sparse:
        rows.append({"kind": "kernel", **_described(sparse), "gradients": False})
    for dispatch in all_dispatches():
        more = {"family": FAMILY, "exactness": "rounding", "gradients": False}
        rows.append({"kind": "dispatch", **_described(dispatch), **more})
    for policy in all_methods():
        more = {"family": policy.family, "exactness": policy.exactness, "gradients": policy.differentiable}
        rows.append({"kind": "policy", **_described(policy()), **more})
    return rows


def _described(item: Any) -> dict[str, Any]:
    text = inspect.getdoc(item) or ""
    fields = (
        {field.name: repr(field.default) for field in dataclasses.fields(item) if field.init}
        if dataclasses.is_dataclass(item)
        else {}
    )
    return {
        "name": item.name,
        "summary": text.splitlines()[0] if text else "",
        "parameters": [f"{name}={value}" for name, value in fields.items()],
        "paper": str(getattr(item, "paper", "")),
        "module": type(item).__module__,
    }
