"""The model card (README.md) that goes into a build's folder.

The front matter's keys are the Hub's (https://huggingface.co/docs/hub/model-cards); license,
languages and tags are the checkpoint's own, taken from the front matter of its card.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined

from lfmq.formats.build import Assets, FileLayout
from lfmq.formats.huggingface.front_matter import base_models, front_matter
from lfmq.formats.plan import Plan, TensorPlan
from lfmq.formats.versions import PROVEN, checkpoint_concerns, known_bad, plan_concerns

_TEMPLATE = """\
---
{% for key, value in facts -%}
{{ key }}: {{ value }}
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
        facts=_facts(assets, [runtime.library, plan.config.model_type, "quantized"]),
        sparse=bool(plan.config.moe_layers),
        name=" ".join(assets.name.split()),
        recipe=plan.recipe,
        rows=_rows(plan, files, stored_as),
        runtime=runtime,
        proven=PROVEN[format],
        bad=known_bad(format, plan_concerns(plan) | checkpoint_concerns(assets)),
    )
    return text.encode()


def _facts(assets: Assets, tags: list[str]) -> list[tuple[str, str]]:
    """The front matter's keys and values, of which texts and lists are as YAML takes JSON."""
    card, bases = front_matter(assets), base_models(assets)
    known = {
        "library_name": tags[0],
        "pipeline_tag": card.pipeline_tag or "text-generation",
        "tags": list(dict.fromkeys([*tags, *card.tags])),
        "base_model": bases[0] if len(bases) == 1 else list(bases),
        "base_model_relation": "quantized" if bases else "",
        "license": card.license,
        "license_name": card.license_name,
        "license_link": card.license_link,
        "language": list(card.language),
    }
    return [(k, json.dumps(v, ensure_ascii=False)) for k, v in known.items() if v]


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
