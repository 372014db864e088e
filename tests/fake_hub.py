"""The parts of the hub's API that this program uses, on this machine: what is uploaded is there to be downloaded."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_" + "s3cret" * 5
"""What an upload must be authorised with."""
COMMIT = "c0ffee" * 6 + "cafe"
"""The one commit that every repository has."""


class Hub(ThreadingHTTPServer):
    """The parts of the hub's API that uploads and downloads use; repositories are files by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.downloading, self.go_on = threading.Event(), threading.Event()

    def handle_error(self, *_: Any) -> None:
        """Say nothing of a client that went away."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub  # type: ignore[assignment]

    def log_message(self, *_: Any) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def answer(self, data: Any, status: int = 200, **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, hub_ = unquote(self.path).partition("?")[0], self.server
        match = re.fullmatch(r"(?:/api/models)?/(\w+/\w+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?", path)
        repo, kind, revision, name = match.groups() if match else ("", "", "", "")
        files = hub_.repos.get(repo)
        if files is None:
            return self.answer({}, 404, X_Error_Code="RepoNotFound")
        if revision and revision not in ("main", COMMIT):
            return self.answer({}, 404, X_Error_Code="RevisionNotFound")
        if kind in ("tree", "resolve") and repo.endswith("gated"):
            return self.answer({}, 403, X_Error_Code="GatedRepo")
        if kind == "tree":
            oids = {key: hashlib.sha1(data).hexdigest() for key, data in files.items()}
            return self.answer([{"type": "file", "path": k, "size": len(files[k]), "oid": oids[k]} for k in files])
        if kind == "resolve":
            if name not in files:
                return self.answer({}, 404, X_Error_Code="EntryNotFound")
            if self.command == "GET" and repo.endswith("slow") and name.endswith("safetensors"):
                hub_.downloading.set()
                hub_.go_on.wait(20)
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            return self.answer(files[name], ETag=etag, X_Repo_Commit=COMMIT)
        return self.answer({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})

    def do_POST(self) -> None:
        body, hub_ = self.rfile.read(int(self.headers["Content-Length"])), self.server
        match = re.fullmatch(r"/api/models/(\w+/\w+)/(preupload|commit)/main", self.path)
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer({"error": "not you"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            hub_.repos.setdefault(repo, {})
            hub_.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return self.answer({"url": f"{hub_.url}/{repo}"})
        assert match, self.path
        if match[2] == "preupload":
            files = [f["path"] for f in json.loads(body)["files"]]
            return self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                hub_.repos[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitUrl": f"{hub_.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})
