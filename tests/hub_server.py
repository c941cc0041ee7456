"""A small Hub on loopback: the part of its HTTP API that pushing and pulling a model uses, kept in memory."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class HubServer(ThreadingHTTPServer):
    """Repositories as {name: {path: bytes}}; every commit replaces one at once."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large_files: dict[str, bytes] = {}
        self.commits = 0
        self.refuse_uploads_after: int | None = None  # an upload that breaks off: so many large files, then errors
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def revision(self, repo: str) -> str:
        listing = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in self.repositories[repo].items()})
        return hashlib.sha1(listing.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def reply(self, content=b"", status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code: str):
        self.reply({"error": code}, 404, X_Error_Code=code)

    def do_PUT(self):
        data = self.body()
        limit = self.server.refuse_uploads_after
        if limit is not None and len(self.server.large_files) >= limit:
            return self.reply({"error": "the connection broke"}, 403)
        self.server.large_files[hashlib.sha256(data).hexdigest()] = data
        return self.reply()

    def do_POST(self):
        path, data = unquote(urlsplit(self.path).path), self.body()
        if path == "/api/repos/create":
            asked = json.loads(data)
            repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            known = repo in self.server.repositories
            self.server.repositories.setdefault(repo, {})
            return self.reply({"url": f"{self.server.address}/{repo}"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/.+", path):
            files = [file["path"] for file in json.loads(data)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            found = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            return self.reply({"files": found})
        if re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(data)["objects"]
            for entry in objects:
                if entry["oid"] not in self.server.large_files:
                    entry["actions"] = {"upload": {"href": f"{self.server.address}/large/{entry['oid']}"}}
            return self.reply({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/commit/.+", path):
            return self.commit(match[1], [json.loads(line) for line in data.splitlines() if line.strip()])
        return self.missing("EntryNotFound")

    def commit(self, repo: str, lines: list[dict]):
        files = dict(self.server.repositories[repo])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
        self.server.repositories[repo] = files
        self.server.commits += 1
        oid = self.server.revision(repo)
        self.reply({"success": True, "commitOid": oid, "commitUrl": f"{self.server.address}/{repo}/commit/{oid}"})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/(.+?)/tree/([^/]+)(/.*)?", path):
            files = self.server.repositories.get(match[1], {})
            folder = (match[3] or "").strip("/")
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
                if not folder or name.startswith(f"{folder}/")
            ]
            return self.reply(entries) if entries else self.missing("EntryNotFound")
        if match := re.fullmatch(r"/api/models/(.+?)(/revision/.+)?", path):
            if match[1] not in self.server.repositories:
                return self.missing("RepoNotFound")
            siblings = [{"rfilename": name} for name in self.server.repositories[match[1]]]
            return self.reply({"id": match[1], "sha": self.server.revision(match[1]), "siblings": siblings, "tags": []})
        if match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            repo, _, name = match.groups()
            if repo not in self.server.repositories:
                return self.missing("RepoNotFound")
            if name not in self.server.repositories[repo]:
                return self.reply(
                    {"error": name}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.server.revision(repo)
                )
            data = self.server.repositories[repo][name]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.reply(data, X_Repo_Commit=self.server.revision(repo), ETag=etag, Content_Type="text/plain")
        return self.missing("EntryNotFound")
