"""The package list, what is shipped, what is installed, and the import rules stay complete."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
FOLDERS = (
    "api",
    "benchmarks",
    "commands",
    "converter",
    "docs",
    "examples",
    "formats",
    "quant",
    "tests",
    "validation",
)
TEXT_SUFFIXES = {".jinja", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}


def packages() -> list[Path]:
    """Every Python package below the root, as folders."""
    tops = sorted(p.parent for p in ROOT.glob("*/__init__.py"))
    return sorted(p.parent for top in tops for p in top.rglob("__init__.py"))


def text_files() -> Iterator[Path]:
    """What a person wrote: files of the root, of .ci/ and of the known folders."""
    yield from (p for p in ROOT.iterdir() if p.is_file() and p.suffix in {*TEXT_SUFFIXES, ""})
    yield ROOT / ".ci" / "run"
    for folder in FOLDERS:
        found = (ROOT / folder).rglob("*")
        yield from (p for p in found if p.is_file() and p.suffix in TEXT_SUFFIXES)
    yield from (p for p in (ROOT / "samples").rglob("*") if p.suffix in {".md", ".py"})


def constraints() -> dict[str, str]:
    """Pinned version by normalized name."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in pins}


def requirements(listed: list[str]) -> list[Requirement]:
    return [Requirement(line) for line in listed]


def test_every_package_is_listed() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    found = (".".join(("lfmq", *p.relative_to(ROOT).parts)) for p in packages())
    assert sorted(listed) == sorted(["lfmq", *found])


def test_root_holds_no_other_module() -> None:
    assert sorted(p.name for p in ROOT.glob("*.py")) == ["__init__.py", "cli.py"]


def test_data_files_are_listed() -> None:
    listed = PROJECT["tool"]["setuptools"]["package-data"]
    shipped = {
        path
        for package, patterns in listed.items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    found = {
        p
        for top in ROOT.glob("*/__init__.py")
        for p in top.parent.rglob("*")
        if p.is_file() and p.suffix != ".py" and p.parent.name != "__pycache__"
    }
    assert shipped == found | {ROOT / "py.typed"}


def test_link_for_static_tools_leads_to_the_root() -> None:
    link = ROOT / ".typing" / "lfmq"
    assert link.is_symlink()
    assert link.resolve() == ROOT


def test_no_path_of_one_machine() -> None:
    outside = re.compile(r"(?<![\w.])/wor" + r"k\b|\.\./share" + r"d\b|/tmp/ven" + r"v\b")
    hits = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in text_files()
        for line in path.read_text("utf-8").splitlines()
        if outside.search(line)
    ]
    assert not hits


def test_constraints_pin_exact_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert not [p for p in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", p)]
    assert pins == sorted(pins, key=str.lower)
    assert "torch==2.13.0" in pins


def test_constraints_cover_what_is_declared() -> None:
    project, pins = PROJECT["project"], constraints()
    declared = requirements(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        declared += requirements(extra)
    for requirement in declared:
        pinned = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned, prereleases=True), str(requirement)


def test_every_install_is_constrained() -> None:
    """A range of some package must not bring in another torch than the one tested."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert re.search(r"^PIP := .*\binstall\b.* -c constraints\.txt$", makefile, re.M)
    installs = re.findall(r"^\t\$\(PIP\) (.*)$", makefile, re.M)
    assert installs[0] == "torch==2.13.0"
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    for line in re.findall(r"^.*\bpip install\b.*$", script, re.M):
        assert " -c constraints.txt " in line


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names that code imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def in_functions(tree: ast.AST) -> ast.Module:
    """Only the bodies of functions."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return ast.Module([n for n in ast.walk(tree) if isinstance(n, kinds)], [])


def names_of(specifications: Iterable[str]) -> set[str]:
    return {canonicalize_name(r.name) for r in requirements(list(specifications))}


def test_every_import_is_declared() -> None:
    """What a module imports a plain install brings, what a function does an extra may bring."""
    declared = names_of(PROJECT["project"]["dependencies"])
    extras = PROJECT["project"]["optional-dependencies"]
    optional = names_of(line for name in extras if name != "test" for line in extras[name])
    providers = packages_distributions()
    modules = [*ROOT.glob("*.py"), *(p for folder in packages() for p in folder.glob("*.py"))]
    for module in modules:
        tree = ast.parse(module.read_bytes())
        late = set(imported(in_functions(tree)))
        for name in sorted(set(imported(tree)) - sys.stdlib_module_names - {"lfmq"}):
            found = {canonicalize_name(d) for d in providers.get(name, [name])}
            allowed = declared | optional if name in late else declared
            assert found & allowed, f"{module.name} imports {name}, which is not declared"
