"""The page without a browser: its numbers, what hostile text does to it, what it refers to."""

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from lfmq.validation.pages import page
from lfmq.validation.pages.charts import heat_map
from lfmq.validation.pages.numbers import format_figure
from lfmq.validation.pages.page import render_page

STYLE = (Path(page.__file__).parent / "page.css").read_text("utf-8")
VOID = {"meta", "link", "br", "img", "input"}


class Parsed(HTMLParser):
    """Elements in order with their attributes and the text inside them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)
        self.close()
        assert not self._open, "unclosed elements"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.elements[index][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(a, "".join(t)) for found, a, t in self.elements if found == tag]

    def text(self) -> str:
        return "".join(self.elements[0][2])

    def embedded(self) -> Any:
        (script,) = self.all("script")
        assert script[0] == {"type": "application/json", "id": "document"}
        return json.loads(script[1])


def resolve(document: Any, pointer: str) -> Any:
    """RFC 6901."""
    for step in pointer.split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        document = document[int(key)] if isinstance(document, list) else document[key]
    return document


def check_numbers(text: str, document: Any) -> set[str]:
    """Every number is the document's; returns where they are from."""
    parsed, seen = Parsed(text), set()
    for _, attributes, inside in parsed.elements:
        place = attributes.get("data-path")
        if place is None:
            continue
        pointer = unquote(place, errors="surrogatepass")
        value = resolve(document, pointer)
        assert json.loads(attributes["data-value"] or "") == value, pointer
        kind: Any = attributes["data-kind"]
        assert "".join(inside) == format_figure(value, kind), pointer
        seen.add(pointer)
    assert parsed.embedded() == document
    return seen


def numbers(value: Any, pointer: str = "") -> set[str]:
    """Where a document has numbers."""
    if isinstance(value, dict):
        steps = {k.replace("~", "~0").replace("/", "~1"): v for k, v in value.items()}
        return {p for k, v in steps.items() for p in numbers(v, f"{pointer}/{k}")}
    if isinstance(value, list):
        return {p for i, v in enumerate(value) for p in numbers(v, f"{pointer}/{i}")}
    return {pointer} if isinstance(value, int | float) and not isinstance(value, bool) else set()


# Drawn, or the name of a row or column, rather than written as a number.
DRAWN = re.compile(
    r"/histogram/|/layers_kld/|/experts/\d+/(layer|expert|tokens|error)$|/(reference_)?load/|"
    r"/layers/\d+/(layer|jaccard)$|/(low|high|from|to)$|/domains/\w+/kld_stderr$|"
    r"/facts/|/failures/3/(found|limit)$|/reference/longest_repeat/mean$|"
    r"/routing/jaccard$|/embedding_kld$|/margins/\d+/pairs$"
)


def test_every_number_is_the_documents(document):
    seen = check_numbers(render_page(document), document)
    assert {p for p in numbers(document) - seen if not DRAWN.search(p)} == set()


def test_only_what_the_contract_has(document):
    """A document without any optional key."""
    plain = bare(document)
    text = render_page(plain)
    seen = check_numbers(text, plain)
    assert "/builds/0/kld/mean" in seen
    titles = [inside for _, inside in Parsed(text).all("h2")]
    assert [t.strip() for t in titles] == [
        "✓ Passed",
        "Parity of builds and engines",
        "Routing",
        "KL divergence",
        "Domains of the text",
        "Conditions",
    ]


# Keys that may be absent, or null, one at a time.
OPTIONAL = re.findall(
    r"\S+",
    """
/conditions /noise_floor/kld_stderr /noise_floor/perplexity_ratio /noise_floor/layers
/noise_floor/domains /noise_floor/domains/en /noise_floor/domains/en/kld_mean
/builds/0/perplexity_ratio_ci95 /builds/0/kld/ci95 /builds/0/kld/histogram /builds/0/top1_ci95
/builds/0/routing/ci95 /builds/0/routing/layers/0/experts /builds/0/routing/layers/0/load
/builds/0/routing/layers/1/reference_load /builds/0/routing/margins /builds/0/domains/en
/builds/0/positions /builds/0/layers_kld /builds/0/embedding_kld /builds/0/experts
/builds/0/generation /builds/0/generation/greedy /builds/0/generation/greedy/answers
/builds/0/generation/greedy/tools /builds/0/generation/greedy/reference
/builds/0/generation/greedy/capped /builds/0/generation/greedy/longest_repeat
/builds/0/generation/sampled/sampling /builds/0/warnings /builds/1/routing/local_exact_set
/builds/1/routing/layers/0/local_exact_set
""",
)


