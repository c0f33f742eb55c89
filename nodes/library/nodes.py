"""The node that lists all learned files and hands one to a Load node, by name and version."""

import logging
from pathlib import Path

import torch
from comfy_api.latest import io

from ..consent import gate
from ..consent.nodes import CATEGORY
from ..consent.record import UNSPECIFIED
from ..consent.widgets import CONSENT
from ..files import weights
from ..files.names import WeightFileError
from ..fingerprint import fingerprint
from ..inputs.checked import CheckedNode, File
from ..messages import tell
from . import index, listing, sidecars

_SHOWN = 30  # lines of the list on the node
_NAME = "Identity Library"


class UnderstudyIdentityLibrary(CheckedNode):
    """One learned file of all, and what is known of it and of the others."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyIdentityLibrary", display_name=_NAME, category=CATEGORY,
            description="Lists all priors, actions, fusions and adapters, with version, base model, consent and "
            "picture, and hands the chosen one to its Load node.",
            search_aliases=[
                "library", "model manager", "browse", "versions", "LoRA list", "preview", "一覧", "管理",
                "列表", "库",
            ],
            inputs=[
                io.Combo.Input(
                    "kind", options=[kind.name for kind in listing.KINDS], default=listing.KINDS[0].name,
                    tooltip="What to load: identity prior with Load Identity Prior, action with Load Action "
                    "Identifier, fusion with Load Fusion, video identity adapter with Load Video Identity Adapter.",
                ),
                File(
                    "name", options=listing.names(listing.all_files()),
                    tooltip="Its name without number and ending, as it was saved; names of all kinds are listed.",
                ),
                io.Int.Input(
                    "version", default=0, min=0, max=999_999_999,
                    tooltip="Which of the files of that name: the number that saving added. 0 is the newest.",
                ),
                io.Model.Input(
                    "model", optional=True,
                    tooltip="The model to use it with, to be compared with the one that it was trained on; it is not "
                    "modified.",
                ),
            ],
            outputs=[
                io.Combo.Output(
                    display_name="file", tooltip="The file's name. Connect it to the file input of its Load node.",
                    options=[],
                ),
                CONSENT.Output(
                    display_name="consent", tooltip="Its consent record, if it has one, for Save nodes and labels.",
                ),
                io.Image.Output(
                    display_name="preview", tooltip="The picture beside the file, or a grey one where there is none.",
                ),
                io.String.Output(display_name="list", tooltip="All files of all kinds, one per line."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name) -> bool:
        """A name that is not listed passes: what is there is said when it is chosen."""
        return True

    @classmethod
    def fingerprint_inputs(cls, kind, name, version, **_model) -> str:
        if None in (kind, name, version):  # links, whose sources have fingerprints of their own
            return ""
        chosen = listing.choose(listing.all_files(), kind, name, version)
        doubts = gate.file_warnings(chosen.path, UNSPECIFIED)
        return "\n".join([str(chosen.path), str(index.version(chosen.path)), *doubts])

    @classmethod
    def execute(cls, kind, name, version, model=None) -> io.NodeOutput:
        files = listing.all_files()
        chosen = listing.choose(files, kind, name, version)
        base = "" if model is None else fingerprint(model)
        shapes, metadata = _header(chosen.path)
        picture, missing = sidecars.preview(chosen.path)
        tell(_NAME, [*_about(chosen, base), *([missing] if missing else [])])
        _warn_of_misfit(chosen, model, base, shapes, metadata)
        others = [listing.line(file, base) for file in files if file.entry.kind in ("", kind) and file is not chosen]
        more = [f"and {len(others) - _SHOWN} more: see the output list"] if len(others) > _SHOWN else []
        tell(_NAME, [*others[:_SHOWN], *more])
        image = torch.full((1, 64, 64, 3), 0.5) if picture is None else picture
        listed = "\n".join(listing.line(file, base) for file in files)
        return io.NodeOutput(chosen.file, gate.read(metadata, _NAME), image, listed)


def _about(chosen: listing.Listed, base: str) -> list[str]:
    """What the node shows of a file, and of what model managers wrote beside it."""
    tags, author = sidecars.tags_and_author(chosen.path)
    beside = [f"beside it: {', '.join(part for part in (*tags, author) if part)}"] if tags or author else []
    digest = index.sha256(str(chosen.path))
    return [f"{chosen.folder}/{chosen.file}, sha256 {digest}", listing.line(chosen, base), *beside]


def _header(path: Path) -> tuple[dict, dict]:
    """Shapes and metadata, or none of a pickle."""
    try:
        return weights.inspect(path)
    except WeightFileError:
        return {}, {}


def _warn_of_misfit(chosen: listing.Listed, model, base: str, shapes: dict, metadata: dict) -> None:
    if model is None or chosen.entry.base == base or not shapes:
        return
    (kind,) = (kind for kind in listing.KINDS if kind.name == chosen.entry.kind)
    if misfit := kind.misfit(model, shapes, metadata):
        tell(_NAME, [f"it does not fit the connected model: {misfit}"], logging.WARNING)


NODES = [UnderstudyIdentityLibrary]
