"""`vllm-mlx models`: what is on this machine, and whether it can be served here. Reads headers; no MLX, no network."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import CacheNotFound, scan_cache_dir
from rich.console import Console
from rich.table import Table

from vllm_mlx.errors import VllmMlxError
from vllm_mlx.guards.process_memory import capacity_bytes
from vllm_mlx.models.download import DEMO, DEMO_FOLDER, gib
from vllm_mlx.models.profile import read_profile
from vllm_mlx.settings import GuardSettings

ROOMY = 0.6
"""Weights over this share of what may be used leave little for keys and values: long contexts will not fit."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """`fits`: yes, tight, no, or unknown with `problem` saying why. Sizes in bytes."""

    name: str
    kind: str
    precision: str
    weights_bytes: int
    disk_bytes: int
    context_tokens: int | None
    fits: str
    problem: str | None = None


def run(parsed: argparse.Namespace) -> int:
    usable_bytes = int(capacity_bytes() * GuardSettings().memory_limit_threshold / 100)
    found = list_models(usable_bytes)
    if parsed.json:
        print(json.dumps([asdict(model) for model in found], indent=1))
        return 0
    Console(highlight=False).print(make_table(found, usable_bytes))
    return 0


def list_models(usable_bytes: int, cache_dir: Path | None = None) -> list[LocalModel]:
    """The built-in model, then those of the hub's cache by name. Data sets and unfinished downloads are left out."""
    found = [describe(DEMO, DEMO_FOLDER, _folder_bytes(DEMO_FOLDER), usable_bytes)]
    try:
        cache = scan_cache_dir(cache_dir)
    except CacheNotFound:
        return found
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id.lower()):
        revisions = [r for r in repo.revisions if (r.snapshot_path / "config.json").exists()]
        if repo.repo_type != "model" or not revisions:
            continue
        newest = max(revisions, key=lambda revision: revision.last_modified)
        if any(newest.snapshot_path.glob("*.safetensors")):
            found.append(describe(repo.repo_id, newest.snapshot_path, repo.size_on_disk, usable_bytes))
    return found


def describe(name: str, folder: Path, disk_bytes: int, usable_bytes: int) -> LocalModel:
    try:
        profile = read_profile(folder)
    except VllmMlxError as error:
        return LocalModel(name, "?", "?", 0, disk_bytes, None, "unknown", str(error))
    quantization = profile.quantization or {}
    bits = quantization.get("bits")
    more = sorted(profile.modalities - {"text"})
    return LocalModel(
        name,
        " + ".join(["text", *more]),
        f"{bits}-bit" if bits else profile.dtype,
        profile.weights_bytes,
        disk_bytes,
        profile.context_tokens,
        _fits(profile.weights_bytes, usable_bytes),
    )


def _fits(weights_bytes: int, usable_bytes: int) -> str:
    if weights_bytes > usable_bytes:
        return "no"
    return "tight" if weights_bytes > ROOMY * usable_bytes else "yes"


def make_table(found: list[LocalModel], usable_bytes: int) -> Table:
    table = Table(box=None, pad_edge=False, caption=f"{gib(usable_bytes)} may be used", caption_justify="left")
    for heading in ("MODEL", "KIND", "PRECISION"):
        table.add_column(heading)
    for heading in ("WEIGHTS", "ON DISK", "CONTEXT"):
        table.add_column(heading, justify="right")
    table.add_column("FITS")
    colours = {"yes": "green", "tight": "yellow", "no": "red", "unknown": "dim"}
    for model in found:
        fits = model.problem or model.fits
        context = f"{model.context_tokens // 1024}k" if model.context_tokens else "?"
        table.add_row(
            model.name, model.kind, model.precision, gib(model.weights_bytes) if model.weights_bytes else "?",
            gib(model.disk_bytes), context, f"[{colours[model.fits]}]{fits}[/]",
        )  # fmt: skip
    return table


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
