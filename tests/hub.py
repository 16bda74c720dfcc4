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
    If it is `down`, every connection breaks."""

    def __init__(self, models):
        self.models = {name: Path(folder) for name, folder in models.items()}
        self.down, self.requests = False, []

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
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache),
                "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def answer(request):
    """What huggingface_hub and transformers ask: the model, its newest commit, the files of that
    (there are no subfolders), HEAD and GET of one file."""
    hub, path = request.hub, request.path.split("?")[0]
    if hub.down:
        return
    hub.requests.append((request.command, path))
    api = re.fullmatch("/api/models/(.+?)(?:/(revision|tree)/[^/]+(/.+)?)?", path)
    file = re.fullmatch("/(.+)/resolve/[^/]+/(.+)", path)
    name = api[1] if api else file and file[1]
    if name not in hub.models:
        return send(request, 404, {"X-Error-Code": "RepoNotFound"})
    sha = hashlib.sha1(name.encode()).hexdigest()
    if api and api[3]:
        return send(request, 404, {"X-Error-Code": "EntryNotFound"})
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
    content = (hub.models[name] / file[2]).read_bytes()
    etag = f'"{hashlib.sha1(content).hexdigest()}"'
    send(request, 200, {"ETag": etag, "X-Repo-Commit": sha}, content)


def send(request, status, headers, content=b""):
    request.send_response(status)
    for name, value in {**headers, "Content-Length": len(content)}.items():
        request.send_header(name, str(value))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(content)
