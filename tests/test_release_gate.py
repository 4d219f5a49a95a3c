"""The release gate's examples and the page on runtimes: what they say is what there is."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import yaml

from lfmq.cli import main
from lfmq.formats.versions import KNOWN_BAD, PROVEN
from lfmq.validation.gate.thresholds import load_thresholds

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WORKFLOW = (DOCS / "examples" / "release-gate.yml").read_text("utf-8")
THRESHOLDS = DOCS / "examples" / "thresholds.toml"
PAGE = (DOCS / "release-gate.md").read_text("utf-8")


def steps() -> list[dict[str, Any]]:
    (job,) = yaml.safe_load(WORKFLOW)["jobs"].values()
    return list(job["steps"])


def commands() -> list[list[str]]:
    """The lfmq commands of the workflow, with its variables set, without redirections."""
    environment = yaml.safe_load(WORKFLOW)["env"]
    found = []
    for step in steps():
        for line in step.get("run", "").replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r">.*", "", line))
            values = [re.sub(r"\$(\w+)", lambda m: str(environment[m[1]]), w) for w in words]
            if values[:1] == ["lfmq"]:
                found.append(values[1:])
    return found


def parse(words: list[str]) -> None:
    command = main.commands[words[0]]
    command.make_context(words[0], words[1:], parent=click.Context(main))


def test_the_page_quotes_the_files():
    assert f"```yaml\n{WORKFLOW}```\n" in PAGE
    assert f"```toml\n{THRESHOLDS.read_text('utf-8')}```\n" in PAGE


def test_the_workflow_converts_verifies_and_validates():
    assert [words[0] for words in commands()] == ["convert", "verify", "validate"]
    parse(commands()[0])
    parse(commands()[1])


def test_the_workflow_validates_with_options_that_exist():
    parse(commands()[2])


def test_nothing_is_published_that_was_refused():
    """A step without a condition runs only when all before it were good."""
    names = [step.get("name", step.get("uses")) for step in steps()]
    validate, publish = names.index("Validate"), names.index("Publish")
    assert validate < publish == len(names) - 1
    assert "if" not in steps()[publish]
    assert "continue-on-error" not in WORKFLOW
    kept = next(step for step in steps() if step.get("with", {}).get("path") == "report")
    assert kept["if"] == "${{ !cancelled() }}"
    assert "--html report/" in steps()[validate]["run"]
    assert yaml.safe_load(WORKFLOW)["permissions"] == {"contents": "read"}


def test_the_workflow_installs_what_is_tested():
    installs = [x for step in steps() for x in step.get("run", "").splitlines() if "pip" in x]
    assert installs
    assert all(" -c constraints.txt " in line for line in installs)
    assert str(THRESHOLDS.relative_to(ROOT)) in WORKFLOW


def test_limits_of_the_example_exist():
    found = load_thresholds(THRESHOLDS)
    assert dict(found.limits) == tomllib.loads(THRESHOLDS.read_text("utf-8"))["limits"]


def test_the_page_on_runtimes_has_the_whole_table():
    page = (DOCS / "runtimes.md").read_text("utf-8")
    for format, packages in PROVEN.items():
        assert f"| {format} | {', '.join(packages)} |\n" in page
    rows = [line.strip("|").split(" | ") for line in page.splitlines() if "](https://" in line]
    assert len(rows) == len(KNOWN_BAD)
    for cells, row in zip(rows, KNOWN_BAD, strict=True):
        what, bad, builds, wrong, remedy, source = (c.strip() for c in cells)
        assert (what, bad) == (row.what.rstrip(","), row.bad)
        assert (wrong, remedy) == (row.wrong, row.remedy)
        assert f"]({row.source})" in source
        named = set(PROVEN) if builds.startswith("all formats") else {builds.partition(", ")[0]}
        assert named == set(row.formats)
        assert builds.endswith(row.concern or named.pop())
