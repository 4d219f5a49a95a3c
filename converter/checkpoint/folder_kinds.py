"""What a path is that is no checkpoint, and what to give in its place."""

import re
from pathlib import Path
from typing import NoReturn

from lfmq.formats.huggingface.json_file import parse_object
from lfmq.quant.errors import CheckpointError

_ADAPTER = "adapter_config.json"
_RUN = re.compile(r"checkpoint-(\d+)")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def refuse_other_kinds(folder: Path) -> None:
    """Refuse a path that is something else than a checkpoint folder.

    Raises:
        CheckpointError: says what it is, and what to use.
    """
    if folder.is_file():
        _refuse_file(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / _ADAPTER).is_file():
        _refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        _refuse_without_config(folder)


def _refuse_file(path: Path) -> NoReturn:
    if path.suffix == ".gguf":
        raise CheckpointError(
            f"{path}: a GGUF file, which is a finished build; give the folder of the checkpoint "
            "it was made from, with config.json and safetensors"
        )
    inside = f"give the folder it lies in, {path.parent}"
    if path.suffix == ".safetensors" and not (path.parent / "config.json").is_file():
        inside = "put it into a folder with the model's config.json and tokenizer, and give that"
    raise CheckpointError(f"{path}: a file, expected a checkpoint folder; {inside}")


def _refuse_adapter(folder: Path) -> NoReturn:
    path = folder / _ADAPTER
    try:
        base = parse_object(path.read_bytes(), path).get("base_model_name_or_path")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    of = f" of {str(base)[:80]}" if base else ""
    raise CheckpointError(
        f"{path}: an adapter (LoRA){of}, not a whole model; merge it into its base first "
        "(merge_and_unload of peft, then save_pretrained) and give that folder"
    )


def _refuse_without_config(folder: Path) -> None:
    runs = {int(m[1]): p for p in folder.iterdir() if (m := _RUN.fullmatch(p.name)) and p.is_dir()}
    if runs:
        raise CheckpointError(
            f"{folder}: the folder of a training run, not a checkpoint; give one inside it, the "
            f"newest is {runs[max(runs)]}"
        )
    if inside := sorted(p.name for p in folder.glob("models--*--*") if p.is_dir()):
        raise CheckpointError(
            f"{folder}: a cache of the Hub; give one of its models, such as {folder / inside[0]}"
        )
    if found := sorted(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{found[0]}: a GGUF file, which is a finished build; {folder} has no config.json and "
            "safetensors of a checkpoint"
        )
    if below := sorted(p.parent for p in folder.glob("*/config.json")):
        raise CheckpointError(
            f"{folder / 'config.json'}: not found; {folder} is not a checkpoint folder, but "
            f"{below[0]} may be one"
        )


def refuse_without_weights(folder: Path, present: list[str]) -> NoReturn:
    """Refuse a folder with a config and no weights, and say what lies there in their place.

    Args:
        folder: of the checkpoint.
        present: the safetensors files in it, of which none counts.

    Raises:
        CheckpointError: always.
    """
    names = sorted(p.name for p in folder.iterdir())
    wanted = "neither model.safetensors nor model.safetensors.index.json found"
    if present:
        raise CheckpointError(
            f"{folder}: {wanted}; {present[0]} is there, under a name that transformers does not "
            "load by itself; if it holds the whole model, rename it to model.safetensors"
        )
    broken = [
        n for n in names if n.endswith(".safetensors") or n == "model.safetensors.index.json"
    ]
    if broken:
        raise CheckpointError(
            f"{folder / broken[0]}: a link to a file that is not there; download the checkpoint "
            "again"
        )
    if pickles := [n for n in names if n.endswith(_PICKLES)]:
        raise CheckpointError(
            f"{folder / pickles[0]}: a pickle file, which is never opened (it can run code); "
            "convert the checkpoint to safetensors first (from_pretrained and save_pretrained of "
            "transformers)"
        )
    for ending, kind in ((".gguf", "a GGUF"), (".onnx", "an ONNX")):
        if found := [n for n in names if n.endswith(ending)]:
            raise CheckpointError(
                f"{folder / found[0]}: {kind} file, which is a finished build; give the folder of "
                "the checkpoint it was made from, with safetensors"
            )
    raise CheckpointError(f"{folder}: {wanted}")
