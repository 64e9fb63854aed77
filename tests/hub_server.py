"""A Hub on the loopback that the real `huggingface_hub` client talks to: enough of the protocol to push, load and list.

Repositories and blobs stay in memory. Large files go through LFS (no Xet), every commit gets a sha of its own, downloads
answer ranges. Writing, and reading what is private, takes `TOKEN`. What is asked for and not known here is in `unknown`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from tests.preloaded_python import python

TOKEN: Final = "hf_dummy"
# huggingface_hub 2.4 uploads LFS files with an argument that httpx2 no longer likes
UPLOAD_WARNING: Final = "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"
_LARGE: Final = (".safetensors", ".bin")
_REPO: Final = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """One repository: what is at each commit, and where its branches are."""

    private: bool = False
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # commit -> path -> sha256
    branches: dict[str, str] = field(default_factory=dict)


class Hub:
    """The server's state, and what a test may do with it directly."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []  # "GET /path", in the order they came
        self.unknown: list[str] = []
        self.uploaded: list[str] = []  # the sha256 of what came by LFS, in the order in which it was complete
        self.after_upload: Callable[[], None] = lambda: None  # called when something was added there
        self.lock = threading.RLock()

    def publish(self, name: str, folder: Path) -> str:
        """Make a repository hold exactly what is in a local folder; returns the commit."""
        repo = self.repos.setdefault(name, Repo())
        files = (path for path in folder.rglob("*") if path.is_file())
        return self.commit(repo, "main", {p.relative_to(folder).as_posix(): self.keep(p.read_bytes()) for p in files})

    def keep(self, data: bytes) -> str:
        oid = hashlib.sha256(data).hexdigest()
        self.blobs[oid] = data
        return oid

    def commit(self, repo: Repo, branch: str, files: dict[str, str]) -> str:
        sha = hashlib.sha1(json.dumps([len(repo.commits), branch, files], sort_keys=True).encode()).hexdigest()
        repo.commits[sha], repo.branches[branch] = files, sha
        return sha

    def files(self, name: str, revision: str = "main") -> dict[str, str]:
        """Path -> sha256 of what is in a repository."""
        repo = self.repos[name]
        return repo.commits[repo.branches.get(revision, revision)]

    def env(self, home: Path) -> dict[str, str]:
        """The environment of a client with its caches in `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE", "TRANSFORMERS_"))}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }

    def run(self, home: Path, *args: str, **env: str) -> str:
        """Run `python ARGS` as a client of this Hub, which must succeed; returns what it printed."""
        done = subprocess.run(
            [*python(), *args], env=self.env(home) | env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub on a free port, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", **headers: str) -> None:
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": code} | headers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self._read_body()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            try:
                for method, pattern, handle in _ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in method.split():
                        handle(self, **match.groupdict())
                        return
                self.hub.unknown.append(f"{self.command} {path}")
                raise _Refused(404)
            except _Refused as refused:
                self._answer(refused.status, b"{}", refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    # --- who may do what ---

    @property
    def _member(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _writer(self) -> None:
        if not self._member:
            raise _Refused(401, "Unauthorized")

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._member):
            raise _Refused(404 if self._member else 401, "RepoNotFound")
        return repo

    def _at(self, name: str, revision: str) -> tuple[Repo, str, dict[str, str]]:
        repo = self._repo(name)
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise _Refused(404, "RevisionNotFound")
        return repo, sha, repo.commits[sha]

    # --- writing ---

    def create_repo(self) -> None:
        self._writer()
        wish = json.loads(self.body)
        name = f"{wish['organization'] or 'me'}/{wish['name']}"
        exists = name in self.hub.repos
        if not exists:
            repo = self.hub.repos[name] = Repo(private=wish.get("visibility") == "private")
            self.hub.commit(repo, "main", {".gitattributes": self.hub.keep(b"*.safetensors filter=lfs\n")})
        self._json({"url": f"{self.hub.url}/{name}", "name": name}, 409 if exists else 200)

    def create_branch(self, repo: str, revision: str) -> None:
        self._writer()
        branches = self._repo(repo).branches
        if revision in branches:
            raise _Refused(409, "BranchExists")
        branches[revision] = branches["main"]
        self._json({})

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        self._writer()
        files = self._at(repo, revision)[2]
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": _mode(file["path"]),
                        "shouldIgnore": False,
                        "oid": self._oid(file["path"], files[file["path"]]) if file["path"] in files else None,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def _oid(self, path: str, blob: str) -> str:
        return blob if _mode(path) == "lfs" else _git_oid(self.hub.blobs[blob])

    def lfs_batch(self, repo: str) -> None:
        self._writer()
        self._repo(repo)
        objects = []
        for item in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}, "verify": {"href": f"{self.hub.url}/lfs"}}
            objects.append(item if item["oid"] in self.hub.blobs else item | {"actions": actions})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if self.hub.keep(self.body) != oid:
            raise _Refused(400, "the bytes are not what their name says")
        self.hub.uploaded.append(oid)
        self.hub.after_upload()
        self._answer(200, b"")

    def lfs_verify(self) -> None:
        wish = json.loads(self.body)
        if len(self.hub.blobs.get(wish["oid"], b"")) != wish["size"]:
            raise _Refused(400, "not uploaded")
        self._json({})

    def commit(self, repo: str, revision: str) -> None:
        self._writer()
        found, _, before = self._at(repo, revision)
        files = dict(before)
        for line in self.body.splitlines():
            key, value = json.loads(line).values()
            if key == "file":
                files[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _Refused(400, "a file was not uploaded")
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                del files[value["path"]]
        number = len(found.commits)
        asks = "create_pr=1" in self.path
        sha = self.hub.commit(found, f"refs/pr/{number}" if asks else revision, files)
        self._json(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}",
                "pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}" if asks else None,
            }
        )

    # --- reading ---

    def info(self, repo: str, revision: str | None = None) -> None:
        found, sha, files = self._at(repo, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._json({"id": repo, "sha": sha, "private": found.private, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        files = self._at(repo, revision)[2]
        if folder is not None:
            files = {path: blob for path, blob in files.items() if path.startswith(f"{folder}/")}
            if not files:
                raise _Refused(404, "EntryNotFound")
        entries = []
        for path, blob in sorted(files.items()):
            data = self.hub.blobs[blob]
            entries.append({"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)})
            if _mode(path) == "lfs":
                entries[-1]["lfs"] = {"oid": blob, "size": len(data), "pointerSize": 134}
        self._json(entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        _, sha, files = self._at(repo, revision)
        commit = {"X-Repo-Commit": sha}
        if path not in files:
            raise _Refused(404, "EntryNotFound", **commit)
        data = self.hub.blobs[files[path]]
        if _mode(path) == "regular":
            self._data(data, _git_oid(data), commit)
            return
        linked = {"X-Linked-Etag": f'"{files[path]}"', "X-Linked-Size": str(len(data))}
        self._data(data, files[path], commit | linked)

    def _data(self, data: bytes, etag: str, headers: Mapping[str, str]) -> None:
        headers = {**headers, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self._answer(200, data, headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        piece = data[start : end + 1]
        self._answer(206, piece, headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def nothing(self) -> None:
        self._json({})


def _mode(path: str) -> str:
    return "lfs" if path.endswith(_LARGE) else "regular"


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_ROUTES: Final[list[tuple[str, str, Callable[..., None]]]] = [
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{_REPO}/branch/(?P<revision>.+)", _Handler.create_branch),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    ("POST", "/lfs", _Handler.lfs_verify),
    ("GET", f"/api/models/{_REPO}(/revision/(?P<revision>.+))?", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("GET HEAD", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("GET", "/api/agent-harnesses", _Handler.nothing),
]
