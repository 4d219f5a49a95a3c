"""The project's own workflows and hooks: they name targets, versions and programs that exist."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text("utf-8"))["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


def test_there_is_one_for_changes_and_one_for_releases() -> None:
    assert [path.stem for path in WORKFLOWS] == ["ci", "release"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.stem)
def test_actions_are_pinned_and_rights_are_stated(workflow: Path) -> None:
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert not [action for action in used if not re.search(r"@v\d+", action)]
    assert yaml.safe_load(workflow.read_text("utf-8"))["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.stem)
def test_python_versions_are_supported(workflow: Path) -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    versions = re.findall(r'"(3\.\d+)"', workflow.read_text("utf-8"))
    assert versions
    assert all(version in supported for version in versions)


def test_a_change_is_checked_shown_and_tested() -> None:
    run = [step.get("run", "") for step in steps(ROOT / ".github" / "workflows" / "ci.yml")]
    targets = re.findall(r"make (\w+)", "\n".join(run))
    assert targets == ["check", "demo", "test"]
    assert all(re.search(rf"^{target}:", MAKEFILE, re.M) for target in targets)


def test_hooks_are_programs_of_make_check() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    programs = {hook["entry"].removeprefix(".venv/bin/").split()[0] for hook in hooks}
    assert programs == {"ruff", "lint-imports", "mypy"}
    assert all(f"$(BIN)/{program}" in MAKEFILE for program in programs)
