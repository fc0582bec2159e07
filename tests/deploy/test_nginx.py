"""deploy/nginx/vllm-mlx.conf in a real nginx before two real servers. Skipped where nginx is not installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.serving.process import ServerProcess, free_port, serving
from vllm_mlx.api.requests import SESSION_HEADERS
from vllm_mlx.settings import Settings

CONFIG = Path(__file__).parents[2] / "deploy/nginx/vllm-mlx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/bin")

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: apt install nginx)")

AROUND = """
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
    uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    include {folder}/vllm-mlx.conf;
}}
"""


@dataclass
class Site:
    """nginx at `url`, and the replicas by the address that nginx has for them."""

    url: str
    replicas: dict[str, ServerProcess]

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def place_of(self, session: str, header: str = "x-session-id") -> str:
        """Which replica the conversation is sent to."""
        return str(self.client.get("/v1/models", headers={header: session}).headers["x-served-by"])

    def session_at(self, address: str) -> str:
        return next(name for name in map(str, range(1000)) if self.place_of(name) == address)

    def ask(self, session: str, content: str, **fields: object) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0, **fields}
        headers = {"x-session-id": session}
        return self.client.post("/v1/chat/completions", json=body, headers=headers)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("nginx")
    with ExitStack() as stack:
        flags = ("--repetition-policy", "off")
        servers = [stack.enter_context(serving("demo", *flags, log=folder / f"{i}", is_awaited=False)) for i in (1, 2)]
        port = free_port()
        text = CONFIG.read_text().replace("listen 8000;", f"listen 127.0.0.1:{port};")
        for number, server in enumerate(servers, 1):
            text = text.replace(f"127.0.0.1:800{number} ", f"127.0.0.1:{server.port} ")
        (folder / "vllm-mlx.conf").write_text(text)
        (folder / "nginx.conf").write_text(AROUND.format(folder=folder))
        assert NGINX is not None
        nginx = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")])
        try:
            for server in servers:
                server.wait_until_healthy()
            yield Site(f"http://127.0.0.1:{port}", {f"127.0.0.1:{server.port}": server for server in servers})
        finally:
            nginx.terminate()
            nginx.wait(timeout=30)


def test_a_conversation_stays_with_its_replica_and_finds_its_prefix_there(site: Site) -> None:
    for address in site.replicas:
        session = site.session_at(address)
        story = f"{session}: " + "once upon a time there was a server. " * 8
        first, again = site.ask(session, story), site.ask(session, story)
        assert first.headers["x-served-by"] == again.headers["x-served-by"] == address
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize("header", SESSION_HEADERS)
def test_every_header_that_names_a_conversation_keeps_it_together_and_all_are_spread(site: Site, header: str) -> None:
    names = [f"s{number}" for number in range(40)]
    places = [site.place_of(name, header) for name in names]
    assert set(places) == set(site.replicas) and places[:5] == [site.place_of(name, header) for name in names[:5]]


def test_probes_are_answered_and_large_bodies_are_refused_in_front(site: Site) -> None:
    assert site.client.get("/health/ready").json() == {"status": "healthy"}
    assert site.client.get("/health/live").status_code == 200
    assert f"client_max_body_size {Settings().server.max_body_mb:.0f}m;" in CONFIG.read_text()
    too_large = b"x" * int(Settings().server.max_body_mb * 2**20 + 1)
    assert site.client.post("/v1/chat/completions", content=too_large).status_code == 413


def test_a_replica_that_drains_ends_its_streams_and_its_conversations_go_on_elsewhere(site: Site) -> None:
    address = min(site.replicas)
    session, leaving = site.session_at(address), site.replicas[address]
    body = {"messages": [{"role": "user", "content": "Count"}], "stream": True, "ignore_eos": True,
            "stream_options": {"include_usage": True}, "max_tokens": 1000, "temperature": 0}  # fmt: skip
    headers = {"x-session-id": session}
    with httpx.stream("POST", f"{site.url}/v1/chat/completions", json=body, headers=headers, timeout=120) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        next(lines)  # it has come while the rest is not even computed: nothing is held back
        leaving.signal()
        while httpx.get(f"{leaving.url}/health/ready").status_code == 200:
            pass
        assert httpx.get(f"{leaving.url}/health/live").json()["status"] == "draining", "alive, though not ready"
        moved = site.ask(session, "and now?")
        assert moved.status_code == 200 and moved.headers["x-served-by"].split(", ")[-1] != address
        rest = list(lines)
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["usage"]["completion_tokens"] == 1000
    assert leaving.wait() == 0
    for number in range(20):  # with one replica gone nobody notices
        assert site.place_of(f"later {number}").split(", ")[-1] in set(site.replicas) - {address}
    assert site.ask(session, "x").status_code == 200 and site.client.get("/health/ready").status_code == 200
