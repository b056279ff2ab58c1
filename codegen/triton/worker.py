"""Compile kernels in a process of its own: a job a line comes in as JSON, files and a line of JSON go out.

Processes, not threads, so that a compiler that aborts takes one kernel with it and not the caller, and so that two cores work.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effcompile.codegen.triton import cross, kernels
from effcompile.codegen.triton.kernel import Config, Form
from effcompile.core.errors import EffError


def to_json(form: Form, config: Config) -> dict[str, Any]:
    """Return what names a binary of a kernel, as JSON values."""
    return {"form": dataclasses.asdict(form), "config": dataclasses.asdict(config)}


def _pairs(data: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((str(name), value) for name, value in data)


def from_json(data: Mapping[str, Any]) -> tuple[Form, Config]:
    """Build what `to_json` gave."""
    form, config = data["form"], data["config"]
    boxes = tuple((str(name), tuple(map(int, shape))) for name, shape in config["descriptors"])
    return (
        Form(form["name"], _pairs(form["types"]), _pairs(form["constants"]), tuple(form["aligned"])),
        Config(_pairs(config["tiles"]), config["warps"], config["stages"], boxes),
    )


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """Compile one binary, write its machine code and its assembler text, and return what is known of it."""
    (kernel,) = (each for each in kernels() if each.name == job["kernel"])
    form, config = from_json(job)
    try:
        built = cross.build(kernel, form, config, job["compute"])
    except EffError as error:
        return {"error": error.to_json()}
    Path(job["code"]).write_bytes(built.code)
    Path(job["text"]).write_text(built.text, encoding="utf-8")
    told = {"symbol": built.symbol, "parameters": built.parameters, "scratch": built.scratch}
    return {**told, "binary": built.binary.to_json()}


def main() -> None:
    """Work until the input ends."""
    out = sys.stdout
    sys.stdout = sys.stderr  # a compiler's own words must not come between the answers
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
