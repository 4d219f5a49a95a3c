"""What is fuzzed: each kind of file that lfmq opens, what opens it, and what is right then.

A kind's ``run`` opens the damaged file as a command does and returns what was accepted; ``judge``
says what is wrong with that, by an oracle that is not lfmq's own reader where there is one.
"""

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import lfmq
from lfmq.benchmarks import fuzz_mutations as damage
from lfmq.cli import main
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.model.tensors import expected_tensors
from lfmq.converter.model.text import load_windows
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.statistics.calibrate import open_statistics
from lfmq.formats.huggingface.config import parse_config
from lfmq.formats.registry import FORMATS
from lfmq.formats.writing.journal import Journal
from lfmq.validation.gate.thresholds import load_thresholds
from lfmq.validation.measure.builds import open_builds
from lfmq.validation.tasks.tasks import load_tasks

Result = dict[str, Any]
BUILDS = {
    "gguf": "tiny-int4.gguf",
    "mlx": "tiny-int4-mlx",
    "onnx": "tiny-int4-onnx",
    "compressed-tensors": "tiny-int4-compressed-tensors",
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
# Facts that a build may state otherwise without computing otherwise; others are to be reported.
_HARMLESS = ("max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        file: which is damaged, in the folder of subjects.
        mutate: how.
        run: opens it in that folder; what was accepted.
        judge: what is wrong with what was accepted, beside what the sound file gives; or nothing.
    """

    file: str
    mutate: damage.Mutation
    run: Callable[[Path], Result]
    judge: Callable[[Path, Result, Result], str] = lambda root, sound, found: ""


# ---- subjects


def make_subjects(root: Path) -> None:
    """A small checkpoint, its builds with and without a manifest, and files of other kinds."""
    checkpoint = root / "tiny"
    _make_checkpoint(checkpoint)
    lfmq.convert(str(checkpoint), root / "made", uncalibrated=True, recipe="int4")
    (root / "free").mkdir()
    for name in BUILDS.values():
        copy = shutil.copytree if (root / "made" / name).is_dir() else shutil.copy
        copy(root / "made" / name, root / "free" / name)
    text = sample_file("evaluation.jsonl").read_text("utf-8").splitlines()
    chats = [line for line in text if '"messages"' in line][:8]
    (root / "chats.jsonl").write_text("\n".join([*chats, *text[:4]]) + "\n", "utf-8")
    (root / "plain.txt").write_text(" ".join(text[:20])[:6000], "utf-8")
    tasks = sample_file("tasks.jsonl").read_text("utf-8").splitlines()
    (root / "tasks.jsonl").write_text("\n".join(tasks[:10]) + "\n", "utf-8")
    lfmq.calibrate(
        str(checkpoint), root / "statistics", text=root / "chats.jsonl", tokens=256, sequence=64,
        imatrix=root / "imatrix",
    )  # fmt: skip
    (root / "recipe.toml").write_text(
        '[[rule]]\nbits = 4\ngroup = 32\n\n[[rule]]\nroles = ["attention"]\nbits = 8\n\n'
        '[[rule]]\nroles = ["experts"]\nlayers = [2, "3-3"]\nexperts = [0, 2]\nfloat = "float32"\n'
    )
    (root / "thresholds.toml").write_text(
        "[limits]\nmax_kld = 0.01\nmin_routing = 0.9\nmax_perplexity_ratio = 1.02\n\n"
        "[domains.en]\nmax_kld = 0.02\n"
    )
    _make_journal(root / "journal")


def _make_checkpoint(folder: Path) -> None:
    sample = sample_file()
    config = json.loads((sample / "config.json").read_text())
    config |= {
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
        "num_hidden_layers": 4, "num_dense_layers": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    }  # fmt: skip
    folder.mkdir()
    for path in sample.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config))
    card = (
        "---\nlicense: other\nlicense_name: lfm1.0\nlanguage: [en, ja]\ntags: [a, b]\n---\n# T\n"
    )
    (folder / "README.md").write_text(card)
    rng = np.random.default_rng(3)
    tensors = {
        t.name: (rng.standard_normal(t.shape) * 0.05 + (len(t.shape) == 1)).astype(np.float16)
        for t in expected_tensors(parse_config(config, folder))
    }
    weight_map = {n: SHARDS["experts" in n] for n in tensors}
    for shard in SHARDS:
        part = {n: t for n, t in tensors.items() if weight_map[n] == shard}
        save_file(part, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _make_journal(path: Path) -> None:
    journal = Journal(path)
    journal.create({"layout": "1", "inputs": "2"})
    for i in range(20):
        journal.add((f"t{i}", f"u{i}"), (f"{i:016x}",))
    journal.close()


def copy_subjects(root: Path, target: Path) -> None:
    """The same files under another folder, linked: a damaged one is written anew."""
    shutil.copytree(root, target, copy_function=os.link)


# ---- what opens a file


@cache
def _checkpoint(folder: Path) -> Any:
    return lfmq.open_checkpoint(str(folder))


def _digest(read: Callable[[str], Any], names: list[str]) -> str:
    found = hashlib.sha256()
    for name in names:
        found.update(np.ascontiguousarray(read(name), np.float32).tobytes())
    return found.hexdigest()


def _open_checkpoint(root: Path) -> Result:
    checkpoint = lfmq.open_checkpoint(str(root / "tiny"))
    names = [t.name for t in expected_tensors(checkpoint.config)]
    return {"config": asdict(checkpoint.config), "weights": _digest(checkpoint.read, names)}


def _judge_config(root: Path, sound: Result, found: Result) -> str:
    """Every fact that is used is what the file says."""
    if found["weights"] != sound["weights"]:
        return "other weights"
    raw = json.loads((root / "tiny/config.json").read_bytes())
    for key, used in found["config"].items():
        if key in ("layer_types", *_DEFAULTS) or key.endswith("token_id"):
            continue
        said = raw.get(key, sound["config"][key])
        if key == "rope_theta":
            nested = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
            said = nested.get(key, raw.get(key))
        if said != used or isinstance(said, bool) != isinstance(used, bool):
            return f"{key} is {used}, the file says {said!r:.60}"
    return ""


_DEFAULTS = (
    "head_dim",
    "num_dense_layers",
    "model_type",
    "tie_word_embeddings",
    "routed_scaling_factor",
)


def _judge_weights(root: Path, sound: Result, found: Result) -> str:
    """The weights are what the library safetensors finds in the file."""
    if found == sound:
        return ""
    theirs = {n: t for shard in SHARDS for n, t in load_file(root / "tiny" / shard).items()}
    config = lfmq.open_checkpoint(str(root / "tiny")).config
    names = [t.name for t in expected_tensors(config)]
    same = _digest(lambda name: theirs[name].astype(np.float32), names) == found["weights"]
    return "" if same else "other weights than safetensors reads"


def _use_text(root: Path, file: str = "chats.jsonl") -> Result:
    """Tokenize and render, and lay out every container."""
    checkpoint = lfmq.open_checkpoint(str(root / "tiny"))
    windows = load_windows(
        [root / file], checkpoint.assets, checkpoint.config, tokens=128, sequence=32
    )
    return {"ids": hashlib.sha256(windows.ids.tobytes()).hexdigest()}


def _lay_out(root: Path) -> Result:
    checkpoint = lfmq.open_checkpoint(str(root / "tiny"))
    plan = resolve_plan(checkpoint.config, load_recipe("int4"))
    found = {}
    for name, module in FORMATS.items():
        module.check(plan, checkpoint.assets)
        found[name] = module.layout(plan, checkpoint.assets).nbytes
    return found


def _use_statistics(root: Path, file: str) -> Result:
    checkpoint = _checkpoint(root / "tiny")
    statistics = open_statistics(root / file, checkpoint.config)
    plan = resolve_plan(checkpoint.config, load_recipe("int4"))
    sums = 0.0
    for entry in plan.entries:
        importance = statistics.importance(entry)
        sums += 0.0 if importance is None else float(importance.sum(dtype=np.float64))
    parts = [(p.error, p.kld) for p in statistics.parts.values()]
    merged = json.dumps(statistics.to_json())
    return {"sums": sums, "parts": parts, "json": len(merged), "tokens": statistics.tokens}


def _judge_statistics(root: Path, sound: Result, found: Result) -> str:
    numbers = [found["sums"], *(x for pair in found["parts"] for x in pair)]
    if not all(type(x) in (int, float) and math.isfinite(x) and x >= 0 for x in numbers):
        return "holds numbers that are negative or not finite"
    return "" if type(found["tokens"]) is int and found["tokens"] > 0 else "tokens"


def _read_recipe(root: Path) -> Result:
    checkpoint = _checkpoint(root / "tiny")
    plan = resolve_plan(checkpoint.config, load_recipe(str(root / "recipe.toml")))
    return {"plan": [str(e.storage) for e in plan.entries]}


def _read_thresholds(root: Path) -> Result:
    return {"limits": repr(load_thresholds(root / "thresholds.toml"))[:2000]}


def _read_tasks(root: Path) -> Result:
    checkpoint = _checkpoint(root / "tiny")
    return {
        "tasks": len(load_tasks(root / "tasks.jsonl", checkpoint.assets, checkpoint.config).tasks)
    }


def _read_journal(root: Path) -> Result:
    past = Journal(root / "journal").read({"layout": "1", "inputs": "2"})
    return {} if past is None else {"units": len(past.units), "bytes": past.nbytes}


def _verify(root: Path) -> Result:
    return {name: str(lfmq.verify(root / "made" / path)) for name, path in BUILDS.items()}


def _judge_manifest(root: Path, sound: Result, found: Result) -> str:
    """The manifest that was believed names every file of every build."""
    (path,) = (root / "made").glob("*.manifest.json")
    builds = {b["path"]: b["files"] for b in json.loads(path.read_bytes())["builds"].values()}
    for name in BUILDS.values():
        build = root / "made" / name
        files = [build] if build.is_file() else [p for p in build.rglob("*") if p.is_file()]
        for file in files:
            said = builds[name][str(file.relative_to(root / "made"))]
            if said["sha256"] != hashlib.sha256(file.read_bytes()).hexdigest():
                return f"{file.name} was not hashed"
    return ""


def _open_build(root: Path, format: str) -> Result:
    checkpoint = _checkpoint(root / "tiny")
    (build,) = open_builds((root / "free" / BUILDS[format],), ("read",), checkpoint)
    names = [t.name for t in expected_tensors(checkpoint.config)]
    return {
        "weights": _digest(build.reader.read, names),
        "config": asdict(build.reader.config),
        "facts": [fact.name for fact in build.facts],
    }


def _judge_build(root: Path, sound: Result, found: Result) -> str:
    if found["weights"] != sound["weights"]:
        return "other weights"
    for key, value in found["config"].items():
        if value != sound["config"][key] and key not in (*_HARMLESS, *found["facts"]):
            return f"{key} is {value}, and no fact says so"
    return ""


# ---- options


_WORDS = (
    "-1", "0", "1", "1e9", "9" * 30, "9" * 5000, "nan", "inf", "0.5", "", "x", "a\nb", "\udcff",
    "../x", "/proc/self/mem", "\u202ex", "int4", "3.5bpw", "1GB", "9" * 40 + "GB",
)  # fmt: skip
_OPTIONS = {
    "plan": ("--recipe", "--to", "--size", "--bits", "--context"),
    "convert": (
        "--recipe",
        "--to",
        "--tokens",
        "--sequence",
        "--threads",
        "--text",
        "--statistics",
    ),
    "calibrate": ("--tokens", "--sequence", "--text", "--output", "--imatrix", "--balance"),
    "validate": ("--tokens", "--sequence", "--engine", "--thresholds", "--max-kld", "--html"),
    "inspect": ("--json",),
}


def _damage_options(rng: random.Random, _: bytes) -> bytes:
    command = rng.choice(list(_OPTIONS))
    words = [command, "CHECKPOINT"]
    if command == "validate":
        words += ["BUILD", "--tokens", "64", "--sequence", "32", "--text", "TEXT"]
    if command == "convert":
        words += ["--output", "OUTPUT", "--uncalibrated"]
    if command == "calibrate":
        words += ["--output", "OUTPUT", "--text", "TEXT", "--tokens", "64", "--sequence", "32"]
    for _count in range(rng.choice((1, 1, 2))):
        words += [rng.choice(_OPTIONS[command]), rng.choice(_WORDS)]
    return json.dumps(words).encode()


def _run_options(root: Path) -> Result:
    """A command line, in a folder of its own; an exit status that is not 0 is a refusal."""
    places = {
        "CHECKPOINT": str(root / "tiny"),
        "BUILD": str(root / "free" / "none.gguf"),  # to measure one takes long
        "TEXT": str(root / "plain.txt"),
        "OUTPUT": str(root / "out" / "o"),
    }
    words = [places.get(w, w) for w in json.loads((root / "options").read_bytes())]
    (root / "out").mkdir(exist_ok=True)
    os.chdir(root / "out")
    done = CliRunner().invoke(main, [*words, "--quiet"] if words[0] != "inspect" else words)
    shutil.rmtree(root / "out")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    if done.exit_code:
        lines = done.stderr.strip().splitlines()
        raise Refused(lines[-1] if lines else f"exit status {done.exit_code}")
    return {}


class Refused(Exception):
    """A command ended with a line and an exit status that is not 0."""


# ---- all kinds

_build = {format: partial(_open_build, format=format) for format in BUILDS}


def _of_build(format: str, file: str, mutate: damage.Mutation) -> Kind:
    path = f"free/{BUILDS[format]}"
    return Kind(f"{path}/{file}" if file else path, mutate, _build[format], _judge_build)


KINDS: dict[str, Kind] = {
    "config": Kind("tiny/config.json", damage.damage_json, _open_checkpoint, _judge_config),
    "safetensors": Kind(
        f"tiny/{SHARDS[0]}", damage.damage_safetensors, _open_checkpoint, _judge_weights
    ),
    "index": Kind(
        "tiny/model.safetensors.index.json", damage.damage_json, _open_checkpoint, _judge_weights
    ),
    "tokenizer": Kind("tiny/tokenizer.json", damage.damage_json, _use_text),
    "tokenizer-layout": Kind("tiny/tokenizer.json", damage.damage_json, _lay_out),
    "tokenizer-config": Kind("tiny/tokenizer_config.json", damage.damage_json, _use_text),
    "chat-template": Kind("tiny/chat_template.jinja", damage.damage_text, _use_text),
    "generation-config": Kind("tiny/generation_config.json", damage.damage_json, _lay_out),
    "card": Kind("tiny/README.md", damage.damage_text, _lay_out),
    "recipe": Kind("recipe.toml", damage.damage_toml, _read_recipe),
    "thresholds": Kind("thresholds.toml", damage.damage_toml, _read_thresholds),
    "statistics": Kind(
        "statistics",
        damage.damage_safetensors,
        partial(_use_statistics, file="statistics"),
        _judge_statistics,
    ),
    "imatrix": Kind(
        "imatrix", damage.damage_gguf, partial(_use_statistics, file="imatrix"), _judge_statistics
    ),
    "jsonl": Kind("chats.jsonl", damage.damage_lines, _use_text),
    "text": Kind("plain.txt", damage.damage_text, partial(_use_text, file="plain.txt")),
    "tasks": Kind("tasks.jsonl", damage.damage_lines, _read_tasks),
    "journal": Kind("journal", damage.damage_lines, _read_journal),
    "manifest": Kind("made/tiny-int4.manifest.json", damage.damage_json, _verify, _judge_manifest),
    "options": Kind("options", _damage_options, _run_options),
    "gguf": _of_build("gguf", "", damage.damage_gguf),
    "mlx-config": _of_build("mlx", "config.json", damage.damage_mlx_config),
    "mlx-index": _of_build("mlx", "model.safetensors.index.json", damage.damage_json),
    "mlx-safetensors": _of_build("mlx", "model.safetensors", damage.damage_safetensors),
    "onnx-graph": _of_build("onnx", "model.onnx", damage.damage_graph),
    "onnx-config": _of_build("onnx", "config.json", damage.damage_json),
    "onnx-genai": _of_build("onnx", "genai_config.json", damage.damage_json),
    "ct-config": _of_build("compressed-tensors", "config.json", damage.damage_json),
    "ct-safetensors": _of_build(
        "compressed-tensors", "model.safetensors", damage.damage_safetensors
    ),
}
