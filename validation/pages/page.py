"""The report as one HTML page that needs no network and no script.

Every number is written by ``lfmq.validation.pages.numbers.format_figure`` and carries its place in
the report's JSON (``data-path``, a JSON pointer, percent-encoded) and its exact value
(``data-value``).
"""

import base64
import hashlib
import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lfmq.validation.measure.figures import KLD, PERPLEXITY, PERPLEXITY_RATIO, ROUTING
from lfmq.validation.measure.report import Report, columns_of
from lfmq.validation.pages.chart_set import draw
from lfmq.validation.pages.generation_table import HEADINGS, generation_rows
from lfmq.validation.pages.numbers import UNKNOWN, format_figure
from lfmq.validation.pages.page_tables import Entry, tabulate
from lfmq.validation.pages.rows import (
    Number,
    Row,
    list_misses,
    list_rows,
    list_tokenizers,
    list_warnings,
    number,
    number_in,
    shown,
)
from lfmq.validation.pages.scales import FLOOR_STEPS, SHARE_STEPS

_FOLDER = Path(__file__).parent


def render_page(report: Report) -> str:
    """The page of a report; parts that it has no figures for are left out."""
    rows = list_rows(report)
    style = (_FOLDER / "page.css").read_text("utf-8")
    template = _environment().get_template("page.html.j2")
    floor = report.noise_floor
    columns = columns_of(report)
    return template.render(
        report=report,
        rows=rows,
        groups=[list(group) for _, group in groupby(rows, key=lambda row: row.report.path)],
        misses=list_misses(report),
        columns=columns,
        perplexity=PERPLEXITY,
        ratio=PERPLEXITY_RATIO,
        floor={
            figure: number(
                floor.figures[figure].value, f"/noise_floor/{figure.flat_key}", figure.kind
            )
            for figure in columns
            if figure in floor.figures
        },
        floor_error=number(floor.figures[KLD].stderr, "/noise_floor/kld_stderr", KLD.kind),
        kld=KLD,
        summary=_summary(report),
        charts=draw(report, rows),
        tables=tabulate(report, rows),
        generated=generation_rows(rows),
        headings=HEADINGS,
        conditions=_conditions(report),
        warnings=list_warnings(rows),
        tokenizers=list_tokenizers(report.parity),
        document=report.to_json(),
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )


# What conditions are called; a key that is not here is shown under its own name.
_CONDITIONS = {
    "sequence": "tokens per window",
    "tokens": "tokens",
    "text_sha256": "sha256 of the text",
}


def _conditions(report: Report) -> list[tuple[str, Number | str]]:
    """Under what the figures were found."""
    return [
        (
            _CONDITIONS.get(key, key),
            number(value, f"/conditions/{key}", "count") if isinstance(value, int) else value,
        )
        for key, value in asdict(report.conditions).items()
    ]


def _summary(report: Report) -> list[tuple[str, Number]]:
    """The numbers at the head of the page."""
    found = [
        ("positions scored", number(report.tokens_scored, "/tokens_scored", "count")),
        (
            "reference perplexity",
            number(report.reference_perplexity, "/reference/perplexity", "perplexity"),
        ),
    ]
    for figure in (KLD, ROUTING):
        at = f"/noise_floor/{figure.flat_key}"
        value = number_in(report.noise_floor.figures, figure, at)
        if value is not None:
            found.append((f"noise floor, {figure.title}", value))
    return found


def _bits(row: Row) -> tuple[Number, Number]:
    """Bits per weight and bytes of a build."""
    bits = number(row.report.bits_per_weight, f"{row.at}/bits_per_weight", "bits")
    return bits, number(row.report.nbytes, f"{row.at}/bytes", "count")


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.filters |= {"figure": _figure, "cell": _cell, "shown": shown, "bits": _bits}
    environment.globals |= {"share_steps": SHARE_STEPS, "floor_steps": FLOOR_STEPS}
    return environment


def _figure(found: Number | None) -> Markup:
    if found is None:
        return Markup(UNKNOWN)
    text = format_figure(found.value, found.kind)
    return Markup("<span {}>{}</span>").format(_attributes(found), text)


def _attributes(found: Number, step: str = "") -> Markup:
    """Where the number of an element is from; tests compare it with the document."""
    pattern = Markup('class="n{}" data-path="{}" data-value="{}" data-kind="{}"')
    place = quote(found.pointer, safe="/~", errors="surrogatepass")
    return pattern.format(step, place, json.dumps(found.value), found.kind)


def _cell(entry: Entry) -> Markup:
    """A cell of a table with its colour."""
    if entry.found is None:
        return Markup("<td>{}</td>").format(UNKNOWN)
    step = "" if entry.step is None else f" q{entry.step}"
    text = format_figure(entry.found.value, entry.found.kind)
    return Markup("<td {}>{}</td>").format(_attributes(entry.found, step), text)
