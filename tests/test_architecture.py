"""The picture in ARCHITECTURE.md, checked: imports flow downward, MLX stays below the border, the house stays small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "vllm_mlx"
LEAVES = {"errors", "observability"}
# Each room, and the rooms it may import beside itself and the leaves. `app` and what stands above it may import all.
BELOW = {
    "api": {"generation", "parsers.events", "engine.step", "engine.request", "settings"},
    # A model's facts and its media spans are plain data, read from files before MLX is there.
    "generation": {
        "parsers", "engine", "models.profile", "models.span", "models.token_row", "models.sound", "settings",
    },
    "parsers": set(),
    "engine": {"guards", "models"},
    "guards": set(),
    "mcp_client": set(),
    "models": set(),
    "observability": set(),
    "errors": set(),
    "settings": {"resolution"},
    "resolution": {"settings"},
    "options": {"settings"},
    "blas": set(),
    "connect": {"options"},
    "ui": set(),
}
# The composition root (app, backend, beside, fleet, lifecycle, loading, oversight) and the commands.
TOP = {
    "app", "backend", "beside", "commands", "fleet", "lifecycle", "loading", "offline", "oversight",
    "provenance", "ranks", "cli", "disk_cache", "doctor", "bench", "machine", "supervisor", "tune",
    "warm", "__main__", "__init__",
}  # fmt: skip
# The files of the engine that compute; everything else in it decides.
MLX_IN_ENGINE = {
    "runner", "seat", "prefill", "decode_batch", "kv_cache", "kv_batch", "kv_pack", "invariance", "sampler", "draws",
    "logits", "constraint", "disk_codec", "draft_model", "drafted", "mtp_draft",
}  # fmt: skip
HTTP = {"fastapi", "starlette", "uvicorn", "pydantic"}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__") or "__init__", path


MODULES = dict(modules())


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Absolute names of what a module imports, anywhere in it, with the line."""
    path = MODULES[name]
    package = ["vllm_mlx", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{source}.{alias.name}"
                is_module = target.removeprefix("vllm_mlx.") in MODULES and source.startswith("vllm_mlx")
                yield (target if is_module else source), node.lineno


def room(module: str) -> str:
    return module.split(".")[0]


def test_imports_flow_downward():
    wrong = [
        f"{name}:{line} imports {target}"
        for name in MODULES if room(name) not in TOP
        for target, line in imports(name)
        if target.startswith("vllm_mlx.")
        and not target.removeprefix("vllm_mlx.").startswith(tuple(BELOW[room(name)] | LEAVES | {room(name)}))
    ]
    assert not wrong


def test_mlx_is_imported_only_below_the_border():
    wrong = [
        f"{name}:{line} imports {target}"
        for name in MODULES
        if room(name) != "models" and not (room(name) == "engine" and name.split(".")[-1] in MLX_IN_ENGINE)
        for target, line in imports(name)
        if target.split(".")[0] in ("mlx", "mlx_lm", "mlx_vlm", "mlx_audio")
    ]
    assert not wrong


def test_http_is_known_only_to_the_api():
    wrong = [
        f"{name}:{line} imports {target}"
        for name in MODULES if room(name) not in {"api", "ui"} | TOP
        for target, line in imports(name)
        if target.split(".")[0] in HTTP
    ]
    assert not wrong


def test_below_the_api_settings_come_as_groups():
    """A part takes its own group; whoever sees all of Settings soon reads all of it."""
    wrong = [
        f"{name}:{node.lineno}"
        for name, path in MODULES.items() if room(name) in {"generation", "engine", "guards", "models"}
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "vllm_mlx.settings"
        and any(alias.name == "Settings" for alias in node.names)
    ]
    assert not wrong


def test_modules_say_what_they_are():
    sources = {name: path.read_text() for name, path in MODULES.items()}
    assert not [name for name, text in sources.items() if text.strip() and not ast.get_docstring(ast.parse(text))]


def test_every_room_is_in_the_picture():
    assert {room(name) for name in MODULES} <= set(BELOW) | TOP


def test_no_file_holds_a_second_idea(capsys):
    """Prints the size table for whoever reads the log."""
    sizes = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    totals: dict[str, int] = {}
    for name, size in sizes.items():
        totals[room(name)] = totals.get(room(name), 0) + size
    with capsys.disabled():
        print(f"\n{sum(sizes.values())} lines in {len(sizes)} files:",
              ", ".join(f"{name} {size}" for name, size in sorted(totals.items(), key=lambda item: -item[1])))
    assert not {name: size for name, size in sizes.items() if size > 600}
