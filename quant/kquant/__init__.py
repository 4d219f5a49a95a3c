"""ggml's K-quants: superblocks whose scales are quantized themselves."""
