"""Compare the documentation with the code: error codes, options, verbs, links."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from effcompile.cli.main import verbs
from effcompile.compiler import all_kernels, all_passes
from effcompile.core.options import FAMILIES, Options

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("effcompile", "passes", "lowering", "codegen", "models", "bench")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
CODE = re.compile(r"EFF-[A-Z]\d{3}")


def codes_in_the_tree() -> set[str]:
    return {
        code
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*.py")
        for code in CODE.findall(path.read_text(encoding="utf-8"))
    }


def test_every_code_is_documented_once_and_exists() -> None:
    listed = re.findall(r"^\| (EFF-[A-Z]\d{3}) \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == codes_in_the_tree()


def test_every_error_of_an_export_says_what_to_do_next() -> None:
    silent = []
    texts = {path: path.read_text(encoding="utf-8") for folder in SOURCES for path in (ROOT / folder).rglob("*.py")}
    for path, text in texts.items():
        for node in ast.walk(ast.parse(text)) if "EFF-E" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("EffError", "ContractError") and node.args:
                code = getattr(node.args[0], "value", "")
                if str(code).startswith("EFF-E") and "hint" not in [word.arg for word in node.keywords]:
                    silent.append(f"{path.name}:{node.lineno} {code}")
    assert silent == []


def test_codes_on_other_pages_exist() -> None:
    known = codes_in_the_tree()
    for path in PAGES:
        assert set(CODE.findall(path.read_text())) <= known, path.name


def test_every_option_is_documented() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "options.md").read_text(), re.MULTILINE)
    assert set(listed) == {field.name for field in fields(Options)} - {"families"}
    text = (ROOT / "docs" / "options.md").read_text()
    assert all(f"`{family}`" in text for family in FAMILIES)


def test_passes_and_kernels_are_on_the_map() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    names = [item.name for item in (*all_passes(Options()), *all_kernels())]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_verbs_of_the_readme_exist() -> None:
    used = {word for path in PAGES for word in re.findall(r"\beff ([a-z]+)\b", path.read_text())}
    known = set(verbs())
    assert "explain" in used
    assert used <= known


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), target


def test_readme_has_the_markers_of_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- results:begin -->") == text.count("<!-- results:end -->") == 1
    assert text.index("<!-- results:begin -->") < text.index("<!-- results:end -->")
