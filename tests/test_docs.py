"""The documents say what the code does."""

import re
import runpy
from pathlib import Path

import click
import pytest

from lfmq.cli import main
from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.plan.builtin import builtin_recipes
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe, parse_recipe
from lfmq.formats.plan import EXPERT_ROLES, SHARED_ROLES
from lfmq.formats.registry import FORMATS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("[!.]*/README.md")])
COMMANDS = sorted(main.commands)
# Rooms and tests that a page may name: each of these folders, and what lies in it.
NAMED = "api|benchmarks|commands|converter|docs|examples|formats|quant|samples|tests|validation"


def fenced(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as forges make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_has_help_and_example(name: str) -> None:
    command = main.commands[name]
    context = click.Context(command, info_name=name, parent=click.Context(main, info_name="lfmq"))
    text = command.get_help(context)
    assert command.help
    assert re.search(rf"Example:\n\s+lfmq {name} ", text)
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert not [p.name for p in options if not p.help]


@pytest.mark.parametrize("name", COMMANDS)
def test_example_is_accepted(name: str) -> None:
    """The example's options and arguments parse; nothing is run."""
    command = main.commands[name]
    example = (command.epilog or command.help or "").strip().splitlines()[-1].split()
    assert example[:2] == ["lfmq", name]
    command.make_context(name, example[2:])


def test_cli_page_is_generated() -> None:
    render = runpy.run_path(str(DOCS / "generate_cli.py"))["render"]
    assert (DOCS / "cli.md").read_text("utf-8") == render(), "run: make docs"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_format_has_a_page(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text("utf-8")
    assert "refuse" in page.lower()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def rooms() -> set[str]:
    """Every package folder below the root, as ``formats/gguf/``."""
    tops = [p.parent for p in ROOT.glob("*/__init__.py")]
    found = (p.parent.relative_to(ROOT) for top in tops for p in top.rglob("__init__.py"))
    return {f"{folder.as_posix()}/" for folder in found}


def test_architecture_has_a_line_for_every_room() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    named = re.findall(r"^\| `([\w/]+/)` \| \S", page, re.M)
    assert len(named) == len(set(named))
    assert set(named) == rooms()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_in_pages_exist(page: Path) -> None:
    """A path in backticks, as ``formats/gguf/``, is there; NAME stands for any name."""
    if page.name == "CHANGELOG.md":
        pytest.skip("names what a release had")
    for path in re.findall(rf"`((?:{NAMED})/[\w./*-]*)`", page.read_text("utf-8")):
        pattern = path.rstrip("/").replace("NAME", "*")
        assert [*ROOT.glob(pattern)], f"{page.name} names {path}"


def test_terms_page_names_every_figure_option() -> None:
    """Each limit on the command line belongs to a figure of the page of terms."""
    page = (DOCS / "terms.md").read_text("utf-8")
    options = [o for p in main.commands["validate"].params for o in p.opts]
    limits = [o for o in options if o.startswith(("--max-", "--min-"))]
    assert limits
    assert not [o for o in limits if f"`{o}`" not in page]


def test_readme_starts_with_the_two_commands() -> None:
    start = "\n".join((ROOT / "README.md").read_text("utf-8").splitlines()[:40])
    assert "make demo" in start
    assert "make test" in start


def test_changelog_speaks_of_this_version() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    version = re.search(r'^version = "(.*)"$', project, re.M)
    assert version is not None
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_recipe_page_shows_the_built_in_recipes() -> None:
    examples = fenced((DOCS / "recipes.md").read_text("utf-8"), "toml")
    for name in builtin_recipes():
        assert load_recipe(name).text in examples, f"docs/recipes.md does not quote {name}"


def test_recipe_page_examples_resolve(sample_folder: Path) -> None:
    config = open_checkpoint(sample_folder).config
    for number, example in enumerate(fenced((DOCS / "recipes.md").read_text("utf-8"), "toml"), 1):
        resolve_plan(config, parse_recipe(example, f"example {number}", "docs/recipes.md"))


def test_recipe_page_names_every_role() -> None:
    page = (DOCS / "recipes.md").read_text("utf-8")
    assert not [role for role in (*EXPERT_ROLES, *SHARED_ROLES) if f"`{role}`" not in page]
