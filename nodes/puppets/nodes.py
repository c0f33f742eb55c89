"""The puppet theatre in a graph: pictures, masks, poses and captions that need no file, and its image encoder."""

import dataclasses

import numpy as np
import torch
from comfy_api.latest import io

from .. import messages
from ..inputs.checked import CheckedNode
from ..inputs.words import entries
from . import vision
from .captions import caption, subject_phrase
from .config import (
    ALL_ACTIONS,
    COLOURS,
    FRAMINGS,
    HEADWEAR,
    LIGHTS,
    PATTERNS,
    SCENES,
    SPECIES,
    VIEW_NAMES,
    Identity,
    Picture,
    Take,
    actions_of,
    check_framing,
)
from .render import draw_pose, render, render_clip
from .world import check_name, identity_from_words, names_a_puppet, pick, sample_identity, staged

_IDENTITY_HELP = (
    "Who it is, in the theatre's words: 'red striped robot with blue trousers and a yellow cap'. 'test 0' to "
    "'test 23' are puppets that no model of the theatre was trained on; 'random' follows the seed. Species: "
    f"{', '.join(SPECIES)}. Patterns: {', '.join(PATTERNS)}. Headwear: {', '.join(HEADWEAR[1:])}, no hat. Colours: "
    f"{', '.join(COLOURS)}."
)
_SEED_HELP = "Decides the moment of the action, light, camera, decoration and small angles of the joints."
_MAX_SEED = 2**63 - 1
_RANDOM = "random"  # as the seed decides


def _size_input() -> io.Int.Input:
    return io.Int.Input(
        "size", default=128, min=64, max=512, step=8, optional=True, advanced=True,
        tooltip="Width and height in pixels. The theatre's own models were trained at 128, its video model at 96.",
    )


def _camera_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "framing", options=list(FRAMINGS), default="full", optional=True,
            tooltip="All of the puppet, or a close-up: head and shoulders fill the frame. Actions of a close-up: "
            + ", ".join(actions_of("close_up")) + ".",
        ),
        io.Combo.Input(
            "light", options=[_RANDOM, *LIGHTS], default=_RANDOM, optional=True, advanced=True,
            tooltip="Colour and brightness of the picture; 'random' follows the seed. Captions have no word for it.",
        ),
        io.Combo.Input(
            "view", options=[_RANDOM, *VIEW_NAMES], default=_RANDOM, optional=True, advanced=True,
            tooltip="Where the puppet is in the frame; 'random' follows the seed. Captions have no word for it.",
        ),
    ]


def _check_camera(framing: str, light: str, view: str) -> None:
    check_name("framing", framing, FRAMINGS)
    check_name("light", light, (_RANDOM, *LIGHTS))
    check_name("view", view, (_RANDOM, *VIEW_NAMES))


def _chosen(name: str) -> str | None:
    return None if name == _RANDOM else name


def _identity(words: str, seed: int) -> Identity:
    return sample_identity(seed) if words.strip().lower() == "random" else identity_from_words(words)


def _identities(text: str) -> list[str]:
    """The puppets of a list, one a line; a comma begins another one only before words that say who it is."""
    puppets: list[str] = []
    for line in text.splitlines():
        for i, words in enumerate(entries(line)):
            if i and not names_a_puppet(words):
                puppets[-1] += f", {words}"
            else:
                puppets.append(words)
    return puppets


