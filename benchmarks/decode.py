"""Tokens per second of builds in llama.cpp, ONNX Runtime and mlx-lm on CPU, and bytes a token.

    python benchmarks/decode.py --checkpoint FOLDER --recipe int4 --recipe int8 --llama-bin DIR

Decoding is bound by the bytes read for a token: ``MB/token`` is what
``lfmq.converter.plan.plan.token_bytes`` counts (of experts the share that is chosen, all else
once; keys, values and states not), ``GB/s`` that times the tokens per second. Builds are made of
``--recipe`` (rounded to nearest: speed does not depend on the values), or given by ``--build``.
With ``--llama-bin``, the folder of ``llama-quantize``, llama.cpp's own types are rows too, made of
a bfloat16 GGUF. Every run is a process of its own (``decode_engines.py``); builds take turns for
some rounds, medians and the range are shown. A build that memory will not do for is left out, with
a line. Without ``--checkpoint`` one of the full size is made first (17 GB).

It wants a machine with nothing else to do: runtimes' threads wait for each other by spinning, and
one that has lost its core holds up all. The load before the first run is shown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from decode_engines import ENGINES
from full_size import make, size_of
from gguf import GGUFReader
from rich.console import Console
from rich.table import Table
from watch import watch

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.planned import plan_builds
from lfmq.formats.plan import ModelConfig
from lfmq.formats.registry import FORMATS, detect_format

HERE = Path(__file__).parent
LLAMA_TYPES = ("Q4_0", "Q4_K_M")
YARDSTICK = "Q4_K_M"
FLOAT_RECIPE = '[[rule]]\nfloat = "bfloat16"\n'
# Memory of a run over the build's bytes: llama.cpp maps the file; ONNX Runtime keeps a second,
# rearranged copy of what it read; mlx-lm's scales and biases become float32.
MEMORY = {"gguf": 1.0, "onnx": 2.2, "mlx": 1.3}
ROOM_BYTES = 1.5e9  # of activations, cache and the interpreter


@dataclass(frozen=True, slots=True)
class Row:
    """A build to be run; ``token_bytes`` is None where it cannot be told from the files."""

    name: str
    format: str
    path: Path
    token_bytes: int | None


def main() -> None:
    """Make the builds, run them in turn, print a line of JSON for each run and the table."""
    options = parse_options()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        options.work = Path(scratch)
        if options.checkpoint is None:
            options.checkpoint = options.work / "full-size"
            make(options.checkpoint)
        rows = [row for row in make_rows(options) if has_room(row)]
        found: dict[Row, list[dict[str, float]]] = {row: [] for row in rows}
        print(f"load of the last minute: {os.getloadavg()[0]:.1f}")
        for _ in range(options.rounds):
            for row in rows:
                figures = run(row, options)
                found[row].append(figures)
                line = {"build": row.name, "format": row.format, **figures}
                print(json.dumps(line), flush=True)
        show(found, options)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint made before")
    parser.add_argument("--recipe", action="append", default=[], help="a name or a file")
    parser.add_argument("--build", type=Path, action="append", default=[], help="a finished build")
    parser.add_argument("--to", action="append", choices=list(ENGINES), help="default: all")
    parser.add_argument("--llama-bin", type=Path, help="folder with llama-quantize")
    parser.add_argument("--scratch", type=Path, help="folder for what is written")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded after it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.to = options.to or list(ENGINES)
    if not (options.recipe or options.build):
        options.recipe = ["int4"]
    return options


def make_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Builds of the recipes, those given, and llama.cpp's own."""
    checkpoint = open_checkpoint(options.checkpoint)
    for number, recipe in enumerate(options.recipe):
        yield from convert(checkpoint, recipe, options, options.work / str(number))
    for path in options.build:
        format = detect_format(path)
        nbytes = gguf_token_bytes(path, checkpoint.config) if format == "gguf" else None
        yield Row(path.name, format, path, nbytes)
    if options.llama_bin is not None and "gguf" in options.to:
        yield from llama_types(checkpoint, options)


