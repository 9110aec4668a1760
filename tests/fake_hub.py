"""A small Hugging Face hub on loopback: repositories of models, commits, LFS uploads and downloads, kept in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"
_REPO = r"([\w.-]+/[\w.-]+)"


@dataclass
class Hub:
    """State of the hub: files by repository, branch and path; objects of LFS by SHA-256."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    address: str = ""


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """Serve an empty hub on a free port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _commit_id(content: dict[str, bytes]) -> str:
    sha = hashlib.sha1(usedforsecurity=False)
    for name in sorted(content):
        sha.update(name.encode() + hashlib.sha256(content[name]).digest())
    return sha.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._dispatch(
            {
                rf"/{_REPO}/resolve/([^/]+)/(.+)": self._file,
                rf"/api/models/{_REPO}(?:/revision/([^/]+))?": self._info,
                rf"/api/models/{_REPO}/tree/([^/]+)": self._tree,
            }
        )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self._dispatch({"/lfs/(.+)": self._upload})

    def do_POST(self) -> None:
        self._dispatch(
            {
                "/api/validate-yaml": self._validate,
                "/api/repos/create": self._create,
                rf"/api/models/{_REPO}/branch/([^/]+)": self._branch,
                rf"/api/models/{_REPO}/preupload/[^/]+": self._upload_modes,
                rf"/{_REPO}.git/info/lfs/objects/batch": self._upload_addresses,
                rf"/api/models/{_REPO}/commit/([^/]+)": self._commit,
            }
        )

    def _dispatch(self, routes: dict[str, Callable[..., None]]) -> None:
        """Call the method of the first route that matches the path, with the groups of its pattern."""
        for pattern, method in routes.items():
            if match := re.fullmatch(pattern, self.path.partition("?")[0]):
                method(*match.groups())
                return
        self._fail(404)

    def _file(self, repo: str, revision: str, name: str) -> None:
        content = self._content(repo, revision)
        if content is None:
            return
        commit = _commit_id(content)
        if name in content:
            etag = hashlib.sha256(content[name]).hexdigest()
            self._reply(content[name], ETag=f'"{etag}"', X_Repo_Commit=commit)
        else:
            self._reply(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)

    def _info(self, repo: str, revision: str | None) -> None:
        content = self._content(repo, revision or "main")
        if content is not None:
            files = [{"rfilename": name} for name in content]
            self._reply({"id": repo, "sha": _commit_id(content), "siblings": files})

    def _tree(self, repo: str, revision: str) -> None:
        content = self._content(repo, revision)
        if content is not None:
            self._reply([{"type": "file", "path": name, "size": len(d), "oid": "0"} for name, d in content.items()])

    def _content(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """Return the files of a revision; without one, send an error and return None."""
        branches = self.hub.repos.get(repo)
        if branches is None or (repo in self.hub.private and not self._is_authorized()):
            self._fail(404 if self._is_authorized() else 401, "RepoNotFound")
            return None
        by_commit = {_commit_id(content): content for content in branches.values()}
        found = branches.get(revision, by_commit.get(revision))
        if found is None:
            self._fail(404, "RevisionNotFound")
        return found

    def _validate(self) -> None:
        self._body()
        self._reply({"errors": [], "warnings": []})

    def _create(self) -> None:
        request = json.loads(self._body())
        if not self._is_authorized():
            self._fail(401)
            return
        repo = f"{request.get('organization') or 'someone'}/{request['name']}"
        exists = repo in self.hub.repos
        if not exists:
            self.hub.repos[repo] = {"main": {}}
            if request.get("private") or request.get("visibility") == "private":
                self.hub.private.add(repo)
        self._reply({"url": f"{self.hub.address}/{repo}"}, 409 if exists else 200)

    def _branch(self, repo: str, name: str) -> None:
        self._body()
        branches = self.hub.repos[repo]
        branches.setdefault(name, dict(branches["main"]))
        self._reply()

    def _upload_modes(self, _: str) -> None:
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
            for file in json.loads(self._body())["files"]
        ]
        self._reply({"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})

    def _upload_addresses(self, _: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}"}}}
            for each in json.loads(self._body())["objects"]
        ]
        self._reply({"transfer": "basic", "objects": objects})

    def _upload(self, digest: str) -> None:
        data = self._body()
        assert hashlib.sha256(data).hexdigest() == digest
        self.hub.objects[digest] = data
        self._reply()

    def _commit(self, repo: str, branch: str) -> None:
        content = self.hub.repos[repo][branch]
        for line in filter(None, self._body().decode().splitlines()):
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                content[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                content[value["path"]] = self.hub.objects[value["oid"]]
        commit = _commit_id(content)
        self._reply({"commitUrl": f"{self.hub.address}/{repo}/commit/{commit}", "commitOid": commit, "success": True})

    def _is_authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, body: Any = None, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _fail(self, status: int, code: str = "") -> None:
        self._reply({"error": code}, status, X_Error_Code=code)
