"""Find and load the models that `zoo:NAME` names.

The folder is the registry: every module of this package that holds a constant `ENTRIES` contributes its entries.
"""

import importlib
import pkgutil

import torch

import effcompile.models as package
from effcompile.core.errors import unknown
from effcompile.models.entry import ZooEntry, ZooModel


def entries() -> tuple[ZooEntry, ...]:
    """Return the entries of all families, sorted by name."""
    found: dict[str, ZooEntry] = {}
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if info.name == __name__:
            continue
        for item in getattr(importlib.import_module(info.name), "ENTRIES", ()):
            assert item.name not in found, f"two zoo entries are called {item.name}"
            found[item.name] = item
    return tuple(found[name] for name in sorted(found))


def names() -> tuple[str, ...]:
    """Return the names of all models, sorted."""
    return tuple(item.name for item in entries())


def find(name: str) -> ZooEntry:
    """Return the entry called `name`, with or without the prefix `zoo:`.

    Raises:
        EffError: EFF-U101 when there is none; the hint gives the near matches.
    """
    bare = name.removeprefix("zoo:")
    known = {item.name: item for item in entries()}
    if bare in known:
        return known[bare]
    raise unknown("EFF-U101", "zoo model", bare, known, hint="write zoo:NAME")


def load(name: str, *, dtype: torch.dtype = torch.float32, meta: bool = False) -> ZooModel:
    """Build the model called `name` in eval mode.

    Args:
        name: an entry of `names()`, with or without the prefix `zoo:`.
        dtype: of the weights and of floating inputs. Tables that need float32 keep it.
        meta: build on the meta device: right shapes and no weights, nothing fetched.

    Raises:
        EffError: EFF-U101 unknown name; EFF-U102 trained weights that cannot be fetched; EFF-U104 a missing package;
            EFF-U105 an unusable cache folder.
    """
    item = find(name)
    model = item.build(dtype, meta).eval()
    tokenizer = None if meta or item.tokenizer is None else item.tokenizer()
    return ZooModel(item.name, model, item, dtype, torch.device("meta" if meta else "cpu"), tokenizer)
