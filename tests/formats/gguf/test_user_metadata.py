"""Key-values of the user: typed by key or by look, refused where the writer decides."""

from dataclasses import replace

import pytest
from gguf import GGUFReader, GGUFValueType

from lfmq.formats.gguf import container
from lfmq.formats.gguf.user_metadata import checked, parse_pairs
from lfmq.quant.errors import UsageError

TYPES = {
    "general.version=2": ("2", GGUFValueType.STRING),
    "general.author=A = B": ("A = B", GGUFValueType.STRING),
    "general.license=mit": ("mit", GGUFValueType.STRING),
    "general.sampling.top_k=40": (40, GGUFValueType.INT32),
    "general.sampling.temp=1": (1.0, GGUFValueType.FLOAT32),
    "general.sampling.sequence=k;p": ("k;p", GGUFValueType.STRING),
    "my.flag=true": (True, GGUFValueType.BOOL),
    "my.count=-3": (-3, GGUFValueType.INT32),
    "my.long=5000000000": (5000000000, GGUFValueType.INT64),
    "my.part=0.5": (0.5, GGUFValueType.FLOAT32),
    "my.text=a b": ("a b", GGUFValueType.STRING),
    'my.digits="12"': ("12", GGUFValueType.STRING),
    "my.none=null": ("null", GGUFValueType.STRING),
    "my.empty=": ("", GGUFValueType.STRING),
}


def test_values_are_typed(tiny_config, tiny_assets, make_plan, tmp_path):
    card = b"---\nlicense: other\ntags: [x]\n---\n"
    lists = {"general.tags=a, b": ["a", "b"], "my.list=[1, 2]": [1, 2]}
    assets = replace(
        tiny_assets,
        files=tiny_assets.files | {"README.md": card},
        metadata=parse_pairs([*TYPES, *lists]),
    )
    (file,) = container.layout(make_plan(replace(tiny_config, vocab_size=8192)), assets).files
    path = tmp_path / "x.gguf"
    path.write_bytes(file.constants[0][1].ljust(file.size, b"\0"))
    fields = GGUFReader(path).fields
    for pair, (value, kind) in TYPES.items():
        field = fields[pair.partition("=")[0]]
        assert (field.contents(), field.types[0]) == (value, kind), pair
    for pair, value in lists.items():
        assert fields[pair.partition("=")[0]].contents() == value


@pytest.mark.parametrize(
    "pair",
    [
        "x", "=x", "x=1", ".a=1", "a..b=1", "a b.c=1", "ä.b=1", "a." + "b" * 300 + "=1",
        "general.name=x", "general.architecture=llama", "General.Type=x", "general.alignment=64",
        "tokenizer.ggml.pre=x", "lfm2moe.block_count=1", "lfm2.rope.freq_base=1", "split.count=2",
        "lfmq.recipe=x", "GGUF.version=3", "general.base_model.count=7",
        "general.sampling.top_k=hot", "general.sampling.temp=true", "general.tags=[1]",
        "my.list=[]", "my.list=[1, \"a\"]", "my.list=[[1]]", "my.big=99999999999999999999",
        "my.real=1e999", r'my.text="\ud800"', "my.text=" + "x" * 70_000,
    ],
)  # fmt: skip
def test_what_is_refused(pair):
    with pytest.raises(UsageError, match=r"^--metadata ") as caught:
        parse_pairs([pair])
    assert len(str(caught.value)) < 400


def test_a_key_twice_is_refused():
    with pytest.raises(UsageError, match=r"my\.key: is given twice"):
        parse_pairs(["my.key=1", "my.key=2"])


@pytest.mark.parametrize("value", [None, {}, b"x", object(), 2**70, float("nan"), [1, "a"], []])
def test_values_from_python(value):
    with pytest.raises(UsageError, match=r"--metadata my\.key: is "):
        checked({"my.key": value})
    assert checked({"general.tags": ["a"]}) == {"general.tags": ("a",)}
