"""Bytes of a picture or clip from where the client says they are: data: URL, http(s), local file. Worker threads.

A server that fetches what strangers name is a tool for reaching the network behind it. So: http(s) only; the name is
resolved here, every address is checked, and the connection goes to the checked address itself, for each redirect anew;
time, size and number of redirects are bounded. Local files only where the operator allows them. Nothing is decoded
here. Everything refused is an InvalidRequest that names the part.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import os
import re
import socket
import ssl
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import httpx

from vllm_mlx.errors import InvalidRequest

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BARE_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{64,}={0,2}")

Resolve = Callable[[str, int], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes, and the media type the sender declared for them (only data: URLs are taken at their word)."""

    data: bytes
    declared: str | None = None


@dataclass(frozen=True, slots=True)
class SourceLimits:
    timeout_s: float = 20.0
    max_redirects: int = 5
    max_bytes: int = 64 << 20


def is_public_address(text: str) -> bool:
    """Whether an address is on the open internet, looking through the forms that wrap another one."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public_address(str(inner))
    return address.is_global and not address.is_multicast


def resolve(host: str, port: int) -> Sequence[str]:
    """All addresses of a name, as the system resolves it."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class MediaSources:
    """Reads media by source. `is_loopback`: only this machine can reach the server. `allows_address`, `resolve` and
    `trusted` (whose certificates count; by default the usual authorities') are arguments so that tests can stand in for
    the internet."""

    def __init__(
        self,
        *,
        allows_remote: bool = True,
        roots: Sequence[str | Path] = (),
        is_loopback: bool = False,
        limits: SourceLimits = SourceLimits(),
        allows_address: Callable[[str], bool] = is_public_address,
        resolve: Resolve = resolve,
        trusted: ssl.SSLContext | None = None,
    ) -> None:
        self._allows_remote = allows_remote
        self._roots = [Path(r).expanduser().resolve() for r in roots]
        self._is_loopback = is_loopback
        self._limits = limits
        self._allows_address = allows_address
        self._resolve = resolve
        self._verify: ssl.SSLContext | bool = trusted if trusted is not None else True

    @property
    def description(self) -> str:
        """For the start-up lines: where media may come from."""
        remote = "public http(s) addresses (--no-remote-media: none)" if self._allows_remote else "no URLs"
        if self._roots:
            local = f"files under {', '.join(map(str, self._roots))}"
        elif self._is_loopback:
            local = "any file that this user can read (--media-root narrows that)"
        else:
            local = "no local files, as others can reach this server (--media-root allows some)"
        return f"Media may come from data: URLs, {remote}, {local}."

    def read(self, source: str, param: str, *, deadline: float | None = None) -> Blob:
        """The bytes of `source`. `deadline` is a `time.monotonic()` value that may shorten the time-out."""
        scheme = source[:8].partition(":")[0].lower()
        if scheme == "data":
            return self._read_data_url(source, param)
        if scheme in ("http", "https"):
            return Blob(self._fetch(source, param, deadline))
        if scheme == "file":
            return Blob(self._read_file(self._path_of(source, param), param))
        if _BARE_BASE64.fullmatch(source) and (source[0] != "/" or source.startswith("/9j/")):
            return Blob(self._decode_base64(source, param))
        if source.startswith("/"):
            return Blob(self._read_file(Path(source), param))
        raise InvalidRequest(
            f"{_shown(source)} is not a source of media; give an http(s) URL, a data: URL or an absolute path.",
            param=param,
            code="invalid_media_source",
        )

    # ── in the request itself ───────────────────────────────────────────────────────────────────────────────────────

    def _read_data_url(self, source: str, param: str) -> Blob:
        head, comma, body = source[5:].partition(",")
        if not comma:
            raise InvalidRequest("The data: URL has no comma between its type and its data.", param=param)
        kind, *options = (word.strip().lower() for word in head.split(";"))
        if len(body) > self._limits.max_bytes * 4 // 3 + 1024:
            raise self._too_big(param)
        data = self._decode_base64(body, param) if "base64" in options else unquote_to_bytes(body)
        return Blob(data, kind or None)

    def _decode_base64(self, text: str, param: str) -> bytes:
        text = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
        try:
            return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequest("The media's base64 is not valid.", param=param, code="invalid_base64") from None

    # ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _path_of(self, source: str, param: str) -> Path:
        parts = urlsplit(source)
        if parts.netloc not in ("", "localhost"):
            raise InvalidRequest("A file: URL names a file on this machine: file:///path.", param=param)
        path = Path(url2pathname(parts.path))
        if not path.is_absolute():
            raise InvalidRequest("A file: URL holds an absolute path: file:///path.", param=param)
        return path

    def _read_file(self, path: Path, param: str) -> bytes:
        if not self._roots and not self._is_loopback:
            raise InvalidRequest(
                "This server reads no local files, as others can reach it; send the data in a data: URL, or start it "
                "with --media-root.",
                param=param,
                code="local_media_refused",
            )
        if "\0" in str(path):
            raise InvalidRequest("The path holds a zero byte.", param=param)
        try:
            real = Path(os.path.realpath(path))
            if self._roots and not any(real.is_relative_to(root) for root in self._roots):
                raise InvalidRequest(
                    f"Local files are read only under {', '.join(map(str, self._roots))} (--media-root).",
                    param=param,
                    code="local_media_refused",
                )
            return self._read_regular_file(real, param)
        except FileNotFoundError:
            raise InvalidRequest(f"There is no file {_shown(str(path))}.", param=param) from None
        except OSError as error:
            raise InvalidRequest(
                f"The file {_shown(str(path))} cannot be read: {error.strerror or error}.", param=param
            ) from None

    def _read_regular_file(self, path: Path, param: str) -> bytes:
        # Non-blocking, so that a named pipe does not hold the thread; the link, if any, was followed above.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise InvalidRequest(f"{_shown(str(path))} is not a regular file.", param=param)
            if status.st_size > self._limits.max_bytes:
                raise self._too_big(param)
            return file.read(self._limits.max_bytes + 1)

    # ── the network ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _fetch(self, url: str, param: str, deadline: float | None) -> bytes:
        if not self._allows_remote:
            raise InvalidRequest(
                "This server fetches no URLs (--no-remote-media); send the data in a data: URL.",
                param=param,
                code="remote_media_refused",
            )
        until = time.monotonic() + self._limits.timeout_s
        until = min(until, deadline) if deadline is not None else until
        for _ in range(self._limits.max_redirects + 1):
            answer = self._get(url, param, until)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise InvalidRequest(f"The media's URL redirects more than {self._limits.max_redirects} times.", param=param)

    def _get(self, url: str, param: str, until: float) -> bytes | str:
        """The body, or the URL that a redirect names."""
        pinned, host, extensions = self._pin(url, param)
        timeout = httpx.Timeout(max(0.05, until - time.monotonic()))
        headers = {"host": host, "user-agent": "vllm-mlx", "accept": "image/*,video/*,*/*;q=0.5"}
        try:
            # Neither proxies nor redirects of the client's own: both would connect to something unchecked.
            with (
                httpx.Client(
                    trust_env=False, follow_redirects=False, timeout=timeout, verify=self._verify
                ) as client,
                client.stream("GET", pinned, headers=headers, extensions=extensions) as response,
            ):
                if response.status_code in _REDIRECTS and "location" in response.headers:
                    return str(httpx.URL(url).join(response.headers["location"]))
                if response.status_code != 200:
                    raise InvalidRequest(
                        f"The media's URL answered with status {response.status_code}.",
                        param=param,
                        code="media_fetch_failed",
                    )
                return self._body(response, param, until)
        except httpx.TimeoutException:
            raise self._too_slow(param) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise InvalidRequest(
                f"The media's URL could not be fetched: {str(error) or type(error).__name__}.",
                param=param,
                code="media_fetch_failed",
            ) from None

    def _body(self, response: httpx.Response, param: str, until: float) -> bytes:
        length = response.headers.get("content-length", "")
        if length.isdigit() and int(length) > self._limits.max_bytes:
            raise self._too_big(param)
        body = bytearray()
        for chunk in response.iter_bytes():  # as they come: a given size would wait for it
            body += chunk
            if len(body) > self._limits.max_bytes:
                raise self._too_big(param)
            if time.monotonic() > until:
                raise self._too_slow(param)
        return bytes(body)

    def _pin(self, url: str, param: str) -> tuple[httpx.URL, str, dict[str, str]]:
        """The URL with its host replaced by a checked address, the Host header, and the name for TLS."""
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError, ValueError):
            raise InvalidRequest("The media's URL is not valid.", param=param) from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InvalidRequest("Media are fetched from http(s) URLs only.", param=param, code="remote_media_refused")
        port = parsed.port or (443 if parsed.scheme == "https" else 80)
        try:
            addresses = self._resolve(parsed.host, port)
        except (OSError, UnicodeError):
            addresses = ()
        if not addresses:
            raise InvalidRequest(
                f"The host {_shown(parsed.host)} of the media's URL cannot be resolved.",
                param=param,
                code="media_fetch_failed",
            )
        # All must be allowed: a name with one public and one private address is a trick.
        if not all(self._is_allowed(a) for a in addresses):
            raise InvalidRequest(
                f"The host {_shown(parsed.host)} of the media's URL is not on the public internet.",
                param=param,
                code="remote_media_refused",
            )
        host = parsed.netloc.decode("ascii").rpartition("@")[2]
        return parsed.copy_with(host=addresses[0], username=None, password=None), host, {"sni_hostname": parsed.host}

    def _is_allowed(self, address: str) -> bool:
        try:
            return self._allows_address(address)
        except ValueError:
            return False

    def _too_big(self, param: str) -> InvalidRequest:
        return InvalidRequest(
            f"The media are larger than {self._limits.max_bytes >> 20} MiB.", param=param, code="media_too_large"
        )

    def _too_slow(self, param: str) -> InvalidRequest:
        return InvalidRequest(
            "The media's URL did not answer in time; send the data in a data: URL.",
            param=param,
            code="media_fetch_failed",
        )


def _shown(text: str) -> str:
    """A client's text in an error: short, one line."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return repr(text if len(text) <= 80 else text[:77] + "...")
