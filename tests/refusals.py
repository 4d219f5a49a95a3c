"""What a user reads when a build is refused: one line, short enough to be read."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lfmq.quant.errors import ValidationError


def refusal_of(check: Callable[[Path], object], build: Path) -> str:
    """The line with which ``check`` refuses the build."""
    with pytest.raises(ValidationError) as caught:
        check(build)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message
