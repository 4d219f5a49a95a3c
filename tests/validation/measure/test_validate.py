import dataclasses

import numpy as np
import pytest
from gguf import GGUFReader

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.model.text import load_windows
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.formats.registry import FORMATS, detect_format
from lfmq.quant.errors import ValidationError
from lfmq.validation.gate.judge import judge
from lfmq.validation.gate.thresholds import Thresholds
from lfmq.validation.measure.figures import KLD, ROUTING
from lfmq.validation.measure.validate import validate

# Windows as long as those the sample was trained on.
SEQUENCE = 256


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def windows(sample, sample_folder):
    text = sample_folder.parent / "evaluation.jsonl"
    return load_windows(
        [text], sample.assets, sample.config, tokens=11 * SEQUENCE, sequence=SEQUENCE
    )


@pytest.fixture(scope="module")
def build(sample, tmp_path_factory):
    def make(recipe, *formats):
        loaded = load_recipe(recipe)
        plan = resolve_plan(sample.config, loaded)
        chosen = {name: FORMATS[name] for name in formats}
        output = tmp_path_factory.mktemp("builds")
        return [b.path for b in convert(sample, loaded, plan, chosen, output).builds]

    return make


def test_every_format_holds_the_same_model(sample, windows, build):
    paths = build("int4", *FORMATS)
    assert [detect_format(p) for p in paths] == list(FORMATS)
    report = validate(sample, paths, windows)
    first = report.builds[0]
    assert first.domains.keys() == set(windows.domains)
    assert first.routing is not None
    assert [r.layer for r in first.routing.layers] == list(sample.config.moe_layers)
    for other in report.builds[1:]:
        # norms and conv kernels are bfloat16 in the checkpoint; MLX keeps them as float16
        assert other.figures[KLD].value == pytest.approx(first.figures[KLD].value, rel=1e-3)
        assert other.figures[ROUTING].value == pytest.approx(
            first.figures[ROUTING].value, abs=1e-3
        )
    assert report.tokens_scored == 11 * (SEQUENCE // 2 - 1)
    assert report.conditions.tokens == 11 * SEQUENCE
    floor = report.noise_floor
    assert (floor.figures[KLD].stderr or 0) > 0
    assert floor.domains.keys() == first.domains.keys()
    assert floor.layers.keys() == {r.layer for r in first.routing.layers}


def test_more_bits_are_nearer_and_thresholds_tell(sample, windows, build):
    (int8,), (int4,) = build("int8", "gguf"), build("int4-all", "gguf")
    report = validate(sample, [int8, int4], windows)
    near, far = report.builds
    assert near.figures[KLD].value < far.figures[KLD].value / 5
    assert near.figures[ROUTING].value > far.figures[ROUTING].value
    failures = judge(report, Thresholds({"min_routing": 0.95}))
    assert [(f.path, f.figure) for f in failures] == [(str(int4), "routing.exact_set")]
    assert report.passed
    assert not dataclasses.replace(report, failures=failures).passed


def test_a_wide_margin_keeps_its_experts(sample, windows, build):
    """Which experts a token goes to turns only where the reference's own choice was close."""
    (path,) = build("int4", "gguf")
    (found,) = validate(sample, [path], windows).builds
    assert found.routing is not None
    bins = found.routing.margins
    assert sum(b.pairs for b in bins) == 11 * (SEQUENCE // 2 - 1) * 4
    assert bins[-1].exact_set > bins[0].exact_set
    assert bins[-1].exact_set > 0.99


def test_layers_and_experts_when_asked(sample, windows, build):
    (path,) = build("int4", "gguf")
    short = dataclasses.replace(windows, ids=windows.ids[:2], domains=windows.domains[:2])
    (found,) = validate(sample, [path], short, by_layer=True).builds
    assert found.attribution is not None
    assert [layer.layer for layer in found.attribution.layers] == list(range(6))
    assert all(0.01 < e.error < 0.2 for e in found.attribution.experts)
    tokens = [e.tokens for e in found.attribution.experts if e.layer == 2]
    assert sum(tokens) == 2 * (SEQUENCE // 2 - 1) * 2


def test_a_build_of_another_model_is_refused(sample, windows, build):
    (path,) = build("int8", "gguf")
    other = dataclasses.replace(sample, config=dataclasses.replace(sample.config, num_experts=8))
    with pytest.raises(ValidationError, match="num_experts is 16, the checkpoint's is 8"):
        validate(other, [path], windows)


def test_an_expert_swap_shows(sample, windows, build):
    """Swapped experts leave every tensor's statistics alone; only routing evidence sees them."""
    (path,) = build("int8", "gguf")
    read = FORMATS["gguf"].open_reader(path)
    content = bytearray(path.read_bytes())
    names = [f"model.layers.3.feed_forward.experts.{e}.w2.weight" for e in (0, 1)]
    assert not np.array_equal(read.read(names[0]), read.read(names[1]))
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.3.ffn_down_exps.weight")
    nbytes = tensor.n_bytes // 16
    start = int(tensor.data_offset)
    first, second = (bytes(content[start + i * nbytes :][:nbytes]) for i in (0, 1))
    content[start : start + 2 * nbytes] = second + first
    swapped = path.with_name("swapped.gguf")
    swapped.write_bytes(content)
    with pytest.raises(ValidationError, match=r"not a build of this .*experts\.[01]\.w2"):
        validate(sample, [swapped], windows)
    report = validate(sample, [path, swapped], windows, allow_other=True)
    good, bad = report.builds
    assert not good.other
    assert "differ from the checkpoint's" in bad.other
    assert bad.to_json()["other_checkpoint"] == bad.other
    assert any("--allow-other" in line for line in bad.warnings)
    assert bad.figures[KLD].value > 10 * good.figures[KLD].value
    assert bad.routing is not None
    assert good.routing is not None
    assert bad.routing.layers[-1].exact_set < good.routing.layers[-1].exact_set - 0.02
