"""A hub for the tests, on loopback: the paths that the hub's client requests, as local folders."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test"


@dataclass
class Repository:
    folder: Path
    error: tuple[int, str] | None = None
    """Status and `X-Error-Code` of every answer."""
    whole: bool = False
    """Whether ranges are not regarded."""
    cut: int = 0
    """Bytes that are missing at the end of every answer of a range."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Contents that stand in place of the folder's."""

    def names(self) -> list[str]:
        return sorted(
            {
                *self.files,
                *(
                    path.relative_to(self.folder).as_posix()
                    for path in self.folder.rglob("*")
                    if path.is_file()
                ),
            }
        )

    def content(self, name: str) -> bytes | None:
        path = self.folder / name
        return (
            self.files[name]
            if name in self.files
            else path.read_bytes()
            if path.is_file()
            else None
        )


@dataclass
class Hub:
    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Method, path and range of every request."""
    served: dict[str, int] = field(default_factory=dict)
    """Bytes of the bodies sent, by file."""
    refused: bool = False
    """Whether the token has no right to write."""
    private: dict[str, bool] = field(default_factory=dict)
    """Of the repositories that were made here."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded, by SHA-256."""

    def environment(self, home: Path) -> dict[str, str]:
        """What tells the client to talk to this server alone, and to keep everything in `home`."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "XDG_CACHE_HOME": str(home / "cache"),
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }


@contextmanager
def serving():
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self.answer()

        do_HEAD = do_POST = do_PUT = do_GET

        def answer(self):
            path = self.path.partition("?")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if (
                path != "/api/agent-harnesses"
            ):  # which the client may ask for at any time, for its own affairs
                hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
            if self.command in ("POST", "PUT") or path == "/api/whoami-v2":
                return self.written(path, body)
            for pattern, answer in (
                (r"/api/(?:models|datasets)/(\w+/[\w-]+)/(revision|tree)/([^/]+)", self.told),
                (r"/api/(?:models|datasets)/(\w+/[\w-]+)()()", self.told),
                (r"(?:/datasets)?/(\w+/[\w-]+)/resolve/([^/]+)/(.+)", self.file),
            ):
                if match := re.fullmatch(pattern, path):
                    repository = hub.repositories.get(match[1])
                    if repository is None:
                        return self.send(404, error="RepoNotFound")
                    if repository.error:
                        return self.send(repository.error[0], error=repository.error[1])
                    return answer(repository, *match.groups()[1:])
            return self.send(404)

        def told(self, repository, kind, revision):
            if revision and revision not in ("main", "v1", COMMIT):
                return self.send(404, error="RevisionNotFound")
            if kind == "tree":
                files = [(name, repository.content(name)) for name in repository.names()]
                entries = [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(data),
                        "oid": hashlib.sha1(data).hexdigest(),
                    }
                    for name, data in files
                ]
                return self.send(200, json.dumps(entries).encode())
            files = [{"rfilename": name} for name in repository.names()]
            return self.send(
                200, json.dumps({"id": "x/y", "sha": COMMIT, "siblings": files}).encode()
            )

        def file(self, repository, revision, name):
            content = repository.content(name)
            if content is None:
                return self.send(404, error="EntryNotFound")
            headers = {
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "Accept-Ranges": "bytes",
            }
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted is None or repository.whole:
                return self.send(200, content, headers, name=name)
            part = content[int(wanted[1]) : int(wanted[2]) + 1]
            if not part:
                return self.send(416)
            headers["Content-Range"] = (
                f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(content)}"
            )
            return self.send(206, part[: len(part) - repository.cut], headers, name=name)

        def written(self, path, body):
            """Everything that needs a token."""
            if path.startswith("/upload/"):  # whose address is the permission
                hub.blobs[hashlib.sha256(body).hexdigest()] = body
                return self.send(200)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.send(401, b'{"error": "Invalid credentials in Authorization header"}')
            if path == "/api/whoami-v2":
                return self.send(
                    200,
                    json.dumps({"type": "user", "name": "me", "orgs": [{"name": "us"}]}).encode(),
                )
            if hub.refused:
                return self.send(403, b'{"error": "You do not have the rights to write"}')
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if name in hub.repositories:
                    return self.send(409, json.dumps({"url": f"{hub.address}/{name}"}).encode())
                hub.repositories[name], hub.private[name] = (
                    Repository(Path("/nonexistent")),
                    asked.get("visibility") == "private",
                )
                hub.repositories[name].names = lambda: sorted(hub.repositories[name].files)
                return self.send(
                    200, json.dumps({"url": f"{hub.address}/{name}", "id": name}).encode()
                )
            if match := re.fullmatch(r"/api/models/(\w+/[\w-]+)/preupload/main", path):
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                return self.send(200, json.dumps({"files": files}).encode())
            if re.fullmatch(r"/\w+/[\w-]+\.git/info/lfs/objects/batch", path):
                objects = [
                    {
                        "oid": each["oid"],
                        "size": each["size"],
                        "actions": {"upload": {"href": f"{hub.address}/upload/{each['oid']}"}},
                    }
                    for each in json.loads(body)["objects"]
                ]
                kind = {"Content-Type": "application/vnd.git-lfs+json"}
                return self.send(
                    200, json.dumps({"transfer": "basic", "objects": objects}).encode(), kind
                )
            if match := re.fullmatch(r"/api/models/(\w+/[\w-]+)/commit/main", path):
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        hub.repositories[match[1]].files[value["path"]] = base64.b64decode(
                            value["content"]
                        )
                    if line["key"] == "lfsFile":
                        hub.repositories[match[1]].files[value["path"]] = hub.blobs[value["oid"]]
                told = {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"{hub.address}/{match[1]}/commit/{COMMIT}",
                }
                return self.send(200, json.dumps(told).encode())
            if path == "/api/validate-yaml":
                return self.send(200, b'{"errors": [], "warnings": []}')
            return self.send(404)

        def send(self, status, content=b"", headers=None, *, error="", name=""):
            self.send_response(status)
            for key, value in {
                "Content-Length": str(len(content)),
                "Content-Type": "application/json",
                **(headers or {}),
            }.items():
                self.send_header(key, value)
            if error:
                self.send_header("X-Error-Code", error)
                self.send_header("X-Error-Message", f"the server's words for {error}")
            self.end_headers()
            if self.command == "HEAD":
                return
            sent = 0
            try:
                while sent < len(content):
                    sent += self.wfile.write(content[sent : sent + (1 << 16)])
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                if name:
                    hub.served[name] = hub.served.get(name, 0) + sent

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
