"""From the names of tensors in the files to those of the model, as transformers renames them.

Its rules are in core_model_loading.py and conversion_mapping.py (5.23): ``model.`` is put before a
name where that gives one of the model's, experts may be stored one by one or stacked, and buffers
are computed anew. Prefixes of wrappers, which transformers does not know, are read over when the
model's tensors stand under one: their names say nothing about what is computed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lfmq.converter.model.tensors import FINAL_NORM, HEAD
from lfmq.formats.huggingface.safetensors_file import StoredTensor, part_of, rows_of
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import CheckpointError

# torch.compile, FSDP and activation checkpointing name the module they wrap so, at any depth.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Computed at loading (rotary frequencies, positions), of TransformerEngine, or of TRL's critics.
_BUFFERS = re.compile(
    r"(?:(?:^|\.)(?:rotary_emb|pos_emb)\.(?:original_)?inv_freq|(?:^|\.)position_ids"
    r"|\._extra_state|^v_head\.[\w.]+)$"
)
_ADAPTER = re.compile(r"\.(?:lora_\w+|base_layer|modules_to_save|original_module)\.")
_STACKED = re.compile(r"(model\.layers\.\d+\.feed_forward\.experts)\.(gate_up_proj|down_proj)")
_EXPERT = re.compile(r"(model\.layers\.\d+\.feed_forward\.experts)\.\d+\.(w[123])\.weight")
_ROOTS = ("layers.", "embed_tokens.", "embedding_norm.")
_BASE = "model."
_ANCHOR = FINAL_NORM.removeprefix(_BASE)
_LAST = re.compile(r"(?<![^.])model\.$")


@dataclass(frozen=True, slots=True)
class NamedTensors:
    """Tensors by the model's names; what has none keeps its own.

    Attributes:
        stored: where each is; an expert of a stack is a part of it.
        notes: what was done to get there.
    """

    stored: dict[str, StoredTensor]
    notes: tuple[str, ...]


def model_names(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> NamedTensors:
    """Give tensors the model's names.

    Args:
        tensors: by their names in the files.
        config: of the model.

    Raises:
        CheckpointError: parts of an adapter, two tensors for one of the model, or a stack of
            experts of another shape.
    """
    kept = {name: t for name, t in tensors.items() if not _is_buffer(name, config)}
    ignored = [name for name in tensors if name not in kept]
    prefix = _prefix(kept)
    named: dict[str, str] = {}
    spellings: dict[tuple[str, ...], str] = {}
    stored: dict[str, StoredTensor] = {}
    for name, tensor in kept.items():
        _refuse_adapter(name, tensor)
        for new, part in _parts(_renamed(name, prefix), name, tensor, config):
            if new in named:
                raise CheckpointError(
                    f"{tensor.path}: {name} and {named[new]} are both {new}; remove one of them"
                )
            named[new], stored[new] = name, part
            if expert := _EXPERT.fullmatch(new):
                _refuse_two_spellings(spellings.setdefault(expert.groups(), name), name, tensor)
    return NamedTensors(stored, tuple(_notes(kept, ignored, prefix)))


def _is_buffer(name: str, config: ModelConfig) -> bool:
    if _BUFFERS.search(name):
        return True
    return name.endswith(".feed_forward.expert_bias") and not config.use_expert_bias


def _unwrapped(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _prefix(tensors: Mapping[str, StoredTensor]) -> str:
    """What stands before the names of the model without its head: ``model.`` as a rule.

    The final norm, of which a model has one, tells it.
    """
    found = {
        name.removesuffix(_ANCHOR) for name in map(_unwrapped, tensors) if name.endswith(_ANCHOR)
    }
    wrapped = [p for p in found if p.endswith(".")]
    return wrapped[0] if len(found) == 1 and wrapped else _BASE


def _renamed(name: str, prefix: str) -> str:
    name = _unwrapped(name)
    if prefix != _BASE and name.startswith(prefix):
        return _BASE + name.removeprefix(prefix)
    outer = _LAST.sub("", prefix)
    if outer and name == outer + HEAD:
        return HEAD
    return _BASE + name if name.startswith(_ROOTS) else name


def _refuse_adapter(name: str, tensor: StoredTensor) -> None:
    if _ADAPTER.search(name):
        raise CheckpointError(
            f"{tensor.path}: {name} is part of an adapter (LoRA); merge it into its base first "
            "(merge_and_unload of peft, then save_pretrained)"
        )


def _refuse_two_spellings(first: str, name: str, tensor: StoredTensor) -> None:
    """In transformers a layer's experts are in the order of their names, prefix and all."""
    if first.startswith(_ROOTS) != name.startswith(_ROOTS):
        raise CheckpointError(
            f"{tensor.path}: {name} beside {first}: transformers would mix up the "
            f"experts; name all with {_BASE} or none"
        )


def _parts(
    new: str, name: str, tensor: StoredTensor, g: ModelConfig
) -> Iterator[tuple[str, StoredTensor]]:
    """The tensor itself, or the matrices of a stack.

    A stack is [E, 2 I, H], of gate and up projections, or [E, H, I], of down projections.
    """
    stack = _STACKED.fullmatch(new)
    if stack is None:
        yield new, tensor
        return
    wide, down = g.moe_intermediate_size, stack[2] == "down_proj"
    shape = (g.num_experts, *((g.hidden_size, wide) if down else (2 * wide, g.hidden_size)))
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.path}: {name} has shape {list(tensor.shape)}, the config expects "
            f"{list(shape)}"
        )
    for expert in range(g.num_experts):
        both = part_of(tensor, expert)
        if down:
            yield f"{stack[1]}.{expert}.w2.weight", both
        else:
            yield f"{stack[1]}.{expert}.w1.weight", rows_of(both, 0, wide)
            yield f"{stack[1]}.{expert}.w3.weight", rows_of(both, wide, 2 * wide)


def _notes(kept: Mapping[str, StoredTensor], ignored: list[str], prefix: str) -> Iterator[str]:
    if prefix != _BASE:
        yield f"the tensors' names begin with {prefix}, read as {_BASE}"
    elif any(name.startswith(_ROOTS) for name in map(_unwrapped, kept)):
        yield f"the tensors' names lack {_BASE}, read as with it"
    if wrappers := sorted({w for name in kept for w in _WRAPPERS.findall(name)}):
        yield f"{', '.join(wrappers)} in the tensors' names is read over"
    if stacks := sum(_STACKED.fullmatch(_renamed(name, prefix)) is not None for name in kept):
        yield f"experts are stored as {stacks} stacks (gate_up_proj, down_proj), read one by one"
    if ignored:
        more = f" and {len(ignored) - 1} more" if len(ignored) > 1 else ""
        yield f"{ignored[0]}{more}: not among the model's weights, ignored as transformers does"
