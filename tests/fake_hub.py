"""A hub on this machine, as far as huggingface_hub needs one to create a repository and to commit to it.

The real client speaks to it over HTTP, with git-lfs's protocol (HF_HUB_DISABLE_XET=1).
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_good"


class Hub:
    """What the hub has, and what happens to it.

    repos   {name: {path: bytes}} and `private` {name: bool}
    blobs   {SHA-256: bytes} that were uploaded, committed or not
    puts    the sizes of all uploads
    breaks  the number of uploads after which the next one is refused
    role    of the token
    """

    def __init__(self):
        self.repos, self.private, self.blobs, self.puts, self.commits = {}, {}, {}, [], []
        self.breaks, self.role = None, "write"
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def environment(self):
        """For a program in another process."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}

    def use(self, monkeypatch):
        """Let huggingface_hub in this process, which may be imported already, speak to this hub."""
        from huggingface_hub import constants

        for name, value in self.environment().items():
            monkeypatch.setenv(name, value)
        for name, value in ("ENDPOINT", self.endpoint), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True), (
                "HUGGINGFACE_CO_URL_TEMPLATE", self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"):
            monkeypatch.setattr(constants, name, value)
        return self


class Handler(BaseHTTPRequestHandler):
    """Answers requests; `hub` is the Hub."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer waits 40 ms

    def log_message(self, *_):
        pass

    def answer(self, value=None, status=200, body=None, **headers):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        length = int(self.headers.get("Content-Length") or 0)
        data, path = self.rfile.read(length), self.path.partition("?")[0]
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        is_upload = path.startswith("/blob/")
        if not is_upload and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, *match.groups(), data=data)
        return self.answer({"error": f"no such place: {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def whoami(self, data):
        self.answer({"name": "me", "orgs": [{"name": "Lab"}], "auth": {"accessToken": {"role": self.hub.role}}})

    def create(self, data):
        values = json.loads(data)
        name = f"{values['organization']}/{values['name']}"
        status = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(name, {".gitattributes": b""})
        self.hub.private.setdefault(name, values.get("visibility") == "private" or bool(values.get("private")))
        self.answer({"url": f"{self.hub.endpoint}/{name}", "error": "exists"}, status)

    def tree(self, name, data):
        self.answer([{"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                     for path, content in self.hub.repos[name].items()])

    def validate(self, data):
        self.answer({"errors": [], "warnings": []})

    def preupload(self, name, data):
        self.answer({"files": [{"path": file["path"], "shouldIgnore": False,
                                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"}
                               for file in json.loads(data)["files"]]})

    def batch(self, name, data):
        objects = []
        for wanted in json.loads(data)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.endpoint}/blob/{wanted['oid']}"}}}
            objects.append({**wanted, **({} if wanted["oid"] in self.hub.blobs else upload)})
        self.answer({"objects": objects, "transfer": "basic"})

    def put(self, oid, data):
        if self.hub.breaks is not None and len(self.hub.puts) >= self.hub.breaks:
            return self.answer({"error": "the line is cut"}, 403)
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.blobs[oid] = data
        self.hub.puts.append(len(data))
        return self.answer({})

    def commit(self, name, data):
        files, changed = self.hub.repos[name], []
        for line in map(json.loads, data.splitlines()):
            value, path = line["value"], line["value"].get("path")
            if line["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[path] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[path]
            changed.append(path)
        self.hub.commits.append(changed)
        self.answer({"commitUrl": f"{self.hub.endpoint}/{name}/commit/1", "commitOid": "1" * 40})

    def resolve(self, name, path, data):
        content = self.hub.repos.get(name, {}).get(path)
        if content is None:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        digest = hashlib.sha1(content).hexdigest()  # stands for that of the commit too: clients cache by it
        return self.answer(body=content, ETag=f'"{digest}"', X_Repo_Commit=digest)


ROUTES = {
    "GET /api/whoami-v2": Handler.whoami, "POST /api/repos/create": Handler.create,
    "POST /api/validate-yaml": Handler.validate, "PUT /blob/([0-9a-f]{64})": Handler.put,
    "GET /api/models/([^/]+/[^/]+)/tree/main": Handler.tree,
    "POST /api/models/([^/]+/[^/]+)/preupload/main": Handler.preupload,
    "POST /([^/]+/[^/]+?)[.]git/info/lfs/objects/batch": Handler.batch,
    "POST /api/models/([^/]+/[^/]+)/commit/main": Handler.commit,
    "(?:GET|HEAD) /([^/]+/[^/]+)/resolve/main/(.+)": Handler.resolve,
}


@contextlib.contextmanager
def running():
    hub = Hub()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
