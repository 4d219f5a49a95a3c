"""``general.*`` of a GGUF: what the model is, whose, under which license, how it samples.

Keys are those of gguf-py's ``Keys.General`` (llama.cpp pull requests 7499 and 17120). Base models
go through gguf-py's own ``Metadata``, which parts an id into name, organization and version.
"""

from gguf import GGUFWriter, Metadata

from lfmq.formats.build import Assets
from lfmq.formats.huggingface.front_matter import front_matter, hub_id, sampling_settings

_HUB = "https://huggingface.co/"


def add_authorship(writer: GGUFWriter, assets: Assets) -> None:
    """License, base models, tags, languages and addresses, as card and config state them."""
    card = front_matter(assets)
    given = {
        "license": card.license,
        "license_name": card.license_name,
        "license_link": card.license_link,
        "base_model": list(card.base_model),
        "tags": list(card.tags),
        "pipeline_tag": card.pipeline_tag,
        "language": list(card.language),
    }
    found = Metadata.apply_metadata_heuristic(Metadata(), {k: v for k, v in given.items() if v})
    found.name, own = assets.name, hub_id(assets)
    _, _, found.basename, found.finetune, found.version, _ = Metadata.get_model_id_components(
        assets.name
    )
    if own:
        found.organization = own.partition("/")[0]
        found.repo_url = found.source_repo_url = _HUB + own
    found.url = card.url if card.url.startswith(("https://", "http://")) else found.repo_url
    found.tags = list(dict.fromkeys(found.tags)) if found.tags else None
    found.set_gguf_meta_model(writer)


def add_sampling(writer: GGUFWriter, assets: Assets) -> None:
    """Recommended sampling, under llama.cpp's names for what ``generation_config.json`` sets."""
    settings = sampling_settings(assets)
    if "top_k" in settings:
        writer.add_sampling_top_k(int(settings["top_k"]))
    for name, add in (
        ("top_p", writer.add_sampling_top_p),
        ("min_p", writer.add_sampling_min_p),
        ("temperature", writer.add_sampling_temp),
        ("repetition_penalty", writer.add_sampling_penalty_repeat),
    ):
        if name in settings:
            add(float(settings[name]))
