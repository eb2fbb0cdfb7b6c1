"""A Hub on loopback, as far as huggingface_hub's client uses it to push and to pull models.

Repositories live in memory as git would name them: a regular file by its blob's SHA-1, a large one
by its SHA-256. `Hub.fail` makes requests fail, or cuts their connection in the middle of the body.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass, field

import yaml
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, Rule
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

MODEL = "/api/models/<owner>/<name>"
ROUTES = Map(
    [
        Rule("/api/whoami-v2", endpoint="whoami"),
        Rule("/api/repos/create", endpoint="create", methods=["POST"]),
        Rule("/api/validate-yaml", endpoint="validate", methods=["POST"]),
        Rule(f"{MODEL}", endpoint="info"),
        Rule(f"{MODEL}/revision/<revision>", endpoint="info"),
        Rule(f"{MODEL}/tree/<revision>", endpoint="tree"),
        Rule(f"{MODEL}/branch/<revision>", endpoint="branch", methods=["POST"]),
        Rule(f"{MODEL}/preupload/<revision>", endpoint="preupload", methods=["POST"]),
        Rule(f"{MODEL}/commit/<revision>", endpoint="commit", methods=["POST"]),
        Rule("/<owner>/<name>.git/info/lfs/objects/batch", endpoint="batch", methods=["POST"]),
        Rule("/lfs/<oid>", endpoint="store", methods=["PUT"]),
        Rule("/lfs/<oid>", endpoint="stored", methods=["GET", "HEAD"]),
        Rule("/<owner>/<name>/resolve/<revision>/<path:path>", endpoint="resolve"),
    ]
)
LARGE = (".safetensors", ".png")  # what .gitattributes hands to LFS
File = namedtuple("File", "content oid is_large")


@dataclass
class Repository:
    private: bool
    gated: bool = False
    commits: dict = field(default_factory=dict)  # sha -> {path: File}
    branches: dict = field(default_factory=dict)  # name -> sha

    def commit(self, branch, files):
        made = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}\n{made}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


class Refusal(HTTPException):
    """An answer that says no, with the headers by which the client tells why."""

    def __init__(self, status, message, code=""):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        super().__init__(message, Response(json.dumps({"error": message}), status, headers,
                                           content_type="application/json"))  # fmt: skip


class Hub:
    """`tokens` are token -> user; `requests` is every request so far, as (method, path)."""

    def __init__(self, tokens):
        self.tokens, self.repositories, self.large = tokens, {}, {}
        self.requests, self.failures, self.url = [], [], ""

    def fail(self, pattern, status=None, times=1, message="made to fail", before=lambda: None):
        """Let the next `times` requests "METHOD path" that match fail: with `status`, or cut off
        in the middle of the body. `before` is called first."""
        self.failures.append([re.compile(pattern), status, times, message, before])

    @property
    def store_url(self):
        """Where large files are: another host, which the token must not be sent to."""
        return self.url.replace("127.0.0.1", "localhost") + "/lfs"

    def contents(self, repo_id, revision="main"):
        """path -> bytes at a branch."""
        repository = self.repositories[repo_id]
        files = repository.commits[repository.branches[revision]]
        return {path: file.content for path, file in files.items() if path != ".gitattributes"}

    def __call__(self, environ, start_response):
        request = Request(environ)
        self.requests.append((request.method, request.path))
        try:
            self._fail(request, environ)
            endpoint, values = ROUTES.bind_to_environ(environ).match()
            found = getattr(self, endpoint)(request, **values)
            answer = found if isinstance(found, Response) else Response(
                json.dumps(found), content_type="application/json")  # fmt: skip
        except HTTPException as refusal:
            answer = refusal.get_response(environ)
        request.get_data()  # what was not looked at must be read all the same
        return answer(environ, start_response)

    def _fail(self, request, environ):
        for failure in self.failures:
            pattern, status, times, message, before = failure
            if times and pattern.search(f"{request.method} {request.path}"):
                failure[2] -= 1
                before()
                if status is not None:
                    raise Refusal(status, message)
                environ["wsgi.input"].read(1000)
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                raise ConnectionAbortedError

    def _user(self, request):
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def _repository(self, request, owner, name, *, write=False):
        user, found = self._user(request), self.repositories.get(f"{owner}/{name}")
        if found is None or (found.private and user != owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise Refusal(403 if user else 401, f"no right to write to the namespace {owner}")
        return found

    def _files(self, repository, revision):
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    def whoami(self, request):
        user = self._user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}}

    def create(self, request):
        asked, user = request.get_json(), self.whoami(request)["name"]
        owner = asked.get("organization") or user
        repo_id, private = f"{owner}/{asked['name']}", asked.get("visibility") == "private"
        if owner != user:
            raise Refusal(403, f"no right to create a model under the namespace {owner}")
        if repo_id in self.repositories:
            body = {"error": "You already created this model repo", "url": f"{self.url}/{repo_id}"}
            return Response(json.dumps(body), 409, content_type="application/json")
        new = self.repositories[repo_id] = Repository(private or bool(asked.get("private")))
        new.commit("main", {".gitattributes": regular(b"*.safetensors filter=lfs\n")})
        return {"url": f"{self.url}/{repo_id}", "name": repo_id}

    def validate(self, request):
        content = request.get_json()["content"]
        metadata = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else None
        errors = [] if isinstance(metadata, dict) else [{"message": "no metadata"}]
        for model in (metadata or {}).get("model-index", []):
            for result in model["results"]:
                if not {"task", "dataset", "metrics"} <= set(result):
                    errors.append({"message": '"model-index" is incomplete'})
        body = json.dumps({"errors": errors, "warnings": []})
        return Response(body, 400 if errors else 200, content_type="application/json")

    def info(self, request, owner, name, revision="main"):
        repository = self._repository(request, owner, name)
        sha, files = self._files(repository, revision)
        return {"id": f"{owner}/{name}", "sha": sha, "private": repository.private, "tags": [],
                "gated": "manual" if repository.gated else False, "downloads": 0, "likes": 0,
                "siblings": [{"rfilename": path} for path in files]}  # fmt: skip

    def tree(self, request, owner, name, revision):
        _, files = self._files(self._repository(request, owner, name), revision)
        return [{"type": "file", "path": path, "oid": file.oid, "size": len(file.content)}
                for path, file in files.items()]  # fmt: skip

    def branch(self, request, owner, name, revision):
        repository = self._repository(request, owner, name, write=True)
        if revision in repository.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{revision}")
        repository.branches[revision] = repository.branches["main"]
        return {}

    def preupload(self, request, owner, name, revision):
        _, there = self._files(self._repository(request, owner, name, write=True), revision)
        return {"files": [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
             "oid": there[file["path"]].oid if file["path"] in there else None}
            for file in request.get_json()["files"]
        ]}  # fmt: skip

    def batch(self, request, owner, name):
        self._repository(request, owner, name, write=True)
        objects = request.get_json(force=True)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.large:
                wanted["actions"] = {"upload": {"href": f"{self.store_url}/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def store(self, request, oid):
        if "Authorization" in request.headers:
            raise Refusal(400, "The token was sent to a store")
        content = request.get_data()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The object does not match its hash")
        self.large[oid] = content
        return {}

    def stored(self, request, oid):
        if "Authorization" in request.headers:
            raise Refusal(400, "The token was sent to a store")
        return Response(self.large[oid], headers={"ETag": f'"{oid}"'})

    def commit(self, request, owner, name, revision):
        repository = self._repository(request, owner, name, write=True)
        sha, files = self._files(repository, revision)
        files = dict(files)
        for line in request.get_data().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit", sha) != sha:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            if entry["key"] == "file":
                files[value["path"]] = regular(base64.b64decode(value["content"]))
            if entry["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    raise Refusal(400, f"The LFS object of {value['path']} was never uploaded")
                files[value["path"]] = File(self.large[value["oid"]], value["oid"], True)
        made = repository.commit(revision, files)
        return {"commitUrl": f"{self.url}/{owner}/{name}/commit/{made}", "commitOid": made}

    def resolve(self, request, owner, name, revision, path):
        repository = self._repository(request, owner, name)
        sha, files = self._files(repository, revision)
        if repository.gated and self._user(request) != owner:
            raise Refusal(403, "Access to this model is restricted", "GatedRepo")
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"'}
        if not file.is_large:
            return Response(file.content, headers=headers)
        headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content)),
                    "Location": f"{self.store_url}/{file.oid}"}  # fmt: skip
        return Response("", 302, headers)


def regular(content):
    """A file as git stores it."""
    return File(content, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), False)


class _Quiet(WSGIRequestHandler):
    def log(self, *_):
        """Nothing: the tests look at `Hub.requests`."""


@contextmanager
def serving(hub):
    """Serve a Hub on a free port of loopback; its address is `hub.url`."""
    server = make_server("127.0.0.1", 0, hub, threaded=True, request_handler=_Quiet)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
