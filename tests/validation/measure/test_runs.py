"""Native engines through the real child process, with engines made up for the test.

``twin_engine`` is the reference forward under another name, so its figures must be those of
``read``; ``{}`` takes faults.
"""

import os
import sys

import numpy as np
import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.jobs.execution import Execution, Step
from lfmq.converter.model.forward import Model
from lfmq.converter.model.text import load_windows
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import ValidationError
from lfmq.validation.engines import child_process as native
from lfmq.validation.measure.figures import KLD, LOCAL_ROUTING, ROUTING, TOP1
from lfmq.validation.measure.runs import compare_native, open_recorder, run_reference
from lfmq.validation.measure.validate import validate

SEQUENCE = 32
ENGINE = """
from dataclasses import replace
import numpy as np
import torch
from lfmq.converter.model.blocks import routed_blocks
from lfmq.converter.jobs.execution import Execution, Step
from lfmq.converter.model.forward import Model, route, run_model
from lfmq.formats.registry import FORMATS
from lfmq.validation.engines.protocol import WindowRun

NAME, EXTRA = "twin", "twin"

def version():
    {}
    return "twin 1"

def run_windows(request):
    reader = FORMATS["gguf"].open_reader(request.path)
    config, dropped = reader.config, ()
    {}
    model = Model(config, reader.read)
    head = model.weight("model.embed_tokens.weight")
    for i, window in enumerate(request.ids):
        logits = None
        if request.router_inputs is None:
            trace = run_model(model, np.array(window)[None])
            logits = (trace.hidden[0, request.scored] @ head.T).numpy()
            routing = trace.routing
        else:
            inputs, blocks = request.router_inputs.items(), routed_blocks(config)
            x_of = {{n: torch.from_numpy(np.array(x[i])) for n, x in inputs}}
            routing = {{n: route(model, blocks[n][0], x) for n, x in x_of.items()}}
        chosen = {{n: r.selected.flip(1).numpy() for n, r in routing.items() if n not in dropped}}
        yield WindowRun(logits, chosen)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setitem(native.NATIVE, "gguf", "twin_engine")

    def write(fault="pass", version="pass"):
        (tmp_path / "twin_engine.py").write_text(ENGINE.format(version, fault))

    yield write
    sys.modules.pop("twin_engine", None)


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def windows(sample, sample_folder):
    text = sample_folder.parent / "evaluation.jsonl"
    return load_windows(
        [text], sample.assets, sample.config, tokens=6 * SEQUENCE, sequence=SEQUENCE
    )


@pytest.fixture(scope="module")
def gguf(sample, tmp_path_factory):
    loaded = load_recipe("int4")
    plan = resolve_plan(sample.config, loaded)
    output = tmp_path_factory.mktemp("builds")
    (found,) = convert(sample, loaded, plan, {"gguf": FORMATS["gguf"]}, output).builds
    return found.path


def test_a_runtime_that_computes_the_same_has_the_same_figures(sample, windows, gguf, install):
    install()
    steps = []
    report = validate(
        sample,
        [gguf],
        windows,
        engines=("read", "native"),
        execution=Execution(progress=lambda step: steps.append((step.done, step.total))),
    )
    read, own = report.builds
    assert (read.engine, own.engine, own.engine_version) == ("read", "twin", "twin 1")
    assert own.figures[KLD].value == pytest.approx(read.figures[KLD].value, rel=1e-3)
    assert own.value(TOP1) == read.value(TOP1)
    assert own.value(ROUTING) == pytest.approx(read.value(ROUTING))
    assert read.value(LOCAL_ROUTING) is None
    assert own.value(LOCAL_ROUTING) == 1.0
    assert own.routing is not None
    assert [layer.local_exact_set for layer in own.routing.layers] == [1.0] * 4
    # three runs of six layers, one of six windows and one of local routing over the same
    assert sum(step for step, _ in steps) == 3 * 6 + 2 * 6
    assert {total for _, total in steps} == {3 * 6 + 2 * 6}


def test_a_router_without_its_bias_shows_in_local_routing(sample, windows, gguf, install):
    install("config = replace(config, use_expert_bias=False)")
    (own,) = validate(sample, [gguf], windows, engines=("native",)).builds
    assert own.figures[LOCAL_ROUTING].value < 0.9
    assert own.figures[ROUTING].value < 0.9


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "dropped = (4,)",
            "experts in layers and numbers 2: .32, 2., 3: .32, 2., 5: .32, 2., the",
        ),
        ("config = replace(config, num_experts_per_tok=1)", "another model"),
    ],
)
def test_experts_of_another_model_are_refused(sample, windows, gguf, install, fault, said):
    install(fault)
    reference = run_reference(Model(sample.config, sample.read), windows)
    with pytest.raises(ValidationError, match=said):
        compare_native(reference, gguf, "gguf", threads=1)


def test_a_missing_runtime_is_said_before_anything_runs(sample, windows, gguf, install):
    install(version="import no_such_runtime")
    steps: list[Step] = []
    with pytest.raises(ValidationError, match="twin is not installed"):
        validate(
            sample,
            [gguf],
            windows,
            engines=("native",),
            execution=Execution(progress=steps.append),
        )
    assert not steps


def test_recorded_inputs_are_what_routers_read(sample, windows, monkeypatch):
    """Of the first windows up to a number of tokens; the reference's choices follow from them."""
    monkeypatch.setattr("lfmq.validation.measure.runs._LOCAL_TOKENS", 3 * SEQUENCE + 1)
    with open_recorder(sample.config, windows) as recorder:
        model = Model(sample.config, sample.read)
        reference = run_reference(model, windows, recorder=recorder)
        assert set(reference.router_inputs) == set(sample.config.moe_layers)
        for layer, inputs in reference.router_inputs.items():
            assert inputs.shape == (3, SEQUENCE, sample.config.hidden_size)
            prefix = f"model.layers.{layer}.feed_forward."
            gate, bias = sample.read(prefix + "gate.weight"), sample.read(prefix + "expert_bias")
            scores = 1 / (1 + np.exp(-(inputs.astype(np.float64) @ gate.T))) + bias
            best = np.argsort(-scores, axis=-1)[..., :2]
            assert np.array_equal(np.sort(best), np.sort(reference.selected[layer][:3]))
