"""How the house is built: the core knows no reports, reports run no model, files can be read."""
import ast
import re

import pytest
from conftest import ROOT

SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "minipav").rglob("*.py")])
CORE = [p for p in SOURCES if "minipav" in p.relative_to(ROOT).parts and p.parent.name != "paper"]


def name(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """All modules that a file imports, inside of functions too; "a.b" for from a import b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: write the whole name"
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)


def within(module, *packages):
    return any(module == p or module.startswith(p + ".") for p in packages)


def test_all_sources_are_found():
    """A check of no files would always pass."""
    assert {"train.py", "search.py", "rl.py", "minipav/run.py", "minipav/search/beam.py",
            "minipav/tasks/task.py", "minipav/paper/claims.py"} <= set(map(name, SOURCES)) and len(CORE) > 20


@pytest.mark.parametrize("path", CORE, ids=name)
def test_the_core_knows_neither_the_paper_nor_how_to_draw(path):
    assert not [m for m in imports(path) if within(m, "minipav.paper", "matplotlib", "pandas")]


@pytest.mark.parametrize("path", ["claims", "figures", "statistics", "report", "rl_report"])
def test_reports_run_no_model(path):
    """Whoever has only the tables of a run can make its figures."""
    found, no = set(imports(ROOT / "minipav" / "paper" / f"{path}.py")), ("torch", "safetensors")
    assert found and not [m for m in found if within(m, *no, "minipav.model", "minipav.sampler")]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_and_functions_can_be_read(path):
    text = path.read_text()
    lines = text.split("\n")
    assert len(lines) <= 251, f"{len(lines) - 1} lines"
    assert not [(i, len(line)) for i, line in enumerate(lines, 1) if len(line) > 110]
    assert text.endswith("\n") and not text.endswith("\n\n") and not re.search(r"[ \t]+$", text, re.M)
    functions = [f for f in ast.walk(ast.parse(text)) if isinstance(f, ast.FunctionDef)]
    assert not [(f.name, n) for f in functions if (n := f.end_lineno - f.lineno + 1) > 45]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
