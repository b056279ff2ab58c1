"""Make of what a builder says an error with a code, a reason and a next step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from effcompile.core.errors import EffError

_KNOWN = (
    (r"Turing", "Turing (sm_75) multiplies float16 and int8 alone", "--dtype fp16, or without sm_75"),
    (r"dedicated kernel", "its attention is float16 alone", "--dtype fp16, or opset 20, which has no attention operator"),
    (r"[Pp]lugin not found|No importer registered", "it has no form of an operator", "eff show DIR lists the sites"),
    (r"out of memory|[Aa]llocation failed|bad_alloc", "memory ran out", "a machine with more, or one target at a time"),
    (r"profile", "the sizes of the optimization profile do not fit", "--profile INPUT.DIM=MIN:OPT:MAX"),
    (r"compute capability|SM\d+ is no", "a chip is not one of this version's", "pip install -U tensorrt_rtx"),
)  # fmt: skip


def complaint(lines: Sequence[Mapping[str, Any]], where: str, product: str) -> EffError:
    """Return the error for a build that gave no engine: EFF-E160 where the parser refused, EFF-E161 where the builder did."""
    parsed = [line for line in lines if "parse" in line]
    if parsed:
        first = parsed[0]
        told = f"operator {first['operator'] or '?'} (node {first['node'] or '?'}): {_short(first['parse'])}"
        reason, hint = _known(first["parse"]) or ("it does not take the graph", "--opset 20 has fewer operators")
        return EffError("EFF-E160", f"{product} refuses the model{where}: {reason}: {told}", hint=hint)
    texts = [str(line["text"]) for line in lines if line.get("level", "").endswith("ERROR")]
    found = next((known for text in texts if (known := _known(text))), None)
    reason, hint = found or ("it gave no reason that is known", "--static (dynamic=False) and fewer targets tell more")
    told = _short(" | ".join(texts[-2:])) or "nothing was logged"
    return EffError("EFF-E161", f"{product} builds no engine{where}: {reason}: {told}", hint=hint)


def _known(text: str) -> tuple[str, str] | None:
    return next(((reason, hint) for pattern, reason, hint in _KNOWN if re.search(pattern, text)), None)


def _short(text: str) -> str:
    return " ".join(text.split())[:400]
