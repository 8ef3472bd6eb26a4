"""A Hub of this machine: as much of the API as publishing and loading models ask for."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_writer"


class Repository:
    """Commits of one repository, the latest last: each is all files."""

    def __init__(self) -> None:
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.gated = False

    def commit(self, files: dict[str, bytes]) -> str:
        everything = {**(self.commits[-1][1] if self.commits else {}), **files}
        text = repr((len(self.commits), sorted(everything.items())))
        self.commits.append((hashlib.sha1(text.encode()).hexdigest(), everything))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub(ThreadingHTTPServer):
    """The server; ``repositories`` by name, and what was asked of it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """Commit files to a repository; returns the commit."""
        return self.repositories.setdefault(name, Repository()).commit(files)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repository = self.server.repositories.get(name)
        if repository is None:
            self.fail(401, "RepoNotFound")  # as the real one says to strangers
            return
        revision = parts[parts.index("revision") + 1] if "revision" in parts else "main"
        if parts[0] != "api":  # USER/NAME/resolve/REVISION/FILE
            revision = parts[3]
        found = repository.at(revision)
        if found is None:
            self.fail(404, "RevisionNotFound")
            return
        commit, files = found
        if parts[0] == "api":
            self.answer(200, {"id": name, "sha": commit, "siblings": []})
        elif repository.gated:
            self.fail(403, "GatedRepo")
        elif (content := files.get("/".join(parts[4:]))) is None:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            tag = hashlib.sha1(content).hexdigest()
            self.answer(200, content, X_Repo_Commit=commit, ETag=f'"{tag}"')

    def do_POST(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
            return
        authorization = self.headers.get("Authorization", "")
        if authorization != f"Bearer {TOKEN}":
            self.fail(403 if authorization else 401, "Forbidden")
            return
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization'] or 'user'}/{given['name']}"
            if name not in self.server.repositories:
                self.server.add(name, {".gitattributes": b""})
            self.answer(200, {"url": f"{self.server.url}/{name}", "id": name})
            return
        _, _, user, name, action, *_ = self.path.strip("/").split("/")
        repository = self.server.repositories[f"{user}/{name}"]
        if action == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular"} for f in files]
            self.answer(200, {"files": [mode | {"shouldIgnore": False} for mode in modes]})
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            commit = repository.commit({f["path"]: base64.b64decode(f["content"]) for f in files})
            url = f"{self.server.url}/{user}/{name}/commit/{commit}"
            self.answer(200, {"success": True, "commitUrl": url, "commitOid": commit})
