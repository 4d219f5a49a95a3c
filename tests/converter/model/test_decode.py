"""The incremental forward against the whole one, and against transformers' generate."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.model.decode import Decoder, KeptModel, sequence_nbytes
from lfmq.converter.model.forward import Model, run_model
from lfmq.quant.errors import ValidationError
from lfmq.quant.types import Quantized, dequantize

# float32 sums in another order differ by some 1e-5 at logits of 20.
LOGIT_TOLERANCE = 1e-4
END_OF_TURN = 4


@pytest.fixture(scope="module")
def sample(sample_folder) -> Checkpoint:
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def model(sample) -> KeptModel:
    return KeptModel(sample.config, sample.read)


def whole_logits(model: Model, ids: np.ndarray) -> torch.Tensor:
    """Logits [S, V] of one sequence, by the forward pass over all its tokens."""
    head = model.weight("model.embed_tokens.weight")
    return (run_model(model, ids[None]).hidden @ head.T)[0]


def compare(model: Model, sequences: list[np.ndarray], prompts: list[int], steps: int) -> None:
    """Feed the given tokens; every logit must be that of the whole forward pass."""
    expected = [whole_logits(model, s) for s in sequences]
    decoder = Decoder(model)
    logits = decoder.start([s[:n] for s, n in zip(sequences, prompts, strict=True)])
    for step in range(steps + 1):
        for row, (wanted, n) in enumerate(zip(expected, prompts, strict=True)):
            difference = (logits[row] - wanted[n - 1 + step]).abs().max()
            assert difference < LOGIT_TOLERANCE, (row, step)
        if step < steps:
            following = [s[n + step] for s, n in zip(sequences, prompts, strict=True)]
            logits = decoder.step(np.array(following))


def test_sample_steps_equal_the_whole_forward(sample, model):
    rng = np.random.default_rng(3)
    prompts = [1, 2, 40, 7, 90]
    sequences = [rng.integers(0, sample.config.vocab_size, n + 12) for n in prompts]
    compare(model, sequences, prompts, 12)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm_topk_prob": False},
        {"use_expert_bias": False},
        {"conv_L_cache": 1},
        {"conv_L_cache": 5},
        {"head_dim": 48},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"layer_types": ("full_attention",) * 4},
        {"layer_types": ("conv",) * 4},
        {"num_dense_layers": 4},
    ],
    ids=str,
)
def test_every_setting_equals_the_whole_forward(change, tiny_config, make_plan, random_weight):
    fields = {f: getattr(tiny_config, f) for f in tiny_config.__dataclass_fields__}
    config = type(tiny_config)(**{**fields, **change})
    weights = {e.name: random_weight(e) for e in make_plan(config).entries}

    def read(name):
        weight = weights[name]
        return dequantize(weight) if isinstance(weight, Quantized) else weight

    rng = np.random.default_rng(5)
    prompts = [4, 1, 9]
    sequences = [rng.integers(0, config.vocab_size, n + 6) for n in prompts]
    compare(KeptModel(config, read), sequences, prompts, 6)


def test_dense_steps_equal_the_whole_forward(sample_dense_folder):
    dense = open_checkpoint(sample_dense_folder)
    rng = np.random.default_rng(9)
    prompts = [1, 40, 7]
    sequences = [rng.integers(0, dense.config.vocab_size, n + 8) for n in prompts]
    compare(KeptModel(dense.config, dense.read), sequences, prompts, 8)


def test_caches_grow(sample, model, monkeypatch):
    monkeypatch.setattr("lfmq.converter.model.decode._FIRST_ROOM", 1)
    ids = np.random.default_rng(6).integers(0, sample.config.vocab_size, 26)
    compare(model, [ids[:23], ids], [3, 6], 20)


def test_long_prompts_go_in_parts(sample, model, monkeypatch):
    rng = np.random.default_rng(8)
    sequences = [rng.integers(0, sample.config.vocab_size, n) for n in (30, 33, 20)]
    monkeypatch.setattr("lfmq.converter.model.forward._TOKENS_AT_ONCE", 40)
    compare(model, sequences, [28, 31, 18], 2)


def test_dropped_sequences_do_not_change_the_others(sample, model):
    rng = np.random.default_rng(4)
    sequences = [rng.integers(0, sample.config.vocab_size, 20) for _ in range(3)]
    decoder = Decoder(model)
    decoder.start([s[:18] for s in sequences])
    decoder.step(np.array([s[18] for s in sequences]))
    decoder.keep(np.array([True, False, True]))
    logits = decoder.step(np.array([sequences[i][19] for i in (0, 2)]))
    for row, i in enumerate((0, 2)):
        wanted = whole_logits(model, sequences[i])[-1]
        assert (logits[row] - wanted).abs().max() < LOGIT_TOLERANCE


def test_greedy_tokens_are_those_of_transformers(sample, model, sample_folder, transformers_model):
    """Eight tasks of four kinds, until each ends or has 48 tokens."""
    lines = (sample_folder.parent / "tasks.jsonl").read_text("utf-8").splitlines()[:8]
    tokenizer = Tokenizer.from_file(str(sample_folder / "tokenizer.json"))
    prompts = []
    for line in lines:
        question = json.loads(line)["messages"][0]["content"]
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompts.append(np.array([1, *tokenizer.encode(text, add_special_tokens=False).ids]))
    decoder = Decoder(model)
    logits = decoder.start(prompts)
    columns = [logits.argmax(-1).numpy()]
    for _ in range(47):
        columns.append(decoder.step(columns[-1]).argmax(-1).numpy())
    theirs = transformers_model(sample.assets.config_json, sample.read)
    for prompt, found in zip(prompts, np.stack(columns, 1), strict=True):
        with torch.no_grad():
            whole = theirs.generate(
                torch.from_numpy(prompt[None]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=48,
                do_sample=False,
                eos_token_id=END_OF_TURN,
                pad_token_id=0,
            )
        expected = whole[0, len(prompt) :].numpy()
        np.testing.assert_array_equal(found[: len(expected)], expected)


def test_weights_are_kept_up_to_the_budget(sample):
    reads = []

    def read(name):
        reads.append(name)
        return sample.read(name)

    prompt = [np.array([1, 50, 60])]
    expected = Decoder(Model(sample.config, sample.read)).start(prompt)
    for budget in (2**31, 10_000_000, 0):
        reads.clear()
        kept = KeptModel(sample.config, read, budget=budget)
        decoder = Decoder(kept)
        assert torch.equal(decoder.start(prompt), expected)
        first = len(reads)
        decoder.start(prompt)
        again = len(reads) - first
        assert sum(t.nbytes for t in kept._kept.values()) <= budget
        # without a budget the embedding alone is read once, for the tokens and for the head
        assert {2**31: again == 0, 10_000_000: 0 < again < first, 0: again == first}[budget]


def test_ids_outside_the_vocabulary_are_refused(model):
    with pytest.raises(ValidationError, match="vocabulary has 8192"):
        Decoder(model).start([np.array([1, 9000])])


def test_a_sequence_takes_the_bytes_it_says(sample, model):
    decoder = Decoder(model)
    logits = decoder.start([np.arange(1, 37)])
    held = sum(m.nbytes for m in decoder._memory.values()) + logits.nbytes
    assert sequence_nbytes(sample.config, 36 + 64) == held
