"""The model card (README.md) that goes into a build's folder.

The front matter's keys are the Hub's (https://huggingface.co/docs/hub/model-cards); the license is
the checkpoint's own, taken from the front matter of its card.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined

from lfmq.formats.build import Assets, FileLayout
from lfmq.formats.plan import Plan, TensorPlan
from lfmq.formats.versions import PROVEN, checkpoint_concerns, known_bad, plan_concerns

_TEMPLATE = """\
---
library_name: {{ runtime.library }}
pipeline_tag: text-generation
tags: [{{ runtime.library }}, {{ model_type }}, quantized]
{% for key, value in facts -%}
{{ key }}: "{{ value }}"
{% endfor -%}
---

# {{ name }}, {{ recipe }}, for {{ runtime.library }}

An LFM2 {{ "mixture-of-experts" if sparse else "dense" }} model quantized by lfmq. Integer weights
are symmetric: every group of a row has a float16 scale, `w = scale * (code - 2 ** (bits - 1))`. A
build of the same recipe for another runtime holds exactly the same integer weights.

| role | stored as | tensors | weights | bits per weight |
|---|---|---:|---:|---:|
{% for row in rows -%}
| {{ row | join(" | ") }} |
{% endfor %}
{{ "Router, norms" if sparse else "Norms" }} and the short convolutions' kernels are always floats.
Bits per weight count codes, scales and offsets as they lie in the file.

## Run it

Needs {{ runtime.needs }}; proven with {{ proven | join(" and ") }}.

```
{{ runtime.how_to_run }}```
{% if bad %}
Known to be wrong for this build:

{% for row in bad -%}
- {{ row.what }} {{ row.bad }}: {{ row.wrong }}; {{ row.remedy }}
  ([source]({{ row.source }})).
{% endfor -%}
{% endif %}
## Check it

`lfmq verify FOLDER` compares every file with the manifest beside the build; `lfmq validate
CHECKPOINT FOLDER` measures perplexity, KL divergence
{{ "and whether the router still picks the same experts" if sparse else "and top-1 agreement" }}.
"""

# What may stand between quotes in YAML and be a license, a link to one, or a Hub id.
_LICENSE = re.compile(
    r'^(license(?:_name|_link)?):[ \t]*(["\']?)([\w.:/+-]{1,200})\2[ \t]*$', re.M
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Runtime:
    """The program a build is for.

    Attributes:
        library: the Hub's ``library_name``.
        needs: the program and the versions it takes.
        how_to_run: shell lines, each ended by a newline.
    """

    library: str
    needs: str
    how_to_run: str


def model_card(
    plan: Plan,
    assets: Assets,
    files: Iterable[FileLayout],
    format: str,
    runtime: Runtime,
    stored_as: Callable[[TensorPlan], str],
) -> bytes:
    """The card's bytes.

    Args:
        plan: what is stored.
        assets: the checkpoint's name, config and card.
        files: the build's files with weights, for their size.
        format: the container, whose proven and known-bad versions the card names.
        runtime: what runs the build.
        stored_as: how the container stores an entry, in words.
    """
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    text = environment.from_string(_TEMPLATE).render(
        facts=_facts(assets),
        model_type=plan.config.model_type,
        sparse=bool(plan.config.moe_layers),
        name=" ".join(assets.name.split()),
        recipe=plan.recipe,
        rows=_rows(plan, files, stored_as),
        runtime=runtime,
        proven=PROVEN[format],
        bad=known_bad(format, plan_concerns(plan) | checkpoint_concerns(assets)),
    )
    return text.encode()


def _facts(assets: Assets) -> list[tuple[str, str]]:
    """Front matter known from the checkpoint: its Hub id and license, where it states them."""
    facts = []
    base = assets.config_json.get("_name_or_path")
    if isinstance(base, str) and _HUB_ID.fullmatch(base):  # else a path on somebody's machine
        facts.append(("base_model", base))
    card = assets.files.get("README.md", b"").decode("utf-8", "replace").replace("\r\n", "\n")
    if card.startswith("---\n"):
        front = card[4:].partition("\n---")[0]
        licenses = {key: value for key, _, value in _LICENSE.findall(front)}
        facts += sorted(licenses.items())
    return facts


def _rows(
    plan: Plan, files: Iterable[FileLayout], stored_as: Callable[[TensorPlan], str]
) -> list[tuple[str, str, str, str, str]]:
    """One row for each role and storage, in the plan's order."""
    nbytes = _stored_nbytes(plan, files)
    counts: dict[tuple[str, str], tuple[int, int, float]] = {}
    for entry in plan.entries:
        key = (entry.role.value, stored_as(entry))
        tensors, weights, size = counts.get(key, (0, 0, 0.0))
        counts[key] = (tensors + 1, weights + entry.size, size + nbytes[entry.name])
    return [
        (role, stored, f"{tensors:,}", f"{weights:,}", f"{8 * size / weights:.2f}")
        for (role, stored), (tensors, weights, size) in counts.items()
    ]


def _stored_nbytes(plan: Plan, files: Iterable[FileLayout]) -> dict[str, float]:
    """Bytes of every tensor; segments of several tensors are shared out by number of weights."""
    sizes = {entry.name: entry.size for entry in plan.entries}
    nbytes = dict.fromkeys(sizes, 0.0)
    for file in files:
        for segment in file.segments:
            whole = sum(sizes[name] for name in segment.sources)
            for name in segment.sources:
                nbytes[name] += segment.nbytes * sizes[name] / whole
    return nbytes
