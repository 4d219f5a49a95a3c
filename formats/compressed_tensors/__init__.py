"""compressed-tensors for vLLM, SGLang and transformers."""
