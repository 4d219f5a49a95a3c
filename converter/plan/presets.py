"""What other quantizers' builds of the same model weigh: limits and landmarks for ours.

Types of llama.cpp's files are those ``llama-quantize`` gives each tensor (``src/llama-quant.cpp``;
a tied embedding is typed as the output), which the recipes of the same names hold; MLX's are those
of ``mlx_lm.convert -q``, which keeps the router at 8 bits. Weights alone, without headers.
"""

from lfmq.converter.model.tensors import expected_tensors, token_share
from lfmq.converter.plan.plan import storages
from lfmq.converter.plan.recipe import Recipe, load_recipe, parse_recipe
from lfmq.formats.plan import ModelConfig, Role
from lfmq.quant.types import Scheme

# Built-in recipes, or rules of what none of ours is.
_RECIPES = {"q4_k_m": "q4_k_m", "q5_k_m": "q5_k_m", "q6_k": "q6_k", "q8_0": "int8"}
_RULES = {
    "q4_0": '[[rule]]\nbits = 4\n[[rule]]\nroles = ["embedding"]\nbits = 6\ngrid = "kquant"\n',
    "mlx-4bit": '[[rule]]\nbits = 4\ngroup = 64\ngrid = "affine_bias"\n',
}
_MLX_ROUTER = Scheme(8, 64, "affine_bias")

PEERS = ("q4_0", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "mlx-4bit")


def peer_schemes(name: str, config: ModelConfig) -> dict[str, Scheme | None]:
    """What the peer stores each tensor as, by the tensor's name; None for floats."""
    stored = storages(config, _recipe(name))
    found = {n: s if isinstance(s, Scheme) else None for n, s in stored.items()}
    if name == "mlx-4bit":
        routers = [t.name for t in expected_tensors(config) if t.role is Role.ROUTER]
        found |= dict.fromkeys(routers, _MLX_ROUTER)
    return found


def _recipe(name: str) -> Recipe:
    if name in _RECIPES:
        return load_recipe(_RECIPES[name])
    return parse_recipe(_RULES[name], name, name)


def peer_bytes(name: str, config: ModelConfig) -> tuple[int, int]:
    """Bytes of all weights, and of those read for a token."""
    schemes = peer_schemes(name, config)
    total, token = 0.0, 0.0
    for tensor in expected_tensors(config):
        scheme = schemes[tensor.name]
        float_bits = 16 if name == "mlx-4bit" else 32
        nbytes = tensor.size * (float_bits if scheme is None else scheme.bits_per_weight) / 8
        total += nbytes
        token += nbytes * float(token_share(tensor, config))
    return round(total), round(token)
