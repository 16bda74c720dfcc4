"""A stand-in for the Hugging Face Hub: real HTTP on 127.0.0.1, to test downloads without a network.

huggingface_hub reads HF_ENDPOINT on import, so the side that downloads must be its own process:

    with StandInHub({"gpt2": folder}) as hub:
        subprocess.run([sys.executable, "train_gpt2.py"], env=os.environ | hub.env(cache))
"""
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


class StandInHub:
    """Serves the files in each folder of {name: folder} as the model of that name, and answers any
    other name as the Hub answers unknown ones. `requests` lists what it was asked: (method, path).
    Of the files in `cut`, half arrives, and then the connection breaks."""

    def __init__(self, models, cut=()):
        self.models = {name: Path(folder) for name, folder in models.items()}
        self.cut, self.requests = cut, []

        class Handler(BaseHTTPRequestHandler):
            hub = self
            do_GET = do_HEAD = answer

            def log_message(self, *args):
                """No lines in the tests' output."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def env(self, cache):
        """Environment variables that send huggingface_hub here, with its cache in `cache`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0",
                "NO_PROXY": "127.0.0.1"}

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def answer(request):
    """What snapshot_download asks: the newest commit, its files, HEAD and GET of one file."""
    hub, path = request.hub, request.path.split("?")[0]
    hub.requests.append((request.command, path))
    api = re.fullmatch("/api/models/(.+)/(revision|tree)/[^/]+", path)
    file = re.fullmatch("/(.+)/resolve/[^/]+/(.+)", path)
    name = api[1] if api else file and file[1]
    if name not in hub.models:
        return send(request, 404, {"X-Error-Code": "RepoNotFound"})
    sha = hashlib.sha1(name.encode()).hexdigest()
    if api:
        contents = {file.name: file.read_bytes() for file in hub.models[name].iterdir()}
        reply = {"id": name, "sha": sha, "siblings": [{"rfilename": name} for name in contents]}
        if api[2] == "tree":
            reply = [{"type": "file", "path": name, "size": len(content),
                      "oid": hashlib.sha1(content).hexdigest()}
                     for name, content in contents.items()]
        return send(request, 200, {"Content-Type": "application/json"}, json.dumps(reply).encode())
    if not (hub.models[name] / file[2]).exists():
        return send(request, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
    if file[2] in hub.cut and hub.requests.count(("GET", path)) > 1:  # the rest is asked for
        return send(request, 500, {})
    content = (hub.models[name] / file[2]).read_bytes()
    headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha}
    status, wanted = 200, re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
    if wanted:  # the rest of a download that broke off
        start, size = int(wanted[1]), len(content)
        status, content = 206, content[start:]
        headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
    send(request, status, headers, content, len(content) // 2 if file[2] in hub.cut else None)


def send(request, status, headers, content=b"", stop=None):
    """Answer, but send only content[:stop] after the headers before the connection closes."""
    request.send_response(status)
    for name, value in {**headers, "Content-Length": len(content)}.items():
        request.send_header(name, str(value))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(content[:stop])
