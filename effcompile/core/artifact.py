"""Describe an exported model in one JSON value: what is in its files, for whom, and what became of every site.

The manifest is the only file that a reader opens before everything is checked, so reading it trusts nothing: unknown fields,
wrong types and odd file names are errors. `bundle.py` writes and reads the files.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from effcompile.core.errors import EffError, unknown

SCHEMA = 1
NAME = "manifest.json"
Form = Literal["onnx", "tensorrt-rtx", "tensorrt", "triton", "aoti"]
FORMS: tuple[str, ...] = get_args(Form)
Status = Literal["same", "substituted", "dropped"]
CODE = "EFF-E104"
_PART = re.compile(r"[A-Za-z0-9_+=@,()\-][A-Za-z0-9._+=@,()\- ]*")
_HASH = re.compile(r"[0-9a-f]{64}")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{word}{n}" for word in ("com", "lpt") for n in range(1, 10))}
LONGEST = 512  # characters of a file's name
AGAIN = "copy it again from where it was made, or export it again; `eff verify DIR` checks it"


def broken(code: str, message: str) -> EffError:
    """Build the error for an artifact that is not what was written."""
    return EffError(code, message, hint=AGAIN)


@dataclass(frozen=True)
class TensorInfo:
    """Name one input or output; a size is a number, or the name of one that may vary."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class SiteForm:
    """Say what became of a site: the plan's own form (`same`), another exact one (`substituted`), or none (`dropped`)."""

    site: str
    status: Status
    form: str
    reason: str = ""


@dataclass(frozen=True)
class FileEntry:
    """Hold a file's SHA-256 and size in bytes; `native` ones hold machine code and are opened on request alone."""

    sha256: str
    bytes: int
    native: bool = False


@dataclass(frozen=True)
class Check:
    """Hold one comparison with eager: the sizes it ran with, and the largest |difference| over the largest |reference|."""

    sizes: tuple[tuple[str, int], ...]
    error: float
    output: str = ""


@dataclass(frozen=True)
class Manifest:
    """Hold what is known of an artifact; `files` are all of its files but the manifest."""

    form: Form
    model: str
    target: str
    plan_hash: str
    versions: tuple[tuple[str, str], ...] = ()
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    sites: tuple[SiteForm, ...] = ()
    checks: tuple[Check, ...] = ()
    details: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, FileEntry], ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, `schema` first."""
        pairs = ("versions", "details", "files")
        plain = {name: value for name, value in dataclasses.asdict(self).items() if name not in pairs}
        checks = [{**dataclasses.asdict(check), "sizes": dict(check.sizes)} for check in self.checks]
        files = {name: dataclasses.asdict(entry) for name, entry in sorted(self.files)}
        return {
            "schema": SCHEMA,
            **plain,
            "checks": checks,
            "versions": dict(self.versions),
            "details": dict(self.details),
            "files": files,
        }

    def text(self) -> str:
        """Return the manifest as it lies on disk."""
        return json.dumps(self.to_json(), indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, text: str) -> Manifest:
        """Build a manifest from its text.

        Raises:
            EffError: EFF-E104 for text that is no manifest, naming the field; EFF-E103 for an odd file name.
        """
        try:
            data = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise broken(CODE, f"{NAME} is no JSON: {error}") from None
        fields = _taken(data, {"schema": int, **dict.fromkeys(_TYPES, object)}, NAME)
        if fields.pop("schema") != SCHEMA:
            raise broken(CODE, f"{NAME} has schema {data['schema']}; this version reads {SCHEMA}")
        for name, kind in _TYPES.items():
            _is(fields[name], kind, name)
        if fields["form"] not in FORMS:
            raise unknown(CODE, "form of an artifact", str(fields["form"]), FORMS, AGAIN)
        return cls(
            form=fields["form"],
            model=fields["model"],
            target=fields["target"],
            plan_hash=fields["plan_hash"],
            versions=_words(fields["versions"], "versions"),
            inputs=tuple(_tensor(x) for x in fields["inputs"]),
            outputs=tuple(_tensor(x) for x in fields["outputs"]),
            sites=tuple(_site(x) for x in fields["sites"]),
            checks=tuple(_check(x) for x in fields["checks"]),
            details=_words(fields["details"], "details"),
            files=_files(fields["files"]),
        )


def check_name(name: Any) -> str:
    """Return a file's name where it is a plain relative path; raise EFF-E103 else.

    Parts of letters, digits and a few signs are joined by `/`; none begins or ends with a dot or a space, and none is a name that
    Windows keeps for a device.
    """
    if isinstance(name, str) and 0 < len(name) <= LONGEST:
        parts = name.split("/")
        if all(
            _PART.fullmatch(part) and part[-1] not in ". " and part.partition(".")[0].lower() not in _RESERVED
            for part in parts
        ):
            return name
    raise broken("EFF-E103", f"{str(name)[:80]!r} is no name of a file in an artifact")


_TYPES: Mapping[str, type] = {
    "form": str, "model": str, "target": str, "plan_hash": str, "versions": dict, "inputs": list, "outputs": list, "sites": list,
    "checks": list, "details": dict, "files": dict,
}  # fmt: skip


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _is(value: Any, kind: type | tuple[type, ...], name: str) -> Any:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise broken(CODE, f"`{name}` of {NAME} is a {type(value).__name__}, not a {wanted}")
    return value


def _taken(data: Any, kinds: Mapping[str, Any], name: str) -> dict[str, Any]:
    _is(data, dict, name)
    for key in data:
        if key not in kinds:
            raise unknown(CODE, f"field of {name}", str(key)[:80], kinds, AGAIN)
    for key, kind in kinds.items():
        if key not in data:
            raise broken(CODE, f"{name} has no `{key}`")
        if kind is not object:
            _is(data[key], kind, f"{name}.{key}")
    return dict(data)


def _words(data: Mapping[str, Any], name: str) -> tuple[tuple[str, str], ...]:
    return tuple((key, _is(value, str, f"{name}.{key[:40]}")) for key, value in data.items())


def _tensor(data: Any) -> TensorInfo:
    taken = _taken(data, {"name": str, "dtype": str, "shape": list}, "a tensor")
    shape = tuple(_is(size, (int, str), "a size") for size in taken["shape"])
    return TensorInfo(taken["name"], taken["dtype"], shape)


def _site(data: Any) -> SiteForm:
    taken = _taken(data, {"site": str, "status": str, "form": str, "reason": str}, "a site")
    if taken["status"] not in get_args(Status):
        raise unknown(CODE, "status of a site", taken["status"], get_args(Status), AGAIN)
    return SiteForm(**taken)


def _check(data: Any) -> Check:
    taken = _taken(data, {"sizes": dict, "error": (int, float), "output": str}, "a check")
    sizes = tuple((key, _is(value, int, "a size")) for key, value in taken["sizes"].items())
    return Check(sizes, float(taken["error"]), taken["output"])


def _files(data: Mapping[str, Any]) -> tuple[tuple[str, FileEntry], ...]:
    found = []
    for name, entry in data.items():
        check_name(name)
        taken = _taken(entry, {"sha256": str, "bytes": int, "native": bool}, f"file {name}")
        if not _HASH.fullmatch(taken["sha256"]) or taken["bytes"] < 0:
            raise broken(CODE, f"file {name} has no SHA-256 or no size")
        found.append((name, FileEntry(**taken)))
    # Some file systems do not tell upper and lower case apart.
    if len({name.lower() for name, _ in found} | {NAME}) != len(found) + 1:
        raise broken("EFF-E103", "two files of the artifact have one name")
    return tuple(found)
