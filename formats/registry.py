"""The containers by name, and which of them a path on disk is.

A container is imported when it is first looked up: gguf-py and onnx take longer to import than
many commands take to run.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lfmq.quant.errors import CheckpointError, LfmqError, UnsupportedError, ValidationError

if TYPE_CHECKING:
    from lfmq.formats.build import Assets, Format
    from lfmq.formats.plan import Plan


def _gguf() -> "Format":
    from lfmq.formats.gguf import container

    return container


def _mlx() -> "Format":
    from lfmq.formats.mlx import container

    return container


def _onnx() -> "Format":
    from lfmq.formats.onnx import container

    return container


def _compressed_tensors() -> "Format":
    from lfmq.formats.compressed_tensors import container

    return container


class _Containers(Mapping[str, "Format"]):
    """Containers by name, in the order they are reported; each imported when it is looked up."""

    def __init__(self, loaders: Mapping[str, Callable[[], "Format"]]) -> None:
        self._loaders = loaders

    def __getitem__(self, name: str) -> "Format":
        return self._loaders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def __contains__(self, name: object) -> bool:
        return name in self._loaders


FORMATS: Mapping[str, "Format"] = _Containers(
    {
        "gguf": _gguf,
        "mlx": _mlx,
        "onnx": _onnx,
        "compressed-tensors": _compressed_tensors,
    }
)


def check_plan(module: "Format", plan: "Plan", assets: "Assets") -> None:
    """Check a plan against a container; the refusal says which others can hold it.

    Raises:
        UnsupportedError: the container cannot hold the plan.
    """
    try:
        module.check(plan, assets)
    except UnsupportedError as error:
        others = [
            name for name, f in FORMATS.items() if f is not module and _holds(f, plan, assets)
        ]
        remedy = "no other format can: change what the recipe gives it"
        if others:
            *first, last = others
            remedy = f"{', '.join(first)} and {last}" if first else last
            remedy += " can hold it"
        raise UnsupportedError(f"{error}; {remedy}") from error


def _holds(module: "Format", plan: "Plan", assets: "Assets") -> bool:
    try:
        module.check(plan, assets)
    except LfmqError:
        return False
    return True


def detect_format(path: Path) -> str:
    """The container a finished build is, by its name or what its folder holds.

    Raises:
        ValidationError: nothing there, or not a build.
    """
    if not path.exists():
        raise ValidationError(f"{path}: no such build")
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    if (path / "model.onnx").is_file():
        return "onnx"
    if (path / "config.json").is_file() and any(path.glob("model*.safetensors")):
        return "compressed-tensors" if _is_compressed_tensors(path) else "mlx"
    raise ValidationError(
        f"{path}: not a build; expected a .gguf file or an MLX, ONNX or compressed-tensors folder"
    )


def _is_compressed_tensors(folder: Path) -> bool:
    """Whether a folder of safetensors says so in its config."""
    from lfmq.formats.huggingface.config import read_config

    try:
        block = read_config(folder).get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(block, dict) and block.get("quant_method") == "compressed-tensors"


def build_files(path: Path) -> tuple[Path, ...]:
    """All files of a build: those of its folder, or the file and its other parts."""
    if path.is_dir():
        return tuple(sorted(p for p in path.rglob("*") if p.is_symlink() or not p.is_dir()))
    from lfmq.formats.gguf.splits import split_files

    return split_files(path)


def build_nbytes(path: Path) -> int:
    """Size of a build on disk, all its files."""
    return sum(file.stat().st_size for file in build_files(path) if file.is_file())
