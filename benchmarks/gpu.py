"""A calibrated conversion of the full-size model on a GPU, its time and memory.

A checkpoint of the real model's shapes is made first (17 GB with 24 layers), then converted to a
GGUF with calibration, on the GPU and, with ``--cpu-layers``, on the CPU with fewer layers: the
median time of a layer is what the two have in common. Calibrating text is the sample's.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import lfmq
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.jobs.execution import Device, Execution, Step

LAYERS = 24


def main() -> None:
    """Make, convert, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--cpu-layers", type=int, default=0, help="0 leaves the CPU out")
    parser.add_argument("--tokens", type=int, default=32768, help="of the calibration text")
    parser.add_argument("--recipe", action="append", help="default: int4")
    parser.add_argument("--scratch", type=Path, help="folder for what is written, 25 GB")
    options = parser.parse_args()
    runs: list[tuple[Device, int]] = [("cuda", options.layers)]
    if options.cpu_layers:
        runs.append(("cpu", options.cpu_layers))
    table = Table(title=f"{torch.cuda.get_device_name()}, {options.tokens:,} tokens")
    columns = ("recipe", "device", "layers", "seconds", "seconds a layer", "GPU GB", "resident GB")
    for column in columns:
        table.add_column(column, justify="right" if column.startswith(("s", "l")) else "left")
    for device, layers in runs:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            checkpoint = Path(scratch) / "checkpoint"
            script = str(Path(__file__).with_name("make_checkpoint.py"))
            command = [sys.executable, script, str(checkpoint), "--layers", str(layers)]
            subprocess.run(command, check=True)
            for recipe in options.recipe or ("int4",):
                row = measure(checkpoint, Path(scratch) / recipe, recipe, device, options.tokens)
                print(recipe, device, layers, *row, flush=True)
                table.add_row(recipe, device, str(layers), *row)
    Console(width=100).print(table)


def measure(
    checkpoint: Path, output: Path, recipe: str, device: Device, tokens: int
) -> tuple[str, ...]:
    """Seconds, the median of a layer's, and the most memory of the GPU and of the process."""
    begun: list[float] = []

    def note(step: Step) -> None:
        if step.phase == "quantizing" and step.amounts[0].layers > len(begun):
            begun.append(time.monotonic())

    torch.cuda.reset_peak_memory_stats()
    report = lfmq.convert(
        checkpoint,
        output,
        recipe=recipe,
        to=("gguf",),
        text=sample_file("calibration.jsonl"),
        tokens=tokens,
        execution=Execution(device=device, progress=note),
    )
    layers = [later - earlier for earlier, later in pairwise(begun)]
    return (
        f"{report.seconds:.1f}",
        f"{statistics.median(layers):.2f}" if layers else "",
        f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if device == "cuda" else "",
        f"{report.peak_rss_bytes / 1e9:.2f}",
    )


if __name__ == "__main__":
    main()
