"""The containers by name, and which of them a path on disk is."""

from pathlib import Path

from lfmq.formats import gguf, mlx, onnx
from lfmq.formats.build import Format
from lfmq.quant.errors import ValidationError

FORMATS: dict[str, Format] = {"gguf": gguf, "mlx": mlx, "onnx": onnx}


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
        return "mlx"
    raise ValidationError(f"{path}: not a build; expected a .gguf file or an MLX or ONNX folder")


def build_nbytes(path: Path) -> int:
    """Size of a build on disk, all its files."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