@pytest.mark.parametrize("pointer", OPTIONAL)
def test_any_optional_key_may_be_absent_or_null(make_document, pointer):
    parent, _, key = pointer.rpartition("/")
    document = make_document(layers=2, experts=4, formats=("gguf",))
    resolve(document, parent)[key] = None
    check_numbers(render_page(document), document)
    del resolve(document, parent)[key]
    check_numbers(render_page(document), document)


def bare(document: dict) -> dict:
    keys = ["path", "format", "engine", "engine_version", "bytes", "bits_per_weight"]
    keys += ["perplexity", "perplexity_ratio", "top1_agreement", "domains"]
    builds = [
        {k: b[k] for k in keys}
        | {"kld": {k: b["kld"][k] for k in ("mean", "stderr", "median", "p99", "max")}}
        | {
            "routing": {
                "exact_set": b["routing"]["exact_set"],
                "jaccard": b["routing"]["jaccard"],
                "layers": [
                    {k: layer[k] for k in ("layer", "exact_set", "jaccard", "load_shift")}
                    for layer in b["routing"]["layers"]
                ],
            }
        }
        for b in document["builds"]
    ]
    floor = ("kld_mean", "top1_agreement", "routing_exact_set")
    return {
        "checkpoint": document["checkpoint"],
        "tokens_scored": document["tokens_scored"],
        "reference": document["reference"],
        "noise_floor": {k: document["noise_floor"][k] for k in floor},
        "builds": builds,
        "passed": True,
        "failures": [],
    }


