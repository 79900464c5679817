"""A Hub on this machine: enough of its HTTP protocol to create repositories, upload, commit, list and download.

Written from what `huggingface_hub` sends and reads. It checks tokens and permissions, keeps large files apart from
commits as the Hub does, and has faults to switch on.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

import yaml

_LARGE = (".parquet", ".safetensors", ".bin", ".png")
_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
_LICENSES = ("apache-2.0", "mit", "cc-by-sa-4.0", "other", "unknown")


@dataclass
class Repository:
    """Files of each branch: path → content. One commit replaces a branch as a whole."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    sdk: str | None = None

    def files(self, revision):
        return self.commits.get(revision, self.branches.get(revision))

    def sha(self, revision):
        if revision in self.commits:
            return revision
        files = self.branches[revision]
        text = repr((len(self.messages), sorted((path, _digest(content)) for path, content in files.items())))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        return sha


class LoopbackHub:
    """
    The server. `tokens` maps a token to its user and role (`"write"` or `"read"`).

    `large_files_until_refused` lets so many large files pass and refuses the next ones, as an expired address does.
    """

    def __init__(self, tokens):
        self.tokens = tokens
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.large_files_until_refused = None
        self.lock = threading.RLock()
        self._start(0)

    def _start(self, port):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.port}"

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def unreachable(self):
        """Nobody answers at the address meanwhile."""
        self.stop()
        try:
            yield
        finally:
            self._start(self.port)


class _Refused(Exception):
    def __init__(self, status, message, code="", **further):
        self.status, self.message, self.code, self.further = status, message, code, further


