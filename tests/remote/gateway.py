"""A real S3 server on loopback: the gateway of JuiceFS, which is that of MinIO."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import support

USER, PASSWORD = "tester", "not-to-be-seen-anywhere"
JUICEFS = Path(sys.executable).with_name("juicefs")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def serve(folder: Path) -> Iterator[dict[str, str]]:
    """An S3 server with the bucket `env`; the variables by which a host reaches it."""
    if not JUICEFS.exists():
        pytest.skip("needs juicefs")
    folder.mkdir()
    meta, port = f"sqlite3://{folder}/meta.db", _free_port()
    environ = {**os.environ, "HOME": str(folder), "MINIO_ROOT_USER": USER, "MINIO_ROOT_PASSWORD": PASSWORD}
    support.run(JUICEFS, "format", "--storage=file", f"--bucket={folder}/data/", meta, "env", env=environ)
    command: list[str | Path] = [JUICEFS, "gateway", meta, f"127.0.0.1:{port}", "--no-banner", "--metrics=127.0.0.1:0"]
    options = [f"--cache-dir={folder}/cache", f"--log={folder}/log"]
    with (folder / "output").open("w") as output:
        child = subprocess.Popen([*command, *options], env=environ, stdout=output, stderr=output)
    try:
        support.wait_until(lambda: _answers(port), "the S3 server answers")
        yield {
            "RAY_ENVCACHE_REMOTE": "s3://env/prefix",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": PASSWORD,
            "AWS_REGION": "us-east-1",
        }
    finally:
        child.kill()
        child.wait()


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@dataclass
class Relay:
    """Between a host and the server: counts requests, and may be slow, or stop in the middle of an answer."""

    target: int
    port: int = 0
    bytes_per_second: float = 0
    stops_after: int = 0
    requests: list[str] = field(default_factory=list)

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            back = threading.Thread(target=self._answer, args=(server, client), daemon=True)
            back.start()
            with suppress(OSError):
                while data := client.recv(1 << 16):
                    words = data.split(b" ", 2)
                    if words[0] in {b"GET", b"HEAD", b"PUT", b"POST"}:
                        self.requests.append(f"{words[0].decode()} {words[1].decode()}")
                    server.sendall(data)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        sent = 0
        with suppress(OSError):
            while data := server.recv(1 << 14):
                sent += len(data)
                if self.stops_after and sent > self.stops_after:
                    time.sleep(3600)  # a daemon: no answer, and no end of the connection
                if self.bytes_per_second:
                    time.sleep(len(data) / self.bytes_per_second)
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)


@contextmanager
def relayed(environ: dict[str, str]) -> Iterator[tuple[Relay, dict[str, str]]]:
    """A relay in front of a server, and the variables by which a host comes to it."""
    relay = Relay(int(environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        relay.port = listening.getsockname()[1]

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=relay._serve, args=(listening.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield relay, {**environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{relay.port}"}
        listening.shutdown(socket.SHUT_RDWR)
