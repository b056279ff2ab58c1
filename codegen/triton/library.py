"""Write kernels as files that need no Triton: machine code, assembler text, a table of what each takes, a C header, a loader.

code/sm_90/flash-bf16-d128-right-1f0a2b.cubin (.hsaco)    text/sm_90/....ptx (.amdgcn)    source/flash.py
kernels.json   kernels.h   resources.txt   load.py
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effcompile.codegen.triton import load, pool
from effcompile.codegen.triton.calls import Call, written
from effcompile.codegen.triton.kernel import AMD, Config, Form, Kernel
from effcompile.codegen.triton.worker import to_json
from effcompile.core.bundle import Draft
from effcompile.core.emitter import Say
from effcompile.core.errors import EffError

FACTS = "kernels.json"


@dataclass(frozen=True)
class Want:
    """Name one binary."""

    kernel: Kernel
    form: Form
    config: Config
    compute: str

    @property
    def name(self) -> str:
        """Return the kernel, its form, and a digest of all constants: two forms of one name differ in strides, for example."""
        told = json.dumps(to_json(self.form, self.config), sort_keys=True, default=str)
        return f"{self.kernel.name}-{self.form.name}-{hashlib.sha256(told.encode()).hexdigest()[:6]}"


def wants_of(calls: Iterable[Call], compute: str) -> dict[tuple[str, str], Want]:
    """Return the binaries of calls, each once."""
    found = (Want(x.kernel, x.form, x.config, compute) for call in calls for x in call.launches)
    return {(want.name, compute): want for want in found}


def write(
    wants: Sequence[Want],
    calls: Mapping[str, Sequence[Call]],
    draft: Draft,
    *,
    seconds: float,
    processes: int,
    say: Say,
) -> list[dict[str, Any]]:
    """Compile `wants` and write everything; `calls` are the launches of a model for each compute word. Returns the table.

    Raises:
        EffError: as `pool.compile_all`; EFF-E153 for a kernel that needs scratch memory, which the loader does not give.
    """
    jobs = [_job(want, draft) for want in wants]
    answers = pool.compile_all(jobs, seconds, processes, lambda count: say(f"compiled {count} of {len(jobs)} binaries"))
    rows = [_row(want, answer) for want, answer in zip(wants, answers, strict=True)]
    rows.sort(key=lambda row: (row["name"], row["compute"]))
    facts = {"schema": 1, "kernels": rows, "launches": {word: _launches(found) for word, found in calls.items()}}
    draft.file(FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    draft.file("resources.txt").write_text(_table(rows), encoding="utf-8")
    draft.file("kernels.h").write_text(_header(rows), encoding="utf-8")
    draft.file("load.py").write_text(Path(load.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    for kernel in {want.kernel.name: want.kernel for want in wants}.values():
        draft.file(f"source/{kernel.name}.py").write_text(_source(kernel), encoding="utf-8")
    return rows


def _places(want: Want) -> tuple[str, str]:
    amd = want.compute in AMD
    return (
        f"code/{want.compute}/{want.name}.{'hsaco' if amd else 'cubin'}",
        f"text/{want.compute}/{want.name}.{'amdgcn' if amd else 'ptx'}",
    )


def _job(want: Want, draft: Draft) -> dict[str, Any]:
    code, text = _places(want)
    files = {"code": str(draft.file(code, native=True)), "text": str(draft.file(text, native=True))}
    return {"kernel": want.kernel.name, "compute": want.compute, **files, **to_json(want.form, want.config)}


def _row(want: Want, answer: Mapping[str, Any]) -> dict[str, Any]:
    if answer["scratch"]:
        raise EffError(
            "EFF-E153",
            f"{want.name} needs {answer['scratch']} bytes of scratch memory a program, which the loader does not give",
            hint="another --target, or torch.compile on the GPU",
        )
    code, text = _places(want)
    types, binary = dict(want.form.types), answer["binary"]
    arguments = [
        {"name": name, "type": types[name], "aligned": name in want.form.aligned}
        for name in want.kernel.parameters()
        if name in types
    ]
    return {
        "name": want.name,
        "compute": want.compute,
        "kernel": want.kernel.name,
        "symbol": answer["symbol"],
        "code": code,
        "text": text,
        "arguments": arguments,
        "parameters": answer["parameters"],
        "constants": {**dict(want.form.constants), **want.config.constants},
        "warps": want.config.warps,
        "stages": want.config.stages,
        "threads": binary["threads"],
        "shared": binary["shared"],
        "registers": binary["registers"],
        "spills": binary["spills"],
        "matrix": binary["matrix"],
    }


def _launches(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Return for every launch of a model the binary, the grid and the arguments, as expressions of the sizes that vary."""
    return [
        {
            "op": call.op,
            "site": call.site,
            "kernel": Want(each.kernel, each.form, each.config, "").name,
            "grid": [written(size) for size in each.grid],
            "arguments": [written(value) for value in each.arguments],
        }
        for call in calls
        for each in call.launches
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    wide = max((len(row["name"]) for row in rows), default=0)
    lines = [f"{'kernel':<{wide}}  chip    threads  registers  spills  shared  matrix"]
    lines += [
        f"{row['name']:<{wide}}  {row['compute']:<7} {row['threads']:>7}  {row['registers']:>9}  {row['spills']:>6}"
        f"  {row['shared']:>6}  {','.join(row['matrix']) or '-'}"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


_C_TYPES = {
    "i1": "int8_t", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t", "fp32": "float", "fp64": "double",
}  # fmt: skip
_HEADER = """/* What a launch of each binary takes. Pass pointers to the arguments in the order of `arguments`, then as many null
 * pointers as `parameters` is larger than `count`. With cuLaunchKernel: grid, (threads, 1, 1), shared bytes; above 48 KiB set
 * CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES first. Pointers marked `aligned` are multiples of 16 bytes.
 */
#ifndef EFFCOMPILE_KERNELS_H
#define EFFCOMPILE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
  const char *name, *compute, *symbol, *code;
  unsigned threads, shared, count, parameters;
  const char *arguments;
} eff_kernel;

static const eff_kernel eff_kernels[] = {
"""


def _header(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        told = ", ".join(_declared(each) for each in row["arguments"])
        words = ", ".join(f'"{row[key]}"' for key in ("name", "compute", "symbol", "code"))
        sizes = f"{row['threads']}, {row['shared']}, {len(row['arguments'])}, {row['parameters']}"
        lines.append(f'  {{{words}, {sizes},\n   "{told}"}},')
    size = "static const size_t eff_kernels_count = sizeof eff_kernels / sizeof *eff_kernels;"
    return _HEADER + "\n".join(lines) + f"\n}};\n\n{size}\n\n#endif\n"


def _declared(argument: Mapping[str, Any]) -> str:
    kind = argument["type"]
    if kind.startswith("*"):
        return f"{'aligned ' if argument['aligned'] else ''}{kind[1:]} *{argument['name']}"
    return f"{_C_TYPES.get(kind, kind)} {argument['name']}"


def _source(kernel: Kernel) -> str:
    """Return a kernel with every device function that it calls, as they are written."""
    seen: dict[str, Any] = {}
    todo = [kernel.function]
    while todo:
        function = todo.pop()
        if function.__name__ in seen:
            continue
        seen[function.__name__] = function
        names = function.fn.__code__.co_names
        known = function.fn.__globals__
        todo += [known[n] for n in names if hasattr(known.get(n), "fn") and hasattr(known.get(n), "arg_names")]
    parts = [inspect.getsource(function.fn) for function in reversed(seen.values())]
    return (
        '"""The kernel as it is written, for reading."""\n\nimport triton\nimport triton.language as tl\n\n\n'
        + "\n\n".join(parts)
    )
