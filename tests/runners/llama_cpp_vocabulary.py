"""What llama.cpp knows of a GGUF's special tokens, as JSON: run with the file's name."""

import ctypes
import json
import sys

from lfmq.validation.engines.llama_cpp_abi import LogCallback, Pointer, load_library


def main(path: str) -> None:
    library = load_library()
    silent = LogCallback(lambda level, text, data: None)
    library.llama_log_set(silent, None)
    for name in ("llama_vocab_eos", "llama_vocab_eot", "llama_vocab_bos"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_int32, [Pointer]
    library.llama_vocab_is_eog.restype = ctypes.c_bool
    library.llama_vocab_is_eog.argtypes = [Pointer, ctypes.c_int32]
    library.llama_model_chat_template.restype = ctypes.c_char_p
    library.llama_model_chat_template.argtypes = [Pointer, ctypes.c_char_p]
    library.llama_backend_init()
    params = library.llama_model_default_params()
    model = library.llama_model_load_from_file(path.encode(), params)
    vocabulary = library.llama_model_get_vocab(model)
    count = library.llama_vocab_n_tokens(vocabulary)
    named = {n: library.llama_model_chat_template(model, n) for n in (None, b"tool_use")}
    found = {
        "eos": library.llama_vocab_eos(vocabulary),
        "eot": library.llama_vocab_eot(vocabulary),
        "bos": library.llama_vocab_bos(vocabulary),
        "ends": [i for i in range(count) if library.llama_vocab_is_eog(vocabulary, i)],
        "templates": [t if t is None else t.decode() for t in named.values()],
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
