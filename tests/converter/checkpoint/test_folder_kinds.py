"""What is no checkpoint is called by what it is."""

import json

import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.quant.errors import CheckpointError


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert len(message) < 400
    assert "\n" not in message
    return message


def test_a_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    assert "model.gguf: a GGUF file, which is a finished build" in refusal(path)
    assert "model.gguf: a GGUF file" in refusal(tmp_path)


def test_a_file_of_weights(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    message = refusal(folder / "model.safetensors")
    assert f"expected a checkpoint folder; give the folder it lies in, {folder}" in message
    (tmp_path / "alone.safetensors").touch()
    assert "put it into a folder with the model's config.json" in refusal(
        tmp_path / "alone.safetensors"
    )


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "beside a model"])
def test_an_adapter(make_checkpoint, whole):
    folder = make_checkpoint()
    if not whole:
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        (folder / "config.json").unlink()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "LiquidAI/LFM2.5-8B-A1B"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    assert "an adapter (LoRA) of LiquidAI/LFM2.5-8B-A1B" in refusal(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "an adapter (LoRA), not a whole model; merge it" in refusal(folder)


def test_the_folder_of_a_run(tmp_path, make_checkpoint):
    for name in ("checkpoint-900", "checkpoint-1000", "checkpoint-20", "runs"):
        make_checkpoint(name)
    assert f"the newest is {tmp_path / 'checkpoint-1000'}" in refusal(tmp_path)
    open_checkpoint(tmp_path / "checkpoint-1000")


def test_a_run_that_ends_in_a_model_is_a_checkpoint(make_checkpoint):
    folder = make_checkpoint()
    (folder / "checkpoint-5").mkdir()
    open_checkpoint(folder)


def test_a_folder_above_one(tmp_path, make_checkpoint):
    make_checkpoint("inside")
    assert f"{tmp_path / 'inside'} may be one" in refusal(tmp_path)


def test_the_cache_of_the_hub(tmp_path):
    (tmp_path / "models--LiquidAI--LFM2-350M" / "snapshots").mkdir(parents=True)
    assert "a cache of the Hub; give one of its models, such as" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pytorch_model.bin", "a pickle file"),
        ("consolidated.00.pth", "a pickle file"),
        ("model-Q4_0.gguf", "a GGUF file"),
        ("model.onnx", "an ONNX file"),
    ],
)
def test_other_files_in_place_of_safetensors(make_checkpoint, name, what):
    folder = make_checkpoint()
    (folder / "model.safetensors").rename(folder / name)
    assert f"{name}: {what}" in refusal(folder)


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"GGUF\x03", "a GGUF file, not"),
        (b"PK\x03\x04", "a pickle file of torch"),
        (b"", "too short"),
    ],
)
def test_other_files_under_the_name(make_checkpoint, start, what):
    folder = make_checkpoint()
    (folder / "model.safetensors").write_bytes(start + bytes(100 if start else 0))
    assert what in refusal(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "generation_config.json"]
)
def test_a_pointer_of_git_lfs(make_checkpoint, name):
    folder = make_checkpoint()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 33760152\n"
    (folder / name).write_text(pointer)
    assert f"{name}: a Git LFS pointer, not the file itself; run 'git lfs pull'" in refusal(folder)


def test_another_architecture_and_a_multimodal_one(make_checkpoint):
    assert "model_type is 'llama', expected" in refusal(
        make_checkpoint(config={"model_type": "llama"})
    )
    vision = {"model_type": "lfm2_vl", "text_config": {"model_type": "lfm2"}, "vision_config": {}}
    assert "'lfm2_vl', a multimodal checkpoint" in refusal(make_checkpoint("v", config=vision))
