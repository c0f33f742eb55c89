"""ComfyUI's folders in a temporary one, and certificates as the command makes them."""

import datetime
import http.server
import threading
from types import SimpleNamespace

import folder_paths
import make_certificate
import pytest
from pack.nodes.provenance import signing

NOW = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)


@pytest.fixture
def folders(output, tmp_path, monkeypatch):
    """The input, output and temporary folder of one test; there is no certificate."""
    (tmp_path / "input").mkdir()
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return SimpleNamespace(input=tmp_path / "input", output=output)


@pytest.fixture
def certificate(folders):
    """What the command writes, where Label Media looks for it; returns its folder."""
    make_certificate.write(make_certificate.make("Anna", 30, NOW), signing.folder())
    return signing.folder()


@pytest.fixture
def requests():
    """A server on this machine that counts what is asked of it, and answers nothing."""
    paths = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *_arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", paths=paths)
        server.shutdown()
