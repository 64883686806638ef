"""Generation: the KV cache, prefill and decoding, sampling."""
