"""Folders of the kinds that people bring, made from a sound checkpoint folder of one file.

Each function changes the folder it gets. transformers loads those of ``LOADED``; those of
``WRAPPED`` have names that it does not know, and the weights of the folder they were made from.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Kind = Callable[[Path], None]
Tensors = dict[str, torch.Tensor]

EMBEDDING, HEAD, NORM = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.embedding_norm.weight",
)
INDEX = "model.safetensors.index.json"


def load(folder: Path) -> Tensors:
    """The one file's tensors."""
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: Tensors, name: str = "model.safetensors") -> None:
    """Write one file."""
    plain = {k: v.contiguous().clone() for k, v in tensors.items()}
    save_file(plain, folder / name, metadata={"format": "pt"})


def split(folder: Path, tensors: Tensors, count: int, *, index: bool = True) -> None:
    """Write shards, in turns, in place of the one file."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    places = {
        n: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, n in enumerate(tensors)
    }
    for file in set(places.values()):
        store(folder, {n: t for n, t in tensors.items() if places[n] == file}, file)
    if index:
        document = {"metadata": {}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(document))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fused(tensors: Tensors) -> Tensors:
    """The names of the state dict, experts in stacks."""
    found: Tensors = {}
    stacks: dict[str, dict[str, list[torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        before, _, after = name.partition(".experts.")
        if after:  # an expert's w1, w2, w3 in this or another order, experts in theirs
            stacks.setdefault(f"{before}.experts", {}).setdefault(after.split(".")[1], []).append(
                tensor
            )
        else:
            found[name] = tensor
    for name, parts in stacks.items():
        w1, w2, w3 = (torch.stack(parts[key]) for key in ("w1", "w2", "w3"))
        found |= {f"{name}.gate_up_proj": torch.cat((w1, w3), 1), f"{name}.down_proj": w2}
    return found


# ---- what transformers loads


def one_file(folder: Path) -> None:
    """As it is."""


def single_beside_shards(folder: Path) -> None:
    tensors = load(folder)
    split(folder, tensors, 3)
    store(folder, tensors | {NORM: tensors[NORM] * 2})


def stacked_experts(folder: Path) -> None:
    store(folder, fused(load(folder)))


def stacked_experts_in_shards(folder: Path) -> None:
    split(folder, fused(load(folder)), 3)


def without_model_prefix(folder: Path) -> None:
    store(folder, {k.removeprefix("model."): v for k, v in fused(load(folder)).items()})


def partly_without_model_prefix(folder: Path) -> None:
    """Not within experts, which transformers then mixes up: :func:`experts_mixed_up`."""
    names = enumerate(load(folder).items())
    named = {
        k if i % 2 or ".experts." in k else k.removeprefix("model."): v for i, (k, v) in names
    }
    store(folder, named)


def experts_mixed_up(folder: Path) -> None:
    tensors = load(folder)
    store(
        folder,
        {k.removeprefix("model.") if ".experts.3." in k else k: v for k, v in tensors.items()},
    )


def head_in_float32(folder: Path) -> None:
    tensors = load(folder)
    store(folder, tensors | {HEAD: tensors[EMBEDDING].float()})


def head_equal_though_untied(folder: Path) -> None:
    tensors = load(folder)
    store(folder, tensors | {HEAD: tensors[EMBEDDING]})
    edit(folder / "config.json", tie_word_embeddings=False)


def head_of_its_own(folder: Path) -> None:
    tensors = load(folder)
    store(folder, tensors | {HEAD: tensors[EMBEDDING] * 1.5})
    edit(folder / "config.json", tie_word_embeddings=False, tie_embedding=False)


def head_of_its_own_though_tied(folder: Path) -> None:
    tensors = load(folder)
    store(folder, tensors | {HEAD: tensors[EMBEDDING] * 1.5})


def head_alone(folder: Path) -> None:
    tensors = load(folder)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    store(folder, tensors)


def index_names_absent_head(folder: Path) -> None:
    split(folder, load(folder), 2)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map=places | {HEAD: places[NORM]})


def index_of_other_places(folder: Path) -> None:
    split(folder, load(folder), 2)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    other = {file: next(f for f in places.values() if f != file) for file in places.values()}
    edit(folder / INDEX, weight_map={name: other[file] for name, file in places.items()})


def tensor_in_two_shards(folder: Path) -> None:
    tensors = load(folder)
    split(folder, tensors, 2)
    for number, scale in ((1, 3), (2, 5)):
        file = f"model-{number:05d}-of-00002.safetensors"
        store(folder, load_file(folder / file) | {NORM: tensors[NORM] * scale}, file)


def buffers(folder: Path) -> None:
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16) for i in range(2)}
    extra |= {
        "model.pos_emb.inv_freq": torch.ones(16),
        "model.pos_emb.original_inv_freq": torch.ones(16),
    }
    store(folder, load(folder) | extra)


def weights_that_the_config_names(folder: Path) -> None:
    tensors = load(folder)
    store(folder, tensors | {NORM: tensors[NORM] * 7}, "other.safetensors")
    edit(folder / "config.json", transformers_weights="other.safetensors")


def half_precision(folder: Path) -> None:
    store(folder, {k: v if "bias" in k else v.half() for k, v in load(folder).items()})


def old_words_of_rope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {
        "rope_theta": theta,
        "rope_scaling": {"type": "default"},
        "partial_rotary_factor": 1.0,
    }
    (folder / "config.json").write_text(json.dumps(config))


LOADED: tuple[Kind, ...] = (
    one_file, single_beside_shards, stacked_experts, stacked_experts_in_shards,
    without_model_prefix, partly_without_model_prefix, head_in_float32, head_equal_though_untied,
    head_of_its_own, head_of_its_own_though_tied, head_alone, index_names_absent_head,
    index_of_other_places, tensor_in_two_shards, buffers, weights_that_the_config_names,
    half_precision, old_words_of_rope,
)  # fmt: skip


# ---- names of wrappers


def _prefixed(prefix: str) -> Kind:
    def change(folder: Path) -> None:
        tensors = load(folder) | {HEAD: load(folder)[EMBEDDING]}
        store(folder, {prefix + k: v for k, v in tensors.items()})

    change.__name__ = prefix
    return change


def language_model(folder: Path) -> None:
    """Of a multimodal model: the head is outside."""
    tensors = load(folder)
    named = {k.replace("model.", "model.language_model.", 1): v for k, v in tensors.items()}
    store(folder, named | {HEAD: tensors[EMBEDDING]})


def compiled_layers(folder: Path) -> None:
    """torch.compile of each layer, FSDP around the model."""
    tensors = fused(load(folder))
    named = {k.replace("layers.1.", "layers.1._orig_mod."): v for k, v in tensors.items()}
    store(folder, {"_fsdp_wrapped_module." + k: v for k, v in named.items()})


def shards_without_index(folder: Path) -> None:
    split(folder, load(folder), 4, index=False)


WRAPPED: tuple[Kind, ...] = (
    _prefixed("_orig_mod."), _prefixed("base_model.model."), _prefixed("module."),
    _prefixed("module._orig_mod."), language_model, compiled_layers, shards_without_index,
)  # fmt: skip
