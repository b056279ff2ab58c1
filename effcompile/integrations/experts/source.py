"""Know code by its text: a replacement states what one version of a method does, and any other version is refused.

The digest is of the tokens, without comments, docstrings and spacing, so that a reformatted file is the same.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from effcompile.core.site import Refusal

_SKIPPED = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)
_BLOCKS = {tokenize.INDENT: "{", tokenize.DEDENT: "}"}


def digest(function: Callable[..., Any]) -> str:
    """Return 12 hex digits of a function's tokens; raises OSError where it has no source."""
    text = textwrap.dedent(inspect.getsource(function))
    words: list[str] = []
    fresh = True  # at the start of a statement, where a string alone is a docstring
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        begins, fresh = fresh, token.type in (*_BLOCKS, tokenize.NEWLINE) or (fresh and token.type in _SKIPPED)
        if token.type in _BLOCKS:
            words.append(_BLOCKS[token.type])
        elif token.type not in _SKIPPED and not (begins and token.type == tokenize.STRING):
            words.append(token.string)
    return hashlib.sha256("".join("".join(words).split()).encode()).hexdigest()[:12]


def unknown_code(module: nn.Module, known: Mapping[str, str]) -> Refusal | None:
    """Return why a module's methods are not the known ones (name: digest), None where they are."""
    kind = type(module)
    for name, wanted in known.items():
        try:
            found = digest(getattr(kind, name))
        except (AttributeError, OSError, TypeError):
            found = ""
        if found != wanted:
            return Refusal(
                "EFF-M302", f"`{kind.__name__}.{name}` is not the code that effcompile knows ({found or 'no source'})"
            )
    return None
