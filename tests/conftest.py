"""Fixtures for every part's tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.serving.process import ServerProcess, serving
from vllm_mlx import blas

# As the server does, and before any test imports MLX: its own BLAS would take minutes where this takes seconds.
blas.load()

# httpx reads the authorities it trusts for each client, 27 ms where there are all of them. No test leaves this machine.
os.environ.setdefault("SSL_CERT_FILE", str(Path(__file__).parent / "data" / "tls" / "localhost.pem"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported and collected stays to the end: collecting garbage need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("qwen3")` is the folder of a tiny random-weight model, built once a session.

    Do not write into it: copy it, or build another with `tests.tiny_models.build`.
    """
    built: dict[tuple[object, ...], Path] = {}

    def build(name: str, *, dtype: str = "float32", quantize_bits: int | None = None) -> Path:
        from tests import tiny_models  # imports MLX, which most tests do without

        key = (name, dtype, quantize_bits)
        if key not in built:
            folder = tmp_path_factory.mktemp("tiny") / "-".join(str(k) for k in key if k)
            built[key] = tiny_models.build(name, folder, dtype=dtype, quantize_bits=quantize_bits)
        return built[key]

    return build


@pytest.fixture(scope="session")
def demo_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The program with the built-in model and no flags; one for all tests that only talk to it."""
    with serving("demo", log=tmp_path_factory.mktemp("demo") / "log") as process:
        yield process
        assert "Traceback" not in process.output, process.output
