"""A finished build opened by its reader, refused unless all of it was checked."""

import math
from pathlib import Path

from lfmq.converter.model.tensors import expected_tensors
from lfmq.formats.build import Reader
from lfmq.formats.plan import ModelConfig, Plan, TensorPlan
from lfmq.formats.registry import FORMATS, build_nbytes, detect_format
from lfmq.quant.errors import ValidationError

# No container packs a weight into less than a bit.
_WEIGHTS_A_BYTE = 8


def open_build(path: Path) -> tuple[str, Reader]:
    """The container of a build, and its reader after every tensor and key was checked.

    Raises:
        ValidationError: it is no build, is damaged, or holds what its runtime would use and the
            reader does not know.
    """
    format = detect_format(path)
    reader = FORMATS[format].open_reader(path)
    _check_size(path, reader.config)
    entries = tuple(
        TensorPlan(t.name, t.shape, t.role, t.layer, t.expert, "float32")
        for t in expected_tensors(reader.config)
    )
    reader.check(Plan(reader.config, entries, ""))
    return format, reader


def _check_size(path: Path, g: ModelConfig) -> None:
    """The config's weights fit into the files; lists of their tensors then fit into memory."""
    experts = (g.num_hidden_layers - g.num_dense_layers) * g.num_experts
    weights = (
        g.vocab_size * g.hidden_size
        + len(g.conv_layers) * g.hidden_size**2
        + len(g.attention_layers) * g.hidden_size * g.num_attention_heads * g.head_dim
        + 3 * g.hidden_size * g.num_dense_layers * g.intermediate_size
        + 3 * g.hidden_size * experts * g.moe_intermediate_size
    )
    nbytes = build_nbytes(path)
    if weights > nbytes * _WEIGHTS_A_BYTE:
        raise ValidationError(
            f"{path}: states a model of at least {_words(weights)} weights, which its "
            f"{nbytes:,} bytes cannot hold; write or fetch the build again"
        )


def _words(count: int) -> str:
    return f"{count:,}" if count < 10**15 else f"10^{int(math.log10(count))}"
