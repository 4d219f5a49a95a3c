"""Train the dense sample on a CPU: a 7.0 M parameter Lfm2ForCausalLM that starts from the parts of lfm2moe-tiny, float32, AdamW, cosine schedule.

usage: train_dense.py CORPUS SPARSE OUT [SEED=12 [STEPS=400]]     CORPUS: the folder corpus.py wrote; SPARSE: samples/lfm2moe-tiny

Embedding, norms, convolutions and attention start as the sparse model has them. The 768 rows of a feed-forward start as three of its experts side
by side, or as the 512 of its dense layer and 256 new ones. Text from another seed; about 20 minutes on two cores that others use too.
"""
import json
import math
import random
import shutil
import sys

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from train import VOCABULARY, batches, token_stream
from transformers import Lfm2Config, Lfm2ForCausalLM

PEAK_RATE, WIDTH = 1.2e-3, 256
LAYERS = ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]
# What Liquid's config.json says beside what the class reads; mlx-lm needs block_dim and block_ff_dim.
HUB = {"block_dim": WIDTH, "block_ff_dim": 1024, "block_mlp_init_scale": 1.0, "block_norm_eps": 1e-5, "block_out_init_scale": 1.0, "block_use_swiglu": True,
       "block_use_xavier_init": True, "conv_dim": WIDTH, "conv_use_xavier_init": True, "num_heads": 8, "tie_embedding": True, "use_pos_enc": True}


def start(model, sparse):
    """Every weight that the sparse model has; a feed-forward from its experts 0, 1, 2 at half weight each, as the router would mix two."""
    state = model.state_dict()
    for name, value in state.items():
        if ".feed_forward.w" not in name:
            value.copy_(sparse["model.embed_tokens.weight" if name == "lm_head.weight" else name])
            continue
        block, part, _ = name.rsplit(".", 2)
        axis = 1 if part == "w2" else 0
        if name in sparse:
            value[: sparse[name].shape[0], : sparse[name].shape[1]].copy_(sparse[name])
        else:
            value.copy_(torch.cat([sparse[f"{block}.experts.{e}.{part}.weight"] for e in range(3)], axis) * (0.5 if part == "w2" else 1))


def main():
    corpus, folder, out = json.load(open(f"{sys.argv[1]}/corpus.json")), sys.argv[2], sys.argv[3]
    seed, steps = (int(a) for a in (sys.argv[4:] + ["12", "400"][len(sys.argv) - 4 :])[:2])
    torch.manual_seed(seed)
    tok = Tokenizer.from_file(f"{folder}/tokenizer.json")
    ids = token_stream(tok, corpus["train"])
    config = Lfm2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, block_ff_dim=HUB["block_ff_dim"], block_auto_adjust_ff_dim=True, block_multiple_of=256, block_ffn_dim_multiplier=1.0,
        num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2, layer_types=LAYERS, conv_L_cache=3, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=4, pad_token_id=0)
    model = Lfm2ForCausalLM(config)      # the width of w1 becomes 768: 2/3 of 1024, up to a multiple of 256
    start(model, load_file(f"{folder}/model.safetensors"))
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    halves = ((x, y) for rows in batches(tok, ids, random.Random(seed)) for x, y in zip(rows[0].chunk(2), rows[1].chunk(2)))     # 8 rows a step
    for step in range(steps):
        rate = PEAK_RATE * min(1, (step + 1) / 40) * (0.49 * (1 + math.cos(math.pi * step / steps)) + 0.02)
        for g in optimizer.param_groups:
            g["lr"] = rate
        x, y = next(halves)
        loss = F.cross_entropy(model(input_ids=x, use_cache=False).logits.view(-1, VOCABULARY), y.reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(step, round(loss.item(), 3), flush=True)
    model.to(torch.bfloat16).save_pretrained(out)
    saved = json.load(open(f"{out}/config.json"))
    json.dump(dict(sorted((saved | HUB).items())), open(f"{out}/config.json", "w"), indent=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(f"{folder}/{name}", f"{out}/{name}")


if __name__ == "__main__":
    main()
