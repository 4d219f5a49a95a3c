"""From a checkpoint's ``config.json`` to a :class:`ModelConfig`, strict about what it needs."""

from functools import partial
from pathlib import Path
from typing import Any

from lfmq.formats.huggingface.config_keys import check_keys
from lfmq.formats.huggingface.json_file import parse_object
from lfmq.formats.huggingface.rope import rope_theta
from lfmq.formats.plan import ModelConfig, without_experts
from lfmq.quant.errors import CheckpointError, quoted

_POSITIVE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "conv_L_cache",
)

_short = partial(quoted, most=60)
_LARGEST = 2**31 - 1
# Far above any model (LFM2-24B-A2B has 2,432 experts); beyond it the lists of tensors fill memory.
_MOST_LAYERS, _MOST_EXPERTS = 10_000, 1_000_000


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: missing, not JSON, or of another model type.
    """
    path = folder / "config.json"
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found; {folder} is not a checkpoint folder") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    config = parse_object(content, path, finite=True)
    _check_type(config, path)
    return config


def _check_type(config: dict[str, Any], path: Path) -> None:
    found = config.get("model_type")
    if isinstance(found, str) and found in _FEED_FORWARD:
        return
    if any(key in config for key in ("text_config", "vision_config", "audio_config")):
        raise CheckpointError(
            f"{path}: model_type is {_short(found)}, a multimodal checkpoint; only text models "
            "are supported: save its language model alone, with save_pretrained"
        )
    raise CheckpointError(
        f"{path}: model_type is {_short(found)}, expected 'lfm2_moe' or 'lfm2'; only LFM2 and "
        "LFM2.5 text models are supported"
    )


def parse_config(raw: dict[str, Any], source: Path) -> ModelConfig:
    """The model's facts; ``source`` is named in errors.

    Raises:
        CheckpointError: a key is missing, of the wrong type, contradicts another, or may change
            what the model computes in a way that is not known.
    """
    number: dict[str, Any] = {key: _integer(raw, key, source, least=1) for key in _POSITIVE}
    types = _layer_types(raw, number["num_hidden_layers"], source)
    # transformers lets the older name win
    tie = "tie_embedding" if "tie_embedding" in raw else "tie_word_embeddings"
    derived = number["hidden_size"] // number["num_attention_heads"]
    given = raw if raw.get("head_dim") is not None else {"head_dim": derived}
    config = ModelConfig(
        **number,
        **_FEED_FORWARD[raw["model_type"]](raw, source),
        model_type=raw["model_type"],
        head_dim=_integer(given, "head_dim", source, least=1),
        norm_eps=_real(raw.get("norm_eps"), "norm_eps", source),
        rope_theta=_real(rope_theta(raw, source), "rope_theta", source),
        layer_types=types,
        bos_token_id=_token(raw, "bos_token_id", source),
        eos_token_id=_token(raw, "eos_token_id", source),
        pad_token_id=_token(raw, "pad_token_id", source),
        tie_word_embeddings=_flag(raw, tie, source),
    )
    check_keys(raw, source)
    _check_consistent(raw, config, source)
    return config


def _routed_facts(raw: dict[str, Any], source: Path) -> dict[str, Any]:
    """The feed-forward part of ``lfm2_moe``: dense layers first, then a router and experts."""
    widths = ("intermediate_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok")
    factor = raw.get("routed_scaling_factor", 1.0)
    return {key: _integer(raw, key, source, least=1) for key in widths} | {
        "num_dense_layers": _integer(raw, "num_dense_layers", source, least=0),
        "norm_topk_prob": _flag(raw, "norm_topk_prob", source),
        "use_expert_bias": _flag(raw, "use_expert_bias", source),
        "routed_scaling_factor": _real(factor, "routed_scaling_factor", source),
    }


def _dense_facts(raw: dict[str, Any], source: Path) -> dict[str, Any]:
    """The feed-forward part of ``lfm2``: every layer dense, of the adjusted width.

    The rule is that of transformers' ``Lfm2MLP`` (models/lfm2/modeling_lfm2.py, 5.23):
    ``block_ff_dim`` wins over ``intermediate_size``; with ``block_auto_adjust_ff_dim`` two thirds
    of it, times ``block_ffn_dim_multiplier``, rounded up to ``block_multiple_of``.
    """
    width = _integer(
        raw, "block_ff_dim" if "block_ff_dim" in raw else "intermediate_size", source, least=1
    )
    if _flag(raw, "block_auto_adjust_ff_dim", source):
        width = int(2 * width / 3)
        multiplier = raw.get("block_ffn_dim_multiplier", 1.0)
        width = int(_real(multiplier, "block_ffn_dim_multiplier", source) * width)
        step = _integer({"block_multiple_of": 256} | raw, "block_multiple_of", source, least=1)
        width = step * -(-width // step)
    if not 1 <= width <= _LARGEST:
        raise CheckpointError(
            f"{source}: the feed-forward width that block_ff_dim and its multiplier give is "
            f"{width}, expected 1 to {_LARGEST}"
        )
    layers = _integer(raw, "num_hidden_layers", source, least=1)
    return {"intermediate_size": width, **without_experts(layers)}


# By model type: the facts of the feed-forward half of a layer.
_FEED_FORWARD = {"lfm2_moe": _routed_facts, "lfm2": _dense_facts}


def _check_consistent(config: dict[str, Any], g: ModelConfig, source: Path) -> None:
    problems = (
        (bool(config.get("conv_bias")), "conv_bias is true, which is not supported"),
        (
            g.num_experts_per_tok > g.num_experts,
            f"num_experts_per_tok {g.num_experts_per_tok} exceeds num_experts {g.num_experts}",
        ),
        (
            g.num_attention_heads % g.num_key_value_heads != 0,
            f"num_attention_heads {g.num_attention_heads} is no multiple of "
            f"num_key_value_heads {g.num_key_value_heads}",
        ),
        (g.num_dense_layers > g.num_hidden_layers, "num_dense_layers exceeds num_hidden_layers"),
        (g.head_dim % 2 != 0, f"head_dim {g.head_dim} is odd, rotary embedding needs pairs"),
        (
            g.num_hidden_layers * g.num_experts > _MOST_EXPERTS,
            f"num_experts {g.num_experts} in each of {g.num_hidden_layers} layers, expected at "
            f"most {_MOST_EXPERTS:,} in all",
        ),
    )
    for wrong, message in problems:
        if wrong:
            raise CheckpointError(f"{source}: {message}")


def _integer(config: dict[str, Any], key: str, source: Path, least: int) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST:
        raise CheckpointError(
            f"{source}: {key} is {_short(value)}, expected an integer >= {least}"
        )
    return value


def _flag(config: dict[str, Any], key: str, source: Path) -> bool:
    value = config.get(key, True)
    if not isinstance(value, bool):
        raise CheckpointError(f"{source}: {key} is {_short(value)}, expected true or false")
    return value


def _real(value: Any, key: str, source: Path) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
        raise CheckpointError(f"{source}: {key} is {_short(value)}, expected a positive number")
    return float(value)


def _token(config: dict[str, Any], key: str, source: Path) -> int | None:
    value = config.get(key)
    if isinstance(value, list):  # some configs list several end tokens; the first ends a turn
        value = value[0] if value else None
    if value in (None, -1):  # older configs say -1 for none
        return None
    last = config["vocab_size"] - 1
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= last:
        raise CheckpointError(
            f"{source}: {key} is {_short(value)}, expected a token from 0 to {last}"
        )
    return value


def _layer_types(config: dict[str, Any], layers: int, source: Path) -> tuple[Any, ...]:
    types = config.get("layer_types")
    indices = config.get("full_attn_idxs")
    if types is None and isinstance(indices, list) and layers <= _MOST_LAYERS:
        types = ["full_attention" if i in indices else "conv" for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise CheckpointError(f"{source}: layer_types must list one type for each of {layers}")
    for i, kind in enumerate(types):
        if kind not in ("conv", "full_attention"):
            raise CheckpointError(
                f"{source}: layer_types[{i}] is {_short(kind)}, not conv or attention"
            )
    return tuple(types)
