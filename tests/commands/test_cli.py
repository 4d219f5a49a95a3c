"""The commands as scripts see them: JSON keys, exit status, what goes where."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lfmq.cli import main
from lfmq.converter.plan.builtin import builtin_recipes
from lfmq.formats.registry import FORMATS


def lfmq(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


def document(result: Result) -> dict:
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    output = tmp_path_factory.mktemp("builds")
    done = lfmq("convert", "sample", "--output", output, "--uncalibrated", "--json", "--quiet")
    assert done.stderr == ""
    return document(done)


def test_inspect(sample_folder):
    shown = lfmq("inspect", "sample")
    assert shown.exit_code == 0
    assert "16,865,728" in shown.stdout
    found = document(lfmq("inspect", sample_folder, "--json"))
    assert found["parameters"] == 16_865_728
    assert {"name", "geometry", "tensors", "bytes", "roles", "warnings"} <= set(found)
    assert found["odd"] == found["warnings"]


def test_help_names_every_recipe_and_format():
    shown = lfmq("plan", "--help").stdout
    for name in (*builtin_recipes(), *FORMATS):
        assert name in shown
    first = " ".join(lfmq("--help").stdout.split())
    assert "GGUF, MLX, ONNX and compressed-tensors" in first
    assert "'sample'" in first
    assert "'sample-dense'" in first


def test_options_that_exclude_each_other_are_wrong_usage():
    done = lfmq("calibrate", "sample", "--output", "x", "--balance", 8, "--tokens", 9)
    assert done.exit_code == 2
    assert done.stderr.endswith("Error: --balance 8 is fewer than --tokens 9\n")


def test_plan():
    found = document(lfmq("plan", "sample", "--recipe", "int8", "--json"))
    assert [b["format"] for b in found["builds"]] == list(FORMATS)
    for build in found["builds"]:
        assert set(build) == {"format", "bytes", "bits_per_weight", "bytes_per_token"}
    assert len(found["tensors"]) == 244
    shown = lfmq("plan", "sample", "--tensors", "--to", "gguf")
    assert "model.layers.5.feed_forward.experts.15.w2.weight" in shown.stdout
    assert "mlx" not in shown.stdout


def test_plan_is_exact(builds):
    planned = {
        b["format"]: b["bytes"] for b in document(lfmq("plan", "sample", "--json"))["builds"]
    }
    assert planned == {b["format"]: b["bytes"] for b in builds["builds"]}
    for build in builds["builds"]:
        path = Path(build["path"])
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        assert sum(p.stat().st_size for p in files) == build["bytes"]


def test_convert(builds):
    assert {"builds", "seconds", "memory_bytes", "peak_rss_bytes", "tokens"} <= set(builds)
    assert set(builds["builds"][0]) == {"format", "path", "bytes", "bits_per_weight"}
    names = [Path(b["path"]).name for b in builds["builds"]]
    stem = "lfm2moe-tiny-int4"
    assert names == [f"{stem}{FORMATS[name].SUFFIX}" for name in FORMATS]


def test_progress_goes_to_stderr_a_line_at_a_time(tmp_path):
    done = lfmq("convert", "sample", "--output", tmp_path, "--to", "gguf", "--tokens", 4096)
    lines = [x for x in done.stderr.splitlines() if x.startswith("quantizing: layer ")]
    assert lines[-1].startswith("quantizing: layer 6 of 6, 100 %, read ")
    assert lines[-1].endswith("/s, 0 s left")
    assert len(lines) >= 6
    assert "quantizing" not in done.stdout
    assert "lfm2moe-tiny-int4.gguf" in done.stdout
    assert "fewest tokens" in done.stdout


def test_convert_calibrates_by_default(tmp_path):
    words = ("convert", "sample", "--output", tmp_path, "--to", "gguf", "--tokens", 4096)
    found = document(lfmq(*words, "--json", "--quiet"))
    assert found["tokens"] == 4096
    assert len(found["experts"]) == 4 * 16
    assert sum(e["tokens"] for e in found["experts"]) == 4096 * 2 * 4
    assert {e["rule"] for e in found["experts"]} <= {"own", "shrunk", "pooled"}
    assert [r["layer"] for r in found["routers"]] == [2, 3, 4, 5]
    both = lfmq(*words, "--text", "a.txt", "--uncalibrated")
    assert both.exit_code == 2


def validate(builds, *words: object, format: str = "mlx") -> Result:
    """A short validation; opening the sample's GGUF takes longer than the rest of one."""
    path = builds["builds"][list(FORMATS).index(format)]["path"]
    options = ("--tokens", 512, "--sequence", 128, "--quiet")
    return lfmq("validate", "sample", path, *options, *words)


