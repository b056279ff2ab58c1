"""Record what the binaries of all Triton kernels take: one line for each kernel, form and architecture, at the default config.

`python -m tests.support.resources --accept` compiles everything (some minutes) and writes the table; review its diff like
code. Only what changed is compiled where `--changed` is given.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import textwrap
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from effcompile.codegen.triton import cross, kernels
from effcompile.codegen.triton.kernel import ARCHITECTURES, Config, Form, Kernel

TABLE = Path(__file__).parents[1] / "golden" / "triton_resources.json"
Key = tuple[str, str, str]


def catalog() -> dict[str, tuple[Kernel, Form, Config, str]]:
    """Return what the table has a line for, by `kernel/form/architecture`."""
    found = {}
    for kernel in kernels():
        for arch in ARCHITECTURES:
            for form in kernel.forms(arch):
                found[f"{kernel.name}/{form.name}/{arch}"] = (kernel, form, kernel.configs(form, arch)[0], arch)
    return found


def line(key: str) -> dict[str, Any]:
    """Compile one entry of the catalog and return its line."""
    kernel, form, config, arch = catalog()[key]
    return {"config": config.name, **cross.cross_compile(kernel, form, config, arch).to_json()}


def digest(kernel: Kernel) -> str:
    """Return a digest of the kernel's code with every device function it calls; comments and docstrings do not count."""
    seen: dict[str, str] = {}
    todo = [kernel.function]
    while todo:
        function = todo.pop()
        if function.__name__ in seen:
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
        body = tree.body[0]
        assert isinstance(body, ast.FunctionDef)
        if ast.get_docstring(body) is not None:
            body.body = body.body[1:]
        seen[function.__name__] = ast.unparse(tree)
        called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        todo += [
            value
            for name, value in function.fn.__globals__.items()
            if name in called and hasattr(value, "fn") and hasattr(value, "arg_names")
        ]
    return hashlib.sha256("\n".join(seen[name] for name in sorted(seen)).encode()).hexdigest()[:16]


def load() -> dict[str, Any]:
    """Return the recorded table."""
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


def accept(changed: bool, jobs: int, limit: int) -> None:
    """Compile and write the table; with `changed` keep the lines of kernels and configs that are as they were.

    With a `limit` only so many lines are compiled now, and the table is complete after some more calls with `changed`.
    """
    wanted = catalog()
    sources = {kernel.name: digest(kernel) for kernel in kernels()}
    old = load() if changed and TABLE.is_file() else {"triton": "", "sources": {}, "binaries": {}}
    kept = {
        key: old["binaries"][key]
        for key, (kernel, _, config, _) in wanted.items()
        if old["triton"] == cross.version()
        and old["sources"].get(kernel.name) == sources[kernel.name]
        and old["binaries"].get(key, {}).get("config") == config.name
    }
    todo = [key for key in wanted if key not in kept][: limit or None]
    with ProcessPoolExecutor(jobs) as pool:
        for number, (key, done) in enumerate(zip(todo, pool.map(line, todo))):
            kept[key] = done
            print(
                f"{number + 1}/{len(todo)} {key}: {done['config']} {done['registers']} registers, {done['spills']} spilled"
            )
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(kept[key])}" for key in sorted(kept))
    names = json.dumps(sources, indent=1).replace("\n", "\n  ")
    TABLE.write_text(
        f'{{\n  "triton": "{cross.version()}",\n  "sources": {names},\n  "binaries": {{\n{lines}\n  }}\n}}\n'
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accept", action="store_true", required=True)
    parser.add_argument("--changed", action="store_true", help="compile only what changed")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=0, help="compile so many lines now, the rest with --changed later")
    given = parser.parse_args()
    accept(given.changed, given.jobs, given.limit)
