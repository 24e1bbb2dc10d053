"""A stand-in of the hub's API in a thread: it takes repositories and commits, and refuses what the hub refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_stand_in"
_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
#: Some of the hub's identifiers of licences.
_LICENCES = {"apache-2.0", "mit", "llama2", "llama3", "gemma", "other", "cc-by-4.0"}


@dataclass
class Hub:
    """What it holds and what it was asked."""

    url: str = ""
    #: Whether it is private, by repository.
    repos: dict[str, bool] = field(default_factory=dict)
    branches: dict[str, set[str]] = field(default_factory=dict)
    #: The content of files, by repository, branch and name.
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    #: What base models' cards say, by repository.
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    refuse_commits: bool = False

    def create(self, request: dict[str, Any]) -> tuple[int, object]:
        repo = f"{request['organization']}/{request['name']}"
        if request.get("type", "model") != "model":
            return 400, {"error": f"type {request['type']}"}
        if repo in self.repos:
            return 409, {"url": f"{self.url}/{repo}", "error": "You already created this model repo"}
        private = request.get("visibility") == "private" or bool(request.get("private"))  # by older clients
        self.repos[repo], self.branches[repo] = private, {"main"}
        return 200, {"url": f"{self.url}/{repo}"}

    def info(self, repo: str) -> tuple[int, object]:
        if repo in self.cards:
            return 200, {"id": repo, "private": False, "cardData": self.cards[repo], "tags": [], "siblings": []}
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        return 200, {"id": repo, "private": self.repos[repo], "tags": [], "siblings": []}

    def commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> tuple[int, object]:
        if self.refuse_commits:
            return 403, {"error": "You do not have the right to write to this repository"}
        if branch not in self.branches[repo]:
            return 404, {"error": f"no branch {branch}"}
        header, *entries = lines
        if header["key"] != "header" or not header["value"]["summary"]:
            return 400, {"error": "a commit needs a summary"}
        files = self.files.setdefault((repo, branch), {})
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile" and self.large.get(value["oid"]) is not None:
                files[value["path"]] = self.large[value["oid"]]
            else:
                return 400, {"error": f"{entry['key']} {value}"}
        url = f"{self.url}/{repo}/commit/{'0' * 40}"
        return 200, {"commitUrl": url, "commitOid": "0" * 40, "success": True}

    def batch(self, objects: list[dict[str, Any]]) -> dict[str, Any]:
        found = []
        for entry in objects:
            actions = {"upload": {"href": f"{self.url}/put/{entry['oid']}"}, "verify": {"href": f"{self.url}/verify"}}
            found.append({**entry, "authenticated": True, "actions": actions})
        return {"transfer": "basic", "objects": found}


def metadata_errors(text: str) -> list[str]:
    """What the hub would say about a card's metadata, as far as its documentation tells."""
    if not (found := re.match(r"---\n(.*?)\n---\n", text, re.S)):
        return ["no metadata"]
    data = yaml.safe_load(found[1])
    errors = []
    for key in ("base_model", "datasets"):
        given = data.get(key, [])
        given = [given] if isinstance(given, str) else given
        errors += [f'"{key}" with value "{name}" is not valid' for name in given if not _ID.fullmatch(str(name))]
    if data.get("license", "other") not in _LICENCES:
        errors.append(f'"license" must be one of {_LICENCES}')
    for model in data.get("model-index", []):
        for result in model["results"]:
            keys = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            errors += [f'"model-index.{a}.{b}" is required' for a, b in keys if not result.get(a, {}).get(b)]
            for metric in result["metrics"]:
                errors += [f'"metrics.{key}" is required' for key in ("type", "value") if metric.get(key) is None]
    if unknown := {key for key, value in data.items() if value is None}:
        errors.append(f"{unknown} must not be null")
    return errors


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Nothing of it on the terminal."""

        def answer(self, status: int, content: object) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_HEAD(self) -> None:
            self.answer(200, {})

        def do_GET(self) -> None:
            hub.asked.append(("GET", self.path))
            self.answer(*hub.info(self.path.partition("?")[0].removeprefix("/api/models/")))

        def do_PUT(self) -> None:
            data, oid = self.body(), self.path.rpartition("/")[2]
            assert hashlib.sha256(data).hexdigest() == oid
            hub.large[oid] = data
            self.answer(200, {})

        def do_POST(self) -> None:
            hub.asked.append(("POST", self.path))
            data = self.body()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" and self.path != "/verify":
                self.answer(401, {"error": "Invalid username or password."})
                return
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/?]+)", self.path):
                self.answer(*self.of_repo(*found.groups(), data))
            elif self.path == "/api/repos/create":
                self.answer(*hub.create(json.loads(data)))
            elif self.path == "/api/validate-yaml":
                errors = [{"message": error} for error in metadata_errors(json.loads(data)["content"])]
                self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
            elif self.path.endswith(".git/info/lfs/objects/batch"):
                self.answer(200, hub.batch(json.loads(data)["objects"]))
            elif self.path == "/verify":
                self.answer(200, {})
            else:
                self.answer(404, {"error": self.path})

        def of_repo(self, repo: str, what: str, branch: str, data: bytes) -> tuple[int, object]:
            if repo not in hub.repos:
                return 404, {"error": "Repository not found"}
            if what == "branch":
                there = branch in hub.branches[repo]
                hub.branches[repo].add(branch)
                return (409, {"error": "Reference already exists"}) if there else (200, {})
            if what == "commit":
                return hub.commit(repo, branch, [json.loads(line) for line in data.splitlines()])
            files = json.loads(data)["files"]
            modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in files]
            told = zip(files, modes, strict=True)
            return 200, {"files": [{"path": f["path"], "uploadMode": m, "shouldIgnore": False} for f, m in told]}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
