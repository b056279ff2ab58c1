"""Check what an installation contains: the package list, the links, the entry points, a light import, a whole wheel."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
LINKS = ("codegen", "lowering", "models", "passes")
OPTIONAL = (
    "transformers",
    "diffusers",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "matplotlib",
    "typer",
    "rich",
    "openvino",
    "psutil",
)
LATE = ("torch._dynamo", "torch._inductor.compile_fx", "triton")

IMPORT = """
import json, sys, time
import sympy, torch
import torch.fx.experimental.proxy_tensor
begun = time.process_time()
import effcompile
print(json.dumps({"seconds": time.process_time() - begun, "modules": sorted(sys.modules)}))
"""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def on_disk() -> dict[str, Path]:
    """Return the packages that the folders hold, by the name under which they are imported."""
    found: dict[str, Path] = {}
    for top, name in (("effcompile", "effcompile"), *((link, f"effcompile.{link}") for link in LINKS)):
        for file in (ROOT / top).rglob("__init__.py"):
            if not any(part.is_symlink() for part in file.parents):
                found[".".join((name, *file.parent.relative_to(ROOT / top).parts))] = file.parent
    return found


def test_the_package_list_is_what_is_on_disk() -> None:
    listed = project()["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert sorted(listed) == sorted(on_disk())


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {file.parent for top in ("effcompile", *LINKS) for file in (ROOT / top).rglob("*.py")}
    folders = {folder for folder in folders if not any(part.is_symlink() for part in (folder, *folder.parents))}
    assert folders == set(on_disk().values())


def test_links_are_relative() -> None:
    links = sorted(path.name for path in (ROOT / "effcompile").iterdir() if path.is_symlink())
    assert links == sorted(LINKS)
    for name in LINKS:
        assert str((ROOT / "effcompile" / name).readlink()) == f"../{name}"
        assert (ROOT / "effcompile" / name / "__init__.py").is_file()
    assert project()["tool"]["setuptools"]["package-dir"] == {f"effcompile.{name}": name for name in LINKS}


def test_entry_points_resolve() -> None:
    assert "eff" in torch.compiler.list_backends()
    (backend,) = entry_points(group="torch_dynamo_backends", name="eff")
    (command,) = entry_points(group="console_scripts", name="eff")
    declared = project()["project"]
    assert backend.value == declared["entry-points"]["torch_dynamo_backends"]["eff"]
    assert command.value == declared["scripts"]["eff"]
    assert callable(backend.load())
    assert callable(command.load())


def test_the_version_is_written_once_in_meaning() -> None:
    import effcompile

    assert effcompile.__version__ == project()["project"]["version"]


def test_import_is_light() -> None:
    """Beside torch's own tracer (and the sympy it needs) an import loads our files only; two seconds of CPU is ample."""
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "effcompile.backend" in found["modules"]
    assert [name for name in (*OPTIONAL, *LATE) if name in found["modules"]] == []
    assert found["seconds"] < 2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel that is built from a copy, so that nothing is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("effcompile", *LINKS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(folder),
    ]
    done = subprocess.run([*command, str(source)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    (file,) = folder.glob("*.whl")
    return file


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    expected = {"effcompile/py.typed"}
    for name, folder in on_disk().items():
        sources = [*folder.glob("*.py"), *folder.glob("cpp/*.cpp"), *folder.glob("cpp/*.h"), *folder.glob("*.json")]
        sources += folder.glob("*.safetensors")
        expected |= {f"{name.replace('.', '/')}/{file.relative_to(folder)}" for file in sources}
    assert "effcompile/passes/recognize/attention.py" in expected
    assert {name for name in files(wheel) if ".dist-info/" not in name} == expected


def test_the_wheel_takes_no_other_top_level_name(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in files(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"effcompile"}


def test_the_wheel_runs_without_the_tree(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere and imported alone, the package finds its passes and kernels: no link is needed."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import effcompile; from effcompile.compiler import all_kernels, all_passes; from effcompile.core.options import Options\n"
        "print(effcompile.__file__); print(len(all_kernels()), len(all_passes(Options())))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    where, counts = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert all(int(count) >= 3 for count in counts.split())
