"""What a checkpoint is, and what a user should be warned of, without reading a weight."""

from dataclasses import asdict, dataclass
from typing import Any

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.checkpoint.vocabulary import saved_for_training
from lfmq.converter.model.tensors import expected_tensors
from lfmq.formats.build import Assets
from lfmq.formats.huggingface.chat_template import DEFAULT, chat_templates, other_templates
from lfmq.formats.huggingface.end_tokens import end_token_conflicts
from lfmq.formats.huggingface.front_matter import card_warnings
from lfmq.formats.plan import Role


@dataclass(frozen=True, slots=True)
class RoleCount:
    """How much of the checkpoint one role is."""

    role: str
    tensors: int
    weights: int
    nbytes: int
    dtypes: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of :func:`inspect_checkpoint`."""

    name: str
    title: str
    config: dict[str, Any]
    roles: tuple[RoleCount, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> int:
        """Number of tensors."""
        return sum(r.tensors for r in self.roles)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(r.weights for r in self.roles)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(r.nbytes for r in self.roles)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        totals = {"tensors": self.tensors, "parameters": self.weights, "bytes": self.nbytes}
        return {
            "name": self.name,
            "geometry": self.config,
            **totals,
            "roles": [asdict(r) for r in self.roles],
            "warnings": list(self.warnings),
            "odd": list(self.warnings),  # the key's earlier name
            "notes": list(self.notes),
        }


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Count the checkpoint's tensors by role and look for what a user should know."""
    g = checkpoint.config
    tensors = expected_tensors(g)
    roles = []
    for role in Role:
        found = [checkpoint.stored[t.name] for t in tensors if t.role is role]
        if found:
            weights = sum(t.size for t in tensors if t.role is role)
            dtypes = ", ".join(sorted({t.dtype for t in found}))
            nbytes = sum(t.nbytes for t in found)
            roles.append(RoleCount(role.value, len(found), weights, nbytes, dtypes))
    title = (
        f"{checkpoint.assets.name}: {g.model_type}, {g.num_hidden_layers} layers "
        f"({len(g.conv_layers)} conv, {len(g.attention_layers)} attention), "
    )
    title += (
        f"{g.num_experts} experts, {g.num_experts_per_tok} active" if g.moe_layers else "dense"
    )
    warnings = tuple(_warnings(checkpoint))
    return Inspection(
        checkpoint.assets.name, title, asdict(g), tuple(roles), warnings, checkpoint.notes
    )


def _warnings(checkpoint: Checkpoint) -> list[str]:
    g, files = checkpoint.config, checkpoint.assets.files
    found = []
    biases = [t.dtype for n, t in checkpoint.stored.items() if n.endswith("expert_bias")]
    rounded = sorted({dtype for dtype in biases if dtype != "F32"})
    if rounded:
        found.append(f"expert_bias is stored as {rounded[0]}, not F32: selection was rounded")
    if not g.norm_topk_prob:
        found.append("norm_topk_prob is false: GGUF cannot hold it")
    if g.routed_scaling_factor != 1:
        found.append(f"routed_scaling_factor is {g.routed_scaling_factor}: GGUF cannot hold it")
    if checkpoint.vocabulary is None:
        found.append("no tokenizer.json: GGUF needs one, text cannot be tokenized")
    elif checkpoint.vocabulary.size != g.vocab_size:
        found.append(
            f"the tokenizer has {checkpoint.vocabulary.size:,} tokens, the config's vocab_size "
            f"is {g.vocab_size:,}"
        )
    if not g.tie_word_embeddings:
        found.append(
            "the model has a head of its own: mlx cannot hold it, vLLM ties it to the embedding"
        )
    found += _template_warnings(checkpoint.assets)
    found += end_token_conflicts(checkpoint.assets, g)
    found += card_warnings(checkpoint.assets)
    if saved := saved_for_training(checkpoint.assets):
        found.append(
            f"tokenizer.json saves {saved}: as in transformers, text is tokenized without"
        )
    if "generation_config.json" not in files:
        found.append("no generation_config.json: runtimes use their own sampling defaults")
    return found


def _template_warnings(assets: Assets) -> list[str]:
    used = chat_templates(assets)
    if not (used.default or "").strip():
        others = ", ".join(name for name in used.named if name != DEFAULT)
        what = f"no chat template is the default, only {others}" if others else "no chat template"
        return [f"{what}: chats cannot be rendered"]
    return [
        f"{name} has another chat template than {used.source}: transformers and the builds use "
        f"the one of {used.source}"
        for name in other_templates(assets)
    ]
