"""JSON in every encoding it may have, and what is none."""

from pathlib import Path

import pytest

from lfmq.formats.huggingface.json_file import as_utf8, parse_object
from lfmq.quant.errors import CheckpointError

PATH = Path("x.json")
TEXT = '{"a": "ä"}'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_every_encoding_of_json_is_read(encoding):
    assert parse_object(TEXT.encode(encoding), PATH) == {"a": "ä"}
    assert as_utf8(TEXT.encode(encoding)) == TEXT.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[1]", b"3", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 100_000, b'{"a": "\\ud800"}',
        b'{"a": ' + b"9" * 5000 + b"}", b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=lambda c: repr(c[:12]),
)  # fmt: skip
def test_what_is_no_object_is_one_line(content):
    with pytest.raises(CheckpointError, match=r"^x\.json: ") as caught:
        parse_object(content, PATH)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_numbers_that_other_parsers_refuse():
    for word in ("NaN", "Infinity", "-Infinity"):
        text = f'{{"a": {word}}}'.encode()
        assert parse_object(text, PATH)
        with pytest.raises(CheckpointError, match=f"it holds {word}"):
            parse_object(text, PATH, finite=True)


def test_the_last_of_two_equal_keys_counts():
    assert parse_object(b'{"a": 1, "a": 2}', PATH) == {"a": 2}
