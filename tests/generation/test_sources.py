import base64
import datetime
import os
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.sources import MediaSources, SourceLimits, is_public_address

PARAM = "messages.0.content.1.image_url"


def refuse(sources, source, match=None, code=None):
    with pytest.raises(InvalidRequest, match=match) as caught:
        sources.read(source, PARAM)
    assert caught.value.param == PARAM
    if code:
        assert caught.value.code == code


# ── addresses ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "198.18.0.1",
        "240.0.0.1",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12:3456::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:db8::1",
    ],
)
def test_addresses_behind_the_server_are_not_public(address):
    assert not is_public_address(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_of_the_internet_are(address):
    assert is_public_address(address)


# ── http ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("host")))
        if self.path == "/ok":
            self._send(200, b"data")
        elif self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("location", self.path[4:])
            self.end_headers()
        elif self.path == "/big":
            self._send(200, b"x" * 5000)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(200):
                    self.wfile.write(b"y" * 100)
            except OSError:
                pass
        elif self.path == "/drip":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(50):
                    self.wfile.write(b"z")
                    self.wfile.flush()
                    time.sleep(0.1)
            except OSError:
                pass
        elif self.path == "/silent":
            self.server.over.wait(60)
        else:
            self._send(404, b"no")

    def _send(self, status, body):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.seen = []
    server.over = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def url(server, path, host="images.example"):
    return f"http://{host}:{server.server_address[1]}{path}"


def internet(timeout_s=30.0, **changes):
    """Sources for which this machine plays the internet: names resolve to it, and it counts as public."""
    arguments = {"allows_address": lambda a: a == "127.0.0.1", "resolve": lambda host, port: ["127.0.0.1"], **changes}
    return MediaSources(limits=SourceLimits(timeout_s=timeout_s, max_bytes=4096), **arguments)


def test_a_url_is_fetched_with_its_own_host_name(server):
    assert internet().read(url(server, "/ok"), PARAM).data == b"data"
    assert server.seen[-1] == ("/ok", f"images.example:{server.server_address[1]}")


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """(certificate, key) of an authority of its own, for a name."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    day = datetime.datetime(2020, 1, 1)
    built = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(), day,
                                    day.replace(year=2120))  # fmt: skip
    built = built.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(built.sign(key, hashes.SHA256()).public_bytes(pem))
    plain = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(plain)
    return folder / "cert.pem", folder / "key.pem"


def test_https_is_checked_against_the_name_and_not_the_address(tmp_path):
    cert, key = certificate(tmp_path, "images.example")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []
    offered = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    offered.load_cert_chain(cert, key)
    server.socket = offered.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        port = server.server_address[1]
        sources = internet(trusted=ssl.create_default_context(cafile=cert))
        assert sources.read(f"https://images.example:{port}/ok", PARAM).data == b"data"
        assert server.seen == [("/ok", f"images.example:{port}")]
        for refused in (sources, f"https://other.example:{port}/ok"), (internet(), f"https://images.example:{port}/ok"):
            with pytest.raises(InvalidRequest, match="certificate") as caught:
                refused[0].read(refused[1], PARAM)
            assert caught.value.code == "media_fetch_failed"
    finally:
        server.shutdown()
        server.server_close()


def test_redirects_are_followed_a_few_times(server):
    assert internet().read(url(server, f"/to?{url(server, '/ok')}"), PARAM).data == b"data"
    assert internet().read(url(server, "/to?/ok"), PARAM).data == b"data"
    loop = url(server, "/to?/to?") + "/to?" * 10 + "/ok"
    refuse(internet(), loop, "redirects more than")


def test_private_addresses_are_refused_before_any_connection(server):
    seen = len(server.seen)
    port = server.server_address[1]
    real = MediaSources()
    for host in (
        "127.0.0.1",
        "localhost",
        "[::1]",
        "0.0.0.0",
        "127.1",
        "2130706433",
        "0x7f000001",
        "[::ffff:127.0.0.1]",
    ):
        refuse(real, f"http://{host}:{port}/ok")
    assert len(server.seen) == seen


def test_a_name_that_resolves_to_a_private_address_is_refused(server):
    seen = len(server.seen)
    tricky = MediaSources(resolve=lambda host, port: ["93.184.216.34", "127.0.0.1"])
    refuse(tricky, url(server, "/ok"), "public internet", "remote_media_refused")
    assert len(server.seen) == seen


def test_a_redirect_to_a_private_address_is_refused(server):
    def resolve(host, port):
        return ["127.0.0.1"] if host == "images.example" else ["169.254.169.254"]

    refuse(internet(resolve=resolve), url(server, "/to?http://metadata.internal/latest"), "public internet")


def test_a_name_resolved_once_is_connected_by_that_address(server):
    """A second look-up would let a name change its address between check and connection."""
    lookups = []

    def resolve(host, port):
        lookups.append(host)
        return ["127.0.0.1"]

    internet(resolve=resolve).read(url(server, "/ok", host="no-such-host.invalid"), PARAM)
    assert lookups == ["no-such-host.invalid"]


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://images.example/x", "gopher://images.example/x", "data:,x"]
)
def test_a_redirect_leads_to_http_only(server, target):
    refuse(internet(), url(server, f"/to?{target}"), "http\\(s\\) URLs only|not valid|fetched")


@pytest.mark.parametrize("path", ["/big", "/endless"])
def test_too_many_bytes_are_refused_declared_or_not(server, path):
    refuse(internet(), url(server, path), "larger than", "media_too_large")


@pytest.mark.parametrize("path", ["/drip", "/silent"])
def test_a_server_that_is_slow_is_given_up(server, path):
    refuse(internet(timeout_s=0.5), url(server, path), "in time")


def test_the_requests_deadline_shortens_the_time_out(server):
    with pytest.raises(InvalidRequest, match="in time"):
        internet().read(url(server, "/silent"), PARAM, deadline=time.monotonic() + 0.1)


def test_an_error_status_is_told(server):
    refuse(internet(), url(server, "/nothing"), "status 404", "media_fetch_failed")


def test_the_switch_turns_fetching_off(server):
    refuse(internet(allows_remote=False), url(server, "/ok"), "fetches no URLs")


@pytest.mark.parametrize(
    "source", ["http://", "http:///x", "http://[bad", "https://:80/", "http://exa mple/", "http://a" + "b" * 70_000]
)
def test_urls_that_are_none_are_refused(source):
    refuse(internet(resolve=lambda host, port: []), source)


# ── in the request ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_data_urls_are_read_with_their_declared_type():
    sources = MediaSources()
    blob = sources.read("data:image/png;base64," + base64.b64encode(b"abc").decode(), PARAM)
    assert (blob.data, blob.declared) == (b"abc", "image/png")
    assert sources.read("DATA:image/PNG;charset=x;base64,YWJj\n", PARAM).data == b"abc"
    assert sources.read("data:,a%20b", PARAM).data == b"a b"
    assert sources.read("data:image/png;base64,YWI", PARAM).data == b"ab"
    assert sources.read("data:image/png;base64,-_-_", PARAM).data == base64.b64decode("+/+/")


def test_bare_base64_is_understood_even_when_it_begins_like_a_path():
    raw = b"\xff\xd8\xff" + bytes(range(256))
    assert MediaSources().read(base64.b64encode(raw).decode(), PARAM).data == raw


@pytest.mark.parametrize(
    "source", ["data:image/png;base64,a", "data:image/png;base64,!!!!", "data:image/png;base64,ab=c"]
)
def test_wrong_base64_is_refused(source):
    refuse(MediaSources(), source, "base64")


def test_a_data_url_is_bounded_before_it_is_decoded():
    refuse(MediaSources(limits=SourceLimits(max_bytes=100)), "data:image/png;base64," + "A" * 5000, "larger than")


@pytest.mark.parametrize(
    "source", ["", "image.png", "./x.png", "javascript:alert(1)", "ftp://x/y", "data:image/png", "C:\\x.png"]
)
def test_other_sources_are_refused(source):
    refuse(MediaSources(is_loopback=True), source)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_files_are_read_on_loopback_only(tmp_path):
    file = tmp_path / "a b.png"
    file.write_bytes(b"data")
    local = MediaSources(is_loopback=True)
    assert local.read(str(file), PARAM).data == b"data"
    assert local.read(file.as_uri(), PARAM).data == b"data"
    assert local.read(f"file://localhost{file.as_uri()[7:]}", PARAM).data == b"data"
    refuse(MediaSources(), str(file), "--media-root", "local_media_refused")
    refuse(local, f"file://elsewhere{file}", "this machine")
    refuse(local, "file:relative.png", "absolute")


def test_a_media_root_bounds_what_can_be_read(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside.png"
    root.mkdir()
    (root / "in.png").write_bytes(b"data")
    outside.write_bytes(b"secret")
    (root / "link.png").symlink_to(outside)
    for sources in (MediaSources(roots=[root]), MediaSources(roots=[root], is_loopback=True)):
        assert sources.read(str(root / "in.png"), PARAM).data == b"data"
        refuse(sources, str(outside), "only under")
        refuse(sources, str(root / "link.png"), "only under")
        refuse(sources, f"{root}/../outside.png", "only under")
        refuse(sources, str(tmp_path / "does-not-exist.png"), "only under")


def test_only_regular_files_are_read(tmp_path):
    local = MediaSources(is_loopback=True, limits=SourceLimits(max_bytes=10))
    refuse(local, str(tmp_path))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refuse(local, str(pipe), "regular file")
    refuse(local, "/dev/zero", "regular file")
    refuse(local, str(tmp_path / "missing"), "no file")
    big = tmp_path / "big"
    big.write_bytes(b"x" * 11)
    refuse(local, str(big), "larger than")
    refuse(local, "/tmp/\0x")
    refuse(local, "/" + "x/" * 5000)


def test_the_start_up_line_says_what_is_allowed(tmp_path):
    assert "any file that this user can read" in MediaSources(is_loopback=True).description
    assert "no local files" in MediaSources().description
    assert str(tmp_path) in MediaSources(roots=[tmp_path]).description
    assert "no URLs" in MediaSources(allows_remote=False).description
