"""TOML text to values, where a hostile file gives an error and nothing else.

Integers of TOML have 64 bits (https://toml.io/en/v1.0.0#integer). Python reads longer ones, which
then cannot be printed or compared with a float.
"""

import tomllib
from typing import Any


def parse_toml(text: str) -> dict[str, Any]:
    """The document.

    Raises:
        ValueError: what is wrong with it, in words.
    """
    try:
        document = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    left: list[Any] = [document]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("an integer of more than 64 bits")
    return document
