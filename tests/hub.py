"""A Hub of our own on 127.0.0.1, for processes that find it by HF_ENDPOINT."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# For warm.Process: packages that read HF_ENDPOINT and HF_HOME when they are imported, or import what does.
READ_THE_ADDRESS = ("huggingface_hub", "timm", "open_clip", "comkd_cli")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Answers /<owner>/<repository>/resolve/<revision>/<file> from memory, ranges included."""

    files: dict[str, bytes]
    """By <owner>/<repository>/<file>."""
    announced: dict[str, bytes]
    """What the ETag is made of, where it is not the file itself."""
    requests: list[tuple[str, str | None]]
    """Path and Range of each GET."""
    cut_after: int | None = None
    """Of a body, send so many bytes and hang up."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Headers alone."""
        self.answer(body=False)

    def do_GET(self) -> None:
        """Headers and body."""
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        """One file, or 404."""
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        name = f"{repository}/{rest.partition('/')[2]}"
        content = self.files.get(name)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        start = 0
        if body:
            asked = self.headers.get("Range")
            self.requests.append((self.path, asked))
            start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(self.announced.get(name, content)).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body:
            with suppress(ConnectionError):  # of a client that was killed
                self.wfile.write(content[start : self.cut_after])


@contextmanager
def hub() -> Iterator[tuple[str, type[Hub]]]:
    """Its address, and the class whose fields say what it holds."""
    handler = type("TestHub", (Hub,), {"files": {}, "announced": {}, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
