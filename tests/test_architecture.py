"""The house keeps its shape: imports point down, heavy libraries load late, links lead into the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "stackrace"
BOTTOM = {"errors", "types", "clock", "host", "tokenizer"}
"""harness modules that everything may import; they import nothing of ours but each other."""

FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def imports_of(path):
    """Modules of ours that a file imports, at any depth, as tuples like ("harness", "types")."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{a.name}" for a in node.names} | {node.module}
    return {tuple(n.split(".")[1:]) for n in names if n.startswith("stackrace.")}


def allowed(importer, imported):
    place, what = importer[0], imported[0]
    is_bottom = what == "harness" and (len(imported) == 1 or imported[1] in BOTTOM)
    if place == "kernels":
        return what == "kernels"
    if place == "workloads":
        return what == "workloads" or is_bottom
    if place == "backends":
        return what in ("backends", "kernels", "__version__") or is_bottom
    if place == "harness" and importer[1] in BOTTOM:
        return is_bottom
    return place in ("harness", "__main__")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    importer = path.relative_to(PACKAGE).with_suffix("").parts
    wrong = [".".join(i) for i in imports_of(path) if i and not allowed(importer, i)]
    assert not wrong, f"{'.'.join(importer)} must not import {wrong}"


def test_no_circles_among_the_modules():
    """Depth-first over imports, late ones included: a module must not be reached from itself."""
    graph = {}
    for path in FILES:
        name = path.relative_to(PACKAGE).with_suffix("").parts
        graph[name] = {i for i in imports_of(path) if i != name}
    done, on_path = set(), []

    def visit(name):
        assert name not in on_path, f"circle: {' -> '.join('.'.join(n) for n in [*on_path, name])}"
        if name in done or name not in graph:
            return
        on_path.append(name)
        for imported in graph[name]:
            visit(imported)
        done.add(on_path.pop())

    for name in graph:
        visit(name)


@pytest.mark.parametrize("name", ["harness", "backends", "kernels", "workloads", "conf"])
def test_top_level_folders_are_links_into_the_package(name):
    link = ROOT / name
    assert link.is_symlink()
    assert not Path(link.readlink()).is_absolute()
    assert link.resolve() == PACKAGE / name
    assert (PACKAGE / name / "__init__.py").exists() == (name == "conf")


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from stackrace.harness import cli\n"
        "print([m for m in ('torch', 'triton', 'plotly', 'pandas', 'numpy', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_transformers_finds_its_own_kernels_package_from_the_repository_root():
    """A folder called kernels/ in the working directory must not shadow Hugging Face's package."""
    code = "import sys; sys.path.insert(0, ''); import stackrace.kernels; import transformers.integrations.hub_kernels"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=100)


def test_a_file_fits_one_sitting():
    long = {p.name: n for p in FILES if (n := len(p.read_text().splitlines())) > 300}
    assert not long
