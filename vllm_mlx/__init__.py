"""An inference server for language and vision-language models on MLX.

`from vllm_mlx import LLM, SamplingParams` uses a model without a server (`vllm_mlx.offline`). These names are looked up
when they are first used: importing this package loads nothing.
"""

from typing import Any

__version__ = "0.1.0"

_OFFLINE = {
    "LLM": "llm", "AsyncLLM": "async_llm", "SamplingParams": "params",
    "RequestOutput": "outputs", "CompletionOutput": "outputs",
}  # fmt: skip

__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _OFFLINE:
        from importlib import import_module

        return getattr(import_module(f"vllm_mlx.offline.{_OFFLINE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
