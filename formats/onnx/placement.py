"""Where tensors lie in an ONNX build's data file, and the initializers that say so."""

import numpy as np
import onnx
from onnx import TensorProto, helper

from lfmq.formats.onnx.tensors import DataTensor

# transformers.js finds the data file by this name, other runtimes by the graph's own reference
DATA_FILE = "model.onnx_data"
# a page: what runtimes map at a time (onnx.proto, external_data); smaller tensors share pages
_PAGE = 4096
_SMALL = 64


def place_tensors(tensors: list[DataTensor]) -> dict[str, int]:
    """The offset of each tensor that has bytes of its own."""
    offsets: dict[str, int] = {}
    end = 0
    for tensor in tensors:
        if tensor.alias is not None:
            continue
        alignment = _PAGE if tensor.nbytes >= _PAGE else _SMALL
        offsets[tensor.name] = -(-end // alignment) * alignment
        end = offsets[tensor.name] + tensor.nbytes
    return offsets


def external(tensor: DataTensor, offset: int) -> TensorProto:
    """The initializer that points into the data file."""
    proto = TensorProto(
        name=tensor.name,
        data_type=helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)),
        dims=tensor.shape,
        data_location=TensorProto.EXTERNAL,
    )
    place = {"location": DATA_FILE, "offset": str(offset), "length": str(tensor.nbytes)}
    for key, value in place.items():
        proto.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    return proto
