"""READMEs and other guides name what is there, their links lead somewhere, and no text names a machine."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from launcher.scripts import ROOT
from launcher.workflow_files import Workflow
from pack.nodes.extension import METHOD_NODES, THEATRE_NODES
from support.shipped import all_files, shipped_files

NODES = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in METHOD_NODES + THEATRE_NODES}
GUIDES = {
    name: (ROOT / name).read_text(encoding="utf-8") for name in (
        "README.md", "CONTRIBUTING.md", "workflows/README.md", "workflows/SERVERS.md", "workflows/TRAINING.md",
        "workflows/models/SOURCES.md", "tests/README.md", "tests/experiments/README.md",
        "tests/experiments/PROTOCOL.md",
    )
}
README = GUIDES["README.md"]


def readme_links() -> dict[str, str]:
    """{path in the repository: label} of the links that README and the page of templates and nodes have."""
    return {
        os.path.normpath(Path(guide).parent / target): label.strip("`")
        for guide in ("README.md", "workflows/README.md")
        for label, target in re.findall(r"(?<!!)\[([^\[\]]+)\]\(([^)#]+)", GUIDES[guide])
    }


def test_readme_is_one_screen():
    assert len(README.encode()) <= 8192


def test_guides_name_every_command_and_they_exist():
    scripts = [
        name for name in all_files() if name.endswith(".py") and name.startswith(("tests/", "workflows/"))
        and not name.startswith("workflows/launcher/")  # which run.py starts
        and re.search(r"^if __name__ == ", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert {"workflows/run.py", "tests/run.py"} <= set(scripts)
    text = "\n".join(GUIDES.values())
    assert [name for name in scripts if f"python {name}" not in text] == []
    for name, options in re.findall(r"^ *python (\S+\.py)(.*)$", text, re.MULTILINE):
        # An option may come from a field of a settings class, beside the script.
        files = [ROOT / name] if "theatre/" not in name else (ROOT / name).parent.glob("*.py")
        source = "\n".join(file.read_text(encoding="utf-8") for file in files)
        named = re.findall(r"--[\w-]+", options)
        assert [name for name in named if name not in source and name[2:].replace("-", "_") not in source] == []


def test_readme_names_every_node_workflow_and_licence():
    links = readme_links()
    for node_id, schema in NODES.items():
        assert links.get(f"web/docs/{node_id}.md") == schema.display_name.partition(" (")[0]
    for stem in (path.stem for path in (ROOT / "workflows").glob("*.json")):
        row = rf"^\| .*\[`?{stem}`?\]\((?:workflows/)?{stem}\.json\)"
        guides = ("README.md",) if stem.startswith("Puppets") else ("README.md", "workflows/README.md")
        assert any(re.search(row, GUIDES[guide], re.MULTILINE) for guide in guides), stem
    for family, licence in (
        ("Theatre", "GPL-3.0-or-later"), ("Stable Diffusion 1.5", "CreativeML Open RAIL-M"),
        ("Stable Diffusion 2.1, SDXL", "CreativeML Open RAIL++-M"), ("Wan 2.1, Wan 2.2", "Apache-2.0"),
    ):
        assert re.search(rf"^\| {re.escape(family)}.*{re.escape(licence)} \|$", README, re.MULTILINE), family


def test_the_page_of_templates_links_every_model_file():
    text = GUIDES["workflows/README.md"]
    for path in (ROOT / "workflows").glob("*.json"):
        for model in Workflow(path).models():
            assert f"[{model['name']}]({model['url']})" in text and f"`{model['directory']}`" in text


def anchors(text: str) -> set[str]:
    """The fragments that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("guide", GUIDES)
def test_what_a_guide_points_to_exists(guide):
    text = GUIDES[guide]
    linked = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in linked:
        name, _, fragment = target.partition("#")
        if "://" not in name:
            path = (ROOT / guide).parent / name if name else ROOT / guide
            assert path.exists(), target
            assert not fragment or fragment in anchors(path.read_text(encoding="utf-8")), target
    ours = re.findall(r"`((?:tests|nodes|kernels|workflows|web|locales)/[^`<>*]*)`", text)
    assert linked or guide.endswith(("SOURCES.md", "PROTOCOL.md"))
    assert len(ours) > 10 or guide != "tests/README.md"
    assert [name for name in sorted({*ours}) if not (ROOT / name).exists()] == []


def test_every_result_picture_is_linked():
    """Sheets of development cases are written beside them, and git ignores them."""
    linked = set(re.findall(r"results/(\w+\.jpg)", GUIDES["tests/experiments/README.md"]))
    pictures = (ROOT / "tests" / "experiments" / "results").glob("*.jpg")
    assert {path.name for path in pictures if not path.stem.endswith("_development")} == linked


def test_the_repository_stays_small():
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in run.stdout.split("\0") if name]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= 58 * 2**20


def test_readme_and_project_agree():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    required = project["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    assert f"ComfyUI {required} or newer" in README
    assert f"Python {project['project']['requires-python'].removeprefix('>=')} or newer" in README
    assert f"`comfy node install {project['project']['name']}`" in README
    urls = project["project"]["urls"]
    assert set(urls) == {"Homepage", "Repository", "Issues"}
    assert all(url.startswith(urls["Repository"]) for url in urls.values())


TEXT = {".py", ".md", ".json", ".js", ".toml", ".txt", ".html"}
HOSTS = {"arxiv.org", "github.com", "huggingface.co", "127.0.0.1", "example.org"}
VOCABULARIES = {"cv.iptc.org", "iptc.org", "ns.adobe.com", "www.w3.org"}  # begin names in metadata; nobody opens them
NAMED_HOSTS = re.compile(
    r"\b(?:[\w-]+\.)*(?:pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|debian\.org|ubuntu\.com|conda\.io|docker\.io)\b"
)
MACHINE_PATHS = re.compile(r"(?<![\w.:/}])/(?:work|root|home|tmp|mnt|Users|opt|srv)/\w|\b[A-Z]:\\\\?\w")


def readable_files() -> list[str]:
    launcher = {name for name in all_files() if name.startswith(("workflows/launcher/", "tests/launcher/"))}
    names = {*shipped_files(), *launcher, "workflows/run.py", *GUIDES}
    return sorted(name for name in names if Path(name).suffix in TEXT)


@pytest.mark.parametrize("text", ["pypi.org/simple", "see /home/me/x", r"C:\Users", "files.pythonhosted.org"])
def test_the_search_finds(text):
    assert NAMED_HOSTS.search(text) or MACHINE_PATHS.search(text)


@pytest.mark.parametrize("name", readable_files())
def test_texts_name_no_package_host_and_no_path_of_a_machine(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert NAMED_HOSTS.findall(text) == [] and MACHINE_PATHS.findall(text) == []
    assert {urlsplit(url).hostname for url in re.findall(r"https?://[\w.-]+", text)} <= HOSTS | VOCABULARIES