def _tensors(pictures: list[Picture]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """IMAGE float [B, H, W, 3] in 0..1, MASK float [B, H, W], poses like IMAGE."""
    images = np.stack([p.image for p in pictures])
    masks = np.stack([p.mask for p in pictures])
    poses = np.stack([draw_pose(p.joints, p.image.shape[0]) for p in pictures])
    image, mask, pose = (torch.from_numpy(array).float() for array in (images, masks, poses))
    return image / 255, mask, pose / 255


def _given(value: str | None) -> list[str]:
    return [] if value is None else [value]


def _problem(check, *values) -> str | None:
    try:
        for value in values:
            check(value)
    except ValueError as error:
        return str(error)
    return None


def _no_text(**given: object) -> str | None:
    """ComfyUI asks `validate_inputs` before a node checks what it is given."""
    for name, value in given.items():
        if value is not None and not isinstance(value, str):
            return f"{name} is of type {type(value).__name__}: type or connect a text"
    return None


class UnderstudyPuppet(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyPuppet",
            display_name="Puppet",
            category="Understudy/Theatre",
            description="Draws a paper puppet: a picture or a clip with mask, pose and caption.",
            search_aliases=[
                "test image", "sample image", "puppet theatre", "paper doll", "reference pose",
                "openpose", "人形", "木偶", "纸偶", "パペット", "motion",
            ],
            inputs=[
                io.String.Input("identity", default="red striped robot with blue trousers and a yellow cap",
                                tooltip=_IDENTITY_HELP),
                io.Combo.Input("action", options=list(ALL_ACTIONS), default="waving",
                               tooltip="What it does; 'raising hat' needs a hat. From 'saluting' on, captions have "
                                       "no word for it."),
                io.Combo.Input("scene", options=list(SCENES), default="beach", tooltip="Where it is."),
                io.Int.Input("frames", default=1, min=1, max=257, step=4,
                             tooltip="1 for a picture; 4n+1 (17, 33, …) for one cycle of the action."),
                io.Int.Input("seed", default=0, min=0, max=_MAX_SEED, control_after_generate=True,
                             tooltip=_SEED_HELP),
                io.Boolean.Input("mirrored", default=False, optional=True,
                                 tooltip="Flips the action to the other side, not what the puppet wears."),
                _size_input(),
                *_camera_inputs(),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture, or the frames as a batch."),
                io.Mask.Output(display_name="mask", tooltip="1 where the puppet is."),
                io.Image.Output(display_name="pose",
                                tooltip="Its 18 joints as an OpenPose drawing on black."),
                io.String.Output(display_name="caption", tooltip="All that has words in the picture."),
            ],
        )

    @classmethod
    def validate_inputs(cls, identity=None, action=None, framing="full") -> bool | str:
        """Each is None while it comes from another node."""
        return (_no_text(identity=identity)
                or _problem(lambda name: check_name("action", name, ALL_ACTIONS), *_given(action))
                or _problem(lambda name: check_name("framing", name, FRAMINGS), *_given(framing))
                or (_problem(lambda name: check_framing(action, name), *_given(framing)) if action else None)
                or _problem(lambda words: _identity(words, 0), *_given(identity)) or True)

    @classmethod
    def execute(cls, identity, action, scene, frames, seed, mirrored=False, size=128, framing="full", light=_RANDOM,
                view=_RANDOM) -> io.NodeOutput:
        check_name("scene", scene, SCENES)
        _check_camera(framing, light, view)
        check_framing(action, framing)
        take = staged(_identity(identity, seed), action, scene, np.random.default_rng([0x90DE, seed]), framing,
                      _chosen(light), _chosen(view))
        take = dataclasses.replace(take, mirrored=mirrored)
        pictures = [render(take, size)] if frames == 1 else render_clip(take, frames, size)
        image, mask, pose = _tensors(pictures)
        return io.NodeOutput(image, mask, pose, pictures[0].caption, ui=messages.pictures("Puppet", image, cls))


class UnderstudyPuppetSet(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyPuppetSet",
            display_name="Puppet Set",
            category="Understudy/Theatre",
            description="Draws many puppets with captions, as lists: a data set without a file.",
            search_aliases=[
                "test dataset", "training images", "puppet theatre", "sample images", "dataset", "人形",
                "木偶", "纸偶", "パペット",
            ],
            inputs=[
                io.String.Input("identities", default="", multiline=True,
                                tooltip="Puppets, one a line, taken in turn; empty for random ones. "
                                        + _IDENTITY_HELP),
                io.String.Input("actions", default="", multiline=True,
                                tooltip="In turn; empty for random named ones of the framing. Any of "
                                + ", ".join(ALL_ACTIONS)),
                io.String.Input("scenes", default="", multiline=True,
                                tooltip="Taken in turn; empty for random ones. Any of " + ", ".join(SCENES)),
                io.Int.Input("count", default=8, min=1, max=1024, tooltip="Number of pictures."),
                io.Int.Input("seed", default=0, min=0, max=_MAX_SEED, control_after_generate=True,
                             tooltip="Decides all that the lists leave open. " + _SEED_HELP),
                _size_input(),
                *_camera_inputs(),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="One picture an item."),
                io.Mask.Output(display_name="masks", is_output_list=True, tooltip="1 where the puppet is."),
                io.Image.Output(display_name="poses", is_output_list=True,
                                tooltip="OpenPose drawings on black."),
                io.String.Output(display_name="captions", is_output_list=True, tooltip="All that has words."),
                io.String.Output(display_name="subjects", is_output_list=True,
                                 tooltip="The words of each puppet alone, without action and scene."),
            ],
        )

    @classmethod
    def validate_inputs(cls, identities=None, actions=None, scenes=None, framing="full") -> bool | str:
        """Each is None while it comes from another node."""
        if problem := _no_text(identities=identities, actions=actions, scenes=scenes):
            return problem
        check_action = (lambda name: check_framing(name, framing)) if framing else (
            lambda name: check_name("action", name, ALL_ACTIONS))
        return (_problem(lambda name: check_name("framing", name, FRAMINGS), *_given(framing))
                or _problem(lambda words: _identity(words, 0), *_identities(identities or ""))
                or _problem(check_action, *entries(actions or ""))
                or _problem(lambda name: check_name("scene", name, SCENES), *entries(scenes or "")) or True)

    @classmethod
    def execute(cls, identities, actions, scenes, count, seed, size=128, framing="full", light=_RANDOM,
                view=_RANDOM) -> io.NodeOutput:
        _check_camera(framing, light, view)
        takes = _takes(_identities(identities), entries(actions), entries(scenes), count, seed, framing,
                       _chosen(light), _chosen(view))
        drawn = [_tensors([render(take, size)]) for take in takes]
        images, masks, poses = (list(column) for column in zip(*drawn, strict=True))
        subjects = [subject_phrase(take.identity) for take in takes]
        return io.NodeOutput(images, masks, poses, [caption(take) for take in takes], subjects)


