"""The tokenizer and template of an MLX build in mlx-lm.

``decode`` is what it shares with transformers; the text that mlx-lm streams comes from its own
detokenizer, which takes one blank away from the beginning of an answer.
"""

from lfmq.validation.engines.mlx import EXTRA as EXTRA
from lfmq.validation.engines.mlx import NAME as NAME
from lfmq.validation.engines.mlx import version as version
from lfmq.validation.engines.protocol import TokenizerRequest, TokenizerRun
from lfmq.validation.engines.transformers_tokenizer import answer


def tokenize(request: TokenizerRequest) -> TokenizerRun:
    """Answer the request with mlx-lm's ``load_tokenizer``.

    Raises:
        ImportError: mlx-lm is not installed.
        ValidationError: it does not load the tokenizer.
    """
    from mlx_lm.utils import load_tokenizer

    return answer(NAME, load_tokenizer, request)
