"""What other quantizers' builds of the same model weigh: limits and landmarks for ours.

Types of llama.cpp's files are those ``llama-quantize`` gives each tensor (``more_bits`` in
``src/llama-quant.cpp``; a tied embedding is typed as the output); MLX's are those of
``mlx_lm.convert -q``, which keeps the router at 8 bits. Weights alone, without headers.
"""

from collections.abc import Callable

from lfmq.converter.tensors import Tensor, expected_tensors
from lfmq.quant.types import FLOAT_ROLES, Geometry, Role, Scheme

_Q4_0, _Q8_0 = Scheme(4), Scheme(8)
_Q4_K, _Q5_K = (Scheme(bits, 32, "superblock") for bits in (4, 5))
_Q6_K = Scheme(6, 16, "superblock")
_MLX = {bits: Scheme(bits, 64, "affine") for bits in (4, 8)}
_SUPERBLOCK_BITS = {4: 4.5, 5: 5.5, 6: 6.5625}  # block_q4_K, block_q5_K, block_q6_K

PEERS = ("q4_0", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "mlx-4bit")


def peer_scheme(name: str, tensor: Tensor, geometry: Geometry) -> Scheme | None:
    """What the peer stores a tensor as; None for floats."""
    if name == "mlx-4bit":
        if tensor.role is Role.ROUTER:
            return _MLX[8]
        return None if tensor.role in FLOAT_ROLES else _MLX[4]
    if tensor.role in FLOAT_ROLES:
        return None
    plain = {"q8_0": _Q8_0, "q6_k": _Q6_K, "q4_0": _Q4_0}
    if name in plain:
        is_head = name == "q4_0" and tensor.role is Role.EMBEDDING
        return _Q6_K if is_head else plain[name]
    base = {"q4_k_m": _Q4_K, "q5_k_m": _Q5_K}[name]
    return _Q6_K if _more_bits(tensor, geometry) else base


def peer_bytes(name: str, geometry: Geometry) -> tuple[int, int]:
    """Bytes of all weights, and of those read for a token."""
    total, token = 0.0, 0.0
    for tensor in expected_tensors(geometry):
        nbytes = tensor.size * peer_bits(name, tensor, geometry) / 8
        total += nbytes
        share = geometry.num_experts_per_tok / geometry.num_experts
        token += nbytes if tensor.expert is None else nbytes * share
    return round(total), round(token)


def peer_bits(name: str, tensor: Tensor, geometry: Geometry) -> float:
    """Bits of a weight, scales and offsets included."""
    scheme = peer_scheme(name, tensor, geometry)
    if scheme is None:
        return 16 if name == "mlx-4bit" else 32
    if scheme.grid == "superblock":
        return _SUPERBLOCK_BITS[scheme.bits]
    return scheme.bits + (32 if scheme.grid == "affine" else 16) / scheme.group


def _more_bits(tensor: Tensor, geometry: Geometry) -> bool:
    chosen: Callable[[int, int], bool] = lambda i, n: (  # noqa: E731
        i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    )
    if tensor.role is Role.EMBEDDING:
        return True
    assert tensor.layer is not None
    if tensor.role is Role.EXPERT_DOWN or tensor.name.endswith("feed_forward.w2.weight"):
        return chosen(tensor.layer, geometry.num_hidden_layers)
    if tensor.name.endswith("v_proj.weight"):
        attention = geometry.attention_layers
        return chosen(attention.index(tensor.layer), len(attention))
    return False
