"""``import lfmq``: its names, their types and documents, and the example of docs/python.md."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import lfmq

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = sorted(n for n in lfmq.__all__ if inspect.isfunction(getattr(lfmq, n)))
PROMISED = {
    "open_checkpoint", "load_recipe", "plan", "calibrate", "convert", "validate", "compare",
    "verify", "LfmqError", "CheckpointError", "RecipeError", "PlanError", "UnsupportedError",
    "ValidationError", "__version__",
}  # fmt: skip


def test_every_name_is_there() -> None:
    assert set(lfmq.__all__) >= PROMISED
    assert lfmq.__all__ == sorted(lfmq.__all__)
    assert set(dir(lfmq)) >= set(lfmq.__all__)
    for name in lfmq.__all__:
        assert getattr(lfmq, name) is getattr(lfmq, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lfmq.nothing  # noqa: B018


def test_version_is_that_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'version = "{lfmq.__version__}"' in project


def test_type_checkers_see_every_name() -> None:
    """What is imported late is named for them under TYPE_CHECKING."""
    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If)]
    seen = {alias.name for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert seen | {"__version__"} == set(lfmq.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_documented(name: str) -> None:
    """Args where there are four parameters or more, and what it raises."""
    function = getattr(lfmq, name)
    document = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert "\nRaises:\n" in document
    if len(signature.parameters) >= 4:
        for parameter in signature.parameters:
            assert re.search(rf"^ +(\*\*)?{parameter}: ", document, re.M), parameter


@pytest.mark.parametrize("name", sorted(set(lfmq.__all__) - set(FUNCTIONS) - {"__version__"}))
def test_value_is_documented(name: str) -> None:
    """Its attributes, unless a single sentence says it all."""
    kind = getattr(lfmq, name)
    document = inspect.getdoc(kind) or ""
    assert document
    fields = getattr(kind, "__dataclass_fields__", {})
    if len(fields) >= 3 and name != "Checkpoint":
        for field in fields:
            assert re.search(rf"^ +{field}: ", document, re.M), field


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/python.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "mean KL divergence 0.0" in printed
    assert (tmp_path / "builds" / "lfm2moe-tiny-int4.gguf").is_file()


def test_the_page_names_every_function() -> None:
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    assert not [n for n in FUNCTIONS if f"`{n}(" not in page]
    assert not [n for n in lfmq.__all__ if n.endswith("Error") and f"`{n}`" not in page]