def _digest(content):
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        url = urlparse(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        try:
            with self.hub.lock:
                for pattern, action in _ROUTES:
                    match = re.fullmatch(pattern, f"{self.command} {path}")
                    if match:
                        self.hub.requests[action] += 1
                        getattr(self, f"_{action}")(**match.groupdict())
                        return
                raise _Refused(404, f"no such address: {self.command} {path}", "EntryNotFound")
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, {"error": refused.message} | refused.further, headers)

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status, content=b"", headers=None):
        self.close_connection = True
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json"} | (headers or {})
        self.send_response(status)
        # One request a connection, so that a server that was stopped is out of reach at once.
        headers = {"Content-Length": str(len(content)), "Connection": "close"} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who asks, and what for

    def _user(self):
        header = self.headers.get("Authorization")
        if header is None:
            return None, None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return user

    def _repository(self, kind, repo, write=False):
        name, role = self._user()
        found = self.hub.repositories.get((kind, repo))
        if found is None or (found.private and name != repo.split("/")[0]):
            raise _Refused(401 if name is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self._may_write(name, role, repo.split("/")[0])
        return found

    @staticmethod
    def _may_write(name, role, owner):
        if name is None:
            raise _Refused(401, "Invalid username or password.")
        if role != "write" or name != owner:
            raise _Refused(403, "You don't have the rights to write to this namespace")

    def _files(self, repository, revision):
        files = repository.files(revision)
        if files is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return files

    # Answers

    def _whoami(self):
        name, role = self._user()
        if name is None:
            raise _Refused(401, "Invalid username or password.")
        self._send(200, {"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def _validate(self):
        text = json.loads(self.body)["content"]
        match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
        errors = []
        if not match:
            errors.append("no metadata")
        else:
            try:
                data = yaml.safe_load(match[1]) or {}
            except yaml.YAMLError as error:
                errors.append(f"broken YAML: {error}")
            else:
                if data.get("license", "mit") not in _LICENSES:
                    errors.append(f'"license" must be one of [{", ".join(_LICENSES)}]')
                for entry in data.get("model-index", []):
                    for result in entry["results"]:
                        if not {"task", "dataset", "metrics"} <= set(result) or "name" not in result["dataset"]:
                            errors.append("model-index: a result lacks task, dataset or metrics")
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._send(400 if errors else 200, answer)

    def _create(self):
        payload = json.loads(self.body)
        name, role = self._user()
        owner = payload.get("organization") or name
        self._may_write(name, role, owner)
        kind, repo = payload.get("type", "model"), f"{owner}/{payload['name']}"
        address = f"{self.hub.endpoint}/{_PREFIXES[kind]}{repo}"
        if (kind, repo) in self.hub.repositories:
            raise _Refused(409, f"You already created this {kind} repo: {repo}", url=address)
        private = payload.get("visibility") == "private" or bool(payload.get("private"))
        self.hub.repositories[kind, repo] = Repository(private, sdk=payload.get("sdk"))
        self._send(200, {"url": address, "name": repo})

    def _branch(self, kind, repo, branch):
        repository = self._repository(kind, repo, write=True)
        if branch in repository.branches:
            raise _Refused(409, "Reference already exists")
        repository.branches[branch] = dict(repository.branches["main"])
        self._send(200, {})

    def _info(self, kind, repo, revision=None):
        repository = self._repository(kind, repo)
        files = self._files(repository, revision or "main")
        answer = {"id": repo, "modelId": repo, "sha": repository.sha(revision or "main"), "tags": []}
        answer |= {"private": repository.private, "siblings": [{"rfilename": path} for path in sorted(files)]}
        self._send(200, answer)

    def _refs(self, kind, repo):
        repository = self._repository(kind, repo)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": repository.sha(name)}
            for name in repository.branches
        ]
        self._send(200, {"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def _entry(self, path, content):
        entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if path.endswith(_LARGE):
            entry["lfs"] = {"oid": _digest(content), "size": len(content), "pointerSize": 130}
        return entry

    def _tree(self, kind, repo, revision, folder=""):
        files = self._files(self._repository(kind, repo), revision)
        inside = {path: content for path, content in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise _Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path, content in sorted(inside.items()):
            names = path[len(folder) + 1 if folder else 0 :].split("/")
            for depth in range(1, len(names)):
                above = "/".join([*([folder] if folder else []), *names[:depth]])
                if above not in folders and (recursive or depth == 1):
                    folders.add(above)
                    entries.append({"type": "directory", "path": above, "oid": "0" * 40, "size": 0})
            if recursive or len(names) == 1:
                entries.append(self._entry(path, content))
        self._send(200, entries)

    def _paths(self, kind, repo, revision):
        files = self._files(self._repository(kind, repo), revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        entries = [self._entry(path, files[path]) for path in paths if path in files]
        for path in paths:
            if path not in files and any(name.startswith(f"{path}/") for name in files):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self._send(200, entries)

    def _preupload(self, kind, repo, revision):
        files = self._files(self._repository(kind, repo, write=True), revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(_LARGE) else "regular"
            there = files.get(file["path"])
            oid = None
            if there is not None:
                blob = b"blob %d\0" % len(there) + there
                oid = _digest(there) if mode == "lfs" else hashlib.sha1(blob).hexdigest()
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answer})

    def _batch(self, repo):
        kind = next((kind for kind in ("dataset", "space") if repo.startswith(_PREFIXES[kind])), "model")
        self._repository(kind, repo.removeprefix(_PREFIXES[kind]), write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/large/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _large(self, oid):
        left = self.hub.large_files_until_refused
        if left == 0:
            raise _Refused(403, "Request has expired")
        if left is not None:
            self.hub.large_files_until_refused = left - 1
        if _digest(self.body) != oid:
            raise _Refused(400, "the content does not have this hash")
        self.hub.objects[oid] = self.body
        self._send(200)

    def _commit(self, kind, repo, revision):
        repository = self._repository(kind, repo, write=True)
        files = dict(self._files(repository, revision))
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                repository.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Refused(400, f"large file {value['path']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                raise _Refused(400, f"unknown operation {item['key']}")
        repository.branches[revision] = files
        sha = repository.sha(revision)
        address = f"{self.hub.endpoint}/{_PREFIXES[kind]}{repo}/commit/{sha}"
        self._send(200, {"success": True, "commitOid": sha, "commitUrl": address, "hookOutput": ""})

    def _resolve(self, repo, revision, path):
        kind = next((kind for kind in ("dataset", "space") if repo.startswith(_PREFIXES[kind])), "model")
        repository = self._repository(kind, repo.removeprefix(_PREFIXES[kind]))
        files = self._files(repository, revision)
        headers = {"X-Repo-Commit": repository.sha(revision)}
        if path not in files:
            self._send(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
            return
        content = files[path]
        headers |= {"ETag": f'"{_digest(content)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
            self._send(206, content[start : end + 1], headers)
        else:
            self._send(200, content, headers)


_REPO = r"(?P<kind>model|dataset|space)s/(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/validate-yaml", "validate"),
    (r"POST /api/repos/create", "create"),
    (rf"POST /api/{_REPO}/branch/(?P<branch>.+)", "branch"),
    (rf"POST /api/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    (rf"POST /api/{_REPO}/commit/(?P<revision>.+)", "commit"),
    (rf"POST /api/{_REPO}/paths-info/(?P<revision>.+)", "paths"),
    (rf"GET /api/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    (rf"GET /api/{_REPO}/refs", "refs"),
    (rf"GET /api/{_REPO}/revision/(?P<revision>.+)", "info"),
    (rf"GET /api/{_REPO}", "info"),
    (r"POST /(?P<repo>.+)\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /large/(?P<oid>[0-9a-f]{64})", "large"),
    (r"(?:GET|HEAD) /(?P<repo>(?:datasets/|spaces/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
