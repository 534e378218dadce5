"""Servers on this machine's loopback."""

import http.server
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FileServer(http.server.ThreadingHTTPServer):
    """The files of a folder over HTTP, by ranges as object stores give them."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _FileHandler)
        self.root = root
        self.breaks_off_after: int | None = None
        """Bytes of a body after which a connection is reset; None: all is well."""
        self.has_ranges = True
        """Whether a part of a file, and its length, can be asked for."""
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.paths: list[str] = []
        """What was asked for, with queries."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class _FileHandler(http.server.BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.server.paths.append(self.path)
        place = self.server.root / self.path.partition("?")[0].lstrip("/")
        if not place.is_file():
            self.send_error(404)
            return
        content = place.read_bytes()
        first, last = 0, len(content) - 1
        wanted = self.headers.get("Range") if self.server.has_ranges else None
        if wanted:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
        body = content[first : last + 1]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        if self.server.has_ranges:
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
        self.send_header("ETag", f'"{hash(content):x}"')
        self.end_headers()
        if not with_body:
            return
        limit = self.server.breaks_off_after
        if limit is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[:limit])
        # Closed at once: the other side sees a reset connection.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def file_server(root: Path) -> Iterator[FileServer]:
    """A server of a folder, for the length of the `with` block."""
    with FileServer(root) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class _GitHandler(http.server.BaseHTTPRequestHandler):
    """`git http-backend`, git's own server, as its manual has web servers start it."""

    server: "GitServer"

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.server.commands += [place.read_bytes().decode() for place in Path("/proc").glob("[0-9]*/cmdline")]
        self.server.sent_passwords.add(self.headers.get("Authorization"))
        if self.server.moved_to:
            self.send_response(302)
            self.send_header("Location", self.server.moved_to + self.path)
            self.end_headers()
            return
        if self.server.password and self.headers.get("Authorization") != self.server.password:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="here"')
            self.end_headers()
            return
        variables = {
            "GIT_PROJECT_ROOT": str(self.server.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": self.headers.get("Content-Length", ""),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "REMOTE_ADDR": "127.0.0.1",
        }
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        done = subprocess.run(
            ("git", "http-backend"), env={**os.environ, **variables}, input=sent, capture_output=True, check=True
        )
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        lines = [line.split(": ", 1) for line in head.decode().split("\r\n")]
        self.send_response(int(dict(lines).get("Status", "200").split()[0]))
        for name, value in lines:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.server.paths.append(self.path)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


class GitServer(http.server.ThreadingHTTPServer):
    """The repositories of a folder, by git's protocol over HTTP."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _GitHandler)
        self.root = root
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.paths: list[str] = []
        self.password = ""
        """The header Authorization that is asked for; empty: none is."""
        self.moved_to = ""
        """The server that has everything now; empty: this one."""
        self.sent_passwords: set[str | None] = set()
        self.commands: list[str] = []
        """The list of processes, at each request."""


@contextmanager
def git_server(root: Path) -> Iterator[GitServer]:
    """A server of the repositories in a folder, for the length of the `with` block."""
    with GitServer(root) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