def convert(
    checkpoint: Checkpoint, recipe: str, options: argparse.Namespace, output: Path
) -> Iterator[Row]:
    """A recipe's builds in the formats that hold it; a line for each that does not."""
    parsed = load_recipe(recipe)
    plan = resolve_plan(checkpoint.config, parsed)
    planned = {}
    for build in plan_builds(checkpoint, plan, {name: FORMATS[name] for name in options.to}):
        if build.refused is None:
            planned[build.format] = build.bytes_per_token
        else:
            print(f"{parsed.name} to {build.format}: left out: {build.refused}")
    if not planned:
        return
    command = [sys.executable, "-m", "lfmq.cli", "convert", options.checkpoint, "--uncalibrated"]
    command += ["--recipe", recipe, "--output", output, "--json"]
    command += [word for name in planned for word in ("--to", name)]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True)
    for made in json.loads(done.stdout)["builds"]:
        name = made["format"]
        yield Row(parsed.name, name, Path(made["path"]), planned[name])


def llama_types(checkpoint: Checkpoint, options: argparse.Namespace) -> Iterator[Row]:
    """llama-quantize's files from a bfloat16 GGUF, which is removed when they are made."""
    recipe = options.work / "bfloat16.toml"
    recipe.write_text(FLOAT_RECIPE)
    alone = argparse.Namespace(**vars(options) | {"to": ["gguf"]})
    (whole,) = convert(checkpoint, str(recipe), alone, options.work / "bfloat16")
    paths = {kind: options.work / f"{kind}.gguf" for kind in LLAMA_TYPES}
    for kind, path in paths.items():
        command = [options.llama_bin / "llama-quantize", whole.path, path, kind]
        watch([*command, str(options.threads)], {"LD_LIBRARY_PATH": str(options.llama_bin)})
    whole.path.unlink()
    for kind, path in paths.items():
        yield Row(kind, "gguf", path, gguf_token_bytes(path, checkpoint.config))


def gguf_token_bytes(path: Path, g: ModelConfig) -> int:
    """As ``lfmq.converter.plan.plan.token_bytes``, from the tensors of a file."""
    routed = always = 0
    for tensor in GGUFReader(path).tensors:
        if "_exps." in tensor.name:
            routed += int(tensor.n_bytes)
        else:
            always += int(tensor.n_bytes)
    return always + routed * g.num_experts_per_tok // g.num_experts


def has_room(row: Row) -> bool:
    """Whether a run's memory is free; says so where it is not."""
    needed = MEMORY[row.format] * size_of(row.path) + ROOM_BYTES
    free: int = psutil.virtual_memory().available
    if needed > free:
        print(
            f"{row.name} in {row.format}: left out, needs about {needed:,.0f} bytes of memory, "
            f"{free:,} are free"
        )
    return needed <= free


def run(row: Row, options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of one run."""
    command: list[str | Path] = [sys.executable, HERE / "decode_engines.py", row.path]
    for name in ("prompt", "tokens", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    found = watch(command, {"OMP_NUM_THREADS": str(options.threads)})
    lines = [line for _, line in found.lines if line.startswith('{"prefill"')]
    figures: dict[str, float] = json.loads(lines[-1])
    return figures | {"peak_anonymous_bytes": found.peak_bytes}


def show(found: dict[Row, list[dict[str, float]]], options: argparse.Namespace) -> None:
    """Medians, the range of decoding, and what it is of the yardstick's."""
    table = Table(
        title=f"{options.rounds} rounds in turn, {options.threads} threads, a prompt of "
        f"{options.prompt} tokens, then {options.tokens} one at a time"
    )
    columns = ("build", "format", "bytes", "MB/token", "prefill tokens/s", "decode tokens/s")
    for column in (*columns, "range", "GB/s", f"of {YARDSTICK}", "peak anonymous MB"):
        table.add_column(column, justify="left" if column in ("build", "format") else "right")
    decode = {
        row: statistics.median(figures["decode"] for figures in runs)
        for row, runs in found.items()
    }
    yardstick = next((rate for row, rate in decode.items() if row.name == YARDSTICK), None)
    for row, runs in found.items():
        rates = [figures["decode"] for figures in runs]
        rate, nbytes = decode[row], row.token_bytes
        table.add_row(
            row.name,
            row.format,
            f"{size_of(row.path):,}",
            "" if nbytes is None else f"{nbytes / 1e6:.1f}",
            f"{statistics.median(figures['prefill'] for figures in runs):.1f}",
            f"{rate:.2f}",
            f"{min(rates):.2f}-{max(rates):.2f}",
            "" if nbytes is None else f"{nbytes * rate / 1e9:.2f}",
            "" if yardstick is None else f"{rate / yardstick:.3f}",
            f"{max(figures['peak_anonymous_bytes'] for figures in runs) / 1e6:,.0f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
