"""The node that lets only those pictures pass that look like the references."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..inputs.checked import CheckedNode
from ..inputs.latents import check_finite
from ..messages import tell
from ..training import inputs
from . import method
from .method import PASSED, Thresholds


class UnderstudyIdentityCheck(CheckedNode):
    """Pictures that look like the references, and the others."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def threshold(id: str, default: float, tooltip: str) -> io.Float.Input:
            return io.Float.Input(id, default=default, min=-1.0, max=1.0, step=0.001, round=False, tooltip=tooltip)

        return io.Schema(
            node_id="UnderstudyIdentityCheck", display_name="Identity Check",
            category="Understudy/Checks",
            description="Compares pictures with references by an image encoder, and lets those pass that are similar "
            "enough. Thresholds come from pictures of yours, or are typed.",
            search_aliases=[
                "face similarity", "quality control", "filter images", "same person", "CLIP score", "likeness",
                "類似度", "顔", "人物", "相似度", "人脸",
            ],
            is_input_list=True, is_output_node=True,
            inputs=[
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder: CLIP or DINOv2, or one for faces. It decides what "
                    "similar means.",
                ),
                io.Image.Input(
                    "references", tooltip="Pictures of the one who should be seen, as a batch or a list. More views "
                    "are surer.",
                ),
                io.Image.Input("images", tooltip="Pictures to check, as a batch or a list. Sizes may differ."),
                threshold(
                    "pass_above", 0.85, "Similarity from which a picture passes, -1 to 1. The default is a guess: "
                    "each encoder has its own scale. No effect where same or other is connected.",
                ),
                threshold(
                    "reject_below", 0.7, "Similarity below which a picture is rejected, -1 to 1; from there to "
                    "pass_above it is uncertain. No effect where same or other is connected.",
                ),
                io.Image.Input(
                    "same", optional=True,
                    tooltip="Other pictures of the one who should be seen, 10 or more: they set the thresholds. Not "
                    "the references again.",
                ),
                io.Image.Input(
                    "other", optional=True,
                    tooltip="Pictures of others, 10 or more, as like as those that should be told apart: they set "
                    "the thresholds.",
                ),
                io.String.Input(
                    "names", optional=True, force_input=True,
                    tooltip="A name for each picture, such as file_stem of Casting Sheet: it goes where its picture "
                    "goes.",
                ),
                io.String.Input(
                    "groups", optional=True, force_input=True,
                    tooltip="For each picture the groups that it belongs to, with commas between them, such as "
                    "light, view and species: the report begins with the groups, the worst one first.",
                ),
                io.Boolean.Input(
                    "paired", default=False, optional=True, advanced=True,
                    tooltip="Compares each picture, and each one of same, with the reference of its own number "
                    "alone, for several people at once: give equally many. Those of other take the references in "
                    "turn.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="passed", is_output_list=True,
                    tooltip="Pictures that passed. If there are none, what follows does not run.",
                ),
                io.Image.Output(
                    display_name="rest", is_output_list=True,
                    tooltip="Uncertain and rejected pictures. If there are none, what follows does not run.",
                ),
                io.Float.Output(
                    display_name="scores", is_output_list=True, tooltip="The similarity of each picture, in order.",
                ),
                io.String.Output(display_name="report", tooltip="Groups, thresholds, each picture's score."),
                io.String.Output(
                    display_name="passed_names", is_output_list=True,
                    tooltip="The names of the pictures that passed, for filename_prefix of the node that saves.",
                ),
                io.String.Output(
                    display_name="rest_names", is_output_list=True, tooltip="The names of the other pictures.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, references, images, same=None, other=None, names=None, groups=None, **lists
    ) -> io.NodeOutput:
        values = inputs.single_values(lists)
        pictures = inputs.pictures(images, "images")
        labels = _texts(names, len(pictures), "names") or [f"picture {i + 1}" for i in range(len(pictures))]
        kinds = _texts(groups, len(pictures), "groups")
        known = _embeddings(values["clip_vision"], references, "references")
        given = {"images": images, "same": same, "other": other}
        embedded = {name: _embeddings(values["clip_vision"], part, name) for name, part in given.items() if part}
        typed = Thresholds(values["pass_above"], values["reject_below"])
        scores, thresholds, said, doubts = _compared(embedded, known, values.get("paired", False), typed)
        verdicts = [thresholds.verdict(score) for score in scores]
        passed = [i for i, verdict in enumerate(verdicts) if verdict == PASSED]
        rest = [i for i, verdict in enumerate(verdicts) if verdict != PASSED]
        routes = [
            f"none of the {len(pictures)} pictures is in {name}: what follows it does not run"
            for name, route in (("passed", passed), ("rest", rest)) if not route
        ]
        ranked = method.groups(kinds, scores, verdicts)
        worst = [f"the worst group is {group}" for group in ranked[:1]]
        tell("Identity Check", [*worst, said, *routes])
        tell("Identity Check", doubts, logging.WARNING)
        listed = [
            f"{label}: {score:.3f} {verdict}" for label, score, verdict in zip(labels, scores, verdicts, strict=True)
        ]
        counted = f"{len(passed)} of {len(pictures)} passed, {verdicts.count(method.UNCERTAIN)} are uncertain"
        ranking = ["groups, the worst first:", *map(str, ranked), ""] if ranked else []
        report = "\n".join([*ranking, counted, said, *doubts, *routes, *listed])
        return io.NodeOutput(
            _route(pictures, passed), _route(pictures, rest), scores, report, _route(labels, passed),
            _route(labels, rest), ui={"text": (report,)},
        )


def _route(items: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    """These items, or what blocks the nodes behind an empty list."""
    return [items[i] for i in indices] or [ExecutionBlocker(None)]


def _texts(texts: Sequence[str] | None, count: int, name: str) -> list[str]:
    """A text for each picture, or none at all. Raises ValueError where there are fewer or more."""
    if texts and len(texts) != count:
        raise ValueError(f"{name} has {len(texts)} texts for {count} pictures in images: give one for each")
    return list(texts or ())


def _compared(
    embedded: dict[str, torch.Tensor], known: torch.Tensor, paired: bool, typed: Thresholds
) -> tuple[list[float], Thresholds, str, list[str]]:
    """The score of each of images, the thresholds, a line that says what they are, and doubts.

    `embedded` are images and, where they are connected, same and other. Raises ValueError where pairs do not fit.
    """
    for name in ("images", "same") if paired else ():
        if len(part := embedded.get(name, known)) != len(known):
            fix = "give one for each, or switch paired off"
            raise ValueError(f"{name} has {len(part)} pictures for {len(known)} in references: {fix}")
    scores = {name: method.scores(part, known, paired) for name, part in embedded.items()}
    made = scores.pop("images").tolist()
    copies = [name for name in scores if method.has_copies(embedded[name], known, paired)]
    return made, *_thresholds(scores, copies, typed)


def _embeddings(clip_vision: Any, images: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """[N, D] of each picture, squeezed to the encoder's square. Raises ValueError, naming the input."""
    embedded = []
    for picture in inputs.pictures(images, name):
        vector = clip_vision.encode_image(picture, crop=False).image_embeds
        if vector is None or vector.ndim != 2:
            raise ValueError("clip_vision gives no embedding of a whole picture: load a CLIP or DINOv2 encoder")
        check_finite(vector, f"the embedding of a picture in {name}", "load the encoder in fp32")
        embedded.append(vector.float().cpu())
    return torch.cat(embedded)


def _thresholds(
    given: Mapping[str, torch.Tensor], copies: Sequence[str], typed: Thresholds
) -> tuple[Thresholds, str, list[str]]:
    """The thresholds, a line that says what they are, and doubts. `given` are the scores of same and of other.

    Raises ValueError for typed ones that cross.
    """
    if not given:
        if typed.reject_below > typed.pass_above:
            raise ValueError(
                f"reject_below is {typed.reject_below:g} and pass_above {typed.pass_above:g}: set it lower or equal"
            )
        doubt = "they are not calibrated, and each encoder has its own scale: connect same and other"
        return typed, _said(*typed, "typed"), [doubt]
    calibration = method.calibrate(given.get("same"), given.get("other"))
    doubts = [f"{name} holds a picture of references, whose score is too good: use other pictures" for name in copies]
    thresholds = calibration.thresholds
    said = _said(*thresholds, f"from {' and '.join(given)}: {calibration.result}")
    return thresholds, said, [*doubts, *calibration.doubts]


def _said(pass_above: float, reject_below: float, origin: str) -> str:
    return f"passes from {pass_above:.3f}, rejected below {reject_below:.3f} ({origin})"


NODES = [UnderstudyIdentityCheck]
