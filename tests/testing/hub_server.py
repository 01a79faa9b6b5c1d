"""A server on loopback with as much of the Hugging Face hub's interface as a bundle needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"


class HubServer:
    """Repositories in memory: id -> path -> content.

    Attributes:
        gets: (path, first byte asked for) of every download.
        break_after: a download breaks off after so many bytes, once.
        commits: what was committed, as the client sent it.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.gets: list[tuple[str, int]] = []
        self.commits: list[dict[str, Any]] = []
        self.break_after: int | None = None
        self.no_ranges = False
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file(with_body=False)

    def do_GET(self) -> None:
        self._file(with_body=True)

    def _file(self, with_body: bool) -> None:
        hub = self.server_hub
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        content = hub.repositories.get(found[1], {}).get(found[3]) if found else None
        if found is None or content is None:
            code = "EntryNotFound" if found and found[1] in hub.repositories else "RepoNotFound"
            self._answer(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
            return
        asked = re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and not hub.no_ranges else 0
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if with_body:
            hub.gets.append((found[3], start))
        body = content[start:]
        if with_body and hub.break_after is not None and len(body) > hub.break_after:
            headers["Content-Length"] = str(len(body))
            body, hub.break_after = body[: hub.break_after], None
            self.close_connection = True
        self._answer(206 if start else 200, body, headers, with_body)

    def do_POST(self) -> None:
        hub, body = self.server_hub, self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, b"")
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.repositories.setdefault(name, {})
            hub.private[name] = (asked.get("private") or asked.get("visibility")) in (
                True,
                "private",
            )
            self._json({"url": f"{hub.url}/{name}", "name": name, "id": name})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            large = {file["path"] for file in files if file["size"] > 100_000}
            self._json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"] in large else "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self._json(
                {
                    "transfer": "basic",
                    "objects": [
                        {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                        for one in objects
                    ],
                }
            )
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        else:
            self._answer(404, b"")

    def do_PUT(self) -> None:
        self.server_hub.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer(200, b"")

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        hub = self.server_hub
        name = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.*", self.path)
        assert name is not None
        hub.commits += lines
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                hub.repositories[name[1]][value["path"]] = content
            elif line["key"] == "lfsFile":
                hub.repositories[name[1]][value["path"]] = hub.objects[value["oid"]]
        url = f"{hub.url}/{name[1]}/commit/{COMMIT}"
        self._json({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, document: Any) -> None:
        self._answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        with_body: bool = True,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)