def test_nothing_is_referred_to_but_places_in_the_page(document):
    text = render_page(document)
    parsed = Parsed(text)
    ids = [a["id"] for _, a, _ in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in parsed.elements:
        assert not {"src", "srcset", "style", "action", "data"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        href = attributes.get("href")
        assert href is None or href == "data:," or href.removeprefix("#") in ids
        labelled = attributes.get("aria-labelledby")
        assert labelled is None or labelled in ids
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    (policy,) = (a["content"] for a, _ in parsed.all("meta") if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    (style,) = parsed.all("style")
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; }</style><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% for x in y %}",
    "a\nb\x1b[31m\u202egnp.exe\x00",
    "\udcff\ud800",
    "]]>--><!-- &lt;b&gt;",
    "~1/~0 \\u003c",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(document, text):
    bad = copy.deepcopy(document)
    bad["checkpoint"] = text
    bad["conditions"] |= {"text_sha256": text, "device": text}
    for build in bad["builds"][:3]:
        build |= {"path": text, "format": text, "engine": text, "engine_version": text}
        build["warnings"] = [text]
        build["domains"] = {text: build["domains"]["en"]}
    bad["builds"][0]["generation"] = {text: bad["builds"][0]["generation"]["greedy"]}
    bad["noise_floor"]["domains"] = {text: {"kld_mean": 0.001, "top1_agreement": 0.99}}
    failure = {"path": text, "engine": text, "figure": text, "found": 1.0, "limit": 2.0}
    bad["failures"] = [failure | {"why": text}]
    rendered = render_page(bad)
    rendered.encode()  # no lone surrogate
    check_numbers(rendered, bad)
    expected = [tag for tag, _, _ in Parsed(render_page(document)).elements]
    found = {tag for tag, _, _ in Parsed(rendered).elements}
    assert found <= set(expected)
    assert not re.search(r"[\x00\x1b\u202e]", rendered)
    assert "7 * 7" in rendered or "7 * 7" not in text


def test_what_is_no_number_is_a_dash(document):
    odd = copy.deepcopy(document)
    build = odd["builds"][0]
    build["perplexity"] = build["perplexity_ratio"] = build["kld"]["mean"] = float("nan")
    build["kld"]["max"] = float("inf")
    build["kld"]["ci95"] = [float("nan"), float("nan")]
    build["routing"]["layers"][0]["experts"][3] = None
    rendered = render_page(odd)
    assert "NaN" not in rendered
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", rendered)
    build["perplexity"] = build["perplexity_ratio"] = build["kld"]["mean"] = None
    build["kld"] |= {"max": None, "ci95": [None, None]}
    check_numbers(rendered, odd)


def test_heat_map_shows_every_expert(document):
    parsed = Parsed(render_page(document))
    rects = [a["class"] for a, _ in parsed.all("rect")]
    layers = [x for b in document["builds"] for x in b["routing"]["layers"]]
    shares = [e for layer in layers for e in layer["experts"]]
    assert sum(c != "bar" for c in rects) == len(shares)
    chart = heat_map(document["builds"][0]["routing"]["layers"])
    assert chart is not None
    cells = [c for row in chart.rows for c in row.cells]
    first = document["builds"][0]["routing"]["layers"]
    titles = [
        f"layer {x['layer']}, expert {i}: {format_figure(e, 'share')}"
        for x in first
        for i, e in enumerate(x["experts"])
    ]
    assert [c.title.partition(";")[0] for c in cells] == titles
    assert {c.step for c in cells} <= set(range(7))


def test_the_verdict_comes_first_and_names_what_missed(document):
    text = render_page(document)
    assert "<title>lfm2moe-tiny: missed " in text
    (start,) = (
        re.sub(r"\s+", " ", inside)
        for a, inside in Parsed(text).all("section")
        if a.get("class") == "verdict failed"
    )
    assert text.index("verdict failed") < text.index("<nav")
    assert start.startswith(" ✕ Missed 5 limits were missed:")
    assert "builds/lfm2moe-tiny-int4-onnx in onnxruntime: mean KLD is 0.00912" in start
    assert "mean KLD in ja is 0.00" in start
    assert "max_kld = 0.005" in start
    assert re.search("bos_token_id is not the checkpoint.s the build says 5", start)
    assert "lfm2moe-tiny-int4-onnx: bos_token_id is 5, the checkpoint's 1" in Parsed(text).text()
    assert "same experts, local is not measured, limit 0.9990" in start
    assert "generation is not measured [generation] has limits" in start
    missed = [inside for a, inside in Parsed(text).all("td") if a.get("class") == "missed"]
    assert [m.split("✕")[1].strip() for m in missed] == ["limit 0.9990", "limit 0.00500"]


def test_tables_are_tables(document):
    parsed = Parsed(render_page(document))
    assert len(parsed.all("table")) == len(parsed.all("caption")) > 10
    assert all("scope" in a for a, _ in parsed.all("th"))
    drawings = [a for a, _ in parsed.all("svg") if a.get("aria-hidden") != "true"]
    assert all(a["role"] == "img" and "aria-labelledby" in a for a in drawings)


def test_builds_that_share_format_and_engine_are_told_apart(document):
    twice = copy.deepcopy(document)
    twice["builds"] = [twice["builds"][0], copy.deepcopy(twice["builds"][0])]
    twice["builds"][1]["path"] = "builds/lfm2moe-tiny-int8.gguf"
    text = render_page(twice)
    assert "lfm2moe-tiny-int8.gguf · read" in text
    assert "lfm2moe-tiny-int4.gguf · read" in text


def test_the_same_document_gives_the_same_page(document):
    assert render_page(document) == render_page(json.loads(json.dumps(document)))


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_are_readable_and_in_order(mode):
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.S)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", blocks[mode]))
    for ink in ("ink", "quiet", "accent", "good", "bad"):
        assert contrast(colours[ink], colours["ground"]) >= 4.5, ink
    assert contrast(colours["quiet"], colours["raised"]) >= 4.5
    for verdict in ("good", "bad"):
        assert contrast(colours[verdict], colours[f"{verdict}-ground"]) >= 4.5
        assert contrast(colours["ink"], colours[f"{verdict}-ground"]) >= 4.5
    steps = [colours[f"q{i}"] for i in range(7)]
    for i, step in enumerate(steps):
        assert contrast(step, colours[f"on{i}"]) >= 4.5, i
    # lightness alone orders the steps: for print in grey and for readers who see few colours
    apart = [contrast(step, colours["ground"]) for step in steps]
    assert apart == sorted(apart)
    assert min(b / a for a, b in pairwise(apart)) > 1.1
    assert contrast(colours["data"], colours["ground"]) >= 3  # graphics
