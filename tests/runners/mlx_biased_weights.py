"""mlx-lm with a wrong routing rule: the engine of a test, run in a process of its own."""

from collections.abc import Iterator

from mlx_lm.models import lfm2_moe

from lfmq.tests.validation.engines.test_mlx import biased_weights
from lfmq.validation.engines import mlx as native_mlx
from lfmq.validation.engines.mlx import EXTRA as EXTRA
from lfmq.validation.engines.mlx import NAME as NAME
from lfmq.validation.engines.mlx import version as version
from lfmq.validation.engines.protocol import EngineRequest, WindowRun


def run_windows(request: EngineRequest) -> Iterator[WindowRun]:
    """See the module."""
    lfm2_moe.Lfm2MoeSparseMoeBlock.__call__ = biased_weights
    return native_mlx.run_windows(request)
