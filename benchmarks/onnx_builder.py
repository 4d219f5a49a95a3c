"""Conversion to ONNX int4 beside onnxruntime-genai's model builder: seconds and peak memory.

    python benchmarks/onnx_builder.py --layers 6 --scratch DIR

The checkpoint has the shapes of LFM2.5-8B-A1B's layers, but fewer of them: the builder holds the
model in memory. ``builder`` is ``python -m onnxruntime_genai.models.builder --precision int4``,
which rounds every matrix of the layers and the head to 4 bits in groups of 32; ``lfmq`` is
``lfmq convert --to onnx --uncalibrated`` with ``int4`` and, for the same widths but the head's,
``int4-all``. Every run is a process of its own that reads a disk whose cache was dropped; the
programs take turns, medians are shown. The builder is left out, with a line, where it would need
more memory than is free.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import psutil
from full_size import ROUNDS, Row, convert, make, print_table, report, row_of, size_of
from watch import forget, watch

RECIPES = ("int4", "int4-all")
# The builder's peak over the checkpoint's bytes, and what it has beside; measured here: 6.1 GB for
# a checkpoint of 3.7 GB, 1.4 GB for 0.5 GB.
BUILDER_SHARE, ROOM_BYTES = 1.6, 0.7e9


def main() -> None:
    """Run the programs in turn; print a line of JSON for each run, then the table."""
    options = parse_options()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        options.work = Path(scratch)
        if options.checkpoint is None:
            options.checkpoint = options.work / "checkpoint"
            counts = ("--layers", options.layers, "--experts", options.experts)
            make(options.checkpoint, *map(str, counts), "--vocabulary", str(options.vocabulary))
        size = size_of(options.checkpoint)
        print(f"checkpoint: {size:,} bytes")
        rows: list[Row] = []
        for _ in range(options.rounds):
            for recipe in RECIPES:
                words = ("--uncalibrated", "--recipe", recipe)
                for row in convert(options, options.checkpoint, ["onnx"], *words):
                    row.pop("lines")
                    rows.append(report("lfmq", row | {"run": recipe}))
            if room_for_builder(size):
                rows.append(report("builder", build(options)))
    print_table(rows)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="one made before; default: make it")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=128000)
    parser.add_argument("--scratch", type=Path, help="folder for what is written")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    options.threads = len(os.sched_getaffinity(0))
    return options


def room_for_builder(checkpoint_bytes: int) -> bool:
    """Whether the builder's memory is free; says so where it is not."""
    needed = BUILDER_SHARE * checkpoint_bytes + ROOM_BYTES
    free: int = psutil.virtual_memory().available
    if needed > free:
        print(f"builder: left out, needs about {needed:,.0f} bytes of memory, {free:,} are free")
    return needed <= free


def build(options: argparse.Namespace) -> Row:
    """The builder's conversion, on CPU, with what it does when not told otherwise."""
    output, cache = options.work / "built", options.work / "cache"
    forget(options.checkpoint)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
    command += ["-i", options.checkpoint, "-o", output, "-c", cache, "-p", "int4"]
    found = watch(command, {"HF_HUB_OFFLINE": "1"})
    row = row_of("int4", found, output)
    shutil.rmtree(output)
    shutil.rmtree(cache, ignore_errors=True)
    return row


if __name__ == "__main__":
    main()
