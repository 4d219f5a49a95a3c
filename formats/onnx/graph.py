"""The ONNX graph of an LFM2 model and the tensors its data file holds.

Operators: ai.onnx 23 and ONNX Runtime's ``com.microsoft`` 1 (``docs/ContribOperators.md`` there);
docs/onnx.md draws the graph. Nothing here reads a weight: shapes and storages come from the plan.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lfmq.formats.build import Bytes
from lfmq.formats.onnx.tensors import (
    DataTensor,
    Part,
    float_dtype,
    pack_float,
    pack_scale,
    pack_weights,
    pack_zero,
    rotary_tables,
    zero_nbytes,
)
from lfmq.formats.plan import Plan, TensorPlan
from lfmq.quant.types import Scheme, Storage

OPSET = 23
IR_VERSION = 11
CONTRIB = "com.microsoft"
_CONTRIB_OPS = frozenset(
    {"FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "MoE", "QMoE"}
)
_END = np.iinfo(np.int64).max
# log of a routing weight of 0 in MoE's softmax: exp(-1e4) is 0 in float32
_LOG_ZERO = -1e4
# what transformers' Lfm2MoeTopKRouter adds to the sum it divides by
_ROUTING_EPSILON = 1e-6


def expert_groups(plan: Plan, layer: int) -> dict[Storage, tuple[int, ...]]:
    """The layer's experts by storage; an expert's three projections share theirs."""
    groups: dict[Storage, list[int]] = {}
    for entry in plan.entries:
        if entry.layer == layer and entry.expert is not None:
            members = groups.setdefault(entry.storage, [])
            if entry.expert not in members:
                members.append(entry.expert)
    return {storage: tuple(members) for storage, members in groups.items()}


def group_label(storage: Storage) -> str:
    """How tensor names spell a group's storage, for example ``int4_g32``."""
    return str(storage).replace(" ", "_")


