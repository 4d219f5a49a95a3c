"""The model card (README.md) that goes into a build's folder."""

import json

from jinja2 import Environment, StrictUndefined

from lfmq.formats.build import Assets
from lfmq.quant.types import Plan, Storage

_TEMPLATE = """\
---
library_name: {{ library }}
pipeline_tag: text-generation
tags: [{{ library }}, lfm2_moe, quantized]
{% if base_model -%}
base_model: {{ base_model }}
{% endif -%}
---

# {{ name }}, {{ recipe }}, for {{ library }}

An LFM2 mixture-of-experts model quantized by lfmq. Integer weights are symmetric: every group of
a row has a float16 scale, `w = scale * (code - 2 ** (bits - 1))`. A build of the same recipe for
another runtime holds exactly the same integer weights.

| role | stored as | tensors | weights |
|---|---|---:|---:|
{% for row in rows -%}
| {{ row | join(" | ") }} |
{% endfor %}
Router, norms and the short convolutions' kernels are always floats.

## Run it

Needs {{ runtime }}.

```
{{ how_to_run }}```

## Check it

`lfmq verify FOLDER` compares every file with the manifest beside the build; `lfmq validate
CHECKPOINT FOLDER` measures perplexity, KL divergence and whether the router still picks the same
experts.
"""


def model_card(
    plan: Plan, assets: Assets, *, library: str, runtime: str, how_to_run: str
) -> bytes:
    """The card's bytes.

    Args:
        plan: what is stored how.
        assets: the checkpoint's name and config.
        library: the Hub's ``library_name``.
        runtime: the program and version it needs.
        how_to_run: shell lines that run it.
    """
    base_model = assets.config.get("_name_or_path")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    text = environment.from_string(_TEMPLATE).render(
        library=library,
        name=assets.name,
        recipe=plan.recipe,
        base_model=json.dumps(base_model) if isinstance(base_model, str) and base_model else "",
        rows=_rows(plan),
        runtime=runtime,
        how_to_run=how_to_run,
    )
    return text.encode()


def _rows(plan: Plan) -> list[tuple[str, str, str, str]]:
    counts: dict[tuple[str, Storage], tuple[int, int]] = {}
    for entry in plan.entries:
        key = (entry.role.value, entry.storage)
        tensors, weights = counts.get(key, (0, 0))
        counts[key] = (tensors + 1, weights + entry.size)
    return [(role, str(s), f"{n:,}", f"{w:,}") for (role, s), (n, w) in counts.items()]
