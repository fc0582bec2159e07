"""`vllm-mlx tune`: measures the settings that depend on machine and model, and keeps the best for later starts.

The profile is written last, at once: interrupted, the command leaves what was there before. Another program that uses
the machine meanwhile spoils the measurement; a server need not be stopped for correctness, only for that.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_mlx.errors import SettingsError
from vllm_mlx.settings import Settings, setting_fields
from vllm_mlx.tune import profile as tuned
from vllm_mlx.tune.search import Knobs, Measurer, Outcome, search

KNOBS = {path.partition(".")[2]: path for path in tuned.TUNABLE}


def run(settings: Settings, rounds: str, *, folder: Path | None = None,
        open_model: Callable[[Settings], tuple[Any, Measurer, bool]] | None = None) -> int:
    """The command. `folder` is where the profile goes; `open_model` loads the model named by the settings: its profile,
    what measures it, and whether it can guess ahead."""
    if not rounds.isdigit() or int(rounds) < 1:
        raise SettingsError(f"--rounds takes a whole number from 1, not {rounds!r}.")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    settings = settings.with_values(model__tune_profile=False)
    settings, _ = settings.resolve()
    started = time.monotonic()
    try:
        model, measurer, can_guess = (open_model or load)(settings)
        before = Knobs(**{name: _value(settings, path) for name, path in KNOBS.items()})
        console.print(f"{model.name}: each candidate in {rounds} rounds ...")
        outcome = search(measurer, before, num_rounds=int(rounds), can_guess=can_guess, say=console.print)
    except KeyboardInterrupt:
        print("vllm-mlx: interrupted; nothing was written.", file=sys.stderr)
        return 130
    path = tuned.path_of(settings, model, folder)
    tuned.write(_profile(model.name, outcome), path)
    console.print(_works(outcome))
    console.print(_knobs(outcome))
    console.print(
        f"Measured for {time.monotonic() - started:.0f} s. `vllm-mlx serve` uses this for this model from now on, where"
        f" no flag says otherwise: {path}", soft_wrap=True)
    return 0


def load(settings: Settings) -> tuple[Any, Measurer, bool]:
    """The model in this process, on this thread."""
    from vllm_mlx.backend import ModelFiles, load_blas

    files = ModelFiles.fetch(settings)
    load_blas(settings)
    from vllm_mlx.engine.assembly import build_engine
    from vllm_mlx.loading import engine_options
    from vllm_mlx.models import device, loader
    from vllm_mlx.tune.measurer import EngineMeasurer

    model = files.settings.model
    loaded = loader.load(
        files.folder, mllm=model.mllm, dtype=model.dtype, trust_remote_code=model.trust_remote_code
    ).model
    options = engine_options(files.settings, device.free_bytes(), backend=device.report().backend)
    runner: Any = build_engine(loaded, options, lambda events, status: None).runner
    return files.profile, EngineMeasurer(loaded, options), runner.speculator is not None


def _value(settings: Settings, path: str) -> Any:
    group, _, name = path.partition(".")
    return getattr(getattr(settings, group), name)


def _profile(model: str, outcome: Outcome) -> tuned.TunedProfile:
    """What is better than the default, and the measurement behind it."""
    before, after = asdict(outcome.before), asdict(outcome.after)
    values = {KNOBS[name]: value for name, value in after.items() if value != before[name]}
    measured = {c.work: {"before_s": c.before_s, "after_s": c.after_s, "ratios": c.ratios} for c in outcome.comparisons}
    return tuned.TunedProfile(model, values, measured, time.time())


def _works(outcome: Outcome) -> Table:
    table = Table(title="Before and after, in turns")
    for name in ("work", "before", "after", "times as fast", "rounds"):
        table.add_column(name)
    for c in outcome.comparisons:
        rounds = " ".join(f"{ratio:.2f}" for ratio in c.ratios)
        table.add_row(c.work, f"{c.before_s:.2f} s", f"{c.after_s:.2f} s", f"{c.gain:.2f}", rounds)
    return table


def _knobs(outcome: Outcome) -> Table:
    table = Table(title="Settings")
    for name in ("flag", "before", "after"):
        table.add_column(name)
    labels = {item.path: item.label for item in setting_fields()}
    for name, path in KNOBS.items():
        old, new = getattr(outcome.before, name), getattr(outcome.after, name)
        table.add_row(labels[path], str(old), str(new) if new != old else "the same")
    return table
