"""Find kernels, passes and policies: a folder is the registry.

A class is found because its file is there; adding one edits nothing else, and importing a module registers nothing. Packages named
by the entry-point group `effcompile.folders` join the built-in folders.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from typing import TypeVar

T = TypeVar("T")
GROUP = "effcompile.folders"


def folders(*built_in: str) -> tuple[str, ...]:
    """Return package names to search: ours, then those that other distributions name."""
    return (*built_in, *(point.value for point in sorted(entry_points(group=GROUP), key=lambda p: p.name)))


@functools.cache
def modules(package: str) -> tuple[str, ...]:
    """Return the module names of a package and its sub-packages, sorted."""
    root = importlib.import_module(package)
    found = [item.name for item in pkgutil.walk_packages(root.__path__, package + ".")]
    return tuple(sorted(found))


def classes(base: type[T], *packages: str) -> tuple[type[T], ...]:
    """Return the concrete subclasses of `base` that the packages define, by name; two with one name are our bug."""
    found: dict[str, type[T]] = {}
    for package in packages:
        for name in modules(package):
            for _, item in inspect.getmembers(importlib.import_module(name), inspect.isclass):
                if issubclass(item, base) and not inspect.isabstract(item) and item.__module__ == name:
                    # A name is unique within its family.
                    key = f"{getattr(item, 'family', '')}:{getattr(item, 'name', item.__qualname__)}"
                    assert found.get(key, item) is item, f"two {base.__name__} are called {key}"
                    found[key] = item
    return tuple(found[key] for key in sorted(found))
