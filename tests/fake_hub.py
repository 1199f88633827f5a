"""A hub of one's own over HTTP, which keeps what huggingface_hub commits to it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_a_test"


class Hub(ThreadingHTTPServer):
    """Keeps each repository's files by name, and whether it is private."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits = 0
        self.refuses: tuple[str, int] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake_hub() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        if hub.refuses and hub.refuses[0] in self.path:
            return self._answer(hub.refuses[1], {"error": "You may not do that"})
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            id = f"{asked['organization']}/{asked['name']}"
            hub.files.setdefault(id, {})
            hub.private[id] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return self._answer(200, {"url": f"{hub.address}/{id}"})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self._answer(
                200, {"objects": [self._lfs(x) for x in json.loads(body)["objects"]]}
            )
        if path.endswith("/preupload/main"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if path.endswith("/commit/main"):
            return self._commit("/".join(path.split("/")[3:5]), body)
        return self._answer(404, {"error": path})

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self._body()
        self._answer(200, {})

    def _lfs(self, asked: dict) -> dict:
        upload = {"href": f"{self.server.address}/blobs/{asked['oid']}"}
        return {"oid": asked["oid"], "size": asked["size"], "actions": {"upload": upload}}

    def _commit(self, id: str, body: bytes) -> None:
        hub, files = self.server, self.server.files[id]
        for line in map(json.loads, body.splitlines()):
            told = line["value"]
            if line["key"] == "file":
                files[told["path"]] = base64.b64decode(told["content"])
            if line["key"] == "lfsFile":
                files[told["path"]] = hub.blobs[told["oid"]]
        hub.commits += 1
        address = f"{hub.address}/{id}/commit/{hub.commits:040x}"
        self._answer(200, {"commitUrl": address, "commitOid": f"{hub.commits:040x}"})

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _answer(self, code: int, tree: dict) -> None:
        data = json.dumps(tree).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if code >= 400:
            self.send_header("x-error-message", tree["error"])
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
