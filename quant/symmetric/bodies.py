"""The candidates of the symmetric grid; ``lfmq.quant.line.scale`` searches among them."""

import numpy as np

from lfmq.quant.line.scale import ScaleLine
from lfmq.quant.line.state import line_bodies

# Levels tried for the largest weight of a group; docs/quantization.md describes the search.
TARGETS = {
    4: np.arange(18, 28, dtype=np.float32) / np.float32(3),
    8: np.array([126.0, 126.5, 127.0, 127.4], np.float32),
}

BODIES = line_bodies(ScaleLine(TARGETS))
