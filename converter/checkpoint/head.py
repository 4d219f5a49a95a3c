"""Whether a model's head is its embedding, decided as transformers' ``tie_weights`` does (5.23).

Of a head and an embedding that are both stored, equal values are tied and different ones are not,
whatever the config says; of one alone, a config that ties them makes it both.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lfmq.converter.model.tensors import EMBEDDING, HEAD
from lfmq.formats.huggingface.safetensors_file import (
    FLOAT_DTYPES,
    StoredTensor,
    read_tensor,
    rows_of,
)
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import CheckpointError
from lfmq.quant.types import widened

_WEIGHTS_AT_ONCE = 2**22


@dataclass(frozen=True, slots=True)
class Head:
    """What was found.

    Attributes:
        tied: the embedding is the head.
        stored: the tensors without a copy of the tied head.
        notes: what was done to them.
    """

    tied: bool
    stored: dict[str, StoredTensor]
    notes: tuple[str, ...] = ()


def settle_head(folder: Path, stored: dict[str, StoredTensor], config: ModelConfig) -> Head:
    """Find out whether the head is the embedding; both are read when both are stored.

    Raises:
        CheckpointError: the config says that there is a head, and there is none.
    """
    head, embedding = stored.get(HEAD), stored.get(EMBEDDING)
    if head is None:
        if not config.tie_word_embeddings:
            raise CheckpointError(
                f"{folder / 'config.json'}: tie_word_embeddings is false, but {HEAD} is missing; "
                "fetch the file that holds it, or set the key to true if the embedding is the head"
            )
        return Head(True, stored)
    rest = {name: t for name, t in stored.items() if name != HEAD}
    if embedding is None:
        if not config.tie_word_embeddings:
            return Head(False, stored)  # the missing embedding is reported with its name
        return Head(True, {EMBEDDING: head, **rest}, (f"{HEAD} is also the embedding",))
    if _equal(head, embedding):
        how = "" if head.dtype == embedding.dtype else f" in {head.dtype}"
        return Head(True, rest, (f"{HEAD} is a copy{how} of the embedding, which is tied",))
    note = f"{HEAD} differs from the embedding: the model has a head of its own"
    if config.tie_word_embeddings:
        note += ", though config.json ties them (transformers does not, either)"
    return Head(False, stored, (note,))


def _equal(head: StoredTensor, embedding: StoredTensor) -> bool:
    """Whether two matrices hold the same numbers, in any float dtype; a few rows at a time."""
    if head.shape != embedding.shape or len(head.shape) != 2:
        return False
    if not {head.dtype, embedding.dtype} <= FLOAT_DTYPES.keys():
        return False
    step = max(1, _WEIGHTS_AT_ONCE // max(1, head.shape[1]))
    for start in range(0, head.shape[0], step):
        ours, theirs = (
            widened(read_tensor(rows_of(t, start, start + step))) for t in (head, embedding)
        )
        if not np.array_equal(ours, theirs):
            return False
    return True
