"""Hub ids against a stand-in server, in processes: the address is read at import."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.checkpoint.locate import locate_checkpoint
from lfmq.quant.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/tiny-moe"
REVISION = "v1.5"


class Hub(BaseHTTPRequestHandler):
    """Serves one repository at one revision, as the Hub's HTTP API does."""

    folder: Path

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        names = sorted(p.name for p in self.folder.iterdir())
        if path in (f"/api/models/{REPOSITORY}/tree/{r}" for r in (REVISION, COMMIT)):
            tree = [
                {"type": "file", "path": n, "size": 0, "oid": COMMIT}
                for n in [*names, "pytorch_model.bin"]
            ]
            content = json.dumps(tree).encode()
            return self.send(200, content, {"Content-Type": "application/json"}, body=body)
        if path.startswith(f"/api/models/{REPOSITORY}") and path.endswith((REVISION, COMMIT)):
            content = json.dumps(
                {
                    "id": REPOSITORY,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": n} for n in [*names, "pytorch_model.bin"]],
                }
            ).encode()
            return self.send(200, content, {"Content-Type": "application/json"}, body=body)
        head, _, name = path.rpartition("/")
        if head in (f"/{REPOSITORY}/resolve/{r}" for r in (REVISION, COMMIT)) and name in names:
            content = (self.folder / name).read_bytes()
            tag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
            return self.send(200, content, headers, body=body)
        error = {"X-Error-Code": "RevisionNotFound" if REPOSITORY in path else "RepoNotFound"}
        return self.send(404, b"{}", error, body=body)

    def send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(make_checkpoint):
    handler = type("Handler", (Hub,), {"folder": make_checkpoint("served", shards=2)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def lfmq(endpoint: str, cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "lfmq.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_hub_id_with_a_revision_is_downloaded(hub, tmp_path):
    done = lfmq(
        hub, tmp_path / "cache", "inspect", f"{REPOSITORY}@{REVISION}", "--json", "--quiet"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["tensors"] == 74
    assert report["name"] == "tiny-moe"
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_an_unknown_revision_is_one_line(hub, tmp_path):
    done = lfmq(hub, tmp_path / "cache", "inspect", f"{REPOSITORY}@main", "--quiet")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {REPOSITORY}: no such folder, and as a Hub id")
    assert done.stderr.count("\n") == 1


class Page(BaseHTTPRequestHandler):
    """Not a Hub: a portal that answers everything with a page of its own."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>please log in</html>")

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


class Hangup(Page):
    """Closes the connection without an answer."""

    def do_GET(self) -> None:
        self.close_connection = True


@pytest.mark.parametrize("handler", [Page, Hangup])
def test_a_server_that_is_no_hub_is_one_line(handler, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        done = lfmq(endpoint, tmp_path / "cache", "inspect", REPOSITORY, "--quiet")
        server.shutdown()
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {REPOSITORY}: no such folder, and as a Hub id")
    assert done.stderr.count("\n") == 1


def test_a_hub_out_of_reach_is_one_line(tmp_path):
    done = lfmq("http://127.0.0.1:9", tmp_path / "cache", "inspect", REPOSITORY, "--quiet")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {REPOSITORY}: no such folder, and as a Hub id")
    assert "Traceback" not in done.stderr


def test_a_folder_wins_over_a_hub_id(make_checkpoint, tmp_path, monkeypatch):
    make_checkpoint("org").rename(tmp_path / "x")
    (tmp_path / "org").mkdir()
    (tmp_path / "x").rename(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert locate_checkpoint("org/name").folder == Path("org/name")


def test_the_samples_are_found(sample_folder, sample_dense_folder):
    assert locate_checkpoint("sample").folder == sample_folder
    assert locate_checkpoint("sample-dense").folder == sample_dense_folder
    assert locate_checkpoint("sample-dense").name == "lfm2-tiny"


@pytest.mark.parametrize("reference", ["a/b/c", "no such name", "../up/one", "@v1"])
def test_what_is_neither_is_refused(reference):
    with pytest.raises(CheckpointError, match="no such folder, and not a Hub id"):
        locate_checkpoint(reference)


@pytest.fixture
def cached(make_checkpoint, tmp_path):
    """A snapshot as the Hub's client lays it out: links into blobs."""
    root = tmp_path / "hub" / "models--LiquidAI--LFM2.5-8B-A1B"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for i, path in enumerate(sorted(make_checkpoint().iterdir())):
        blob = path.rename(root / "blobs" / f"{i:040x}")
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_a_snapshot_is_named_by_its_repository(cached, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(cached)
    monkeypatch.chdir(cached)
    for path in (str(cached), f"{cached}/", str(tmp_path / "link"), ".", f"../{COMMIT}"):
        assert locate_checkpoint(path).name == "LFM2.5-8B-A1B", path
    checkpoint = open_checkpoint(cached)
    assert checkpoint.assets.name == "LFM2.5-8B-A1B"
    assert all(path.parent == cached for path in checkpoint.weight_files)


def test_the_folder_of_a_repository_stands_for_its_snapshot(cached):
    root = cached.parents[1]
    assert locate_checkpoint(str(root)).folder == cached
    other = cached.with_name("f" * 40)
    other.mkdir()
    with pytest.raises(CheckpointError, match=f"2 snapshots; give one, such as {other}"):
        locate_checkpoint(str(root))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    location = locate_checkpoint(str(root))
    assert (location.folder, location.name) == (cached, "LFM2.5-8B-A1B")


@pytest.mark.parametrize("main", ["../../..", "gone", "\xff"])
def test_a_reference_that_names_no_snapshot(cached, main):
    root = cached.parents[1]
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(main, "latin-1")
    assert locate_checkpoint(str(root)).folder == cached
