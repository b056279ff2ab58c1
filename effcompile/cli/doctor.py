"""Say what this machine has and what is missing."""

from __future__ import annotations

from typing import Annotated

import typer

from effcompile.cli import parameters as given
from effcompile.cli.checks import Check, abilities, all_checks
from effcompile.cli.console import bad, dim, good, print_json, progress, stdout, table

Smoke = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Also compile a small function and our C++ kernels, to see that the compiler works.",
    ),
]

_COLORS = {"ok": good, "missing": dim, "warn": bad, "broken": bad}


def doctor(smoke: Smoke = False, as_json: given.AsJson = False) -> int:
    """Look at Python, torch, the compiler, CPU and GPUs, extras and caches, and say how to mend what is not well.

    Exit code 1 where something is broken; what is merely not installed does not count.
    """
    with progress("looking", quiet=as_json):
        checks = [*all_checks(), *([_smoke(), _kernels()] if smoke else [])]
        able = abilities()
    broken = [check for check in checks if check.state == "broken"]
    if as_json:
        print_json({"checks": [vars(check) for check in checks], "targets": able, "broken": len(broken)})
        return 1 if broken else 0
    out = stdout()
    out.print(
        table(
            "",
            ("what", "state", "found", "to mend it"),
            [[c.name, _COLORS[c.state](c.state), c.text, c.fix] for c in checks],
        )
    )
    out.print()
    rows: dict[tuple[str, str, str], list[str]] = {}
    for row in able:
        key = ("yes", "yes" if row["compile_and_run"] else "no", row["why_not"])
        rows.setdefault(key, []).append(row["target"])
    listed = [
        [", ".join(names), good(key[0]), (good if key[1] == "yes" else dim)(key[1]), key[2]]
        for key, names in rows.items()
    ]
    out.print(table("What each target can do here", ("target", "explain, plan", "compile and run", ""), listed))
    out.print()
    out.print(bad(f"{len(broken)} broken") if broken else good("all well"))
    return 1 if broken else 0


def _smoke() -> Check:
    import torch

    def small(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x) * 2

    try:
        x = torch.linspace(-2, 2, 64)
        with torch.no_grad():
            gap = float((torch.compile(small, backend="eff")(x) - small(x)).abs().max())
    except Exception as error:
        text = str(error).strip().splitlines()
        return Check(
            "compile",
            "broken",
            f"{type(error).__name__}: {text[0] if text else ''}",
            "eff cache verify --fix; eff repro zoo:llama-tiny",
        )
    return Check(
        "compile", "ok" if gap < 1e-5 else "broken", f"a small function compiled and ran, difference to eager {gap:.1e}"
    )


def _kernels() -> Check:
    """Build every C++ source of ours; without one its ops are right, but slower."""
    import warnings

    from effcompile.ops import native

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built = {source: native.library(source) for source in native.KERNELS}
    failed = [source for source, library in built.items() if library is None]
    if not failed:
        return Check("C++ kernels", "ok", f"{', '.join(built)} built")
    reasons = [str(item.message) for item in caught if "could not be compiled" in str(item.message)]
    text = reasons[0] if reasons else "no vector instructions found, or no compiler"
    return Check("C++ kernels", "warn", f"without {', '.join(failed)}: {text}", "eff cache verify --fix")
