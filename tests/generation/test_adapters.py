"""Adapters by name: keys, users, replacement and leaving, on a bank that only takes note."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.errors import ModelLoadError, Unavailable, UnknownModel
from vllm_mlx.generation.adapters import AdapterRegistry, describe


class World:
    def __init__(self) -> None:
        self.held: list[str] = []
        self.registry = AdapterRegistry()
        self.registry.attach(self, self.submit)

    def load(self, name: str, folder: Path) -> str:
        if not folder.is_dir():
            raise ModelLoadError(f"{folder} is not a folder.")
        self.held.append(name)
        return "facts"

    def unload(self, name: str) -> None:
        self.held.remove(name)

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(job())
        except ModelLoadError as error:
            future.set_exception(error)
        return future


def folder(tmp_path: Path, content: str) -> Path:
    path = tmp_path / content
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(content)
    return path


async def test_a_name_is_served_from_its_load_to_its_unload(tmp_path: Path) -> None:
    world = World()
    adapter = await world.registry.load("sql", folder(tmp_path, "a"))
    async with world.registry.use("sql") as key:
        assert key == adapter.key and key.startswith("sql@") and world.held == [key]
    assert await world.registry.unload("sql") and not await world.registry.unload("sql")
    assert world.held == []
    with pytest.raises(UnknownModel, match="no adapter 'sql'; loaded: none"):
        async with world.registry.use("sql"):
            pass


async def test_adapters_come_back_with_their_model_as_their_files_are_then(tmp_path: Path) -> None:
    world = World()
    for name in ("same", "changed", "gone"):
        await world.registry.load(name, folder(tmp_path, name))
    keys = {adapter.name: adapter.key for adapter in world.registry}
    world.registry.detach()
    world.held.clear()
    (tmp_path / "changed/adapter_config.json").write_text("other weights")
    (tmp_path / "gone/adapter_config.json").unlink()
    (tmp_path / "gone").rmdir()
    world.registry.bring_back(world.load)
    world.registry.attach(world, world.submit)
    assert {adapter.name for adapter in world.registry} == {"same", "changed"}
    async with world.registry.use("same") as same, world.registry.use("changed") as changed:
        assert same == keys["same"] and changed != keys["changed"], "what is cached of other weights must not be found"
        assert sorted(world.held) == sorted([same, changed])


def test_an_adapter_of_the_start_that_does_not_fit_ends_the_start(tmp_path: Path) -> None:
    registry = AdapterRegistry()
    registry.begin_with([describe("none", tmp_path / "nowhere")])
    with pytest.raises(ModelLoadError):
        registry.bring_back(World().load)


async def test_no_name_is_no_adapter(tmp_path: Path) -> None:
    async with World().registry.use("") as key:
        assert key == ""


async def test_what_runs_with_an_adapter_finishes_with_it(tmp_path: Path) -> None:
    world = World()
    await world.registry.load("sql", folder(tmp_path, "a"))
    async with world.registry.use("sql") as old:
        new = (await world.registry.load("sql", folder(tmp_path, "b"))).key
        async with world.registry.use("sql") as key:
            assert key == new != old and world.held == [old, new]
        await world.registry.unload("sql")
        assert world.held == [old]
    assert world.held == []


async def test_the_key_follows_the_content_so_that_no_cache_is_found_by_another(tmp_path: Path) -> None:
    one, two = describe("sql", folder(tmp_path, "a")), describe("sql", folder(tmp_path, "b"))
    assert one.key != two.key and describe("sql", folder(tmp_path, "a")).key == one.key
    world = World()
    first = await world.registry.load("sql", folder(tmp_path, "a"))
    assert await world.registry.load("sql", folder(tmp_path, "a")) is first and world.held == [first.key]


async def test_a_failed_load_leaves_what_was_served(tmp_path: Path) -> None:
    world = World()
    await world.registry.load("sql", folder(tmp_path, "a"))
    with pytest.raises(ModelLoadError):
        await world.registry.load("sql", tmp_path / "nowhere")
    assert [adapter.name for adapter in world.registry] == ["sql"] and len(world.held) == 1


async def test_while_the_model_is_away_nothing_is_loaded(tmp_path: Path) -> None:
    world = World()
    world.registry.detach()
    with pytest.raises(Unavailable):
        await world.registry.load("sql", folder(tmp_path, "a"))
