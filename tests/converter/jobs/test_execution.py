"""How work is run travels as one value, and tells whoever listens."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from lfmq.converter.jobs.execution import DEFAULT_MEMORY, Execution, Step
from lfmq.converter.jobs.memory import parse_bytes
from lfmq.quant.errors import ValidationError


def test_defaults_use_every_core_and_tell_nobody():
    execution = Execution()
    assert execution.threads >= 1
    assert (execution.device, execution.cluster) == ("cpu", None)
    assert execution.memory == DEFAULT_MEMORY == parse_bytes("2GB")
    execution.tell("nobody hears it")
    execution.counter("balancing")(1, 6)
    with pytest.raises(FrozenInstanceError):
        execution.threads = 3  # type: ignore[misc]


def test_steps_and_lines_reach_the_listeners():
    steps: list[Step] = []
    lines: list[str] = []
    execution = Execution(progress=steps.append, notice=lines.append)
    advance = execution.counter("generating", "answer")
    advance(2, 8)
    execution.tell("a line")
    assert steps == [Step("generating", "answer", 2, 8)]
    assert lines == ["a line"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused_at_once():
    with pytest.raises(ValidationError, match="use --device cpu"):
        Execution(device="cuda")
