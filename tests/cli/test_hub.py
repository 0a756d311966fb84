"""``--push-to-hub`` against a hub of a few routes on this machine: a folder arrives whole, private, or not at all."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

TOKEN = "hf_of_a_test"


class Hub(BaseHTTPRequestHandler):
    """The routes that the hub's own client calls for an upload of small files."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid user token."}, 401)
        if self.path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": "me", "orgs": [{"name": "mine"}]})
        return self.answer({"error": "Not Found"}, 404)

    def do_POST(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else self.chunks()
        self.server.asked.append(self.path)
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            return self.answer({"url": f"{self.server.address}/me/smaller", "id": "1"})
        if self.path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                                          for f in files]})
        if "/commit/" in self.path and not self.server.full:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    assert line["value"]["encoding"] == "base64"
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{self.server.address}/me/smaller/commit/{'a' * 40}",
                                "commitOid": "a" * 40, "success": True})
        return self.answer({"error": "the quota is used up"}, 403)

    def chunks(self):
        body = b""
        while n := int(self.rfile.readline(), 16):
            body += self.rfile.read(n)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, found, status=200):
        text = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.made, server.files, server.full = [], [], {}, False
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def environment(address, token, home):
    """Return variables that the client of the hub reads when it is imported."""
    return {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hf")}


def prune(dense, out, address):
    """Run the command as a user does."""
    command = [sys.executable, "-m", "pruning_lib", "prune", "--model", dense, "--removed-fraction", "0.2",
               "--out", out, "--calibration", "mini_prompts", "--prompts", "3", "--text", "none", "--reconstruct",
               "none", "--push-to-hub", "me/smaller"]
    return subprocess.run([*map(str, command)], capture_output=True, text=True,
                          env=environment(address, TOKEN, out.parent))


def test_a_folder_arrives_as_it_is_on_disk_in_a_private_repository(dense, hub, tmp_path):
    done = prune(dense, tmp_path / "small", hub.address)
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {hub.address}/me/smaller" in done.stdout
    made, = hub.made
    assert (made["name"], made["organization"]) == ("smaller", "me")
    assert made.get("private") or made.get("visibility") == "private"  # by version of the client
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "pruning.json"} <= set(hub.files)
    assert str(tmp_path) not in hub.files["README.md"].decode(), "a card names no folder of the user's machine"


def test_an_upload_that_fails_leaves_the_model_and_says_how_to_go_on(dense, hub, tmp_path):
    hub.full = True
    done = prune(dense, tmp_path / "small", hub.address)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "upload failed: me/smaller" in done.stderr and "the quota is used up" in done.stderr
    assert f"is saved in {tmp_path / 'small'}; upload it with: hf upload" in done.stderr
    assert (tmp_path / "small" / "model.safetensors").is_file()


@pytest.mark.parametrize(("repo", "token", "port", "message"), [
    ("other/smaller", TOKEN, True, "your token belongs to me, mine; give one of them"),
    ("me/smaller", "hf_old", True, "the hub did not take the token"),
    ("me/smaller", TOKEN, False, "the hub did not take the token")])
def test_what_the_hub_would_refuse_is_refused_before_work_starts(hub, tmp_path, repo, token, port, message):
    """The first thing that ``prune`` does: ``test_an_upload_is_refused_before_work_starts_without_a_token``."""
    code = (f"from pruning_lib.cli import hub\ntry: hub.refuse_upload({repo!r})\n"
            "except (ValueError, OSError) as e: print(e)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(
        hub.address if port else "http://127.0.0.1:9", token, tmp_path))
    assert message in done.stdout and not hub.made
