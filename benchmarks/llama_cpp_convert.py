"""llama.cpp's convert_hf_to_gguf.py for a checkpoint with the sample's tokenizer.

It knows tokenizers by a hash; the sample's is not among them, so the pre-tokenizer it would find
for LFM2 is given. Everything else is its own.

usage: llama_cpp_convert.py LLAMA_CPP_SOURCE CHECKPOINT --outfile FILE ...
"""

import runpy
import sys

source = sys.argv.pop(1)
sys.path[:0] = [source, f"{source}/gguf-py"]
from conversion import base  # noqa: E402 - llama.cpp's own package

base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "lfm2"
sys.argv[0] = f"{source}/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
