"""The sample, its int4 build and damaged ones do the sample's tasks."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFReader

from lfmq.cli import main
from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.model.decode import KeptModel
from lfmq.converter.model.forward import Model
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import ValidationError
from lfmq.validation.tasks.figures import Answer, Figures
from lfmq.validation.tasks.repeats import Repeats
from lfmq.validation.tasks.run import (
    answer_tasks,
    check_builds,
    compare_models,
    generation_lines,
    prepare_checks,
)
from lfmq.validation.tasks.tasks import Verdict

TASKS, NEW_TOKENS = 24, 64


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def path(sample_folder):
    return sample_folder.parent / "tasks.jsonl"


@pytest.fixture(scope="module")
def checks(sample, path):
    return prepare_checks(sample, path, count=TASKS, new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def build(sample, tmp_path_factory):
    recipe = load_recipe("int4")
    plan = resolve_plan(sample.config, recipe)
    output = tmp_path_factory.mktemp("builds")
    return convert(sample, recipe, plan, {"gguf": FORMATS["gguf"]}, output).builds[0].path


@pytest.fixture(scope="module")
def swapped(build):
    """The build with the experts of layer 2 in another order, their tensors intact."""
    content = bytearray(build.read_bytes())
    for part in ("gate", "up", "down"):
        name = f"blk.2.ffn_{part}_exps.weight"
        tensor = next(t for t in GGUFReader(build).tensors if t.name == name)
        start, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
        experts = content[start : start + nbytes]
        half = nbytes // 16 * 8
        content[start : start + nbytes] = experts[half:] + experts[:half]
    path = build.with_name("swapped.gguf")
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def loud(sample, build):
    """The build with the weights of layer 5 tripled."""
    read = FORMATS["gguf"].open_reader(build).read

    def tripled(name):
        weight = read(name)
        projection = weight.ndim == 2 and name.startswith("model.layers.5.")
        return weight * np.float32(3) if projection else weight

    return KeptModel(sample.config, tripled)


@pytest.fixture(scope="module")
def figures(sample, checks, build, swapped, loud):
    """JSON of the build and of the two damaged ones."""
    found = check_builds(sample, [build, swapped], checks, allow_other=True)
    (last,) = compare_models(Model(sample.config, sample.read), [loud], checks)
    return [
        {mode: f.to_json() for mode, f in g.summary().items()}
        for g in (found[build], found[swapped], last)
    ]


def test_the_reference_answers_as_the_samples_readme_says(sample, path):
    checks = prepare_checks(sample, path, count=60, new_tokens=NEW_TOKENS)
    answers = answer_tasks(KeptModel(sample.config, sample.read), checks, sampling=None)
    tools = [a.verdict.correct for a in answers if a.kind == "tool"]
    others = [a.verdict.correct for a in answers if a.kind == "answer"]
    assert (sum(tools), len(tools), sum(others), len(others)) == (22, 22, 10, 38)
    assert not any(a.capped or a.repeats.looped for a in answers)
    assert answers[0].text == "<think>17 + 14 = 31.</think>\n31"


def test_keys_and_conditions(figures, checks):
    for found in figures:
        assert list(found) == ["greedy", "sampled"]
        for mode in found.values():
            assert set(mode["answers"]) == {"accuracy", "reference_accuracy", "n"}
            names = ("valid", "right_function", "right_arguments", "reference_right_arguments")
            assert set(mode["tools"]) == {*names, "n"}
            assert set(mode["longest_repeat"]) == {"max", "mean"}
            assert (mode["tasks"], mode["runs"], mode["new_tokens"]) == (TASKS, 1, NEW_TOKENS)
            assert mode["answers"]["n"] + mode["tools"]["n"] == TASKS
            assert mode["tasks_sha256"] == checks.tasks.sha256
            assert set(mode["reference"]) == {"capped", "longest_repeat", "looped"}
            assert mode["reference"]["looped"] == mode["reference"]["capped"] == 0
        assert found["greedy"]["sampling"] is None
        assert found["sampled"]["sampling"]["temperature"] == 0.2
        assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_good_build_answers_as_the_reference(figures):
    for found in figures[0].values():
        tools = found["tools"]
        assert tools["valid"] == tools["right_function"] == tools["right_arguments"] == 1
        assert found["same_text"] > 0.8
        assert found["capped"] == found["looped"] == 0
        assert found["length_ratio"] == pytest.approx(1, abs=0.02)


def test_swapped_experts_answer_worse(figures):
    """Sentences stay whole, so neither length nor loops show it: what is said is wrong."""
    for found in figures[1].values():
        assert found["tools"]["right_arguments"] < 0.8
        assert found["tools"]["reference_right_arguments"] == 1
        assert found["same_text"] < 0.6


def test_a_layer_too_loud_does_not_end(figures, checks, loud):
    for found in figures[2].values():
        assert found["tools"]["valid"] == 0
        assert found["answers"]["accuracy"] == found["same_text"] == 0
        assert found["capped"] > 0.9
        assert found["length_ratio"] > 2
    longer = replace(checks, new_tokens=160)
    answers = answer_tasks(loud, longer, sampling=None)
    assert sum(a.repeats.looped for a in answers) > TASKS / 4


def test_a_model_against_itself(sample, checks):
    """The same random numbers: every sampled answer is equal, and tasks have several."""
    reference = Model(sample.config, sample.read)
    twice = replace(checks, runs=2)
    done: list[int] = []
    (found,) = compare_models(reference, [reference], twice, done.append)
    assert sum(done) == 2 * TASKS * (1 + 2)
    for mode, runs in ((found.greedy, 1), (found.sampled, 2)):
        document = mode.summary().to_json()
        assert (document["tasks"], document["runs"]) == (TASKS, runs)
        assert document["answers"]["n"] + document["tools"]["n"] == TASKS * runs
        assert document["same_text"] == document["length_ratio"] == 1
        assert document["answers"]["accuracy"] == document["answers"]["reference_accuracy"]
    pairs = zip(found.sampled.build[::2], found.sampled.build[1::2], strict=True)
    assert any(a.text != b.text for a, b in pairs)


def test_batches_do_not_change_answers(sample, checks, monkeypatch):
    model = KeptModel(sample.config, sample.read)
    few = replace(checks, tasks=replace(checks.tasks, tasks=checks.tasks.tasks[:7]))
    whole = answer_tasks(model, few, sampling=checks.sampling)
    monkeypatch.setattr("lfmq.validation.tasks.run._STATE_BYTES", 1)
    parts = answer_tasks(model, few, sampling=checks.sampling)
    assert [a.text for a in whole] == [a.text for a in parts]


def answer(tokens, *, correct=True, capped=False, longest=0, looped=False) -> Answer:
    ids, verdict = np.array(tokens, np.int64), Verdict(correct)
    return Answer("answer", ids, "", verdict, capped, Repeats(longest, looped))


def test_figures_of_known_answers():
    reference = [answer([1, 2, 3, 4]), answer([1, 2], correct=False)]
    build = [answer([1, 2, 3, 4]), answer([7] * 8, capped=True, longest=8, looped=True)]
    found = Figures(reference, build, 1, "", 8, None).summary().to_json()
    assert found["answers"] == {"accuracy": 1.0, "reference_accuracy": 0.5, "n": 2}
    assert found["tools"]["valid"] is None
    assert found["capped"] == found["looped"] == found["same_text"] == 0.5
    assert found["longest_repeat"] == {"max": 8, "mean": 4.0}
    assert found["length_ratio"] == (1 + 4) / 2


def test_a_line_for_a_terminal_says_what_was_asked():
    reference = [answer([1, 2, 3, 4]), answer([1, 2], correct=False)]
    found = Figures(reference, reference, 1, "", 8, None).summary()
    (line,) = generation_lines([("builds/a.gguf", {"greedy": found}), ("b.gguf", None)])
    assert line == (
        "a.gguf: greedy: 1/2 answers right (reference 1), same text 100.0%, at the cap 0.0%, "
        "looped 0.0%, length x1.00"
    )


def test_a_length_cap_counts_only_thoughts_without_an_end(sample, checks):
    """Where the model thinks, a finished thought is no doom loop."""
    model = KeptModel(sample.config, sample.read)
    plain = replace(checks, tasks=replace(checks.tasks, thinks=False), new_tokens=16)
    ends = ["</think>" in a.text for a in answer_tasks(model, plain, sampling=None)]
    assert 0 < sum(ends) < TASKS
    capped = [a.capped for a in answer_tasks(model, plain, sampling=None)]
    thinking = replace(plain, tasks=checks.tasks)
    unfinished = [a.capped for a in answer_tasks(model, thinking, sampling=None)]
    assert unfinished == [not end for end in ends]
    assert sum(capped) > sum(unfinished)


def test_a_context_too_short_is_refused(sample, path):
    with pytest.raises(ValidationError, match="--new-tokens 2048 exceed the model's context"):
        prepare_checks(sample, path, new_tokens=2048)


def test_the_command(build, path):
    words = ["validate", "sample", build, "--tokens", 512, "--sequence", 128]
    words += ["--tasks", path, "--task-count", 7, "--new-tokens", 48, "--threads", 1]
    done = CliRunner().invoke(main, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    assert "generating: answer 28 of 28" in done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith(f"{build.name}: greedy: "))
    assert "1/1 tool calls right (reference 1)" in line
    done = CliRunner().invoke(main, [str(w) for w in [*words, "--json", "--quiet"]])
    found = json.loads(done.stdout)["builds"][0]["generation"]
    assert found["sampled"]["tasks"] == 7
    wrong = CliRunner().invoke(main, [str(w) for w in [*words, "--tasks", build]])
    assert wrong.exit_code == 1
    assert str(build) in wrong.stderr
