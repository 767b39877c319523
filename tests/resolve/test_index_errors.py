"""What uv says of package indexes, in the words of the real uv: who may try again, and what else to do."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ray_envcache.errors import BuildError, EnvCacheError, PassingError
from tests import index, support
from tests.resolve.test_uv_errors import check, failed, sync

pytestmark = pytest.mark.host


@pytest.fixture(autouse=True)
def _own_uv_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another test fetched must not hide that this one cannot."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))


class Answer(BaseHTTPRequestHandler):
    """Answers each request with the server's `code`."""

    def do_GET(self) -> None:
        self.send_response(getattr(self.server, "code", 404))
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def answering(code: int, certificate: Path | None = None) -> Iterator[str]:
    """The address of an index that answers all requests so."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.code = code  # type: ignore[attr-defined]
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}/simple"
        server.shutdown()


def compiled(folder: Path, url: str) -> EnvCacheError:
    """The error for a requirement that is looked for at this index."""
    (folder / "requirements.txt").write_text(f"--index-url {url}\nwanted==1.0\n")
    return failed("pip", "compile", "requirements.txt", cwd=folder)


@pytest.mark.parametrize("code", [429, 500, 503])
def test_index_that_fails(tmp_path: Path, code: int) -> None:
    """An index that cannot answer now may do so later."""
    with answering(code) as url:
        check(
            compiled(tmp_path, url),
            PassingError,
            f"Failed to fetch: {url}",
            "proxies and mirrors",
        )


@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.1:1"])
def test_index_out_of_reach(tmp_path: Path, host: str) -> None:
    """A host that is not known, and one that does not listen, may be there later."""
    check(compiled(tmp_path, f"http://{host}/simple"), PassingError, "an index does not answer", "proxies and mirrors")


def test_index_that_keeps_us_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that takes the request and says nothing is out of reach too."""
    monkeypatch.setenv("UV_HTTP_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/simple"
        check(compiled(tmp_path, url), PassingError, "operation timed out", "proxies and mirrors")


@pytest.mark.parametrize("code", [401, 403])
def test_index_that_wants_credentials(tmp_path: Path, code: int) -> None:
    """uv says of such an index that it has no such package; what it wants is in the message all the same."""
    with answering(code) as url:
        check(compiled(tmp_path, url), BuildError, "an index wants credentials", "UV_INDEX_<NAME>_USERNAME")


def test_index_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    """A certificate that is not trusted will not be trusted later: the hint has the variables."""
    certificate = tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    support.run(
        *make,
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        certificate,
        "-out",
        tmp_path / "public.pem",
        stderr=None,
    )
    with certificate.open("a") as file:
        file.write((tmp_path / "public.pem").read_text())
    with answering(404, certificate) as url:
        check(compiled(tmp_path, url), BuildError, "invalid peer certificate", "SSL_CERT_FILE")


@pytest.fixture
def locked(tmp_path: Path, wheels: Path) -> Iterator[tuple[Path, index.Index]]:
    """A project locked against an index on loopback."""
    support.make_wheel(wheels, "wanted")
    with index.serve(wheels) as served:
        project = support.make_project(tmp_path / "project", tmp_path / "none", ["wanted"], lock=False)
        text = project.read_text().partition("no-index")[0]
        project.write_text(f'{text}[[tool.uv.index]]\nurl = "{served.url}"\ndefault = true\n')
        support.run_uv("lock", cwd=project.parent)
        yield project, served


def test_file_that_an_index_lost(locked: tuple[Path, index.Index]) -> None:
    """An index that answers, but not with the file, will not have it later."""
    project, served = locked
    (served.folder / "wanted-1.0-py3-none-any.whl").unlink()
    check(sync(project), BuildError, "404 Not Found", "`uv lock --upgrade`")


def test_file_that_an_index_replaced(locked: tuple[Path, index.Index]) -> None:
    """Another file than was locked is refused with both hashes, and the package is in the hint."""
    project, served = locked
    support.make_wheel(served.folder, "wanted", modules={"wanted.py": "evil = True\n"})
    check(sync(project), BuildError, "Hash mismatch", "`uv lock --upgrade-package wanted`")


def test_offline(locked: tuple[Path, index.Index], monkeypatch: pytest.MonkeyPatch) -> None:
    """A uv that was told to stay offline says so: no index is at fault."""
    monkeypatch.setenv("UV_OFFLINE", "1")
    check(sync(locked[0]), BuildError, "Network connectivity is disabled", "unset UV_OFFLINE")
