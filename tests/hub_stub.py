"""A stand-in for the Hugging Face Hub on this machine, with the few endpoints that fastperc's commands use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_secretsecretsecretsecret"


class Repo:
    """A repository: its commits, each the files by name, and who may see it."""

    def __init__(self, files=None, private=False, gated=False):
        self.private, self.gated, self.commits = private, gated, {}
        self.add(files or {})

    def add(self, files):
        merged = {**self.files(), **files}
        sha = hashlib.sha1(repr((len(self.commits), sorted(merged))).encode()).hexdigest()
        self.commits[sha] = merged
        return sha

    @property
    def head(self):
        return next(reversed(self.commits), "")

    def files(self, revision="main"):
        return self.commits.get(self.head if revision == "main" else revision, {} if revision == "main" else None)


class Hub:
    """The stub: ``repos`` by name, and ``requests``, each the method, the path and the token or None."""

    def __init__(self):
        self.repos, self.requests, self.refuses, self.card_errors = {}, [], {}, []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status, code="", message="no"):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_any(self):
        hub = self.server.hub
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(self.path.partition("?")[0])
        hub.requests.append((self.command, path, token))
        for pattern, answer in hub.refuses.items():
            if re.fullmatch(pattern, path):
                return self.fail(*answer)
        for pattern, call in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                return call(self, hub, token, body, *match.groups())
        return self.fail(404)

    do_HEAD = do_GET = do_POST = handle_any


def visible(handler, hub, token, name):
    """The repository called ``name``, or None after an answer that says why not."""
    repo = hub.repos.get(name)
    if repo is None or (repo.private and token != TOKEN):
        return handler.fail(404 if token else 401, "RepoNotFound", "Repository not found")
    return repo


def resolve(handler, hub, token, body, name, revision, file):
    if (repo := visible(handler, hub, token, name)) is None:
        return
    if repo.gated:
        handler.fail(403 if token else 401, "GatedRepo", "Access to this model is restricted")
    elif (files := repo.files(revision)) is None:
        handler.fail(404, "RevisionNotFound")
    elif file not in files:
        handler.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=repo.head)
    else:
        commit = repo.head if revision == "main" else revision
        etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
        handler.answer(200, files[file], ETag=etag, X_Repo_Commit=commit, Content_Type="application/octet-stream")


def info(handler, hub, token, body, name):
    if (repo := visible(handler, hub, token, name)) is not None:
        siblings = [{"rfilename": file} for file in repo.files()]
        handler.answer(200, {"id": name, "sha": repo.head, "private": repo.private, "siblings": siblings})


def create(handler, hub, token, body):
    if token != TOKEN:
        return handler.fail(401, "", "Invalid username or password.")
    wanted = json.loads(body)
    name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
    private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
    hub.repos[name] = Repo(private=private)
    handler.answer(200, {"url": f"http://{handler.headers['Host']}/{name}", "name": name})


def validate(handler, hub, token, body):
    errors = [{"message": message} for message in hub.card_errors]
    handler.answer(400 if errors else 200, {"errors": errors, "warnings": []})


def preupload(handler, hub, token, body, name):
    files = [
        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
    ]
    handler.answer(200, {"files": files})


def commit(handler, hub, token, body, name):
    if token != TOKEN:
        return handler.fail(401, "", "Invalid username or password.")
    lines = [json.loads(line) for line in body.splitlines()]
    (header,) = (line["value"] for line in lines if line["key"] == "header")
    repo = hub.repos[name]
    if header.get("parentCommit") not in (None, repo.head):
        return handler.fail(412, "", "A commit has happened since")
    sha = repo.add({f["value"]["path"]: base64.b64decode(f["value"]["content"]) for f in lines if f["key"] == "file"})
    handler.answer(200, {"commitUrl": f"http://{handler.headers['Host']}/{name}/commit/{sha}", "commitOid": sha})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    f"/{NAME}/resolve/([^/]+)/(.+)": resolve,
    f"/api/models/{NAME}": info,
    "/api/repos/create": create,
    "/api/validate-yaml": validate,
    f"/api/models/{NAME}/preupload/main": preupload,
    f"/api/models/{NAME}/commit/main": commit,
}


@contextmanager
def serve():
    """Yields the address of a running stub, and the stub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.daemon_threads = Hub(), True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
