"""What a UI-format workflow file says about itself: title, description and the model files that it needs."""

from __future__ import annotations

import json
from pathlib import Path

from . import source

NOTES = ("MarkdownNote", "Note")


class Workflow:
    """One workflow file. Raises SetupError if it cannot be read or is not in the format that ComfyUI saves."""

    def __init__(self, path: Path):
        self.path = path
        self.stem = path.stem
        try:
            self.content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise source.SetupError(f"{path} cannot be read ({error}): save it again in ComfyUI.") from error
        if not isinstance(self.content, dict) or not isinstance(self.content.get("nodes"), list):
            raise source.SetupError(
                f"{path} is not a workflow in UI format: it has no list `nodes`. Save it with Save, not Export (API)."
            )

    def nodes(self) -> list[dict]:
        """Every node, those inside subgraphs included."""
        subgraphs = self.content.get("definitions", {}).get("subgraphs", [])
        return [*self.content["nodes"], *(node for graph in subgraphs for node in graph["nodes"])]

    def subgraph_ids(self) -> set[str]:
        """The node types that are subgraphs of this file."""
        return {graph["id"] for graph in self.content.get("definitions", {}).get("subgraphs", [])}

    def note(self) -> tuple[str, str]:
        """Title and description (Markdown): the heading and first paragraph of the first note that has a heading."""
        for node in self.content["nodes"]:
            text = str((node.get("widgets_values") or [""])[0]).strip() if node["type"] in NOTES else ""
            if text.startswith("# "):
                heading, _, rest = text.partition("\n")
                return heading[2:].strip(), rest.strip().split("\n\n")[0]
        return self.stem.replace("_", " ").capitalize(), ""

    @property
    def title(self) -> str:
        return self.note()[0]

    @property
    def description(self) -> str:
        return self.note()[1]

    def models(self) -> list[dict]:
        """The model files that its nodes name for download, each once: `name`, `url`, `directory`."""
        models = {}
        for node in self.nodes():
            for model in node.get("properties", {}).get("models", []):
                models.setdefault((model["directory"], model["name"]), model)
        return list(models.values())


def text(content: dict) -> str:
    """A workflow's JSON with one node, link or group a line: a diff shows which changed, in a third fewer bytes."""
    def value(part) -> str:
        return json.dumps(part, ensure_ascii=False)

    rows = []
    for key, part in content.items():
        lines = ",\n  ".join(map(value, part)) if isinstance(part, list) and part else None
        rows.append(f" {value(key)}: [\n  {lines}\n ]" if lines else f" {value(key)}: {value(part)}")
    return "{\n" + ",\n".join(rows) + "\n}\n"


def find(folder: Path, names: list[str]) -> list[Workflow]:
    """The workflows of `folder` with these names, all of them without names.

    A name is a stem, a file name or an unambiguous beginning of a stem, in any case, or the path of a file. Raises
    SetupError for a name that is none of these, or that is the beginning of several.
    """
    known = {path.stem: path for path in sorted(folder.glob("*.json"))}
    chosen = []
    for name in names:
        if name.endswith(".json") and Path(name).is_file():
            chosen.append(Path(name).absolute())
        else:
            chosen.append(known[_stem(Path(name).name.removesuffix(".json"), list(known))])
    return [Workflow(path) for path in (chosen if names else known.values())]


def _stem(name: str, stems: list[str]) -> str:
    """The stem that is `name`, or the only one that begins with it."""
    matches = [stem for stem in stems if _comparable(stem).startswith(_comparable(name))]
    exact = [stem for stem in matches if _comparable(stem) == _comparable(name)]
    if len(exact or matches) != 1:
        problem = f"{name!r} is the beginning of several names" if matches else f"There is no workflow {name!r}"
        listed = ", ".join(matches or stems) or "none"
        raise source.SetupError(f"{problem}. {'Use one of them' if matches else 'Those of the pack'}: {listed}.")
    return (exact or matches)[0]


def _comparable(name: str) -> str:
    """In any case, with spaces or underscores for hyphens."""
    return name.casefold().replace("_", "-").replace(" ", "-")
