"""A package index on loopback, with or without a password."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

USER, PASSWORD = "somebody", "s3cr3t-passw0rd"


@dataclass
class Index:
    """Serves the wheels and source packages of a folder, without headers for caches.

    It asks for a password while `locked`. `sent` are the names of the files that it sent.
    """

    folder: Path
    url: str = ""
    locked: bool = False
    sent: list[str] = field(default_factory=list)

    def page(self, path: str) -> bytes | None:
        parts = [part for part in path.split("/") if part]
        if len(parts) == 2 and parts[0] == "simple":
            found = [file for file in self.folder.iterdir() if file.name.split("-")[0].replace("_", "-") == parts[1]]
            links = [f'<a href="/files/{file.name}#sha256={_sha256(file)}">{file.name}</a>' for file in found]
            return "".join(links).encode() if links else None
        if len(parts) == 2 and parts[0] == "files" and (self.folder / parts[1]).is_file():
            return (self.folder / parts[1]).read_bytes()
        return None


@contextmanager
def serve(folder: Path) -> Iterator[Index]:
    """Serve `folder` as an index at `index.url` for as long as the context lasts."""
    index = Index(folder)
    token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if index.locked and self.headers.get("Authorization") != f"Basic {token}":
                self.send_response(401)
                self.send_header("WWW-Authenticate", "Basic")
                self.end_headers()
                return
            body = index.page(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Type", "text/html" if "/simple/" in self.path else "application/octet-stream")
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET":
                index.sent += [self.path.rpartition("/")[2]] if self.path.startswith("/files/") else []
                self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        index.url = f"http://127.0.0.1:{server.server_address[1]}/simple"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield index
        server.shutdown()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
