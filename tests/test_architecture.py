"""Check what keeps the code readable and safe to import: short files, and modules that register nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("effcompile", "passes", "lowering", "codegen", "models", "bench", "tests")
LONGEST = 400

IMPORT_ALL = """
import json, pkgutil, sys, importlib, threading
import torch
before = {"threads": threading.active_count(), "dtype": torch.get_default_dtype()}
import effcompile
names = [m.name for m in pkgutil.walk_packages(effcompile.__path__, "effcompile.")]
for name in names:
    importlib.import_module(name)
ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("eff::")]
after = {"threads": threading.active_count(), "dtype": torch.get_default_dtype()}
changed = [key for key in before if before[key] != after[key]]
from effcompile import ops as own
own.register()
own.register()
late = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("eff::")]
print(json.dumps({"names": names, "ops": ops, "changed": changed, "late": late}))
"""


def sources() -> list[Path]:
    """Return every Python file once: the links inside effcompile lead to folders that are listed themselves."""
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if not any(part.is_symlink() for part in path.parents)]


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert len(lengths) > 100, "the folders were not found"
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


def test_importing_every_module_registers_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    on_disk = {path for path in sources() if path.relative_to(ROOT).parts[0] not in ("bench", "tests")}
    modules = {path for path in on_disk if path.name != "__init__.py"}
    packages = {path for path in on_disk - modules if path.parent != ROOT / "effcompile"}
    assert len(found["names"]) == len(modules) + len(packages), "a module was not imported"
    assert found["ops"] == []
    assert found["changed"] == []
    assert "eff::attention_v1" in found["late"], "the check itself sees registered ops"


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in sources()
        if "tests" not in path.relative_to(ROOT).parts and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []
