"""A Hub of our own on 127.0.0.1, for processes that find it by HF_ENDPOINT."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler

from tests.serving import serving

TOKEN = "hf_test"
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
    with _serving(type("TestHub", (Hub,), {"files": {}, "announced": {}, "requests": []})) as serving:
        yield serving


@contextmanager
def _serving(handler: type[Hub]) -> Iterator[tuple[str, type[Hub]]]:
    with serving(handler) as port:
        yield f"http://127.0.0.1:{port}", handler


class WritableHub(Hub):
    """Also creates repositories and takes commits, as much as `comkd push` needs; a private one needs a token."""

    private: dict[str, bool]
    """By <owner>/<repository>: those that exist."""
    commits: list[list[str]]
    """The names of the files of each commit."""

    def do_POST(self) -> None:
        """Create a repository, or take files."""
        body = (
            self.rfile.read(int(self.headers.get("Content-Length") or 0)) if "Content-Length" in self.headers else b""
        )
        if not body and self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        if not self._has_token() and self.path != "/api/validate-yaml":
            self._say(401, {"error": "Invalid username or password."})
        elif self.path == "/api/validate-yaml":
            self._say(200, {"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.private[name] = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
            self._say(200, {"url": f"/{name}", "id": name, "name": name})
        else:
            self._take(body)

    def _take(self, body: bytes) -> None:
        repository, _, action = self.path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._say(200, {"files": files})
            return
        repository = repository.partition("/commit/")[0]
        entries = [entry["value"] for line in body.splitlines() if (entry := json.loads(line))["key"] == "file"]
        for entry in entries:
            self.files[f"{repository}/{entry['path']}"] = base64.b64decode(entry["content"])
        self.commits.append([entry["path"] for entry in entries])
        self._say(200, {"commitUrl": f"/{repository}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    def answer(self, body: bool) -> None:
        """As Hub, and what is known of a repository."""
        asks_for_facts = self.path.startswith("/api/models/")
        path = self.path.removeprefix("/api/models/" if asks_for_facts else "/")
        repository = "/".join(path.split("?")[0].split("/")[:2])
        if repository not in self.private or (self.private[repository] and not self._has_token()):
            self.send_response(404 if self._has_token() else 401)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif asks_for_facts:
            facts = {"id": repository, "sha": COMMIT, "private": self.private[repository], "siblings": [], "tags": []}
            self._say(200, facts)
        else:
            super().answer(body)

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _say(self, status: int, document: object) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def writable_hub() -> Iterator[tuple[str, type[WritableHub]]]:
    """As `hub`, and it takes files."""
    fields = {"files": {}, "announced": {}, "requests": [], "private": {}, "commits": []}
    with _serving(type("TestWritableHub", (WritableHub,), fields)) as (url, handler):
        yield url, handler  # type: ignore[misc]
