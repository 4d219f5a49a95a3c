"""Tokenizers and chat templates of builds in every runtime against the checkpoint's, by group.

    python benchmarks/tokenizer_parity.py [CHECKPOINT...]

Without a checkpoint: the sample, the dense sample, and the sample with 64 added tokens. Each is
rounded to nearest into every container; docs/tokenizers.md describes the groups.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import lfmq
from lfmq.converter.jobs.execution import Execution
from lfmq.validation.parity.result import Parity
from lfmq.validation.parity.run import measure_parity

SAMPLES = Path(__file__).resolve().parents[1] / "samples"


def added_tokens(first: int) -> list[dict[str, Any]]:
    """64 added tokens: special or not, short and long, one beginning like another, any script."""
    texts = [f"<|tool_{i}|>" for i in range(16)]
    texts += [f"<t{i}>" for i in range(1, 17)]
    texts += [f"[ref {i}]" for i in range(8)] + [f"«标记{i}»" for i in range(8)]
    texts += ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "</q>", "🙂🙂", "\n\n--", "=>>", "…"]
    texts += ["<mask>", "_é_", "<|LONG" + "_x" * 30 + "|>", "###END###", "@@", "$$$", "\t\t\t\t"]
    return [
        {
            "id": first + i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": i % 3 == 1,
            "special": i % 3 != 1,
        }
        for i, text in enumerate(texts)
    ]


def with_added_tokens(source: Path, target: Path) -> Path:
    """A copy of a checkpoint with the tokens, and rows for them in the embedding."""
    shutil.copytree(source, target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    weights = load_file(target / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    added = added_tokens(len(embedding))
    tokenizer["added_tokens"] += added
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights["model.embed_tokens.weight"] = torch.cat([embedding, embedding[: len(added)]])
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["vocab_size"] += len(added)
    (target / "config.json").write_text(json.dumps(config))
    return target


def measure(folder: Path, output: Path) -> Parity:
    """Every container of a checkpoint in every runtime that is installed."""
    checkpoint = lfmq.open_checkpoint(folder)
    made = lfmq.convert(checkpoint, output, uncalibrated=True, execution=Execution())
    builds = {build.path: build.format for build in made.builds}
    slow = measure_parity(checkpoint.assets, builds, native=True, threads=2)
    folders = {path: format for path, format in builds.items() if format in ("mlx",)}
    fast = measure_parity(checkpoint.assets, folders, native=False)
    return Parity(
        slow.tokenizer + fast.tokenizer, slow.template, slow.not_measured + fast.not_measured
    )


def show(name: str, found: Parity) -> bool:
    """A column for each runtime; whether all is equal."""
    runtimes = list(dict.fromkeys(g.runtime for g in found.tokenizer))
    groups = list(dict.fromkeys(g.group for g in found.tokenizer))
    cells = {(g.runtime, g.group): "equal" if g.equal else "DIFFERS" for g in found.tokenizer}
    cells |= {(t.runtime, "rendered"): "equal" if t.equal else "DIFFERS" for t in found.template}
    width = max(map(len, runtimes)) + 2
    print(f"\n{name}\n{'group':18s}" + "".join(f"{r:>{width}s}" for r in runtimes))
    for group in [*groups, "rendered"]:
        print(
            f"{group:18s}" + "".join(f"{cells.get((r, group), '-'):>{width}s}" for r in runtimes)
        )
    different = [row for row in found.by_runtime() if row.first_difference]
    for row in different:
        print(f"  {row.runtime}: {row.first_difference}")
    for missing in found.not_measured:
        print(f"  {missing.runtime} not compared: {missing.why}")
    return not different


def main() -> None:
    """Print a table for each checkpoint; exit status 1 where something differs."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(word) for word in sys.argv[1:]]
        if not folders:
            sample = SAMPLES / "lfm2moe-tiny"
            more = with_added_tokens(sample, Path(name) / "lfm2moe-tiny-64-added-tokens")
            folders = [sample, SAMPLES / "lfm2-tiny", more]
        equal = [show(f.name, measure(f, Path(name) / f"builds-{f.name}")) for f in folders]
    sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    main()
