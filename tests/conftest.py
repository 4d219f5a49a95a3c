"""Fixtures: a tiny random LFM2-MoE for structure, the trained sample for quality."""

import ctypes
import fcntl
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.model.tensors import expected_tensors
from lfmq.converter.model.text import load_windows
from lfmq.converter.statistics.collect import collect
from lfmq.converter.statistics.statistics import (
    Statistics,
    load_statistics,
    save_statistics,
)
from lfmq.formats.build import Assets, BuildLayout
from lfmq.formats.plan import (
    FLOAT_ROLES,
    ModelConfig,
    Plan,
    Role,
    TensorPlan,
)
from lfmq.formats.writing.writer import BuildWriter
from lfmq.quant.types import (
    Quantized,
    Scheme,
    Storage,
    Weight,
)
from lfmq.tests.kernels import compile_once

ROOT = Path(__file__).resolve().parents[1]

# No example fails because a machine is busy, and every run tries the same examples.
settings.register_profile(
    "lfmq",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lfmq")
compile_once()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``gpu`` need one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session", autouse=True)
def one_core() -> Iterator[None]:
    """Commands see one core, so that ``--threads`` is 1 unless a test says otherwise.

    A command sets torch's threads for the rest of the process, and those of a pool spin while
    they wait: two workers with two threads each take several times as long on two cores.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: {0})
        yield


@pytest.fixture(scope="session")
def sample_folder() -> Path:
    """The trained sample checkpoint."""
    return ROOT / "samples" / "lfm2moe-tiny"


@pytest.fixture(scope="session")
def sample_dense_folder() -> Path:
    """The trained dense sample checkpoint."""
    return ROOT / "samples" / "lfm2-tiny"


@pytest.fixture(scope="session")
def short_sample_folder(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's first three layers, one of them with experts: a third of the work."""
    folder = tmp_path_factory.mktemp("short") / "short"
    shutil.copytree(sample_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": config["layer_types"][:3]}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    beyond = tuple(f"model.layers.{i}." for i in range(3, 6))
    kept = {name: w for name, w in weights.items() if not name.startswith(beyond)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def sample_statistics(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """Of 2,048 tokens, gathered by the first worker that asks."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    sample, path = open_checkpoint(sample_folder), root / "statistics.safetensors"
    with (root / "statistics.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            text = sample_folder.parent / "calibration.jsonl"
            windows = load_windows([text], sample.assets, sample.config, tokens=2048, sequence=128)
            save_statistics(path, collect(sample, windows)[0])
    return load_statistics(path, sample.config)


@pytest.fixture(scope="session")
def ggml() -> ctypes.CDLL:
    """ggml's own library, from libggml-python."""
    spec = importlib.util.find_spec("libggml")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("libggml-python is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return ctypes.CDLL(str(next(folder.rglob("libggml-base.so"))))


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Two dense and two MoE layers, conv and attention; no two widths are equal by accident."""
    return ModelConfig(
        hidden_size=128,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_dense_layers=2,
        num_experts=6,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        conv_L_cache=3,
        vocab_size=320,
        max_position_embeddings=128,
        norm_eps=1e-5,
        rope_theta=5e6,
        layer_types=("conv", "full_attention", "conv", "full_attention"),
        bos_token_id=1,
        eos_token_id=4,
        pad_token_id=0,
    )


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    """Build a plan: one storage for experts, one for what is shared, exceptions by name."""

    def make(
        config: ModelConfig,
        experts: Storage = Scheme(4),
        shared: Storage = Scheme(8),
        overrides: dict[str, Storage] | None = None,
    ) -> Plan:
        entries = []
        for t in expected_tensors(config):
            storage = shared if t.expert is None else experts
            if t.role in FLOAT_ROLES:
                storage = "float32"
            storage = (overrides or {}).get(t.name, storage)
            entries.append(TensorPlan(t.name, t.shape, t.role, t.layer, t.expert, storage))
        return Plan(config, tuple(entries), "test")

    return make


@pytest.fixture(scope="session")
def random_weight() -> Callable[[TensorPlan], Weight]:
    """A random weight of the entry's storage; deterministic in the entry's name."""

    def make(entry: TensorPlan) -> Weight:
        rng = np.random.default_rng(list(entry.name.encode()))
        scheme = entry.scheme
        if scheme is None:
            return _random_float(rng, entry)
        codes = rng.integers(
            scheme.lowest_code, scheme.highest_code + 1, entry.shape, dtype=np.uint8
        )
        shape = (*entry.shape[:-1], entry.shape[-1] // scheme.group)
        spread = 0.15 / 2**scheme.bits
        scale = (spread * (1 + rng.random(shape)) * rng.choice([-1, 1], shape)).astype(np.float16)
        return Quantized(codes, scale, scheme)

    return make


@pytest.fixture(scope="session")
def write_random(random_weight: Callable[[TensorPlan], Weight]) -> Callable[..., Path]:
    """Writes a build of random weights, as its layout says; where it is."""

    def write(path: Path, plan: Plan, layout: BuildLayout) -> Path:
        with BuildWriter(path, layout) as writer:
            for unit in plan.write_groups():
                writer.write({e.name: random_weight(e) for e in unit})
            writer.commit()
        return path

    return write


def _random_float(rng: np.random.Generator, entry: TensorPlan) -> NDArray[np.float32]:
    """Values that bfloat16 and float16 both hold exactly, of a size that shows mistakes."""
    centre, spread = {
        Role.NORM: (1.0, 0.2),
        Role.CONV_KERNEL: (0.0, 0.5),
        Role.EXPERT_BIAS: (0.0, 0.2),
        Role.ROUTER: (0.0, 0.2),
    }.get(entry.role, (0.0, 0.05))
    values = (centre + spread * rng.standard_normal(entry.shape)).astype(np.float32)
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.fixture
def tiny_assets(tiny_config: ModelConfig, sample_folder: Path) -> Assets:
    """The sample's tokenizer and template beside the tiny config's config."""
    g = tiny_config
    config = {
        "architectures": ["Lfm2MoeForCausalLM"],
        "model_type": "lfm2_moe",
        "hidden_size": g.hidden_size,
        "intermediate_size": g.intermediate_size,
        "moe_intermediate_size": g.moe_intermediate_size,
        "num_hidden_layers": g.num_hidden_layers,
        "num_dense_layers": g.num_dense_layers,
        "num_experts": g.num_experts,
        "num_experts_per_tok": g.num_experts_per_tok,
        "num_attention_heads": g.num_attention_heads,
        "num_key_value_heads": g.num_key_value_heads,
        "conv_L_cache": g.conv_L_cache,
        "conv_bias": False,
        "vocab_size": g.vocab_size,
        "max_position_embeddings": g.max_position_embeddings,
        "norm_eps": g.norm_eps,
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
        "rope_parameters": {"rope_theta": g.rope_theta, "rope_type": "default"},
        "layer_types": list(g.layer_types),
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 4,
        "pad_token_id": 0,
    }
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    )
    files = {name: (sample_folder / name).read_bytes() for name in names}
    return Assets("tiny", config, files, sample_folder)


@pytest.fixture(scope="session")
def transformers_model() -> Callable[..., object]:
    """transformers' model in float32 with weights read by checkpoint name."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def make(config: dict[str, object], read: Callable[[str], NDArray[np.float32]]) -> object:
        kind = "Lfm2Moe" if config["model_type"] == "lfm2_moe" else "Lfm2"
        settings = getattr(transformers, f"{kind}Config")(**config)
        model = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
        with torch.no_grad():
            for name, parameter in model.state_dict().items():
                prefix, _, fused = name.rpartition(".experts.")
                if not prefix:
                    source = "model.embed_tokens.weight" if name == "lm_head.weight" else name
                    parameter.copy_(torch.from_numpy(np.array(read(source))))
                    continue
                parts = ("w1", "w3") if fused == "gate_up_proj" else ("w2",)
                for expert in range(parameter.shape[0]):
                    names = [f"{prefix}.experts.{expert}.{part}.weight" for part in parts]
                    stacked = np.concatenate([read(n) for n in names])
                    parameter[expert].copy_(torch.from_numpy(stacked))
        return model

    return make


@pytest.fixture
def make_checkpoint(
    tmp_path: Path, tiny_config: ModelConfig, tiny_assets: Assets
) -> Callable[..., Path]:
    """Write a small valid checkpoint; ``change`` may edit its tensors, ``config`` its config."""

    def make(
        name: str = "small",
        change: Callable[[dict[str, NDArray[Any]]], None] | None = None,
        config: dict[str, Any] | None = None,
        shards: int = 0,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(9)
        tensors: dict[str, NDArray[Any]] = {
            t.name: (rng.standard_normal(t.shape) * 0.05).astype(np.float32)
            for t in expected_tensors(replace(tiny_config, vocab_size=8192))
        }
        if change is not None:
            change(tensors)
        document = tiny_assets.config_json | {"vocab_size": 8192} | (config or {})
        (folder / "config.json").write_text(json.dumps(document))
        for file, content in tiny_assets.files.items():
            (folder / file).write_bytes(content)
        save_tensors(folder, tensors, shards)
        return folder

    return make


def save_tensors(folder: Path, tensors: dict[str, NDArray[Any]], shards: int) -> None:
    """One safetensors file, or several with an index."""
    if not shards:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {
        n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(tensors)
    }
    for file in sorted(set(weight_map.values())):
        part = {n: t for n, t in tensors.items() if weight_map[n] == file}
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class CountingCheckpoint(Checkpoint):
    """Notes in ``reads`` every tensor that is read."""

    reads: list[str] = []  # noqa: RUF012 - of the class that a test makes of it

    def read(self, name: str) -> NDArray[np.float32]:
        self.reads.append(name)
        return super().read(name)

    def read_rows(
        self, name: str, start: int, stop: int, into: NDArray[np.uint8] | None = None
    ) -> NDArray[Any]:
        if start == 0:
            self.reads.append(name)
        return super().read_rows(name, start, stop, into)


@pytest.fixture
def count_reads() -> Callable[[Checkpoint], tuple[Checkpoint, list[str]]]:
    """The checkpoint again, and the names that are read from it from now on."""

    def make(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
        reads: list[str] = []
        kind = type("Counting", (CountingCheckpoint,), {"reads": reads})
        fields = (checkpoint.folder, checkpoint.config, checkpoint.assets, checkpoint.stored)
        return kind(*fields), reads

    return make
