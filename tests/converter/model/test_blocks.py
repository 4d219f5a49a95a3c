from collections import Counter
from dataclasses import replace

import pytest

from lfmq.converter.model.blocks import Block, Inner, model_blocks, routed_blocks
from lfmq.converter.model.tensors import EMBEDDING, FINAL_NORM, Use, expected_tensors


def names_of(block: Block) -> list[str]:
    router = [n for n in (block.router.weight, block.router.bias) if n] if block.router else []
    branches = [name for branch in block.branches for name in branch.weights]
    return [block.norm, *block.parameters, *router, *branches]


@pytest.mark.parametrize(
    "change",
    [{}, {"use_expert_bias": False}, {"num_dense_layers": 0}, {"num_dense_layers": 4}],
    ids=str,
)
def test_blocks_hold_every_tensor_of_a_layer_once(change, tiny_config):
    config = replace(tiny_config, **change)
    found = Counter(n for layer in model_blocks(config) for b in layer for n in names_of(b))
    expected = [t.name for t in expected_tensors(config) if t.layer is not None]
    assert found == Counter(expected)
    outside = [t.name for t in expected_tensors(config) if t.use is None]
    assert outside == [EMBEDDING, FINAL_NORM]


def test_a_layer_mixes_tokens_first(tiny_config):
    layers = model_blocks(tiny_config)
    kinds = [(mixer.inner, feed_forward.inner) for mixer, feed_forward in layers]
    first, second = (Inner.CONVOLUTION, Inner.FEED_FORWARD), (Inner.ATTENTION, Inner.FEED_FORWARD)
    assert kinds == [first, second, first, second]
    assert all(mixer.mixes_tokens and not other.mixes_tokens for mixer, other in layers)
    assert [block.layer for layer in layers for block in layer] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_readers_read_the_stream_and_writers_write_it(tiny_config):
    shapes = {t.name: t.shape for t in expected_tensors(tiny_config)}
    for layer in model_blocks(tiny_config):
        for block in layer:
            for branch in block.branches:
                assert all(shapes[n][1] == tiny_config.hidden_size for n in branch.readers)
                assert shapes[branch.writer][0] == tiny_config.hidden_size


def test_routed_blocks(tiny_config):
    found = routed_blocks(tiny_config)
    assert list(found) == [2, 3]
    for layer, (block, router) in found.items():
        assert block.router is router
        assert len(block.branches) == tiny_config.num_experts
        assert router.weight == f"model.layers.{layer}.feed_forward.gate.weight"
        assert router.bias == f"model.layers.{layer}.feed_forward.expert_bias"
    without = routed_blocks(replace(tiny_config, use_expert_bias=False))
    assert all(router.bias is None for _, router in without.values())


def test_uses_are_all_used(tiny_config):
    assert {t.use for t in expected_tensors(tiny_config)} == {None, *Use}
