"""The ``quantization_config`` of a compressed-tensors build, and what engines cannot load of it.

A group lists its modules as ``re:`` patterns (``re.match`` on the module's path); the most common
scheme takes the class ``Linear``, last, because the library takes the first group that matches.
The patterns must also match the paths that engines make of the checkpoint's: vLLM puts
``short_conv`` for ``conv`` and ``qkv_proj``, ``w13`` for what it fuses, SGLang ``gate_up_proj``
and ``down_proj`` for the dense feed-forward, and both ask for an expert's scheme under the names
``gate_proj``, ``up_proj`` and ``down_proj`` or w1, w2 and w3.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

from lfmq.formats.plan import (
    EXPERT_ROLES,
    ModelConfig,
    ModelType,
    Plan,
    Role,
    TensorPlan,
)
from lfmq.quant.types import Scheme, Storage

METHOD = "compressed-tensors"
PACKED = "pack-quantized"

_Family = Literal["attention", "conv", "dense", "experts"]
_FAMILIES: dict[Role, _Family] = {
    Role.ATTENTION: "attention",
    Role.CONV: "conv",
    Role.DENSE: "dense",
    **dict.fromkeys(EXPERT_ROLES, "experts"),
}
_PARTS: dict[_Family, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "conv": ("in_proj", "out_proj"),
    "dense": ("w1", "w2", "w3"),
    "experts": ("w1", "w2", "w3"),
}
# What engines call parts, alone or together; a dense w1 and w3 have a name only as a pair.
_ALIASES: dict[_Family, tuple[tuple[frozenset[str], tuple[str, ...]], ...]] = {
    "attention": ((frozenset(("q_proj", "k_proj", "v_proj")), ("qkv_proj",)),),
    "conv": (),
    "dense": (
        (frozenset(("w1", "w3")), ("w13", "gate_up_proj")),
        (frozenset(("w2",)), ("down_proj",)),
    ),
    "experts": (
        (frozenset(("w1",)), ("gate_proj",)),
        (frozenset(("w2",)), ("down_proj",)),
        (frozenset(("w3",)), ("up_proj",)),
    ),
}
# vLLM's gate is a Linear like any other; a head is not in the file, or as floats.
_IGNORED = ("lm_head", r"re:.*feed_forward\.gate$")

# Keys that an engine reads and a checkpoint may lack: vLLM's lfm2 takes widths from these two.
NEEDED: dict[ModelType, Callable[[ModelConfig], dict[str, Any]]] = {
    "lfm2_moe": lambda g: {},
    "lfm2": lambda g: {"block_dim": g.hidden_size, "conv_dim": g.hidden_size},
}


def linear_entries(plan: Plan) -> tuple[TensorPlan, ...]:
    """The weights that may be stored as integers: every Linear but the router's gate."""
    return tuple(e for e in plan.entries if e.role in _FAMILIES)


def quantization_config(plan: Plan) -> dict[str, Any]:
    """The block of ``config.json``: one group for each scheme, floats among the ignored."""
    entries = linear_entries(plan)
    counts = Counter(e.scheme for e in entries if e.scheme is not None)
    (usual, _), *_ = counts.most_common(1)
    groups = [
        _group(scheme, _targets(plan, (e for e in entries if e.scheme == scheme)))
        for scheme in counts
        if scheme != usual
    ]
    groups.append(_group(usual, ["Linear"]))
    floats = _targets(plan, (e for e in entries if e.scheme is None))
    return {
        "quant_method": METHOD,
        "format": PACKED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [*_IGNORED, *floats],
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": scheme.group,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": PACKED,
    }


# ---- patterns


def _targets(plan: Plan, chosen: Iterable[TensorPlan]) -> list[str]:
    """Patterns that match exactly these modules; layers that are alike share one."""
    cells: dict[tuple[_Family, int], dict[int, list[str]]] = {}
    for entry in chosen:
        cell = cells.setdefault((_FAMILIES[entry.role], _layer(entry)), {})
        cell.setdefault(-1 if entry.expert is None else entry.expert, []).append(_part(entry))
    layers: dict[tuple[_Family, tuple[str, ...], tuple[int, ...]], list[int]] = {}
    for (family, layer), experts in cells.items():
        alike: dict[tuple[str, ...], list[int]] = {}
        for expert, parts in experts.items():
            alike.setdefault(tuple(sorted(parts)), []).append(expert)
        for names, numbers in alike.items():
            layers.setdefault((family, names, tuple(numbers)), []).append(layer)
    return [
        "re:.*" + _pattern(plan, family, names, numbers, where)
        for (family, names, numbers), where in layers.items()
    ]


