"""Hold every decision as one JSON value.

After the plan everything is mechanical: a wrong number is either a wrong plan or a wrong rewrite. The hash covers the
decisions only, so that prose and estimates may improve without invalidating a cache.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from effcompile.core.errors import EffError
from effcompile.core.site import Refusal

SCHEMA = 1


@dataclass(frozen=True)
class Choice:
    """Say what happens at one site for one family; `policy` is a kernel or a spelled policy."""

    site: str
    family: str
    policy: str
    reason: str = ""
    seconds: float | None = None
    tag: str = "modelled"


@dataclass(frozen=True)
class Decline:
    """Say what did not happen at one site, and why."""

    site: str
    family: str
    policy: str
    refusal: Refusal
    source: str = ""


@dataclass(frozen=True)
class Plan:
    """Hold the choices for one target. `fingerprints` maps each site to what the plan was made for."""

    target: str
    choices: tuple[Choice, ...] = ()
    declined: tuple[Decline, ...] = ()
    fingerprints: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    schedule: dict[str, Any] | None = field(default=None, hash=False)

    def of(self, site: str, family: str) -> Choice | None:
        """Return the choice for a site and family."""
        return next((c for c in self.choices if c.site == site and c.family == family), None)

    def passes(self) -> tuple[str, ...]:
        """Return the names of the graph passes that run."""
        return tuple(c.policy for c in self.choices if c.family == "pass")

    @property
    def hash(self) -> str:
        """Return a digest of the decisions."""
        decisions = [(c.site, c.family, c.policy) for c in self.choices]
        payload = json.dumps([SCHEMA, self.target, sorted(decisions), sorted(self.fingerprints), self.schedule])
        return hashlib.sha256(payload.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Return the plan as readable JSON with a schema number and its hash."""
        return json.dumps({"schema": SCHEMA, "hash": self.hash, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote; a plan of another schema or with a wrong hash is refused (EFF-P503)."""
        try:
            raw = json.loads(text)
            schema, digest = raw.pop("schema"), raw.pop("hash")
            plan = cls(
                target=raw["target"],
                choices=tuple(Choice(**c) for c in raw["choices"]),
                declined=tuple(Decline(**{**d, "refusal": Refusal(**d["refusal"])}) for d in raw["declined"]),
                fingerprints=tuple((a, b) for a, b in raw["fingerprints"]),
                notes=tuple(raw["notes"]),
                schedule=raw["schedule"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise EffError("EFF-P503", f"not a plan: {error}", hint="eff plan MODEL -o plan.json") from error
        if schema != SCHEMA:
            raise EffError(
                "EFF-P503", f"plan schema {schema}, this version reads {SCHEMA}", hint="make it again: eff plan"
            )
        if digest and digest != plan.hash:  # a person may edit a plan: an emptied hash says so
            raise EffError(
                "EFF-P503",
                f"the decisions hash to {plan.hash}, the file says {digest}",
                hint='after editing a plan set "hash": ""',
            )
        return plan

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Read a plan file."""
        file = Path(path)
        if not file.is_file():
            raise EffError("EFF-P503", f"no plan file `{file}`", hint="eff plan MODEL -o plan.json")
        return cls.from_json(file.read_text())

    def check(self, fingerprints: dict[str, str]) -> None:
        """Raise EFF-P501 unless the plan was made for these sites."""
        mine = dict(self.fingerprints)
        moved = sorted(s for s in mine.keys() & fingerprints.keys() if mine[s] != fingerprints[s])
        gone, new = sorted(mine.keys() - fingerprints.keys()), sorted(fingerprints.keys() - mine.keys())
        if moved or gone or new:
            kinds = ((moved, "changed"), (gone, "gone"), (new, "new"))
            found = [f"{len(names)} sites {word} ({', '.join(names[:3])})" for names, word in kinds if names]
            raise EffError(
                "EFF-P501",
                f"the plan was made for another model or version: {'; '.join(found)}; nothing was applied",
                hint="eff plan MODEL -o plan.json, then eff diff old.json plan.json",
            )
