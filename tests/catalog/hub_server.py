"""A Hugging Face hub on this machine: the endpoints that downloads use, over real HTTP."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """Repositories with their commits: `publish` a folder, and it is the head of its branch.

    requests: what clients asked for, as `METHOD path`. broken: answer everything with status 503.
    gated: repositories that no client may read. fails_on: name of a file that is sent with status 403.
    """

    def __init__(self):
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.refs: dict[tuple[str, str], str] = {}
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.broken = False
        self.fails_on: str | None = None

    def publish(self, repo: str, files: dict[str, bytes] | Path, branch: str = "main") -> str:
        """The commit that `files` (by path, or a folder's) are."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        content = repr(sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items()))
        commit = hashlib.sha1((repo + content).encode()).hexdigest()
        self.commits[repo, commit] = dict(files)
        self.refs[repo, branch] = commit
        return commit

    def downloads(self) -> list[str]:
        """Paths of the files whose bytes were sent, in their order."""
        return [
            line.partition("/resolve/")[2].partition("/")[2]
            for line in self.requests
            if line.startswith("GET") and "/resolve/" in line
        ]

    def _commit(self, repo: str, revision: str) -> str | None:
        return revision if (repo, revision) in self.commits else self.refs.get((repo, revision))

    def answer(self, method: str, url: str, form: dict[str, list[str]]):
        """(status, headers, body) of a request."""
        path = unquote(urlsplit(url).path).lstrip("/")
        self.requests.append(f"{method} /{path}")
        if self.broken:
            return 503, {}, b"down for repairs"
        parts = path.removeprefix("api/models/").split("/")
        repo = "/".join(parts[:2])
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "you must accept its terms"}, b""
        if not any(known == repo for known, _ in self.commits):
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        action, revision, rest = parts[2], parts[3], "/".join(parts[4:])
        commit = self._commit(repo, revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}, b""
        files = self.commits[repo, commit]
        if action == "revision":
            return self._json({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        if action == "paths-info":
            return self._json(
                [entry for wanted in form["paths"] for entry in self._entries(files, wanted, itself=True)]
            )
        if action == "tree":
            found = self._entries(files, rest, itself=False)
            if rest and not found:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": f"{rest} does not exist"}, b""
            return self._json(found)
        if rest not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        if Path(rest).name == self.fails_on:
            return 403, {"X-Repo-Commit": commit}, b""
        etag = f'"{hashlib.sha256(files[rest]).hexdigest()}"'
        return 200, {"X-Repo-Commit": commit, "ETag": etag}, files[rest]

    @staticmethod
    def _entries(files: dict[str, bytes], path: str, itself: bool) -> list[dict]:
        """What the hub says of a path, or of what is directly in it."""
        entries = {}
        for name, data in files.items():
            if itself:
                wanted = name == path or name.startswith(f"{path}/")
                place = path
            else:
                wanted = not path or name.startswith(f"{path}/")
                place = "/".join(name.split("/")[: len(path.split("/")) + 1 if path else 1])
            if wanted and place == name:
                entries[place] = {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
            elif wanted:
                entries[place] = {"type": "directory", "path": place, "oid": "0" * 40}
        return list(entries.values())

    @staticmethod
    def _json(value):
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextmanager
def served(hub: Hub):
    """The address of a server that answers for `hub`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _respond(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            form = {"paths": json.loads(body)["paths"]} if body.startswith("{") else parse_qs(body)
            status, headers, data = hub.answer(self.command, self.path, form)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = _respond  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