def _pattern(
    plan: Plan,
    family: _Family,
    parts: tuple[str, ...],
    experts: tuple[int, ...],
    layers: list[int],
) -> str:
    g = plan.config
    where = rf"layers\.{_one_of(layers)}\."
    names = rf"{_one_of(_names(family, parts))}$"
    every = len(parts) == len(_PARTS[family])
    if family == "attention":
        return ("" if len(layers) == len(g.attention_layers) else where) + rf"self_attn\.{names}"
    if family == "conv":  # vLLM would rename a plain ".conv.", and does not know an escaped one
        return ("" if len(layers) == len(g.conv_layers) else rf"{where}.*") + rf"conv\.{names}"
    if family == "dense":
        return rf"{where}feed_forward\." + (".*" if every else names)
    where = "" if len(layers) == len(g.moe_layers) else where
    if len(experts) == g.num_experts:
        return rf"{where}feed_forward\.experts\." + (".*" if every else rf"\d+\.{names}")
    numbers = _one_of(experts)
    return rf"{where}feed_forward\.experts\.{numbers}\." + (".*" if every else names)


def _names(family: _Family, parts: tuple[str, ...]) -> list[str]:
    """The parts under all their names, alone and fused."""
    together = [new for old, new in _ALIASES[family] if old <= set(parts)]
    return [*parts, *(name for names in together for name in names)]


def _one_of(choices: Iterable[object]) -> str:
    """A pattern for one of several words."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"


def _layer(entry: TensorPlan) -> int:
    assert entry.layer is not None
    return entry.layer


def _part(entry: TensorPlan) -> str:
    """The last word of the module's path."""
    return entry.name.removesuffix(".weight").rpartition(".")[2]


# ---- what engines cannot load


def engine_warnings(plan: Plan) -> tuple[str, ...]:
    """One line for each way in which an engine cannot load what the file holds."""
    entries = linear_entries(plan)
    experts = [e for e in entries if e.expert is not None]
    attention = [e for e in entries if e.role is Role.ATTENTION and _part(e) != "out_proj"]
    dense = [e for e in entries if e.role is Role.DENSE and _part(e) != "w2"]
    fused = (
        (experts, "the experts", "all three projections of all experts of a layer"),
        (attention, "q_proj, k_proj and v_proj", "the three"),
        (dense, "the dense w1 and w3", "both"),
    )
    found = [
        f"layer {layer}: {what} are stored in several ways ({', '.join(sorted(kinds))}); vLLM "
        f"and SGLang need one for {which}"
        for unit, what, which in fused
        for layer, kinds in _mixed(unit)
    ]
    if len({e.storage for e in experts}) > 1:
        kinds = sorted({str(e.storage) for e in experts})
        found.append(
            f"experts are stored in several ways ({', '.join(kinds)}); transformers loads those "
            "of all layers by one scheme, dequantize the build for it"
        )
    elif experts and experts[0].scheme is None:
        # CompressedTensorsDequantize of transformers' integrations/compressed_tensors.py, which it
        # puts before every conversion of experts, drops what is not packed
        found.append(
            f"all experts are stored as {experts[0].storage}; transformers (to 5.23) loads packed "
            "experts alone and stops, dequantize the build for it"
        )
    if not plan.config.tie_word_embeddings:  # lfm2.py and lfm2_moe.py of vLLM: tie_weights
        found.append(
            "the model has a head of its own (lm_head.weight); vLLM ties head and embedding of "
            "LFM2 whatever the config says and computes other logits: use SGLang or transformers"
        )
    return tuple(found)


def _mixed(entries: Iterable[TensorPlan]) -> list[tuple[int, set[str]]]:
    """Layers whose entries are not all stored alike, with how they are."""
    layers: dict[int, set[Storage]] = {}
    for entry in entries:
        layers.setdefault(_layer(entry), set()).add(entry.storage)
    return [(i, {str(s) for s in kinds}) for i, kinds in layers.items() if len(kinds) > 1]
