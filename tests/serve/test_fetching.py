"""Images that are fetched, from a real server with TLS, and addresses that lead where they must
not."""

from __future__ import annotations

import contextlib
import http.server
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bifrost_rt import RequestError
from bifrost_rt.serve import fetching
from bifrost_rt.serve.fetching import Fetcher
from bifrost_rt.serve.settings import Settings

MOST = 5000
IMAGE = b"the bytes of an image" * 10


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        port = self.server.server_address[1]
        redirects = {
            "/moved": "/image",
            "/for-ever": "/for-ever",
            "/away": f"https://127.0.0.1:{port}/image",
            "/http": f"http://localhost:{port}/image",
            "/metadata": "https://169.254.169.254/latest",
        }
        if self.path == "/slow":
            time.sleep(1)
        status = 302 if self.path in redirects else 404 if self.path == "/none" else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", redirects[self.path])
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has heard enough
            self.wfile.write(IMAGE * (100 if self.path == "/large" else 1))

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a server on this machine whose certificate is trusted."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here, which makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    made = ("-keyout", str(key), "-out", str(certificate), "-days", "2", "-addext", names)
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            "/CN=localhost",
            *made,
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate))
        yield int(server.server_address[1])
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fetch(port: int) -> Fetcher:
    """Knows the server by its name, and that its address is meant."""
    return Fetcher([f"LocalHost:{port}", "127.0.0.1"], MOST)


@pytest.mark.parametrize("path", ["image", "moved", "image?size=1#part"])
def test_the_bytes_of_an_allowed_address(fetch: Fetcher, port: int, path: str) -> None:
    assert fetch(f"https://localhost:{port}/{path}", "here") == IMAGE


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("large", "more than 5000 bytes"),
        ("none", "answered with 404"),
        ("for-ever", "redirects more than 3 times"),
        ("away", "not fetched from that host"),
        ("http", "must begin with https"),
        ("metadata", "not fetched from that host"),
        ("slow", "it took too long"),
    ],
)
def test_what_an_allowed_host_may_not_do(
    fetch: Fetcher, port: int, path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "slow":
        monkeypatch.setattr(fetching, "SECONDS", 0.3)
    with pytest.raises(RequestError, match=message) as raised:
        fetch(f"https://localhost:{port}/{path}", "messages[0]")
    assert raised.value.message.startswith("messages[0]: ")


def test_a_redirect_stays_on_its_host_even_if_the_other_is_allowed(port: int) -> None:
    fetch = Fetcher([f"localhost:{port}", f"127.0.0.1:{port}"], MOST)
    with pytest.raises(RequestError, match="redirects to another host"):
        fetch(f"https://localhost:{port}/away", "here")


def test_a_name_that_leads_to_a_private_address(port: int) -> None:
    with pytest.raises(RequestError, match="localhost leads to a private address"):
        Fetcher([f"localhost:{port}"], MOST)(f"https://localhost:{port}/image", "here")


def test_a_certificate_that_is_not_trusted(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    fetch = Fetcher([f"localhost:{port}", "127.0.0.1"], MOST)
    with pytest.raises(RequestError, match="does not give the image: .*CERTIFICATE"):
        fetch(f"https://localhost:{port}/image", "here")


@pytest.mark.parametrize(
    "url",
    [
        *("http://a.example/x", "ftp://a.example/x", "//a.example/x", "a.example/x", ""),
        *("https://b.example/x", "https://a.example:444/x", "https://u:p@a.example/x"),
        *("https://a.example.b.example/x", "https://a.example@b.example/", "https://[::1"),
        *("https://127.0.0.1/", "https://a.example:x/", "file:///etc/passwd", "https://a\\b/"),
    ],
)
def test_addresses_that_are_refused_unasked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fetcher, "_get", lambda *_: pytest.fail("it was asked"))
    for names in (["a.example"], []):
        with pytest.raises(RequestError):
            Fetcher(names, MOST)(url, "here")


@pytest.mark.parametrize("name", ["https://a.example", "a.example/x", "*", "", "a b", "a:0", "a:x"])
def test_hosts_that_are_none(name: str) -> None:
    with pytest.raises(RequestError, match="--fetch-host .*: expected a name"):
        Settings(fetch_hosts=(name,))


def test_hosts_as_operators_write_them(tmp_path: Path) -> None:
    assert Settings(fetch_hosts=("A.example", "192.0.2.7", "[fd00::1]:8443", "a.example:8443"))
