import pytest

from lfmq.converter.plan.toml_text import parse_toml


def test_a_document() -> None:
    assert parse_toml("a = [1, -9223372036854775808]\n[b]\nc = 'x'") == {
        "a": [1, -(2**63)],
        "b": {"c": "x"},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = ", "Invalid value"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "9" * 5000, "limit"),
        ("[[a]]\nb = [0x" + "f" * 6000 + "]", "more than 64 bits"),
        ("a = 9223372036854775808", "more than 64 bits"),
    ],
)
def test_what_is_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_toml(text)
