"""What the builds of a plan will be: checked by their formats and sized; no weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.plan.plan import bits_per_weight, token_bytes
from lfmq.formats.build import BuildLayout, Format
from lfmq.formats.plan import Plan
from lfmq.formats.registry import check_plan
from lfmq.quant.errors import CheckpointError, UnsupportedError


@dataclass(frozen=True, slots=True)
class PlannedBuild:
    """What a build would be.

    Attributes:
        format: its container.
        nbytes: of all its files.
        bits_per_weight: of all its files.
        bytes_per_token: bytes of weights that are read for each decoded token.
        refused: why the format cannot hold the plan; None where it can.
    """

    format: str
    nbytes: int = 0
    bits_per_weight: float = 0.0
    bytes_per_token: int = 0
    refused: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The object of ``builds`` in ``lfmq plan --json``."""
        if self.refused is not None:
            return {"format": self.format, "refused": self.refused}
        return {
            "format": self.format,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "bytes_per_token": self.bytes_per_token,
        }


def plan_layouts(
    checkpoint: Checkpoint, plan: Plan, formats: Mapping[str, Format]
) -> dict[str, BuildLayout]:
    """Check the plan against every format and lay out each build; reads no weight.

    Raises:
        CheckpointError: the name is not UTF-8, or the tokenizer has ids beyond the embedding.
        UnsupportedError: a format cannot hold the plan.
    """
    _check_name(checkpoint)
    rows, vocabulary = plan.config.vocab_size, checkpoint.vocabulary
    if vocabulary is not None and vocabulary.size > rows:
        raise CheckpointError(
            f"{checkpoint.folder / 'tokenizer.json'}: token {vocabulary.last!r} has id "
            f"{vocabulary.size - 1}, the model's vocabulary has {rows} rows; the tokenizer "
            "belongs to another checkpoint"
        )
    for module in formats.values():
        check_plan(module, plan, checkpoint.assets)
    return {name: f.layout(plan, checkpoint.assets) for name, f in formats.items()}


def _check_name(checkpoint: Checkpoint) -> None:
    """Files state the name, as UTF-8."""
    name = checkpoint.assets.name
    if any("\ud800" <= c <= "\udfff" for c in name):
        raise CheckpointError(
            f"{name!a}: the checkpoint's name is not UTF-8, and builds are named after it; "
            "rename the folder, or convert with --name"
        )


def plan_builds(
    checkpoint: Checkpoint, plan: Plan, formats: Mapping[str, Format]
) -> tuple[PlannedBuild, ...]:
    """The size of each build, or why its format refuses; reads no weight."""
    builds = []
    for name, module in formats.items():
        try:
            layout = plan_layouts(checkpoint, plan, {name: module})[name]
        except UnsupportedError as error:
            builds.append(PlannedBuild(name, refused=str(error)))
            continue
        bits = bits_per_weight(plan, layout.nbytes)
        builds.append(PlannedBuild(name, layout.nbytes, bits, token_bytes(plan, layout)))
    return tuple(builds)
