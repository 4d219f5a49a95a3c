"""The rotary embedding of a config: plain, with one base frequency, or refused.

The rules are those of transformers' ``RotaryEmbeddingConfigMixin`` (modeling_rope_utils.py, 5.23):
``rope_scaling`` takes the place of ``rope_parameters``; the type is ``rope_type``, else ``type``;
the base is the one inside, else ``rope_theta`` beside it; parameters may be nested by layer type.
Only a base that no key states is refused here where transformers takes 1,000,000: LFM2.5 has
another.
"""

from functools import partial
from pathlib import Path
from typing import Any

from lfmq.quant.errors import CheckpointError, quoted

_short = partial(quoted, most=40)

_LAYER_TYPES = ("full_attention", "conv", "sliding_attention", "chunked_attention")
# Parameters of the scaled types with the value that scales nothing; None: any has no effect.
_PLAIN = {
    "factor": 1,
    "attention_factor": 1,
    "partial_rotary_factor": 1,
    "original_max_position_embeddings": None,
}


def rope_theta(config: dict[str, Any], source: Path) -> Any:
    """The base of the rotary frequencies, as the config states it.

    Raises:
        CheckpointError: the frequencies are not the plain ones.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key):
            parameters = config[key]
            break
    else:
        key, parameters = "rope_parameters", {}
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{source}: {key} is {_short(parameters)}, expected an object")
    nested = [layer for layer in _LAYER_TYPES if layer in parameters]
    if nested:
        raise CheckpointError(
            f"{source}: {key} has an entry for {nested[0]}; one rope for all layers is supported"
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f"{source}: rope_type is {_short(kind)} ({key}), only 'default' is supported: the "
            "builds would rotate otherwise than transformers"
        )
    _check_plain(parameters, key, source)
    _check_plain({"partial_rotary_factor": config.get("partial_rotary_factor")}, "", source)
    return parameters["rope_theta"] if "rope_theta" in parameters else config.get("rope_theta")


def _check_plain(parameters: dict[str, Any], key: str, source: Path) -> None:
    inside = f" of {key}" if key else ""
    for name, value in parameters.items():
        if name in ("rope_theta", "rope_type", "type") or value is None:
            continue
        if name not in _PLAIN or _PLAIN[name] not in (None, value):
            raise CheckpointError(
                f"{source}: {_short(name)}{inside} is {_short(value)}; plain rope has none, "
                "others are not supported"
            )
