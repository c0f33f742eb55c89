"""Nodes of the video identity adapter (Stand-In): prepare a reference, load and apply the adapter."""

from __future__ import annotations

import logging

from comfy_api.latest import io, ui

from ..messages import tell
from . import files, method, reference_picture, sampling
from .config import ReferenceConfig, VideoIdentityConfig

CATEGORY = "Understudy/Video identity"
ADAPTER = io.Custom("UNDERSTUDY_VIDEO_ADAPTER")
_DEFAULT = VideoIdentityConfig()
_REFERENCE = ReferenceConfig()
_ONE_AT_A_TIME = (
    "{} pictures: VAE Encode of a video model takes them for one video and keeps the first; send them one at a time, "
    "with Rebatch Images and batch_size 1"
)


def _fraction(id: str, step: float, tooltip: str) -> io.Float.Input:
    default = getattr(_DEFAULT, id)
    return io.Float.Input(id, default=default, min=0.0, max=1.0, step=step, round=False, tooltip=tooltip)


def _boxes_input() -> io.BoundingBox.Input:
    boxes = io.BoundingBox.Input(
        "bboxes", optional=True, force_input=True,
        tooltip="Boxes of faces in pixels, from a face detector. The largest counts. Without a face the whole "
        "picture is used.",
    )
    # The host's default is a box of 512 pixels, which clients that fill in defaults send where nothing is connected.
    boxes.default = None
    return boxes


class UnderstudyPrepareReference(io.ComfyNode):
    """A picture of a person as the adapter knows them: a square around the face, on white."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyPrepareReference",
            display_name="Prepare Reference (Stand-In)",
            category=CATEGORY,
            description="Cuts a square around the face and paints the rest white, as the video identity adapter was "
            "trained. Connect it to VAE Encode.",
            search_aliases=["Stand-In", "face crop", "reference image", "identity", "crop face", "white background"],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The picture of the person. VAE Encode takes a batch for one video: send several one at "
                    "a time.",
                ),
                io.Int.Input(
                    "size", default=_REFERENCE.size, min=64, max=2048, step=16,
                    tooltip="Side of the square in pixels. 512 is published; a smaller one takes less time and "
                    "memory.",
                ),
                io.Float.Input(
                    "crop_factor", default=_REFERENCE.crop_factor, min=1.0, max=10.0, step=0.05, round=0.01,
                    tooltip="Side of the square as a multiple of the box's longer side: 1 is the box alone, the "
                    "published 1.5 shows hair and chin.",
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="1 where the person is, from Remove Background or a face mask. The rest becomes white. "
                    "Without bboxes the square goes around it.",
                ),
                _boxes_input(),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The square picture. Connect it to VAE Encode.")],
        )

    @classmethod
    def execute(cls, image, size, crop_factor, mask=None, bboxes=None) -> io.NodeOutput:
        config = ReferenceConfig(size=size, crop_factor=crop_factor)
        prepared, messages = reference_picture.prepare(image, config, mask, bboxes)
        if len(prepared) > 1:
            messages.append(_ONE_AT_A_TIME.format(len(prepared)))
        tell("Prepare Reference", messages, logging.WARNING)
        shown = ui.PreviewImage(prepared, cls=cls).as_dict()
        return io.NodeOutput(prepared, ui={**shown, "text": tuple(messages)} if messages else shown)


class UnderstudyLoadVideoIdentityAdapter(io.ComfyNode):
    """The adapter's weights from a file of the host's `loras` folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyLoadVideoIdentityAdapter",
            display_name="Load Video Identity Adapter (Stand-In)",
            category=CATEGORY,
            description="Reads the published weights, as .ckpt or .safetensors, in fp16, bf16 or fp32, of any rank. "
            "Wan 2.2 has two files, one for each of its models.",
            search_aliases=["Stand-In", "identity adapter", "face video", "load adapter", "character consistency"],
            inputs=[
                io.Combo.Input(
                    "adapter_name", options=files.FOLDER.choices(),
                    tooltip="A file in models/loras or output/loras. A plain LoRA is refused: use Load LoRA for it.",
                ),
            ],
            outputs=[ADAPTER.Output(display_name="adapter", tooltip="Connect it to Apply Video Identity.")],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name) -> int:
        """A file written anew under its name is read anew."""
        return files.FOLDER.fingerprint(adapter_name)

    @classmethod
    def execute(cls, adapter_name) -> io.NodeOutput:
        return io.NodeOutput(files.load(adapter_name))


class UnderstudyApplyVideoIdentity(io.ComfyNode):
    """A model whose video tokens see one person's reference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyApplyVideoIdentity",
            display_name="Apply Video Identity (Stand-In)",
            category=CATEGORY,
            description="Shows a reference picture to a Wan video model, which keeps that person through the video. "
            "Chain it for more people, each with a mask of their own. Apply it to both models of Wan 2.2.",
            search_aliases=["Stand-In", "face video", "keep identity", "character consistency", "reference", "Wan"],
            inputs=[
                io.Model.Input("model", tooltip="A Wan text-, image-to-video or VACE model. It is not changed."),
                ADAPTER.Input("adapter", tooltip="The weights that were trained for this model."),
                io.Latent.Input(
                    "reference", tooltip="VAE Encode of one picture from Prepare Reference, with this model's VAE.",
                ),
                _fraction(
                    "strength", 0.01,
                    "Weight of the reference in the video's attention: 0 is off, 1 as published. Values between are "
                    "exact and somewhat slower.",
                ),
                _fraction("start_percent", 0.001, "Where the reference comes in, as a fraction of the schedule."),
                _fraction("end_percent", 0.001, "Where the reference goes out, as a fraction of the schedule."),
                io.String.Input(
                    "blocks", default=_DEFAULT.blocks, advanced=True,
                    tooltip="Transformer blocks in which the reference is seen: 'all' as published, or numbers and "
                    "ranges from 0 on, such as 0-19, 25.",
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Where in the video this person is, 0 to 1: one mask for all frames, or one a frame. "
                    "Nothing connected is everywhere.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="Connect it to a sampler, or to Apply Video Identity for more people.")],
        )

    @classmethod
    def execute(
        cls, model, adapter, reference, strength, start_percent, end_percent, blocks, mask=None
    ) -> io.NodeOutput:
        config = VideoIdentityConfig(strength, start_percent, end_percent, blocks)
        video_reference = method.video_reference(adapter, reference["samples"], config, mask)
        return io.NodeOutput(sampling.apply(model, video_reference))


NODES = [UnderstudyPrepareReference, UnderstudyLoadVideoIdentityAdapter, UnderstudyApplyVideoIdentity]