class GraphBuilder:
    """Collects nodes, inputs, outputs and initializers while the model is walked through."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tensors: list[DataTensor] = []
        self._entries = {entry.name: entry for entry in plan.entries}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def build(self) -> None:
        """Walk through the whole model."""
        g = self.plan.config
        ids = self._input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
        self._positions()
        x = self._embedding(ids)
        for layer in range(g.num_hidden_layers):
            norm = self._norm(x, f"model.layers.{layer}.operator_norm")
            mixer = self._conv if g.layer_types[layer] == "conv" else self._attention
            mixed = mixer(norm, layer)
            x = self._op("Add", f"/layers.{layer}/mixer/add", mixed, x)
            norm = self._norm(x, f"model.layers.{layer}.ffn_norm")
            feed_forward = self._dense if layer < g.num_dense_layers else self._experts
            delta = feed_forward(norm, layer)
            x = self._op("Add", f"/layers.{layer}/feed_forward/add", x, delta)
        self._head(self._norm(x, "model.embedding_norm"))

    def model(self, place: Callable[[DataTensor], TensorProto]) -> onnx.ModelProto:
        """The finished model; ``place`` says where in the data file a tensor lies."""
        initializers = [place(t) for t in self.tensors] + list(self._constants.values())
        graph = helper.make_graph(
            self._nodes, self.plan.config.model_type, self._inputs, self._outputs, initializers
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="lfmq"
        )

    # The vocabulary the layers are written in

    def _op(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        return self._ops(kind, name, inputs, [f"{name}/output"], **attributes)[0]

    def _ops(
        self, kind: str, name: str, inputs: Sequence[str], outputs: list[str], **attributes: Any
    ) -> list[str]:
        domain = CONTRIB if kind in _CONTRIB_OPS else ""
        self._nodes.append(
            helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes)
        )
        return outputs

    def _input(self, name: str, kind: int, shape: list[str | int]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def _output(self, name: str, shape: list[str | int]) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def _ints(self, *values: int) -> str:
        name = "/int64/" + ",".join(map(str, values))
        self._constants[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def _number(self, value: float) -> str:
        name = f"/float32/{value}"
        self._constants[name] = numpy_helper.from_array(np.array(value, np.float32), name)
        return name

    def _cast(self, name: str, storage: Storage) -> str:
        if storage == "float32":
            return name
        return self._op("Cast", f"/{name}/cast", name, to=TensorProto.FLOAT)

    def _float(self, name: str, *, transposed: bool = False) -> str:
        """A tensor stored as floats, as the float32 value nodes take."""
        entry = self._entries[name]
        dtype, shape = float_dtype(entry), entry.shape
        if transposed:
            name, shape = f"{name}.transposed", shape[::-1]
        part = Part((entry.name,), partial(pack_float, dtype=dtype, transposed=transposed))
        self.tensors.append(DataTensor(name, dtype, shape, (part,)))
        return self._cast(name, entry.storage)

    def _norm(self, x: str, module: str) -> str:
        weight = self._float(f"{module}.weight")
        epsilon = self.plan.config.norm_eps
        return self._op("RMSNormalization", f"/{module}", x, weight, axis=-1, epsilon=epsilon)

    def _linear(self, x: str, module: str) -> str:
        """X times the transpose of a weight [N, K]."""
        entry = self._entries[f"{module}.weight"]
        if entry.scheme is None:
            return self._op("MatMul", f"/{module}", x, self._float(entry.name, transposed=True))
        n, k = entry.shape
        s = entry.scheme
        blocks = (n, k // s.group, s.group * s.bits // 8)
        quantized = self._quantized(entry.name, s, blocks, blocks[:2], ((entry.name,),))
        return self._matmul_nbits(f"/{module}", x, quantized, entry)

    def _matmul_nbits(self, name: str, x: str, quantized: list[str], entry: TensorPlan) -> str:
        n, k = entry.shape
        scheme = entry.scheme
        assert scheme is not None
        return self._op(
            "MatMulNBits", name, x, *quantized,
            K=k, N=n, bits=scheme.bits, block_size=scheme.group, accuracy_level=0,
        )  # fmt: skip

    def _quantized(
        self, name: str, scheme: Scheme, codes: tuple[int, ...], groups: tuple[int, ...],
        sources: tuple[tuple[str, ...], ...],
    ) -> list[str]:  # fmt: skip
        """Codes, scales and, where the grid has them, zero points; a part for each source."""
        parts: list[tuple[str, type[np.generic], tuple[int, ...], Callable[..., Bytes]]] = [
            ("codes", np.uint8, codes, pack_weights),
            ("scale", np.float32, groups, pack_scale),
        ]
        if scheme.grid == "affine_zero_point":
            packed = (*groups[:-1], zero_nbytes(groups[-1], scheme.bits))
            parts.append(("zero", np.uint8, packed, pack_zero))
        for part, dtype, shape, pack in parts:
            runs = tuple(Part(s, pack, by_rows=len(s) == 1) for s in sources)
            self.tensors.append(DataTensor(f"{name}.{part}", dtype, shape, runs))
        return [f"{name}.{part}" for part, *_ in parts]

    # The model

    def _positions(self) -> None:
        """What attention needs besides its layer: lengths from the mask, rotary tables."""
        shape: list[str | int] = ["batch_size", "total_sequence_length"]
        mask = self._input("attention_mask", TensorProto.INT64, shape)
        if not self.plan.config.attention_layers:
            return
        sums = self._op("ReduceSum", "/mask/sum", mask, self._ints(1), keepdims=0)
        last = self._op("Sub", "/mask/last", sums, self._ints(1))
        self._seqlens = self._op("Cast", "/mask/seqlens_k", last, to=TensorProto.INT32)
        total = self._op("Shape", "/mask/shape", mask, start=1, end=2)
        total = self._op("Squeeze", "/mask/total", total)
        self._total = self._op("Cast", "/mask/total_sequence_length", total, to=TensorProto.INT32)
        g = self.plan.config
        tables = rotary_tables(g.max_position_embeddings, g.head_dim, g.rope_theta)
        for name, table in zip(("cos_cache", "sin_cache"), tables, strict=True):
            constant = table.tobytes()
            self.tensors.append(DataTensor(name, np.float32, table.shape, constant=constant))

    def _embedding(self, ids: str) -> str:
        entry = self._entries["model.embed_tokens.weight"]
        name, s = "/model.embed_tokens", entry.scheme
        if s is None:
            return self._op("Gather", name, self._float(entry.name), ids)
        n, k = entry.shape
        packed, groups = (n, k * s.bits // 8), (n, k // s.group)
        codes, *grid = self._quantized(entry.name, s, packed, groups, ((entry.name,),))
        self._tied = grid
        return self._op(
            "GatherBlockQuantized", name, codes, ids, *grid,
            bits=s.bits, block_size=s.group, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def _head(self, x: str) -> None:
        """A head of its own, or the embedding once more; its bytes are in the file only once."""
        own = self._entries.get("lm_head.weight")
        entry = own or self._entries["model.embed_tokens.weight"]
        if own is not None and own.scheme is None:
            table = self._float(own.name)
            logits = self._op("FusedMatMul", "/lm_head", x, table, transB=1)
        elif own is not None:
            logits = self._linear(x, "lm_head")
        elif entry.scheme is None:
            table = entry.name
            if entry.storage != "float32":
                table = f"/{table}/cast/output"
            logits = self._op("FusedMatMul", "/lm_head", x, table, transB=1)
        else:
            n, k = entry.shape
            s = entry.scheme
            blocks = (n, k // s.group, s.group * s.bits // 8)
            codes = f"{entry.name}.codes"
            tied = DataTensor("lm_head.weight.codes", np.uint8, blocks, alias=codes)
            self.tensors.append(tied)
            logits = self._matmul_nbits("/lm_head", x, [tied.name, *self._tied], entry)
        name = self._output("logits", ["batch_size", "sequence_length", entry.shape[0]])
        self._ops("Identity", "/logits", [logits], [name])

    def _attention(self, x: str, layer: int) -> str:
        g = self.plan.config
        module, name = f"model.layers.{layer}.self_attn", f"/layers.{layer}/attention"
        query = self._heads(x, f"{module}.q", g.num_attention_heads)
        key = self._heads(x, f"{module}.k", g.num_key_value_heads)
        value = self._linear(x, f"{module}.v_proj")
        past, present = [], []
        for kind in ("key", "value"):
            shape: list[str | int] = ["batch_size", g.num_key_value_heads]
            dims = [*shape, "past_sequence_length", g.head_dim]
            past.append(self._input(f"past_key_values.{layer}.{kind}", TensorProto.FLOAT, dims))
            dims = [*shape, "total_sequence_length", g.head_dim]
            present.append(self._output(f"present.{layer}.{kind}", dims))
        inputs = [query, key, value, *past, self._seqlens, self._total, "cos_cache", "sin_cache"]
        mixed, *_ = self._ops(
            "GroupQueryAttention", name, inputs, [f"{name}/output", *present],
            num_heads=g.num_attention_heads, kv_num_heads=g.num_key_value_heads,
            scale=g.head_dim**-0.5, do_rotary=1, rotary_interleaved=0,
        )  # fmt: skip
        return self._linear(mixed, f"{module}.out_proj")

    def _heads(self, x: str, module: str, heads: int) -> str:
        """Project, then normalize each head."""
        head_dim = self.plan.config.head_dim
        flat = self._linear(x, f"{module}_proj")
        split = self._ints(0, 0, heads, head_dim)
        y = self._op("Reshape", f"/{module}/split", flat, split)
        y = self._norm(y, f"{module}_layernorm")
        return self._op("Reshape", f"/{module}/join", y, self._ints(0, 0, heads * head_dim))

    def _conv(self, x: str, layer: int) -> str:
        """C * conv(B * x) over the state's columns and the new ones; the state is the last L."""
        g = self.plan.config
        module, name, width = f"model.layers.{layer}.conv", f"/layers.{layer}/conv", g.conv_L_cache
        shape: list[str | int] = ["batch_size", g.hidden_size, width]
        past = self._input(f"past_conv.{layer}", TensorProto.FLOAT, shape)
        present = self._output(f"present_conv.{layer}", shape)
        bcx = self._linear(x, f"{module}.in_proj")
        columns = self._op("Transpose", f"{name}/columns", bcx, perm=[0, 2, 1])
        names = [f"{name}/{part}" for part in ("B", "C", "x")]
        b, c, value = self._ops("Split", f"{name}/split", [columns], names, axis=1, num_outputs=3)
        gated = self._op("Mul", f"{name}/gate", b, value)
        window = self._op("Concat", f"{name}/window", past, gated, axis=2)
        axis, end = self._ints(2), self._ints(_END)
        self._ops("Slice", f"{name}/state", [window, self._ints(-width), end, axis], [present])
        kernel = self._float(f"{module}.conv.weight")
        y = self._op("Conv", f"{name}/conv", window, kernel, group=g.hidden_size)
        y = self._op("Slice", f"{name}/new", y, self._ints(1), end, axis)
        y = self._op("Mul", f"{name}/mul", c, y)
        y = self._op("Transpose", f"{name}/rows", y, perm=[0, 2, 1])
        return self._linear(y, f"{module}.out_proj")

    def _dense(self, x: str, layer: int) -> str:
        module, name = f"model.layers.{layer}.feed_forward", f"/layers.{layer}/feed_forward"
        gate, up = self._linear(x, f"{module}.w1"), self._linear(x, f"{module}.w3")
        sigmoid = self._op("Sigmoid", f"{name}/sigmoid", gate)
        silu = self._op("Mul", f"{name}/silu", gate, sigmoid)
        return self._linear(self._op("Mul", f"{name}/mul", silu, up), f"{module}.w2")

    def _routing(self, tokens: str, layer: int) -> str:
        """Routing weights [T, E]: final for the selected experts, 0 for the others.

        Selection and mixing are done in plain operators, so that every option of the router is
        exact (QMoE's own normalization lacks the 1e-6); QMoE then finds the selected experts as
        the only ones that are not 0.
        """
        g = self.plan.config
        module, name = f"model.layers.{layer}.feed_forward", f"/layers.{layer}/router"
        weights = self._op("Sigmoid", f"{name}/sigmoid", self._linear(tokens, f"{module}.gate"))
        scores = weights
        if g.use_expert_bias:
            bias = self._float(f"{module}.expert_bias")
            scores = self._op("Add", f"{name}/scores", weights, bias)
        outputs = [f"{name}/top_scores", f"{name}/selected"]
        k = self._ints(g.num_experts_per_tok)
        _, selected = self._ops("TopK", f"{name}/topk", [scores, k], outputs, axis=-1)
        mix = self._op("GatherElements", f"{name}/picked", weights, selected, axis=1)
        if g.norm_topk_prob:
            total = self._op("ReduceSum", f"{name}/sum", mix, self._ints(1), keepdims=1)
            total = self._op("Add", f"{name}/total", total, self._number(_ROUTING_EPSILON))
            mix = self._op("Div", f"{name}/normalized", mix, total)
        if g.routed_scaling_factor != 1.0:
            factor = self._number(g.routed_scaling_factor)
            mix = self._op("Mul", f"{name}/scaled", mix, factor)
        shape = self._op("Shape", f"{name}/shape", weights)
        zeros = self._op("ConstantOfShape", f"{name}/zeros", shape)
        return self._op("ScatterElements", f"{name}/dense", zeros, selected, mix, axis=1)

    def _experts(self, x: str, layer: int) -> str:
        """One QMoE a width; each gets the routing weights of its own experts."""
        g = self.plan.config
        name = f"/layers.{layer}/experts"
        tokens = self._op("Reshape", f"{name}/tokens", x, self._ints(-1, g.hidden_size))
        routing = self._routing(tokens, layer)
        groups = expert_groups(self.plan, layer)
        total = ""
        for storage, members in groups.items():
            stack, columns = f"{name}/{group_label(storage)}", routing
            if len(groups) > 1:
                indices = f"model.layers.{layer}.feed_forward.experts.{group_label(storage)}"
                indices = f"{indices}.members"
                array = np.array(members, np.int64)
                self._constants[indices] = numpy_helper.from_array(array, indices)
                columns = self._op("Gather", f"{stack}/columns", routing, indices, axis=1)
            mixed = self._expert_group(tokens, columns, layer, storage, members)
            total = self._op("Add", f"{stack}/add", total, mixed) if total else mixed
        return self._op("Reshape", f"{name}/join", total, self._op("Shape", f"{name}/shape", x))

    def _expert_group(
        self, tokens: str, columns: str, layer: int, storage: Storage, members: tuple[int, ...]
    ) -> str:
        g = self.plan.config
        name = f"/layers.{layer}/experts/{group_label(storage)}/moe"
        wide = (2 * g.moe_intermediate_size, g.hidden_size)
        narrow = (g.hidden_size, g.moe_intermediate_size)
        gate_up = self._expert_stack(layer, storage, members, wide, ("w1", "w3"))
        down = self._expert_stack(layer, storage, members, narrow, ("w2",))
        attributes: dict[str, Any] = {
            "k": min(g.num_experts_per_tok, len(members)),
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "normalize_routing_weights": 0,
        }
        if isinstance(storage, Scheme):
            attributes |= {"expert_weight_bits": storage.bits, "block_size": storage.group}
            zeros = [*gate_up[2:], *down[2:]] or ["", ""]
            inputs = [tokens, columns, *gate_up[:2], "", *down[:2], *[""] * 4, *zeros, "", columns]
            return self._ops("QMoE", name, inputs, [f"{name}/output"], **attributes)[0]
        # MoE has no routing weights input but a softmax: softmax(log w) * sum(w) is w
        log = self._op("Log", f"{name}/log", columns)
        log = self._op("Max", f"{name}/clipped", log, self._number(_LOG_ZERO))
        attributes["normalize_routing_weights"] = 1
        y = self._op("MoE", name, tokens, log, gate_up[0], "", down[0], **attributes)
        share = self._op("ReduceSum", f"{name}/share", columns, self._ints(1), keepdims=1)
        return self._op("Mul", f"{name}/mixed", y, share)

    def _expert_stack(
        self, layer: int, storage: Storage, members: tuple[int, ...],
        shape: tuple[int, int], projections: tuple[str, ...],
    ) -> list[str]:  # fmt: skip
        """A group's weights [E, N, K], an expert after the other; w1 and w3 rows take turns."""
        experts = f"model.layers.{layer}.feed_forward.experts"
        name = f"{experts}.{group_label(storage)}.{'gate_up' if len(projections) > 1 else 'down'}"
        sources = [tuple(f"{experts}.{e}.{p}.weight" for p in projections) for e in members]
        (n, k), count = shape, len(members)
        if not isinstance(storage, Scheme):
            dtype = float_dtype(self._entries[sources[0][0]])
            parts = tuple(Part(s, partial(pack_float, dtype=dtype)) for s in sources)
            self.tensors.append(DataTensor(name, dtype, (count, n, k), parts))
            return [self._cast(name, storage)]
        packed, groups = (count, n, k * storage.bits // 8), (count, n, k // storage.group)
        return self._quantized(name, storage, packed, groups, tuple(sources))
