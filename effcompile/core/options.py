"""Read `options={...}`: every key is checked, and one digest says whether two option sets mean the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from effcompile.core.errors import EffError, unknown
from effcompile.core.plan import Plan

FAMILIES = ("attention", "precision", "kv", "evict", "moe", "tokens", "schedule", "cache")
EMITTERS = ("inductor", "interpreter")
DOORS = {  # families that `torch.compile(backend="eff")` cannot reach, and the door that can
    "kv": "eff.prepare(model, kv=...)",
    "evict": "eff.prepare(model, evict=...)",
    "schedule": "eff.diffusers(pipe, schedule=...)",
    "cache": "eff.diffusers(pipe, cache=...)",
}


def _spelled(key: str, value: Any) -> str:
    text = getattr(value, "spelled", None)  # a policy object; core/policy.py is above this module
    if not isinstance(text, str):
        raise EffError("EFF-U003", f"`{key}` is a {type(value).__name__}", hint="spell it like name{field=value}")
    return text


@dataclass(frozen=True)
class Options:
    """Hold what the user asked for. Defaults are exact passes only, TorchInductor's own settings, and fallback on error.

    `emit` is how the rewritten graph runs: through TorchInductor, or op by op as eager does (`interpreter`: for tests, and to
    tell a wrong rewrite from a wrong kernel).
    """

    families: tuple[tuple[str, str], ...] = ()
    plan: Plan | None = None
    target: str | None = None
    require: tuple[tuple[str, str], ...] = ()
    strict: bool = False
    disable: tuple[str, ...] = ()
    passes: tuple[Any, ...] = ()
    mode: str | None = None
    inductor: tuple[tuple[str, Any], ...] = field(default=(), hash=False)
    emit: str = "inductor"

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Check a mapping of options; raise EffError with the near matches for a key that names nothing."""
        given = dict(options or {})
        if mode is not None:
            given.setdefault("mode", mode)
        keys = {f.name for f in fields(cls)} - {"families"} | set(FAMILIES)
        for key in given:
            if key not in keys:
                raise unknown("EFF-U001", "option", key, keys, hint="eff passes")
        asked = [(key, given.pop(key)) for key in FAMILIES if given.get(key) is not None]
        families = tuple((key, value if isinstance(value, str) else _spelled(key, value)) for key, value in asked)
        plan = given.pop("plan", None)
        if plan is not None and not isinstance(plan, Plan):
            plan = Plan.read(plan)
        require = given.pop("require", None) or {}
        if not isinstance(require, Mapping):
            raise EffError("EFF-U001", "`require` is a mapping", hint='options={"require": {"attention": "all"}}')
        for key, value in require.items():
            if key not in (*FAMILIES, "graph"):
                raise unknown("EFF-U001", "require key", str(key), FAMILIES)
            if str(value) != "all" and not str(value).isdigit():
                raise EffError("EFF-U001", f'`require` {key}={value!r}: give "all" or a number of sites')
        disable = given.pop("disable", ())
        disable = (disable,) if isinstance(disable, str) else tuple(disable)
        emit = str(given.get("emit", EMITTERS[0]))
        if emit not in EMITTERS:
            raise unknown("EFF-U001", "emit", emit, EMITTERS)
        inductor = tuple(sorted((given.pop("inductor", None) or {}).items()))
        return cls(
            families=families,
            plan=plan,
            target=None if given.get("target") is None else str(given["target"]),
            require=tuple(sorted((k, str(v)) for k, v in require.items())),
            strict=bool(given.get("strict", False)),
            disable=disable,
            passes=tuple(given.get("passes", ())),
            mode=None if given.get("mode") in (None, "default") else str(given["mode"]),
            inductor=inductor,
            emit=emit,
        )

    def insisting(self) -> Options:
        """Return the options with contracts for no site: policies run also where they do not pay, and nothing is counted."""
        return replace(self, require=tuple((family, "0") for family, _ in self.require if family != "graph"))

    @property
    def digest(self) -> str:
        """Return a digest of everything that can change the compiled code."""
        parts: list[Any] = [self.families, self.plan.hash if self.plan else None, self.target, self.require]
        parts += [self.strict, self.disable, self.mode, repr(self.inductor), self.emit]
        parts += [f"{type(p).__module__}.{type(p).__qualname__}:{p!r}" for p in self.passes]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]
