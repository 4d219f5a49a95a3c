"""The page without a browser: its numbers, what hostile text does to it, what it refers to."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from lfmq.tests.validation.reports import NAN, with_figure, without_routing
from lfmq.validation.measure.figures import (
    KLD,
    KLD_MAX,
    PERPLEXITY,
    PERPLEXITY_RATIO,
    ROUTING,
    Estimate,
)
from lfmq.validation.measure.generation import AnswerFigures, ToolFigures
from lfmq.validation.measure.report import (
    BuildReport,
    Failure,
    Histogram,
    NoiseFloor,
    Report,
    columns_of,
)
from lfmq.validation.measure.routing import LayerRouting
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
    r"/(perplexity_ratio|top1|rms_delta_p)_stderr$|/routing/(stderr|jaccard)$|/embedding_kld$|/margins/\d+/pairs$"
)


def test_every_number_is_the_reports(report):
    document = report.to_json()
    seen = check_numbers(render_page(report), document)
    assert {p for p in numbers(document) - seen if not DRAWN.search(p)} == set()


def check(report: Report) -> set[str]:
    """The page's numbers are those of the report's JSON."""
    return check_numbers(render_page(report), json.loads(json.dumps(report.to_json())))


def titles(report: Report) -> list[str]:
    return [inside.strip() for _, inside in Parsed(render_page(report)).all("h2")]


def test_only_what_every_report_has(report):
    """A report without any optional part."""
    plain = bare(report)
    assert "/builds/0/kld/mean" in check(plain)
    assert titles(plain) == [
        "✓ Passed",
        "Parity of builds and engines",
        "KL divergence",
        "Conditions",
    ]


def test_a_dense_model_has_no_routing_on_its_page(report):
    dense = without_routing(report)
    assert not any("routing" in pointer for pointer in check(dense))
    assert "Routing" not in titles(dense)
    assert "routing" not in Parsed(render_page(dense)).text().lower()
    assert "#routing" not in render_page(dense)


def test_figures_have_one_title(report):
    parsed = Parsed(render_page(report))
    (parity,) = (inside for a, inside in parsed.all("table") if a.get("class") == "parity")
    for figure in columns_of(report):
        assert figure.heading in parity
        assert figure.meaning in parsed.text()


def first(change: Callable[[BuildReport], BuildReport]) -> Callable[[Report], Report]:
    """A change of the first build."""
    return lambda report: replace(report, builds=(change(report.builds[0]), *report.builds[1:]))


def routed(**changes: Any) -> Callable[[Report], Report]:
    """A change of the routing of the first build."""

    def change(build: BuildReport) -> BuildReport:
        assert build.routing is not None
        return replace(build, routing=replace(build.routing, **changes))

    return first(change)


def generated(**changes: Any) -> Callable[[Report], Report]:
    """A change of the greedy answers of the first build."""

    def change(build: BuildReport) -> BuildReport:
        assert build.generation is not None
        mode = replace(build.generation["greedy"], **changes)
        return replace(build, generation={**build.generation, "greedy": mode})

    return first(change)


def without_layers(report: Report) -> Report:
    return replace(report, noise_floor=replace(report.noise_floor, layers={}))


def without_floor_domains(report: Report) -> Report:
    return replace(report, noise_floor=replace(report.noise_floor, domains={}))


NOTHING = ToolFigures(None, None, None, None, 0)
# Parts of a report that may be absent, one at a time.
OPTIONAL: dict[str, Callable[[Report], Report]] = {
    "floor layers": without_layers,
    "floor domains": without_floor_domains,
    "interval": first(lambda b: with_figure(b, KLD, Estimate(0.002, math.nan, (math.nan,) * 2))),
    "histogram": first(lambda b: replace(b, histogram=Histogram((), ()))),
    "experts": routed(layers=(LayerRouting(2, 0.9, 0.9, 0.0),)),
    "margins": routed(margins=()),
    "routing of one build": first(lambda b: with_figure(replace(b, routing=None), ROUTING, None)),
    "domains": first(lambda b: replace(b, domains={})),
    "positions": first(lambda b: replace(b, positions=())),
    "attribution": first(lambda b: replace(b, attribution=None)),
    "expert errors": first(
        lambda b: replace(b, attribution=replace(b.attribution, experts=()))  # type: ignore[type-var]
    ),
    "generation": first(lambda b: replace(b, generation=None)),
    "no tool tasks": generated(tools=NOTHING),
    "no answers": generated(answers=AnswerFigures(None, None, 0)),
    "sampling": generated(sampling=None),
    "capped": generated(capped=None),
}


@pytest.mark.parametrize("part", OPTIONAL)
def test_any_optional_part_may_be_absent(make_report, part):
    check(OPTIONAL[part](make_report(layers=2, experts=4, formats=("gguf",))))


def bare(report: Report) -> Report:
    def without(build: BuildReport) -> BuildReport:
        figures = {f: Estimate(e.value) for f, e in build.figures.items() if not f.routing}
        return replace(
            build,
            figures=figures,
            histogram=Histogram((), ()),
            routing=None,
            domains={},
            positions=(),
            facts=(),
            attribution=None,
            generation=None,
            warnings=(),
        )

    floor = {f: Estimate(e.value) for f, e in report.noise_floor.figures.items() if not f.routing}
    return replace(
        report,
        builds=tuple(map(without, report.builds)),
        noise_floor=NoiseFloor(floor, {}, {}, ()),
        failures=(),
    )


def test_nothing_is_referred_to_but_places_in_the_page(report):
    text = render_page(report)
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
def test_hostile_text_stays_text(report, text):
    builds = [
        replace(
            b,
            path=text,
            format=text,
            engine=text,
            engine_version=text,
            warnings=(text,),
            domains={text: b.domains["en"]},
        )
        for b in report.builds[:3]
    ]
    assert builds[0].generation is not None
    builds[0] = replace(builds[0], generation={text: builds[0].generation["greedy"]})
    floor = report.noise_floor
    bad = replace(
        report,
        checkpoint=text,
        conditions=replace(report.conditions, text_sha256=text, device=text),
        builds=(*builds, *report.builds[3:]),
        noise_floor=replace(floor, domains={text: floor.domains["en"]}),
        failures=(Failure(text, text, text, 1.0, 2.0, text, text, "number"),),
    )
    rendered = render_page(bad)
    rendered.encode()  # no lone surrogate
    check_numbers(rendered, bad.to_json())
    expected = [tag for tag, _, _ in Parsed(render_page(report)).elements]
    found = {tag for tag, _, _ in Parsed(rendered).elements}
    assert found <= set(expected)
    assert not re.search(r"[\x00\x1b\u202e]", rendered)
    assert "7 * 7" in rendered or "7 * 7" not in text


def test_what_is_no_number_is_a_dash(report):
    (layer, *layers) = report.builds[0].routing.layers
    layer = replace(layer, experts=(math.nan, *layer.experts[1:]))
    (build, *builds) = routed(layers=(layer, *layers))(report).builds
    for figure in (PERPLEXITY, PERPLEXITY_RATIO, KLD):
        build = with_figure(build, figure, NAN)
    build = with_figure(build, KLD_MAX, Estimate(math.inf))
    odd = replace(report, builds=(build, *builds))
    rendered = render_page(odd)
    assert "NaN" not in rendered
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", rendered)
    check(odd)


def test_heat_map_shows_every_expert(report):
    parsed = Parsed(render_page(report))
    rects = [a["class"] for a, _ in parsed.all("rect")]
    shares = [e for b in report.builds for layer in b.routing.layers for e in layer.experts]
    assert sum(c != "bar" for c in rects) == len(shares)
    layers = report.builds[0].routing.layers
    chart = heat_map(layers)
    assert chart is not None
    cells = [c for row in chart.rows for c in row.cells]
    names = [
        f"layer {layer.layer}, expert {i}: {format_figure(e, 'share')}"
        for layer in layers
        for i, e in enumerate(layer.experts)
    ]
    assert [c.title.partition(";")[0] for c in cells] == names
    assert {c.step for c in cells} <= set(range(7))


def test_the_verdict_comes_first_and_names_what_missed(report):
    text = render_page(report)
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
    assert re.search("bos_token_id differs from the checkpoint.s the build says 5", start)
    assert "lfm2moe-tiny-int4-onnx: bos_token_id is 5, the checkpoint's 1" in Parsed(text).text()
    assert "local routing agreement is not measured, limit 0.9990" in start
    assert "generation is not measured [generation] has limits" in start
    missed = [inside for a, inside in Parsed(text).all("td") if a.get("class") == "missed"]
    assert [m.split("✕")[1].strip() for m in missed] == ["limit 0.9990", "limit 0.00500"]


def test_tables_are_tables(report):
    parsed = Parsed(render_page(report))
    assert len(parsed.all("table")) == len(parsed.all("caption")) > 10
    assert all("scope" in a for a, _ in parsed.all("th"))
    drawings = [a for a, _ in parsed.all("svg") if a.get("aria-hidden") != "true"]
    assert all(a["role"] == "img" and "aria-labelledby" in a for a in drawings)


def test_builds_that_share_format_and_engine_are_told_apart(report):
    first = report.builds[0]
    other = replace(first, path="builds/lfm2moe-tiny-int8.gguf")
    text = render_page(replace(report, builds=(first, other), failures=()))
    assert "lfm2moe-tiny-int8.gguf · read" in text
    assert "lfm2moe-tiny-int4.gguf · read" in text


def test_the_same_report_gives_the_same_page(make_report):
    assert render_page(make_report()) == render_page(make_report())


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
