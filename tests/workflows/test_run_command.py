"""`workflows/run.py` as a user calls it: pictures, gallery, messages and exit codes."""

import json
import re
import runpy
import signal
import subprocess
import sys
import urllib.request

import pytest
from launcher.server import free_port
from PIL import Image

MODEL = {
    "name": "absent.safetensors",
    "url": "https://example.org/absent.safetensors",
    "directory": "checkpoints",
}


def two_nodes(prefix, size=(64, 48), title="The picture", models=()):
    """EmptyImage -> SaveImage as the UI saves it, with a note."""
    nodes = [
        {
            "id": 1,
            "type": "EmptyImage",
            "inputs": [],
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
            "properties": {"models": list(models)},
            "widgets_values": [*size, 1, 0x3366CC],
        },
        {
            "id": 2,
            "type": "SaveImage",
            "title": title,
            "outputs": [],
            "properties": {},
            "widgets_values": [prefix],
            "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
        },
        {
            "id": 3,
            "type": "MarkdownNote",
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": ["# One <colour>\n\nIt *is* plain."],
        },
    ]
    common = {"pos": [0, 0], "size": [200, 100], "flags": {}, "mode": 0}
    nodes = [{**common, **node, "order": order} for order, node in enumerate(nodes)]
    return {"nodes": nodes, "links": [[1, 1, 0, 2, 0, "IMAGE"]], "groups": [], "extra": {}, "version": 0.4}


def command(pack_root, *arguments):
    return [sys.executable, str(pack_root / "workflows" / "run.py"), "--cpu", *map(str, arguments)]


@pytest.fixture(scope="module")
def finished(pack_root, tmp_path_factory):
    """One run of a good, a failing, a rejected and a skipped workflow: (process, gallery folder)."""
    folder = tmp_path_factory.mktemp("given workflows")
    contents = {
        "good": two_nodes("good"),
        # ComfyUI cannot write there while the node runs.
        "failing": two_nodes("../../escape", title="Writes outside"),
        "rejected": two_nodes("rejected", size=(0, 48)),
        "skipped": two_nodes("skipped", models=[MODEL]),
    }
    for stem, content in contents.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    gallery = folder / "the gallery"
    names = [folder / f"{stem}.json" for stem in contents]
    process = subprocess.run(
        command(pack_root, *names, "--output", gallery, "--thumbnails"),
        capture_output=True,
        text=True,
        cwd=folder,
    )
    return process, gallery


def test_a_failure_gives_a_non_zero_exit_code_and_names_the_node(finished):
    process, _ = finished
    assert process.returncode == 1, process.stderr
    assert re.search(r'failed +failing\nnode 2 "Writes outside" \(SaveImage\): .*outside', process.stdout)
    assert re.search(r'failed +rejected\nnode 1 "Empty Image" \(EmptyImage\): .*width', process.stdout)


def test_a_workflow_without_its_models_is_skipped_with_the_files_to_download(finished):
    process, _ = finished
    assert re.search(
        r"skipped +skipped\n.*\n +https://example.org/absent.safetensors\n +-> checkpoints/absent",
        process.stdout,
    )


def test_the_good_one_runs_all_the_same_and_shows_its_nodes(finished):
    process, gallery = finished
    assert re.search(r"\[1/2\] Empty Image\n +\[2/2\] The picture\ndone +good", process.stdout)
    pictures = list((gallery / "good").glob("*.png"))
    assert len(pictures) == 1
    with Image.open(pictures[0]) as picture:
        assert picture.size == (64, 48) and picture.getpixel((0, 0)) == (0x33, 0x66, 0xCC)


def test_a_folder_of_somebody_else_is_not_emptied(pack_root, tmp_path):
    run = runpy.run_path(str(pack_root / "workflows" / "run.py"))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
        run["check_replaceable"](folder)
        (folder / "notes.txt").write_text("kept")
    (ours / run["MARK"]).touch()
    run["check_replaceable"](ours)
    with pytest.raises(run["source"].SetupError, match="theirs holds files that no run made: .*--output"):
        run["check_replaceable"](theirs)


def test_the_gallery_page_needs_no_other_file_and_lets_no_markup_through(finished):
    page = (finished[1] / "index.html").read_text(encoding="utf-8")
    assert "One &lt;colour&gt;" in page and "<colour>" not in page and "<em>is</em>" in page
    assert 'src="data:image/png;base64,' in page
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    assert "1 of 4 workflows run" in page and "CPU" in page


def test_contact_sheet_and_thumbnail_show_the_picture(finished):
    _, gallery = finished
    thumbnail = gallery.parent / "good.jpg"
    for path in (gallery / "contact_sheet.jpg", thumbnail):
        with Image.open(path) as picture:
            red, green, blue = picture.getpixel((picture.width // 2, picture.height // 2 - 20))
        assert abs(red - 0x33) + abs(green - 0x66) + abs(blue - 0xCC) < 24, path
    assert not (gallery.parent / "failing.jpg").exists()


def test_control_c_leaves_a_gallery_of_what_was_done(pack_root, tmp_path):
    names = [tmp_path / f"{stem}.json" for stem in ("first", "second")]
    for name in names:
        name.write_text(json.dumps(two_nodes(name.stem)))
    process = subprocess.Popen(
        command(pack_root, *names, "--output", tmp_path / "gallery"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for line in process.stdout:
        if line.startswith("done"):
            process.send_signal(signal.SIGINT)  # while the second one starts
            break
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "Stopped" in errors and "index.html" in output
    page = (tmp_path / "gallery" / "index.html").read_text(encoding="utf-8")
    assert "1 of 1 workflows run" in page and "first.json" in page and "second.json" not in page
    assert (tmp_path / "gallery" / "contact_sheet.jpg").exists()


def test_serve_answers_and_control_c_stops_it(pack_root):
    port = free_port()
    process = subprocess.Popen(
        command(pack_root, "--serve", "--port", port),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as page:
            assert b"ComfyUI" in page.read()
    finally:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Stopped" in errors
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)


def test_an_unknown_name_is_refused_at_once(pack_root):
    process = subprocess.run(command(pack_root, "no_such_workflow"), capture_output=True, text=True)
    assert process.returncode == 2 and "no_such_workflow" in process.stderr
