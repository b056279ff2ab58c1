"""Check, clear and export TorchInductor's compilation cache.

What lies in the cache is unpickled and loaded as code by torch: it belongs to one user and is never shared with others.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from effcompile.cli import parameters as given
from effcompile.cli.artifacts import cache_folder, quarantine, remove, survey
from effcompile.cli.console import bad, dim, good, print_json, progress, stdout, table
from effcompile.cli.models import load_model
from effcompile.core.errors import EffError

Folder = Annotated[Path | None, typer.Option("--folder", help="Another folder than TORCHINDUCTOR_CACHE_DIR.")]
Fix = Annotated[
    bool, typer.Option("--fix", help="Move damaged files into a quarantine folder; torch then compiles anew.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where to write the bundle.", show_default=False)]


def verify(folder: Folder = None, fix: Fix = False, as_json: given.AsJson = False) -> int:
    """Find truncated libraries and other garbage. Exit code 1 where something is damaged and was not moved away."""
    place = folder or cache_folder()
    with progress("checking", quiet=as_json) as step:
        found = survey(place, step)
    moved = quarantine(found) if fix else ()
    if as_json:
        print_json({**found.to_json(), "quarantined": [str(path) for path in moved]})
        return 1 if found.flaws and not moved else 0
    out = stdout()
    out.print(f"{found.folder}: {found.files} files, {found.bytes / 1e6:.1f} MB, mode {found.mode:04o}")
    if not found.owner_is_me:
        out.print(bad("the folder belongs to another user: what is in it is loaded as code"))
    if found.exposed:
        out.print(bad(f"others may write here: chmod go-w {found.folder}"))
    if not found.flaws:
        out.print(good("nothing damaged"))
        return 0
    rows = [
        [f.path.relative_to(found.folder), f.reason, bad("fatal") if f.fatal else dim("recompiles")]
        for f in found.flaws
    ]
    out.print(table("Damaged", ("file", "what", "effect"), rows))
    if moved:
        out.print(good(f"moved {len(moved)} files to {moved[0].parents[0]}"))
        return 0
    out.print("next: eff cache verify --fix")
    return 1


def clear(folder: Folder = None, yes: Yes = False, as_json: given.AsJson = False) -> int:
    """Remove the whole cache folder; the next run compiles everything anew."""
    place = folder or cache_folder()
    found = survey(place)
    if not place.is_dir():
        removed = False
    else:
        _allow(place)
        if not yes:
            if not sys.stdin.isatty():
                raise EffError("EFF-C803", f"this removes {found.files} files in {place}", hint="eff cache clear --yes")
            typer.confirm(f"Remove {found.files} files ({found.bytes / 1e6:.1f} MB) in {place}?", abort=True)
        remove(place)
        removed = True
    if as_json:
        print_json({"folder": str(place), "removed": removed, "files": found.files, "bytes": found.bytes})
    else:
        stdout().print(
            f"removed {found.files} files, {found.bytes / 1e6:.1f} MB" if removed else f"{place} is not there"
        )
    return 0


def _allow(place: Path) -> None:
    """Refuse a folder that does not look like a cache: a wrong --folder must not cost anybody their files."""
    known = {"fxgraph", "aotautograd", "triton", "locks", "fx", "artifacts", "effcompile-quarantine", "bundle", "cache"}
    names = {item.name for item in place.iterdir()}
    short = sum(len(name) <= 2 for name in names)
    if names and not names & known and short < len(names) / 2 and place != cache_folder():
        raise EffError(
            "EFF-C804", f"{place} does not look like TorchInductor's cache", hint="eff cache clear --folder FOLDER"
        )


def export(
    model: given.Model,
    out: Out,
    shape: given.Shape = "",
    dtype: given.Dtype = "",
    option: given.OptionList = None,
    as_json: given.AsJson = False,
) -> int:
    """Compile a model here and write everything that torch cached for it into one file.

    Load it with torch.compiler.load_cache_artifacts(bytes) before the first call, on a machine of the same kind. It
    holds pickles and libraries: only give it to processes of your own.
    """
    import copy

    import torch

    options = given.parse_options(option)
    with progress("compiling", quiet=as_json):
        loaded = load_model(model, given.parse_shape(shape), given.parse_dtype(dtype), real=True)
        args, kwargs = copy.deepcopy((loaded.args, loaded.kwargs))
        with torch.no_grad():
            torch.compile(loaded.runnable, backend="eff", options=options or None)(*args, **kwargs)
        saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        raise EffError(
            "EFF-C805", "torch cached nothing for this model", hint="unset TORCHINDUCTOR_FORCE_DISABLE_CACHES"
        )
    data, info = saved
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    scratch.write_bytes(data)
    scratch.replace(out)
    counts = {kind: len(keys) for kind, keys in info.artifacts.items()}
    if as_json:
        print_json({"file": str(out), "bytes": len(data), "artifacts": counts})
    else:
        stdout().print(
            f"wrote {out}: {len(data) / 1e6:.1f} MB, {', '.join(f'{n} {kind}' for kind, n in counts.items())}"
        )
    return 0


VERBS = (verify, clear, export)