def test_validate(builds):
    found = document(validate(builds, "--json", "--max-kld", 1, format="gguf"))
    assert found["passed"] is True
    assert found["failures"] == []
    assert found["tokens_scored"] == 4 * 63
    assert found["builds"][0]["engine"] == "read"
    shown = validate(builds)
    assert "noise floor" in shown.stdout


@pytest.mark.parametrize(
    ("option", "limit", "figure", "title"),
    [
        ("--max-kld", 1e-9, "kld.mean", "mean KLD"),
        ("--max-perplexity-ratio", 0.5, "perplexity_ratio", "perplexity ratio"),
        ("--max-rms-delta-p", 1e-9, "rms_delta_p", "RMS Δp"),
        ("--min-routing", 1.1, "routing.exact_set", "routing agreement"),
    ],
)
def test_a_missed_threshold_exits_3(builds, option, limit, figure, title):
    done = validate(builds, option, limit, "--json")
    assert done.exit_code == 3
    found = json.loads(done.stdout)
    assert found["passed"] is False
    assert [f["figure"] for f in found["failures"]] == [figure]
    shown = validate(builds, option, limit)
    assert shown.exit_code == 3
    assert f"{title} is" in shown.stdout


def test_a_gate_of_a_file_and_a_baseline(builds, tmp_path):
    before = document(validate(builds, "--json"))
    (tmp_path / "before.json").write_text(json.dumps(before))
    gate = tmp_path / "gate.toml"
    gate.write_text('baseline = "before.json"\n[limits]\nmax_kld = 1e-9\n')
    done = validate(builds, "--thresholds", gate, "--json")
    assert done.exit_code == 3
    assert [f["figure"] for f in json.loads(done.stdout)["failures"]] == ["kld.mean"]
    assert validate(builds, "--thresholds", gate, "--max-kld", 1).exit_code == 0
    longer = lfmq(
        "validate", "sample", before["builds"][0]["path"], "--thresholds", gate, "--tokens", 1024
    )
    assert longer.exit_code == 1
    assert "this run's 1024" in longer.stderr


def test_compare(builds):
    path = builds["builds"][0]["path"]
    words = ("compare", "sample", path, path, "--tokens", 512, "--sequence", 128, "--quiet")
    found = document(lfmq(*words, "--json"))
    assert [d["difference"] for d in found["figures"]] == [0.0] * 5
    assert found["top1"] == {"only_a": 0, "only_b": 0, "p": 1.0}
    assert {g["equal"] for g in found["parity"]["tokenizer"]} <= {True}
    assert lfmq(*words).stdout.partition("Tokenizers")[0].count("equal") == 5


def test_verify(builds, tmp_path):
    paths = [b["path"] for b in builds["builds"]]
    assert [b["intact"] for b in document(lfmq("verify", *paths, "--json"))["builds"]] == [
        True
    ] * len(FORMATS)
    copy = tmp_path / "a.gguf"
    copy.write_bytes(b"GGUF")
    alone = lfmq("verify", copy)
    assert alone.exit_code == 1
    assert "no manifest" in alone.stderr


def test_cuda_where_there_is_none(builds):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    done = validate(builds, "--device", "cuda")
    assert done.exit_code == 1
    assert "--device cpu" in done.stderr


def test_balanced_statistics_and_an_importance_matrix(tmp_path):
    """--balance says what it reached; a build takes the importance matrix as statistics."""
    out, matrix = tmp_path / "s", tmp_path / "m.gguf"
    words = ["--tokens", 512, "--sequence", 128, "--balance", 2048, "--json"]
    done = lfmq("calibrate", "sample", "--output", out, "--imatrix", matrix, *words)
    found = document(done)
    assert found["tokens"] == 512
    assert found["balance"]["pool_tokens"] == 2048
    assert found["balance"]["quota"] == 512
    assert "balance: 512 of 2,048 tokens" in done.stderr
    words = ["--statistics", matrix, "--to", "gguf", "--json", "--quiet"]
    assert document(lfmq("convert", "sample", "--output", tmp_path, *words))["tokens"] == 0
    refused = lfmq("plan", "sample", "--statistics", matrix, "--to", "gguf", "--budget", "6bpw")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: ")
    wrong = lfmq("calibrate", "sample", "--output", tmp_path / "t", "--balance", 5)
    assert wrong.exit_code == 2
