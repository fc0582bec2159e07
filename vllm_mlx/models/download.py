"""From the name of a model to its folder: the built-in one, a local folder, or the hub through huggingface_hub.

Runs before anything is loaded, on the main thread; no MLX. Every failure is a `ModelLoadError` of one sentence: what is
wrong, then what to do. Files that arrived whole are kept, so the same command goes on where the last one ended; within
a file a broken connection is resumed at the byte where it broke.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from vllm_mlx.errors import ModelLoadError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo"
# What serving needs, and what else a repository may hold at great length (other formats, examples, other precisions).
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
UNWANTED = ("original/*", "onnx/*", "consolidated*.safetensors", "*/.*", ".*")
SPARE_BYTES = 64 * 2**20
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class Progress(Protocol):
    """Who watches a download. `start` may come again when an attempt is repeated."""

    def start(self, total_bytes: int, done_bytes: int) -> None: ...

    def advance(self, num_bytes: int) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self) -> None: ...


class Silent:
    """Nobody watches."""

    def start(self, total_bytes: int, done_bytes: int) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def finish(self) -> None:
        pass


class Bar:
    """A progress bar with bytes, speed and remaining time on a terminal; a line now and then elsewhere."""

    is_shown: ClassVar[bool] = False
    """One is on the terminal now: whoever else writes there should wait."""

    def __init__(self, model: str) -> None:
        from rich.console import Console  # not needed by those who only resolve a local folder
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(model, total=None)
        self._model = model
        self._total = self._done = self._next_line = 0

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self._total, self._done = total_bytes, done_bytes
        self._progress.update(self._task, total=total_bytes, completed=done_bytes)
        self._progress.start()
        Bar.is_shown = self._console.is_terminal
        if not self._console.is_terminal:
            self.note(f"Downloading {self._model}: {gib(total_bytes - done_bytes)} to fetch.")
            self._next_line = done_bytes + max(1, total_bytes // 10)

    def advance(self, num_bytes: int) -> None:
        self._progress.advance(self._task, num_bytes)
        self._done += num_bytes
        if not self._console.is_terminal and self._done >= self._next_line:
            self.note(f"Downloading {self._model}: {self._done * 100 // max(1, self._total)} %")
            self._next_line += max(1, self._total // 10)

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def finish(self) -> None:
        self._progress.stop()
        Bar.is_shown = False


def resolve(
    model: str,
    *,
    offline: bool = False,
    revision: str | None = None,
    timeout_s: float = 300.0,
    retries: int = 3,
    progress: Progress | None = None,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """The folder of `model`, fetched from the hub first when it is a hub id and not there yet. May block for long.

    `timeout_s` is how long the connection may be silent; a failed attempt is repeated `retries` times, later each time,
    and none of its transfers is resumed when that is 0.
    `endpoint`, `cache_dir` and `sleep` default to the hub's settings and the real clock.
    """
    if model == DEMO:
        if not (DEMO_FOLDER / "config.json").is_file():
            raise ModelLoadError("The built-in demo model is missing from this installation; install it again.")
        return DEMO_FOLDER
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise ModelLoadError(f"{model} is a file; name the model's folder instead.")
    if not HUB_ID.fullmatch(model) or model.startswith((".", "~")) or ".." in model:
        raise ModelLoadError(f"There is no folder {model}, and it is no hub id such as mlx-community/Qwen3-0.6B-4bit.")
    hub = _Hub(model, revision, timeout_s, endpoint, cache_dir)
    cached = hub.cached_snapshot()
    if offline or hub.is_switched_off():
        if cached is None:
            raise ModelLoadError(
                f"{hub.label} is not in the local cache; run `vllm-mlx download {model}` while there is a network, or "
                "leave out --offline."
            )
        return cached
    return _fetch(hub, cached, retries, progress or Silent(), sleep)


def _fetch(hub: _Hub, cached: Path | None, retries: int, progress: Progress, sleep: Callable[[float], None]) -> Path:
    for attempt in range(retries + 1):
        try:
            with hub.bounds(resumes=retries > 0):
                return hub.download(progress, force=attempt > 0)
        except hub.passing_errors as error:
            if not hub.may_pass(error):
                raise ModelLoadError(hub.explain(error)) from None
            if cached is not None:
                progress.note(f"The hub cannot be reached; the cached copy of {hub.label} is used.")
                return cached
            failure = hub.explain(error)
            if attempt == retries:
                raise ModelLoadError(failure) from None
            wait = 2.0 ** (attempt + 1)
            progress.note(f"{failure} Trying again in {wait:g} s ({attempt + 1} of {retries}).")
            sleep(wait)
        except OSError as error:
            raise ModelLoadError(hub.explain(error)) from None
        finally:
            progress.finish()
    raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    size: int


class WrongSize(Exception):
    """A file arrived with another size than the hub announces."""


class _Resumed(Exception):
    """A transfer is about to be resumed that must not be. Of a type that huggingface_hub does not catch."""

    def __init__(self, failure: Exception) -> None:
        self.failure = failure


class _Hub:
    """The calls to huggingface_hub for one model, and what its errors mean to a person."""

    def __init__(
        self, model: str, revision: str | None, timeout_s: float, endpoint: str | None, cache_dir: Path | None
    ) -> None:
        import huggingface_hub  # takes a while, and a local folder does not need it
        import huggingface_hub.errors
        from huggingface_hub import constants

        self.model, self.revision, self.timeout_s = model, revision, timeout_s
        self.endpoint = endpoint or constants.ENDPOINT
        self.cache_dir = Path(cache_dir or constants.HF_HUB_CACHE)
        self.label = f"{model} (revision {revision})" if revision else model
        self._hub, self._errors, self._constants = huggingface_hub, huggingface_hub.errors, constants
        self._session = huggingface_hub.get_session()
        # The hub's own HTTP library, whichever it is this year: its exceptions share these names.
        http = sys.modules[type(self._session).__module__.partition(".")[0]]
        self.passing_errors = (http.TransportError, self._errors.HfHubHTTPError, WrongSize)
        self._timeouts, self._transport_error = http.TimeoutException, http.TransportError
        self._file = ""

    def is_switched_off(self) -> bool:
        return bool(self._constants.HF_HUB_OFFLINE)

    def may_pass(self, error: Exception) -> bool:
        """Whether the same request may succeed later."""
        if isinstance(error, self._errors.HfHubHTTPError):
            status = error.response.status_code
            return status >= 500 or status in (408, 429)
        return True

    def cached_snapshot(self) -> Path | None:
        """The snapshot in the cache when it has weights and a config, else None."""
        try:
            path = Path(
                self._hub.snapshot_download(
                    self.model, revision=self.revision, cache_dir=self.cache_dir, local_files_only=True
                )
            )
        except (FileNotFoundError, ValueError):
            return None
        return path if (path / "config.json").is_file() and any(path.glob("*.safetensors")) else None

    @contextmanager
    def bounds(self, *, resumes: bool) -> Iterator[None]:
        """While it lasts, no read of the hub's session waits longer than `timeout_s`; whether transfers are resumed."""
        hooks = self._session.event_hooks
        asked: set[tuple[str, str]] = set()

        def bound(request: Any) -> None:
            # The library resumes by itself, up to five times: it asks for the same again while it handles the failure.
            same, failure = (request.method, str(request.url)), sys.exc_info()[1]
            if not resumes and same in asked and isinstance(failure, Exception):
                raise _Resumed(failure)
            asked.add(same)
            request.extensions = {
                **request.extensions,
                "timeout": {**request.extensions.get("timeout", {}), "read": self.timeout_s},
            }

        self._session.event_hooks = {**hooks, "request": [*hooks["request"], bound]}
        try:
            yield
        finally:
            self._session.event_hooks = hooks

    def download(self, progress: Progress, *, force: bool) -> Path:
        self._file = ""
        api = self._hub.HfApi(endpoint=self.endpoint)
        info = api.model_info(self.model, revision=self.revision, files_metadata=True)
        files = select([_File(s.rfilename, s.size or 0) for s in info.siblings or []])
        if not any(file.name.endswith(".safetensors") for file in files):
            raise ModelLoadError(
                f"{self.label} holds no safetensors weights; name a model in MLX or Hugging Face form."
            )
        missing = [file for file in files if not self._is_cached(file, info.sha)]
        self._check_space(sum(file.size for file in missing))
        total = sum(file.size for file in files)
        progress.start(total, total - sum(file.size for file in missing))
        for file in missing:
            self._file = file.name
            self._download_file(api, file, info.sha, progress, force)
        # The name of the revision must lead to the commit, also when every file was there already.
        return Path(
            self._hub.snapshot_download(self.model, revision=info.sha, cache_dir=self.cache_dir, local_files_only=True)
        )

    def _download_file(self, api: Any, file: _File, commit: str, progress: Progress, force: bool) -> None:
        try:
            path = api.hf_hub_download(
                self.model,
                file.name,
                revision=self.revision or "main",
                cache_dir=self.cache_dir,
                tqdm_class=_reporter(progress),
                force_download=force,
            )
        except _Resumed as resumed:
            raise resumed.failure from None
        except OSError as error:
            if "onsistency check failed" in str(error):
                raise WrongSize(file.name) from None
            raise
        if file.size and os.path.getsize(path) != file.size:
            os.unlink(os.path.realpath(path))
            raise WrongSize(file.name)

    def _is_cached(self, file: _File, commit: str) -> bool:
        path = self._hub.try_to_load_from_cache(
            self.model, file.name, cache_dir=self.cache_dir, revision=self.revision or "main"
        )
        return isinstance(path, str) and f"/{commit}/" in Path(path).as_posix() and os.path.getsize(path) == file.size

    def _check_space(self, needed_bytes: int) -> None:
        folder = self.cache_dir
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed_bytes and needed_bytes + SPARE_BYTES > free:
            raise ModelLoadError(
                f"{self.label} needs {gib(needed_bytes)} of disk, but {self.cache_dir} has {gib(free)} free; make "
                "room, or set HF_HUB_CACHE to a larger disk."
            )

    def explain(self, error: Exception) -> str:
        """One sentence on what went wrong, then what to do."""
        errors = self._errors
        if isinstance(error, errors.GatedRepoError):
            return (
                f"{self.model} is gated: accept its terms at {self.endpoint}/{self.model}, then log in with "
                "`hf auth login` or set HF_TOKEN."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{self.model} has no revision {self.revision}; look at {self.endpoint}/{self.model}/tree/main."
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"{self.model} was not found at {self.endpoint}; check the spelling, or set HF_TOKEN if it is private."
            )
        where = f"{self._file} of {self.model}" if self._file else self.label
        if isinstance(error, WrongSize):
            return f"{where} arrived with the wrong size; run the command again."
        if isinstance(error, self._timeouts):
            return (
                f"The download of {where} was silent for {self.timeout_s:g} s; run the command again to go on, or "
                "give a longer --download-timeout."
            )
        if isinstance(error, self._transport_error) and not self._file:
            return (
                f"{self.endpoint} cannot be reached for {self.label} ({_first_line(error)}); check the network, or "
                "name a model that is on this machine."
            )
        if isinstance(error, self._transport_error):
            return f"The download of {where} broke off ({_first_line(error)}); run the command again to go on."
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            if status in (401, 403):
                return f"{self.endpoint} refuses {self.label} ({status}); log in with `hf auth login` or set HF_TOKEN."
            return f"{self.endpoint} answered {status} for {where}; try again later."
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return f"The disk of {self.cache_dir} filled up; make room, or set HF_HUB_CACHE to a larger disk."
        return f"{where} could not be stored in {self.cache_dir} ({_first_line(error)})."


def select(files: Sequence[_File]) -> list[_File]:
    """The files that serving needs, small ones first, so that a missing config shows before gigabytes have come."""
    wanted = [
        file
        for file in files
        if any(fnmatch.fnmatch(file.name, pattern) for pattern in WANTED)
        and not any(fnmatch.fnmatch(file.name, pattern) for pattern in UNWANTED)
    ]
    return sorted(wanted, key=lambda file: (file.size, file.name))


def gib(num_bytes: int) -> str:
    """Bytes as a person reads them."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:.1f} MiB"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _reporter(progress: Progress) -> type:
    """The tqdm-shaped class through which huggingface_hub tells `progress` what arrives."""
    from tqdm.auto import tqdm  # a dependency of huggingface_hub

    class Reporter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            progress.advance(int(n or 0))

    return Reporter
