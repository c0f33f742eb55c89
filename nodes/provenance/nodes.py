"""The nodes that label results and read labels: IPTC's digital source type, and signed C2PA manifests."""

import dataclasses
import datetime
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import io, ui

from ..consent import gate, record
from ..consent.widgets import CONSENT, purpose
from ..files import contents
from ..files.names import normalise_prefix
from ..files.publishing import obstacle, save_content
from ..inputs.checked import CheckedNode, File
from ..inputs.latents import check_finite
from ..inputs.pictures import check_pictures
from ..messages import tell
from . import files, method, report, signing, xmp
from .config import LABELS
from .sources import Sources, gather

CATEGORY = "Understudy/Provenance"
_VIDEO = "video/mp4"


class UnderstudyLabelMedia(CheckedNode):
    """Saves pictures or a video that say how they were made, signed where there is a certificate."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyLabelMedia", display_name="Label Media (C2PA)",
            category=CATEGORY,
            description="Saves pictures or a video with a label that says that a model made them, and with a signed "
            "manifest that names what they were made from, where c2pa-python and a certificate are there.",
            search_aliases=[
                "C2PA", "content credentials", "save image", "save video", "provenance", "watermark", "AI label",
                "IPTC", "XMP", "sign", "来歴", "署名", "保存", "溯源", "签名", "标识",
            ],
            inputs=[
                io.Image.Input("images", optional=True, tooltip="Pictures to save, one file each. Or connect video."),
                io.Video.Input("video", optional=True, tooltip="A video to save as MP4. Or connect images."),
                io.String.Input(
                    "filename_prefix", default="labelled/ComfyUI",
                    tooltip="Name in the output folder, with folders if you like. A number is added; nothing is "
                    "replaced.",
                ),
                io.Combo.Input(
                    "label", options=list(LABELS), default=LABELS[0],
                    tooltip="IPTC's term for how it was made. compositeWithTrainedAlgorithmicMedia: a photo or film "
                    "is in it and a model changed it; trainedAlgorithmicMedia: a model made all of it.",
                ),
                io.Boolean.Input(
                    "sign", default=True,
                    tooltip="Add a signed C2PA manifest, where c2pa-python is installed and a certificate is in "
                    "ComfyUI's folder user/__understudy. Otherwise the label alone is written, and the node says so.",
                ),
                CONSENT.Input(
                    "consent", optional=True,
                    tooltip="From Consent Record, for who is shown: it goes into the file, where everybody can read "
                    "it; its note only with the workflow. What it does not cover, the node says: see purpose.",
                ),
                io.String.Input(
                    "sources", default="", multiline=True, optional=True,
                    tooltip="Files that went into the result and that the graph does not load: one per line, names "
                    "in ComfyUI's input folder, or with ' [output]' behind. Loaded files are found by themselves.",
                ),
                io.Combo.Input(
                    "format", options=list(files.FORMATS), default="png", optional=True, advanced=True,
                    tooltip="Of pictures. png: lossless; jpeg, webp: smaller, at a quality of 95. ComfyUI opens the "
                    "workflow of png and webp. Videos are MP4.",
                ),
                purpose("the consent record"),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        return obstacle("", filename_prefix) or True

    @classmethod
    def fingerprint_inputs(cls, sources: str | None = None, **_values: Any) -> str:
        paths = filter(None, map(files.find_media, (sources or "").split("\n")))
        named = "".join(contents.digest(path) for path in paths if path.is_file())
        return named + "".join(map(_version, (signing.CERTIFICATE, signing.KEY)))

    @classmethod
    def execute(
        cls, filename_prefix, label, sign, images=None, video=None, consent=None, sources="", format="png",
        purpose=record.UNSPECIFIED,
    ) -> io.NodeOutput:
        if (images is None) == (video is None):
            found = "neither images nor video is" if images is None else "images and video are both"
            raise ValueError(f"{found} connected: connect one of them")
        now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
        gate.check_used("Label Media", consent, purpose, "connect a Consent Record that holds to consent")
        signer, unsigned = _signer(now) if sign else (None, [])
        traced = method.trace(cls.hidden.prompt or {}, str(cls.hidden.unique_id))
        gathered = gather(traced, sources, signed=signer is not None)
        if str(cls.hidden.unique_id) not in (cls.hidden.prompt or {}):
            gathered.warnings.append("the graph does not say what led here: name the files in sources")
        if args.disable_metadata:
            traced = dataclasses.replace(traced, steps=())
        ingredients = [each for each, _ in gathered.ingredients]
        packet = xmp.write(label, ingredients, record.describe(consent) if consent else "")
        prefix = normalise_prefix(filename_prefix)
        definition = method.manifest(
            Path(prefix).name, label, traced, len(ingredients), now.isoformat(), _agreed(consent)
        )

        def write(content: bytes, kind: str, name: str, size: tuple[int, int]) -> ui.SavedResult:
            throw_exception_if_processing_interrupted()
            if signer is not None:
                content = signing.sign(content, kind, definition, signer, _definitions(gathered))
            path = save_content(content, "", name, lambda _path: None, files.EXTENSIONS[kind], size)
            subfolder = path.parent.relative_to(folder_paths.get_output_directory())
            return ui.SavedResult(path.name, subfolder.as_posix(), io.FolderType.output)

        saved = _write_video(cls, video, packet, prefix, write) if images is None else [
            *_write_pictures(cls, images, files.FORMATS[format], packet, prefix, write)
        ]
        how = f"signed by {signer.signer}" if signer else "not signed"
        marked = [
            f"the manifest says that {name} puts a watermark into the picture, which is known by its name alone: "
            "give it another title if it does not" for name in traced.watermarks if signer is not None
        ]
        tell("Label Media", [f"labelled as {label}, {how}", *gathered.notes, *marked])
        warnings = [f"{name} takes a mark out of the picture" for name in traced.removers]
        tell("Label Media", [*unsigned, *gathered.warnings, *warnings], logging.WARNING)
        shown = ui.PreviewVideo(saved) if images is None else ui.SavedImages(saved)
        return io.NodeOutput(ui=shown)


class UnderstudyReadLabel(CheckedNode):
    """What a file claims about how it was made, and whether that holds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyReadLabel", display_name="Read Label (C2PA)",
            category=CATEGORY,
            description="Shows what a picture or video claims about how it was made, whether its signature holds, "
            "and whether the picture is still the one that was signed.",
            search_aliases=[
                "C2PA", "content credentials", "verify", "provenance", "manifest", "is this AI", "metadata", "検証",
                "来歴", "验证", "溯源",
            ],
            inputs=[
                File(
                    "file", options=files.listed(), upload=io.UploadType.image,
                    tooltip="A picture or video of ComfyUI's input folder, or of its output folder, marked [output].",
                ),
            ],
            outputs=[
                io.String.Output(display_name="claims", tooltip="What the file claims, one claim per line."),
                io.Boolean.Output(
                    display_name="signature_holds",
                    tooltip="Whether there is a signature and it fits what it signs. It does not say who signed.",
                ),
                io.Boolean.Output(
                    display_name="picture_matches",
                    tooltip="Whether the file is, byte for byte, what was signed.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        # One that a link brings is checked when it is there.
        known = file is None or isinstance(file, str) and files.find_media(file)
        return True if known else f"file is {file!r}: choose a picture or video of the list"

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str:
        path = files.find_media(file or "")
        return (contents.digest(path) if path and path.is_file() else "") + _version(signing.TRUSTED)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        path = files.find_media(file)
        if path is None or not path.is_file():
            raise ValueError(f"file is {file!r}, which is gone: choose another of the list")
        judged, lines = read(path)
        return io.NodeOutput(
            "\n".join(lines), judged.signature_holds, judged.picture_matches, ui=ui.PreviewText("\n".join(lines)),
        )


def read(path: Path) -> tuple[report.Verdict, list[str]]:
    """The verdict on a file and what it claims, label first."""
    try:
        label = files.source_type(path)
        lines = [f"Label: {report.plain(label)} (metadata, which anybody can write)" if label else "Label: none"]
    except ValueError as error:
        lines = [f"Label: {error}"]
    nothing = report.Verdict(False, False, False)
    if not signing.is_available():
        there = "there, but cannot be checked" if files.has_manifest(path) else "none found, without c2pa-python"
        return nothing, [*lines, f"Manifest: {there}: {signing.INSTALL}"]
    content, problem = signing.read(path)
    if content is None:
        problem = problem or "none: nobody signed this file, or the signature was removed"
        return nothing, [*lines, f"Manifest: {report.plain(problem)}"]
    judged, described = report.describe(content)
    return judged, [*lines, *described]


def _agreed(consent: record.ConsentRecord | None) -> dict[str, Any]:
    """What the file says of consent: all but the note."""
    values = dataclasses.asdict(consent) if consent else {}
    return {name: value for name, value in values.items() if value and name != "note"}


def _signer(now: datetime.datetime) -> tuple[signing.Credentials | None, list[str]]:
    """What signs, or None and the reason."""
    if not signing.is_available():
        return None, [f"c2pa-python is not installed, so there is a label and no signature: {signing.INSTALL}"]
    signer = signing.credentials(now)
    if signer is None:
        there = f"{signing.folder()} holds no certificate"
        return None, [f"{there}, so there is a label and no signature: {signing.MAKE}"]
    return signer, []


def _definitions(gathered: Sources) -> list[tuple[dict[str, Any], str, Path | None]]:
    return [
        (method.ingredient(index, each), each.media_type, path)
        for index, (each, path) in enumerate(gathered.ingredients)
    ]


def _metadata(cls: Any) -> dict[str, Any]:
    """What ComfyUI's Save nodes put into files, from which its window opens the workflow."""
    if args.disable_metadata:
        return {}
    prompt = {} if cls.hidden.prompt is None else {"prompt": cls.hidden.prompt}
    return {**prompt, **(cls.hidden.extra_pnginfo or {})}


def _write_pictures(cls: Any, images: Any, kind: str, packet: bytes, prefix: str, write: Callable) -> Any:
    check_pictures(images, "images", least=1)
    check_finite(images, "images", "load or render the picture again", ValueError)
    size = images.shape[2], images.shape[1]
    for index, image in enumerate(images):
        content = files.encode_picture(image, kind, _metadata(cls), packet)
        yield write(content, kind, prefix.replace("%batch_num%", str(index)), size)


def _write_video(cls: Any, video: Any, packet: bytes, prefix: str, write: Callable) -> list[ui.SavedResult]:
    content = files.encode_video(video, _metadata(cls), packet)
    return [write(content, _VIDEO, prefix, video.get_dimensions())]


def _version(name: str) -> str:
    path = signing.folder() / name
    return contents.digest(path) if os.path.isfile(path) else ""


NODES = [UnderstudyLabelMedia, UnderstudyReadLabel]
