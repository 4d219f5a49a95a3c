"""Time and memory at LFM2.5-8B-A1B's size, beside the disk's speed and other tools.

    python benchmarks/full_size.py --checkpoint FOLDER --llama-source DIR --llama-bin DIR

Every run is a process of its own that reads a disk whose cache was dropped. The parts, of which
``--part`` chooses some: ``disk`` (plain reads and writes of as many bytes), ``gguf`` (``int4``
rounded to nearest), ``all`` (every format in one run), ``llama.cpp`` (its converter, then
``llama-quantize`` to Q4_0), ``mlx`` and ``mlx-lm``, ``growth`` (other numbers of layers and
experts), ``calibrated`` (four layers, the rest by arithmetic). Rounds take turns; medians are
shown. Without ``--checkpoint`` one is made first (17 GB). ``onnx_builder.py`` and ``kills.py`` are
commands of their own.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from watch import Watched, forget, read_plainly, watch, write_plainly

from lfmq.formats.registry import FORMATS

HERE = Path(__file__).parent
PARTS = ("disk", "gguf", "all", "llama.cpp", "mlx", "mlx-lm", "growth", "calibrated")
ROUNDS = 3
# Layers, experts and their width; the last is LFM2-24B-A2B's, whose vocabulary is smaller.
GROWTH = ((6, 32, 1792, 128000), (12, 32, 1792, 128000), (40, 64, 1536, 65536))
# A calibrated run's checkpoint: two dense layers, a MoE layer with attention, one without.
CALIBRATED_LAYERS = 4
ATTENTION_LAYERS, CONVOLUTION_LAYERS = 6, 16  # MoE layers of LFM2.5-8B-A1B
Row = dict[str, Any]


def main() -> None:
    """Run the parts; print a table and a line of JSON for each run."""
    options = parse_options()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        options.work = Path(scratch)
        if options.checkpoint is None:
            options.checkpoint = options.work / "full-size"
            make(options.checkpoint)
        rows: list[Row] = []
        for _ in range(options.rounds):
            for part, run in takes_turns(options).items():
                if part in options.part:
                    rows += [report(part, row) for row in run()]
        if "growth" in options.part:
            rows += [report("growth", row) for row in grow(options)]
        if "calibrated" in options.part:
            rows += [report("calibrated", row) for row in calibrate(options)]
    print_table(rows)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint made before")
    parser.add_argument("--scratch", type=Path, help="folder for what is written, 70 GB")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--llama-source", type=Path, help="llama.cpp's source")
    parser.add_argument("--llama-bin", type=Path, help="folder with llama-quantize")
    parser.add_argument("--tokens", type=int, default=32768, help="of the calibration text")
    parser.add_argument("--largest", type=int, default=40, help="layers of the largest growth run")
    options = parser.parse_args()
    options.part = options.part or list(PARTS)
    options.threads = len(os.sched_getaffinity(0))
    if "llama.cpp" in options.part and not (options.llama_source and options.llama_bin):
        parser.error("part llama.cpp wants --llama-source and --llama-bin")
    return options


def report(part: str, row: Row) -> Row:
    """A run's line."""
    row = {"part": part, **row}
    print(json.dumps(row), flush=True)
    return row


def make(folder: Path, *words: str) -> None:
    """Make a checkpoint."""
    command = [sys.executable, str(HERE / "make_checkpoint.py"), str(folder), *words]
    subprocess.run(command, check=True)


def weight_files(checkpoint: Path) -> list[Path]:
    """In order."""
    return sorted(checkpoint.glob("*.safetensors"))


