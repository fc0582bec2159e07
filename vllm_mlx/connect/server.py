"""What a client must know of a running server: where it is, which model it serves, how long its context is."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from vllm_mlx.errors import Unavailable, VllmMlxError

NO_KEY = "not-needed"
"""Clients insist on a key; a server without keys takes any."""
DEFAULT_CONTEXT = 32768


@dataclass(frozen=True, slots=True)
class Server:
    """`url` ends before /v1. `key` is None where the server asks for none. `takes_any_name`: of a model."""

    url: str
    model: str
    context_tokens: int = DEFAULT_CONTEXT
    takes_images: bool = False
    takes_any_name: bool = False
    key: str | None = None

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def any_key(self) -> str:
        return self.key or NO_KEY

    @property
    def max_output_tokens(self) -> int:
        """What a client may ask for at once: agents subtract it from the context."""
        return max(1024, min(32000, self.context_tokens // 4))


def clean_url(url: str) -> str:
    """The server's root, whether or not /v1 was given; VllmMlxError for what is no http(s) address."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise VllmMlxError(f"--url takes an address such as http://127.0.0.1:8000, not {url!r}.")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def ask(url: str, *, key: str | None = None, model: str | None = None) -> Server:
    """Ask the server at `url`. With `model` given, one that does not answer is taken on trust."""
    import httpx  # not at the top: `--help` answers at once

    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=5, trust_env=False) as client:
            listed = client.get("/v1/models")
            known = client.get("/v1/capabilities")
    except httpx.HTTPError as error:
        if model is not None:
            return Server(url, model, key=key)
        raise Unavailable(
            f"No server answers at {url} ({type(error).__name__}); start one with `vllm-mlx serve`, or name a --url, "
            "or a --model to write settings all the same."
        ) from None
    if listed.status_code == 401:
        raise VllmMlxError(f"The server at {url} wants a key: give --api-key, or set VLLM_MLX_API_KEY.")
    if listed.status_code != 200:
        raise Unavailable(f"The server at {url} is not ready (status {listed.status_code}); try again in a moment.")
    found = listed.json()["data"]
    served = next((one for one in found if one["id"] == model), found[0])
    modalities = known.json().get("modalities", {}) if known.status_code == 200 else {}
    return Server(
        url,
        model or served["id"],
        served.get("max_model_len") or DEFAULT_CONTEXT,
        takes_images=bool(modalities.get("image")),
        takes_any_name=any(one["id"] == "default" for one in found),
        key=key,
    )
