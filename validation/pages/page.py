"""The report as one HTML page that needs no network and no script, from the JSON document.

Every number comes from the document through ``lfmq.validation.pages.numbers.format_figure`` and
carries its place in it (``data-path``, a JSON pointer, percent-encoded) and its exact value
(``data-value``).
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lfmq.validation.pages.chart_set import draw
from lfmq.validation.pages.document import (
    Located,
    list_builds,
    list_warnings,
    open_document,
    shown,
)
from lfmq.validation.pages.numbers import UNKNOWN, Kind, describe_figure, format_figure
from lfmq.validation.pages.page_tables import Entry, tabulate
from lfmq.validation.pages.scales import FLOOR_STEPS, SHARE_STEPS

_FOLDER = Path(__file__).parent


def render_page(document: Mapping[str, Any]) -> str:
    """The page of a document of ``lfmq validate --json``.

    Keys that docs/validation.md calls optional may be absent; their part is left out then.
    """
    at = open_document(document)
    builds = list_builds(at)
    style = (_FOLDER / "page.css").read_text("utf-8")
    template = _environment().get_template("page.html.j2")
    return template.render(
        at=at,
        builds=builds,
        groups=[list(group) for _, group in groupby(builds, key=lambda b: b.path)],
        charts=draw(at, builds),
        tables=tabulate(at, builds),
        conditions=_conditions(at),
        warnings=list_warnings(builds),
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )


# What conditions are called; a key that is not here is shown under its own name.
_CONDITIONS = {
    "sequence": "tokens a window",
    "tokens": "tokens",
    "text_sha256": "sha256 of the text",
}


def _conditions(at: Located) -> list[tuple[str, Located]]:
    """Under what the figures were found."""
    found = at.get("conditions")
    if found is None:
        text = at.get("text_sha256")
        return [] if text is None else [(_CONDITIONS["text_sha256"], text)]
    return [(_CONDITIONS.get(key, key), found[key]) for key in found.value]


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.filters |= {
        "figure": _figure,
        "cell": _cell,
        "threshold": _threshold,
        "shown": shown,
        "described": lambda failure: describe_figure(str(failure.value["figure"]))[0],
    }
    environment.globals |= {"share_steps": SHARE_STEPS, "floor_steps": FLOOR_STEPS}
    return environment


def _figure(found: Located, kind: Kind) -> Markup:
    text = format_figure(found.value, kind)
    return Markup("<span {}>{}</span>").format(_attributes(found, kind), text)


def _attributes(found: Located, kind: Kind, step: str = "") -> Markup:
    """Where the number of an element is from; tests compare it with the document."""
    pattern = Markup('class="n{}" data-path="{}" data-value="{}" data-kind="{}"')
    place = quote(found.pointer, safe="/~", errors="surrogatepass")
    return pattern.format(step, place, json.dumps(found.value), kind)


def _cell(entry: Entry, kind: Kind) -> Markup:
    """A cell of a table with its colour."""
    if entry.found is None:
        return Markup("<td>{}</td>").format(UNKNOWN)
    step = "" if entry.step is None else f" q{entry.step}"
    text = format_figure(entry.found.value, kind)
    return Markup("<td {}>{}</td>").format(_attributes(entry.found, kind, step), text)


def _threshold(failure: Located, key: str) -> Markup:
    """The found value or the limit of a failure, written like its figure."""
    if failure.get(key) is None:
        return Markup("not measured")
    _, kind = describe_figure(str(failure.value["figure"]))
    return _figure(failure[key], kind)
