"""A model used from Python, without a server: `LLM` for batches, `AsyncLLM` for streams. vLLM's shape."""
