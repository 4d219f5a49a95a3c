"""Whether two revisions of this repository write the same tensors.

Both convert the sample, each in processes of its own; then every tensor of every build is read
with a foreign reader (gguf-py, safetensors, onnx) and compared byte for byte, under the recipes
``int4``, ``int8`` and ``q4_k_m`` without calibration and ``int4`` with it. K-quants exist in GGUF
alone; the other recipes are written in all four formats.

    python benchmarks/same_tensors.py --against 40980aa

Run one at a time on one machine: calibrated sums depend on the kind of processor.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from gguf import GGUFReader
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
EVERY = ("gguf", "mlx", "onnx", "compressed-tensors")
# Recipe, containers and whether it is calibrated.
RUNS = (
    ("int4", EVERY, False),
    ("int8", EVERY, False),
    ("q4_k_m", ("gguf",), False),
    ("int4", EVERY, True),
)


def build(package: Path, output: Path) -> None:
    """All builds by the code in ``package``, a folder called lfmq."""
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    for recipe, formats, calibrated in RUNS:
        folder = output / f"{recipe}-{'calibrated' if calibrated else 'nearest'}"
        command = [sys.executable, "-P", "-m", "lfmq.cli", "convert", "sample", "--quiet"]
        command += ["--recipe", recipe, "--output", str(folder)]
        command += [word for name in formats for word in ("--to", name)]
        command += ["--sequence", "256"] if calibrated else ["--uncalibrated"]
        subprocess.run(command, check=True, env=environment, cwd=output, stdout=sys.stderr)


def tensors(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every tensor below a folder, by foreign readers."""
    for path in sorted(folder.rglob("*.gguf")):
        for tensor in GGUFReader(path).tensors:
            yield f"gguf {tensor.name} {tensor.tensor_type.name}", tensor.data.tobytes()
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            for name in sorted(opened.keys()):
                tensor = opened.get_tensor(name)
                kind = f"{path.parent.name} {name} {tensor.dtype} {tuple(tensor.shape)}"
                yield kind, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    for path in sorted(folder.rglob("*.onnx")):
        for tensor in onnx.load(path).graph.initializer:
            yield f"onnx {tensor.name} {tensor.data_type} {list(tensor.dims)}", tensor.raw_data


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", required=True, help="the other revision")
    options = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        old, new = place / "old" / "lfmq", place / "new" / "lfmq"
        command = ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(old)]
        subprocess.run([*command, options.against], check=True, stdout=sys.stderr)
        try:
            new.parent.mkdir()
            new.symlink_to(ROOT)
            for side, package in (("before", old), ("after", new)):
                (place / side).mkdir()
                build(package, place / side)
        finally:
            remove = ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(old)]
            subprocess.run(remove, check=True)
        for recipe, formats, calibrated in RUNS:
            name = f"{recipe}-{'calibrated' if calibrated else 'nearest'}"
            before, after = (dict(tensors(place / side / name)) for side in ("before", "after"))
            changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
            different += len(changed)
            digest = hashlib.sha256(b"".join(after[k] for k in sorted(after))).hexdigest()[:16]
            print(
                f"{name:18} {', '.join(formats):38} {len(after):5} tensors, "
                f"{len(changed)} differ, sha256 {digest}"
            )
            for key in sorted(changed)[:5]:
                print(f"    {key}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
