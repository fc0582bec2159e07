"""The LoRA adapters of one model by name: which there are, who uses them, loading and unloading while the server runs.

The engine's bank and the prefix cache know an adapter by its key, name and content hash: keys and values made with one
are never found by another that later takes its name, also on disk. An adapter that is taken away serves what runs with
it, and goes when the last of these has ended. asyncio thread; the bank itself belongs to the MLX thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_mlx.errors import ModelLoadError, Unavailable, UnknownModel

log = logging.getLogger(__name__)


class Bank(Protocol):
    """`models.adapters.AdapterBank`, as far as this needs it."""

    def load(self, name: str, folder: Path) -> Any:
        """Raises ModelLoadError for what does not fit the model."""
        ...

    def unload(self, name: str) -> None: ...


SubmitJob = Callable[[Callable[[], Any]], "Future[Any]"]
"""`EngineThread.submit_job`: have a job run on the MLX thread between two steps, behind all that was sent before it."""


@dataclass(eq=False)
class Adapter:
    """`facts` are the bank's: rank, number of layers, bytes."""

    name: str
    path: Path
    key: str
    facts: Any = None
    num_users: int = 0
    is_leaving: bool = False


def describe(name: str, folder: Path) -> Adapter:
    """An adapter with its key. Reads the files; blocks. A folder that is none is told by whoever loads it."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*")) if folder.is_dir() else ():
        if file.suffix in (".safetensors", ".json"):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return Adapter(name, folder, f"{name}@{digest.hexdigest()[:16]}")


class AdapterRegistry:
    """Starts empty, or with adapters the model was loaded with (`begin_with`); `attach` connects it to an engine."""

    def __init__(self) -> None:
        self._adapters: dict[str, Adapter] = {}
        self._bank: Bank | None = None
        self._submit: SubmitJob | None = None

    def __iter__(self) -> Iterator[Adapter]:
        return iter(tuple(self._adapters.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def begin_with(self, adapters: Sequence[Adapter]) -> None:
        """Serve adapters that the bank holds already."""
        self._adapters = {adapter.name: adapter for adapter in adapters}

    def bring_back(self, load: Callable[[str, Path], Any]) -> None:
        """Load all of them into a model that has just been loaded: `load` takes key and folder, on the MLX thread.

        The first time, what does not fit raises ModelLoadError. When a model comes back, its files may have changed
        meanwhile, which gives the adapter another key, or be gone, which costs the adapter and not the model.
        """
        for adapter in self:
            if adapter.facts is None:
                adapter.facts = load(adapter.key, adapter.path)
                continue
            adapter.key = describe(adapter.name, adapter.path).key
            try:
                adapter.facts = load(adapter.key, adapter.path)
            except ModelLoadError as error:
                log.warning("the adapter %s is served no more: %s", adapter.name, error)
                del self._adapters[adapter.name]

    def attach(self, bank: Bank, submit: SubmitJob) -> None:
        self._bank, self._submit = bank, submit

    def detach(self) -> None:
        """The model goes; its adapters come back with it."""
        self._bank = self._submit = None

    async def load(self, name: str, path: Path) -> Adapter:
        """Load an adapter and serve it, instead of one of this name. Raises ModelLoadError when it does not fit."""
        adapter = await asyncio.to_thread(describe, name, path)
        if (same := self._adapters.get(name)) is not None and same.key == adapter.key:
            return same
        adapter.facts = await asyncio.wrap_future(self._on_mlx_thread(lambda bank: bank.load(adapter.key, path)))
        replaced = self._adapters.get(name)
        self._adapters[name] = adapter
        if replaced is not None:
            await self._let_go(replaced)
        return adapter

    async def unload(self, name: str) -> bool:
        """Serve it no more; False if there is none of this name."""
        adapter = self._adapters.pop(name, None)
        if adapter is not None:
            await self._let_go(adapter)
        return adapter is not None

    def check(self, name: str, param: str) -> None:
        """Raise UnknownModel for a name that is not served."""
        if name not in self._adapters:
            served = ", ".join(f"'{known}'" for known in self._adapters) or "none"
            raise UnknownModel(f"There is no adapter '{name}'; loaded: {served}.", param=param)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[str]:
        """The adapter's key; it stays loaded inside the block. An empty name is no adapter."""
        if not name:
            yield ""
            return
        self.check(name, "adapter")
        adapter = self._adapters[name]
        adapter.num_users += 1
        try:
            yield adapter.key
        finally:
            adapter.num_users -= 1
            if adapter.is_leaving and not adapter.num_users:
                self._on_mlx_thread(lambda bank: bank.unload(adapter.key))

    async def _let_go(self, adapter: Adapter) -> None:
        adapter.is_leaving = True
        if not adapter.num_users:
            await asyncio.wrap_future(self._on_mlx_thread(lambda bank: bank.unload(adapter.key)))

    def _on_mlx_thread(self, job: Callable[[Bank], Any]) -> Future[Any]:
        bank = self._bank
        if bank is None or self._submit is None:
            raise Unavailable("The model is not loaded now.", retry_after_s=5)
        return self._submit(lambda: job(bank))
