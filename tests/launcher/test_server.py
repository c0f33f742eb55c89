"""The real server: the pack loads from folders of any name, and ComfyUI's own files stay unchanged."""

import hashlib
import json
import shutil
import socket
import socketserver
import struct
import subprocess
import sys
import threading

import pytest
from launcher import execution, scripts, source
from launcher import server as server_module
from launcher.server import Server, ServerError, free_port

PROMPT = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "plain"}},
}


def digest(tree):
    """{relative path: hash of the content} of every file in a folder."""
    files = (path for path in tree.rglob("*") if path.is_file())
    return {str(path.relative_to(tree)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def copy_pack(pack_root, target):
    names = ("__init__.py", "pyproject.toml", "nodes", "kernels", "web", "locales", "workflows")
    target.mkdir(parents=True)
    for source_path in (pack_root / name for name in names):
        if source_path.is_dir():
            shutil.copytree(
                source_path, target / source_path.name, ignore=shutil.ignore_patterns("__pycache__")
            )
        elif source_path.exists():
            shutil.copy(source_path, target)
    return target


def test_the_server_has_every_node_of_the_list(server):
    from pack.nodes import extension

    nodes = extension.METHOD_NODES + extension.ADDED_NODES + extension.THEATRE_NODES
    declared = [node.GET_SCHEMA().node_id for node in nodes]
    assert server.node_ids() == sorted(declared)
    assert all(node_id.startswith("Understudy") for node_id in declared)


def test_a_prompt_runs_and_its_picture_can_be_fetched(server):
    entry = server.queue(PROMPT)
    assert entry["status"]["status_str"] == "success"
    saved = entry["outputs"]["2"]["images"][0]
    assert server.view(saved["filename"], saved["subfolder"], saved["type"]).startswith(b"\x89PNG")


def test_a_refused_prompt_says_why(server):
    with pytest.raises(ServerError, match="NoSuchNode"):
        server.queue({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_an_unknown_model_folder_is_empty(server):
    assert server.model_names("no_such_folder") == []


def test_an_enclosing_comfyui_and_a_name_with_a_space(comfy_path, pack_root, tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    ignored = shutil.ignore_patterns("__pycache__")
    comfyui = shutil.copytree(comfy_path, tmp_path / "ComfyUI", ignore=ignored)
    pack = copy_pack(pack_root, comfyui / "custom_nodes" / "my pack")
    before = digest(comfyui)
    enclosing = source.find(pack)
    assert enclosing == comfyui
    with Server(enclosing, tmp_path / "base", pack=pack, name="my pack", cpu=True) as server:
        assert server.node_ids()
        assert server.queue(PROMPT)["status"]["status_str"] == "success"
    assert digest(comfyui) == before


def test_a_pack_that_does_not_load_is_reported_with_its_error(comfy_path, tmp_path):
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "__init__.py").write_text("import no_such_library\n")
    with pytest.raises(ServerError, match="(?s)Traceback.*No module named 'no_such_library'"):
        Server(comfy_path, tmp_path / "base", pack=pack, cpu=True).__enter__()


def test_a_server_that_cannot_start_shows_its_log(comfy_path, tmp_path):
    with pytest.raises(ServerError, match="(?s)ended with code.*unrecognized arguments: --no-such-option"):
        Server(comfy_path, tmp_path / "base", cpu=True, options=("--no-such-option",)).__enter__()


def test_a_port_in_use_is_named_before_anything_starts(comfy_path, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"Port {port} is in use.*--port"):
            Server(comfy_path, tmp_path, port=port).__enter__()
    assert not (tmp_path / "comfyui.log").exists()


def test_a_talkative_client_does_not_block(server, tmp_path, monkeypatch):
    flood = [sys.executable, "-c", "import sys; sys.stderr.write('x' * 500_000 + 'the end'); sys.exit(1)"]
    monkeypatch.setattr(execution, "_command", lambda *_: flood)
    (tmp_path / "any.json").write_text('{"nodes": []}')
    assert execution.run(server, tmp_path / "any.json").error.endswith("the end")


class Connections(socketserver.BaseRequestHandler):
    """Resets as many connections as its server says, then gives a history in which a prompt has ended."""

    def handle(self):
        self.server.seen += 1
        if self.server.seen <= self.server.resets:
            # Closing with unread bytes and no linger sends a reset.
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        self.request.recv(4096)
        body = json.dumps({"prompt": {"status": {"status_str": "success"}}}).encode()
        self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


@pytest.fixture
def dropping(tmp_path, monkeypatch):
    """A server whose process sleeps, and whose port resets connections; set how many by `listener.resets`."""
    monkeypatch.setattr(server_module, "LOST_POLLS", 5)
    with socketserver.TCPServer(("127.0.0.1", 0), Connections) as listener:
        listener.seen = 0
        threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
        waiting = Server(tmp_path, tmp_path, port=listener.server_address[1])
        waiting.log.write_text("the last line")
        waiting.process = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
        )
        yield waiting, listener
        waiting.stop()
        listener.shutdown()


def test_dropped_polls_are_asked_again_while_the_server_runs(dropping):
    waiting, listener = dropping
    listener.resets = 5
    assert waiting.wait("prompt")["status"]["status_str"] == "success"
    assert listener.seen == 6


def test_a_server_that_drops_every_poll_is_an_error_with_its_log(dropping):
    waiting, listener = dropping
    listener.resets = 1000
    with pytest.raises(ServerError, match="(?s)gives no answer.*the last line"):
        waiting.wait("prompt")
    assert listener.seen == 6


def test_a_server_that_ended_is_not_asked_again(dropping):
    waiting, listener = dropping
    listener.resets = 1000
    waiting.process.kill()
    waiting.process.wait()
    with pytest.raises(ServerError, match="ended while it was running"):
        waiting.wait("prompt")
    assert listener.seen == 0


def test_free_ports_are_ports():
    assert 1024 <= free_port() < 65536


def test_the_pack_root_is_not_importable(pack_root):
    import sys

    scripts.alias_pack()
    assert str(pack_root) not in sys.path, "its nodes/ would shadow ComfyUI's nodes.py"
