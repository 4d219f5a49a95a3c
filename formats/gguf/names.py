"""Names of llama.cpp: architectures by model type, tensors through gguf-py's own tables."""

import re
from dataclasses import dataclass

from gguf import MODEL_ARCH, TensorNameMap, get_tensor_name_map

from lfmq.formats.plan import ModelConfig, ModelType

_EXPERT = re.compile(r"^model\.(.*\.experts)\.(\d+)\.(.*)$")
# llama.cpp reads it for lfm2 and lfm2moe alike (load_arch_tensors); gguf-py lists it for lfm2.
HEAD = "output.weight"


@dataclass(frozen=True, slots=True)
class Architecture:
    """What llama.cpp calls a model type.

    Attributes:
        name: ``general.architecture``, and the prefix of the model's keys.
        tensors: gguf-py's key for the table of its tensor names.
    """

    name: str
    tensors: MODEL_ARCH


ARCHITECTURES: dict[ModelType, Architecture] = {
    "lfm2_moe": Architecture("lfm2moe", MODEL_ARCH.LFM2MOE),
    "lfm2": Architecture("lfm2", MODEL_ARCH.LFM2),
}


def name_map(config: ModelConfig) -> TensorNameMap:
    """gguf-py's table of the model's tensor names."""
    return get_tensor_name_map(ARCHITECTURES[config.model_type].tensors, config.num_hidden_layers)


def split_expert(name: str) -> tuple[str, int | None]:
    """A checkpoint name as the key of its (stacked) tensor, and the expert's place in it."""
    found = _EXPERT.match(name)
    if found is None:
        return name, None
    return f"{found[1]}.{found[3]}", int(found[2])


def tensor_name(key: str, names: TensorNameMap) -> str:
    """The GGUF name for a key of :func:`split_expert`."""
    if key == "lm_head.weight":
        return HEAD
    if key.endswith(".expert_bias"):
        key += ".bias"
    name: str | None = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ValueError(f"gguf-py's table for the model has no tensor for {key}")
    return name
