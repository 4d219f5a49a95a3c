"""A short run of ``benchmarks/fuzz.py``: no damaged input of any kind is a fault."""

from collections import Counter
from pathlib import Path

from lfmq.benchmarks.fuzz import RIGHT, fuzz
from lfmq.benchmarks.fuzz_kinds import KINDS

EACH = 10  # inputs of a kind
# Kinds of which an input starts a process or runs a whole command.
FEW = {
    "options": 2,
    "tokenizer": 2,
    "tokenizer-layout": 3,
    "tokenizer-config": 2,
    "chat-template": 2,
    "jsonl": 3,
    "text": 2,
    "tasks": 4,
    "manifest": 5,
    "card": 2,
    "generation-config": 3,
    "gguf": 6,
}


def test_damaged_files_are_refused_or_right(tmp_path: Path) -> None:
    inputs = [(kind, n) for kind in KINDS for n in range(FEW.get(kind, EACH))]
    outcomes = list(fuzz(inputs, 17, tmp_path, 1))
    assert len(outcomes) == len(inputs)
    assert not [o for o in outcomes if o.result not in RIGHT]
    counts = Counter(o.kind for o in outcomes if o.result == "refused")
    assert len(counts) > 20  # not everything is accepted