def size_of(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def takes_turns(options: argparse.Namespace) -> dict[str, Callable[[], list[Row]]]:
    """The parts that every round runs."""
    return {
        "disk": partial(use_disk, options),
        "gguf": partial(convert, options, options.checkpoint, ["gguf"]),
        "all": partial(convert, options, options.checkpoint, list(FORMATS)),
        "llama.cpp": partial(llama_cpp, options),
        "mlx": partial(convert, options, options.checkpoint, ["mlx"]),
        "mlx-lm": partial(mlx_lm, options),
    }


def use_disk(options: argparse.Namespace) -> list[Row]:
    """A plain read of the checkpoint, a plain write of a GGUF's bytes."""
    forget(options.checkpoint)
    files = weight_files(options.checkpoint)
    seconds = read_plainly(files)
    nbytes = sum(p.stat().st_size for p in files)
    written = int(nbytes * 0.303)  # 4.85 of 16 bits a weight
    return [
        {"run": "plain read", "seconds": seconds, "bytes": nbytes},
        {
            "run": "plain write",
            "seconds": write_plainly(options.work / "plain", written),
            "bytes": written,
        },
    ]


def row_of(name: str, found: Watched, path: Path) -> Row:
    """A run's figures."""
    return {
        "run": name,
        "seconds": found.seconds,
        "peak_anonymous_bytes": found.peak_bytes,
        "bytes": size_of(path),
    }


def convert(
    options: argparse.Namespace, checkpoint: Path, formats: list[str], *words: str
) -> list[Row]:
    """``lfmq convert``, rounded to nearest unless words say otherwise."""
    output = options.work / "builds"
    forget(checkpoint)
    command = [sys.executable, "-m", "lfmq.cli", "convert", checkpoint, "--output", output]
    command += [word for name in formats for word in ("--to", name)]
    command += ["--threads", str(options.threads), *(words or ("--uncalibrated",))]
    found = watch(command)
    row = row_of("+".join(formats), found, output)
    shutil.rmtree(output)
    return [row | {"lines": found.lines}] if words else [row]


def llama_cpp(options: argparse.Namespace) -> list[Row]:
    """llama.cpp's two steps to Q4_0."""
    whole, small = options.work / "bf16.gguf", options.work / "q4_0.gguf"
    forget(options.checkpoint)
    script = HERE / "llama_cpp_convert.py"
    command = [sys.executable, script, options.llama_source, options.checkpoint]
    first = watch([*command, "--outfile", whole, "--outtype", "bf16"])
    rows = [row_of("llama.cpp convert_hf_to_gguf", first, whole)]
    command = [options.llama_bin / "llama-quantize", whole, small, "Q4_0", str(options.threads)]
    second = watch(command, {"LD_LIBRARY_PATH": str(options.llama_bin)})
    rows.append(row_of("llama-quantize Q4_0", second, small))
    whole.unlink()
    small.unlink()
    return rows


def mlx_lm(options: argparse.Namespace) -> list[Row]:
    """``mlx_lm.convert -q``."""
    output = options.work / "mlx"
    forget(options.checkpoint)
    command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", options.checkpoint]
    found = watch([*command, "--mlx-path", output, "-q"], {"HF_HUB_OFFLINE": "1"})
    row = row_of("mlx_lm.convert -q", found, output)
    shutil.rmtree(output)
    return [row]


def grow(options: argparse.Namespace) -> Iterator[Row]:
    """Other numbers of layers and experts, each made, converted once a round and removed."""
    for layers, experts, width, vocabulary in GROWTH:
        if layers > options.largest:
            continue
        folder = options.work / "growth"
        words = ("--layers", layers, "--experts", experts, "--expert-width", width)
        make(folder, *map(str, words), "--vocabulary", str(vocabulary))
        nbytes = size_of(folder)
        for _ in range(options.rounds):
            row = convert(options, folder, ["gguf"])[0]
            name = f"{layers} layers, {experts} experts"
            yield row | {"run": name, "ns_per_weight": row["seconds"] / nbytes * 2e9}
        shutil.rmtree(folder)


def calibrate(options: argparse.Namespace) -> list[Row]:
    """A calibrated run of four layers; what 24 take follows from the time of each layer."""
    folder = options.work / "calibrated"
    make(folder, "--layers", str(CALIBRATED_LAYERS))
    row = convert(options, folder, ["gguf"], "--tokens", str(options.tokens))[0]
    shutil.rmtree(folder)
    begun: dict[int, float] = {}
    for seconds, line in row.pop("lines"):
        if found := re.match(r"quantizing: layer (\d+) of", line):
            begun.setdefault(int(found[1]), seconds)  # a layer's line comes when it is begun
    dense, attention = begun[3] - begun[1], begun[4] - begun[3]
    convolution, first = row["seconds"] - begun[4], begun[1]
    whole = first + dense + ATTENTION_LAYERS * attention + CONVOLUTION_LAYERS * convolution
    return [
        row | {"run": f"{CALIBRATED_LAYERS} layers, {options.tokens:,} tokens"},
        {
            "run": "24 layers, by arithmetic",
            "seconds": whole,
            "peak_anonymous_bytes": row["peak_anonymous_bytes"],
            "attention_layer_seconds": attention,
            "convolution_layer_seconds": convolution,
        },
    ]


def print_table(rows: list[Row]) -> None:
    """Medians of each run."""
    table = Table(title=f"medians of {len(rows)} runs, {len(os.sched_getaffinity(0))} cores")
    for column in ("part", "run", "runs", "seconds", "peak anonymous MB", "bytes", "ns/weight"):
        table.add_column(column, justify="left" if column in ("part", "run") else "right")
    for part, run in dict.fromkeys((row["part"], row["run"]) for row in rows):
        same = [row for row in rows if (row["part"], row["run"]) == (part, run)]

        def median(key: str, form: str, rows: list[Row] = same, by: float = 1) -> str:
            values = [row[key] / by for row in rows if key in row]
            return format(statistics.median(values), form) if values else ""

        cells = (median("seconds", ".1f"), median("peak_anonymous_bytes", ",.0f", same, 1e6))
        more = (median("bytes", ",.0f"), median("ns_per_weight", ".2f"))
        table.add_row(part, run, str(len(same)), *cells, *more)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
