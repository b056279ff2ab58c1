"""Say what went wrong, where, why, and what to type next.

A code never changes its meaning: users put it into CI filters and search for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EffError(Exception):
    """Report a condition that the user can act on.

    `code` is stable (`EFF-P502`); `site` names the occurrence (`layers.3.self_attn`); `source` is the user's
    `file:line`; `hint` is the next command or edit. `exit_code` is what the command line returns.
    """

    exit_code = 2

    def __init__(
        self, code: str, message: str, *, site: str | None = None, source: str | None = None, hint: str | None = None
    ) -> None:
        self.code, self.message, self.site, self.source, self.hint = code, message, site, source, hint
        super().__init__(code, message)

    def __str__(self) -> str:
        where = " ".join(
            filter(None, (f"at `{self.site}`" if self.site else "", f"({self.source})" if self.source else ""))
        )
        text = f"{self.code} {where + ': ' if where else ''}{self.message}"
        return f"{text}\n  next: {self.hint}" if self.hint else text

    def to_json(self) -> dict[str, str | None]:
        """Return the fields as JSON values."""
        return {
            "code": self.code,
            "message": self.message,
            "site": self.site,
            "source": self.source,
            "hint": self.hint,
        }


class ContractError(EffError):
    """Report a broken `require` contract, or a target that cannot do what was asked (exit code 3)."""

    exit_code = 3


class RewriteError(EffError):
    """Report our own fault: a pass or a lowering that produced a graph it should not have (exit code 4)."""

    exit_code = 4


def near(word: str, choices: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """Return the choices that look like `word`, best first."""
    return tuple(difflib.get_close_matches(word, sorted(set(choices)), n=count, cutoff=0.5))


def unknown(code: str, what: str, word: str, choices: Iterable[str], hint: str | None = None) -> EffError:
    """Build the error for a word that names nothing, with its near matches (or all choices when none is near)."""
    known = sorted(set(choices))
    close = near(word, known)
    offer = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known) or 'none'}"
    return EffError(code, f"unknown {what} `{word}`; {offer}", hint=hint)