class UnderstudyLoadPuppetVision(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyLoadPuppetVision",
            display_name="Load Puppet Vision",
            category="Understudy/Theatre",
            description="Loads the theatre's own small image encoder, which comes with the pack: 64 pixels, 128 "
            "numbers a picture. For puppets; real pictures need a CLIP or DINOv2 from Load CLIP Vision.",
            search_aliases=[
                "clip vision", "image encoder", "puppet theatre", "load vision model", "人形", "木偶", "纸偶",
            ],
            inputs=[],
            outputs=[
                io.ClipVision.Output(
                    display_name="clip_vision",
                    tooltip="Connect it to CLIP Vision Encode, or to a Train Fusion node.",
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(vision.shipped())


def _takes(identities: list[str], actions: list[str], scenes: list[str], count: int, seed: int, framing: str,
           light: str | None, view: str | None) -> list[Take]:
    takes = []
    for i in range(count):
        rng = np.random.default_rng([0x5E7, seed, i])
        own = int(rng.integers(2**31))
        who = _identity(identities[i % len(identities)] if identities else "random", own)
        action = actions[i % len(actions)] if actions else pick(rng, actions_of(framing, True))
        scene = scenes[i % len(scenes)] if scenes else pick(rng, SCENES)
        check_framing(action, framing)
        check_name("scene", scene, SCENES)
        takes.append(staged(who, action, scene, rng, framing, light, view))
    return takes


NODES = [UnderstudyPuppet, UnderstudyPuppetSet, UnderstudyLoadPuppetVision]
