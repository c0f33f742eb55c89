"""Nodes of the video identity adapter (Stand-In): prepare a reference, load and apply the adapter."""

import logging

from comfy_api.latest import io

from .. import explanations
from ..consent import gate
from ..inputs import strangers, widgets
from ..inputs.checked import CheckedNode
from ..inputs.latents import check_frames
from ..messages import pictures, tell
from . import files, method, reference_picture, sampling
from .config import HIGHEST_GUIDANCE, HIGHEST_STRENGTH, ReferenceConfig, VideoIdentityConfig

CATEGORY = "Understudy/Video identity"
ADAPTER = io.Custom("UNDERSTUDY_VIDEO_ADAPTER")
_DEFAULT = VideoIdentityConfig()
_REFERENCE = ReferenceConfig()
_ONE_AT_A_TIME = (
    "{} pictures: VAE Encode of a video model treats them as one video and only the first counts; send them one at a "
    "time, with Rebatch Images and batch_size 1"
)


def _boxes_input() -> io.BoundingBox.Input:
    boxes = io.BoundingBox.Input(
        "bboxes", optional=True, force_input=True,
        tooltip="Boxes of faces from a face detector; the largest counts. Plain numbers are left, top, right, "
        "bottom; from 0 to 1 they are fractions of the picture. Without a face the whole picture is used.",
    )
    # ComfyUI's default, a box of 512 pixels, is sent by clients that fill in defaults where nothing is connected.
    boxes.default = None
    return boxes


class UnderstudyPrepareReference(CheckedNode):
    """A picture of a person as the adapter was trained on them: a square around the face, on white."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyPrepareReference", display_name="Prepare Reference (Stand-In)",
            category=CATEGORY,
            description="Crops a square around the face and paints the background white, as the video identity "
            "adapter was trained. Connect it to VAE Encode.",
            search_aliases=[
                "Stand-In", "face crop", "reference image", "identity", "crop face", "white background",
                "face", "顔", "人脸",
            ],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The picture of the person. VAE Encode treats a batch as one video: send several one "
                    "at a time.",
                ),
                io.Int.Input(
                    "size", default=_REFERENCE.size, min=64, max=2048, step=16,
                    tooltip="Side of the square in pixels. Published: 512. A smaller one takes less time and memory.",
                ),
                io.Float.Input(
                    "crop_factor", default=_REFERENCE.crop_factor, min=1.0, max=10.0, step=0.05, round=0.01,
                    tooltip="Side of the square as a multiple of the box's longer side: 1 is the box alone, 1.5, as "
                    "published, shows hair and chin.",
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="1 where the person is, from Remove Background or a face mask. The background becomes "
                    "white. Without bboxes the square goes around the mask.",
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
        preview = pictures("Prepare Reference", prepared, cls)
        shown = preview.as_dict() if preview else {}
        return io.NodeOutput(prepared, ui={**shown, "text": tuple(messages)} if messages else shown)


class UnderstudyLoadVideoIdentityAdapter(widgets.LoadNode):
    """The adapter's weights from a file in ComfyUI's `loras` folders."""

    FOLDER, FILE = files.FOLDER, "adapter_name"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyLoadVideoIdentityAdapter", display_name="Load Video Identity Adapter (Stand-In)",
            category=CATEGORY,
            description="Reads the adapter's weights from .ckpt or .safetensors, in fp16, bf16 or fp32, of any rank. "
            "Wan 2.2 needs two files, one for each of its models.",
            search_aliases=[
                "Stand-In", "identity adapter", "face video", "load adapter", "character consistency",
                "顔", "人脸",
            ],
            inputs=[
                cls.file("A file in models/loras or output/loras. Only adapters are listed: else use Load LoRA."),
                cls.purpose(),
            ],
            outputs=[ADAPTER.Output(display_name="adapter", tooltip="Connect it to Apply Video Identity.")],
        )

    @classmethod
    def validate_inputs(cls, adapter_name) -> bool:
        """A file that is not listed passes: what it lacks is said when it is read."""
        return True

    @classmethod
    def execute(cls, adapter_name, purpose=gate.UNSPECIFIED) -> io.NodeOutput:
        adapter = files.load(adapter_name)
        gate.check_used("Load Video Identity Adapter", adapter.consent, purpose)
        return io.NodeOutput(adapter)


class UnderstudyApplyVideoIdentity(CheckedNode):
    """A model whose video tokens see one person's reference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyApplyVideoIdentity", display_name="Apply Video Identity (Stand-In)",
            category=CATEGORY,
            description="Shows a reference picture to a Wan video model, so that the video keeps that person. Chain "
            "it for several people, each with a mask. For Wan 2.2 apply it to both models.",
            search_aliases=[
                "Stand-In", "face video", "keep identity", "character consistency", "reference", "Wan",
                "face swap", "顔", "人脸", "人物",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A Wan text-to-video, image-to-video or VACE model; it is not modified.",
                ),
                ADAPTER.Input("adapter", tooltip="The weights that were trained for this model."),
                io.Latent.Input(
                    "reference", tooltip="One picture from Prepare Reference, encoded with this model's VAE.",
                ),
                widgets.strength(
                    "Weight of the reference in the video's attention: 0 is off, 1 as published, above 1 stronger. "
                    "Other values than 1 are exact and somewhat slower.", _DEFAULT.strength, highest=HIGHEST_STRENGTH,
                ),
                *widgets.percent_range(_DEFAULT, "the reference"),
                widgets.numbers(
                    "blocks", _DEFAULT.blocks, "Transformer blocks that see the reference: 'all' as published"
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Where in the video this person is, 0 to 1: one mask for all frames, or one per frame. "
                    "Without it: everywhere.",
                ),
                io.Float.Input(
                    "reference_guidance", default=_DEFAULT.reference_guidance, min=0.0, max=HIGHEST_GUIDANCE,
                    step=0.1, round=False, optional=True, advanced=True,
                    tooltip="How far the video goes on in the direction in which this reference changed it, as cfg "
                    "for the text. 0 is off; above 0 each step takes one more pass of the model: half as long again "
                    "with CFG, twice as long without.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="Connect it to a sampler, or to another Apply Video Identity.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_values) -> str:
        return explanations.fingerprint()

    @classmethod
    def execute(
        cls, model, adapter, reference, strength, start_percent, end_percent, blocks, mask=None,
        reference_guidance=_DEFAULT.reference_guidance,
    ) -> io.NodeOutput:
        config = VideoIdentityConfig(strength, start_percent, end_percent, blocks, reference_guidance)
        video_reference = method.video_reference(adapter, reference["samples"], config, mask)
        patched = sampling.apply(model, video_reference)
        check_frames(reference["samples"], "reference")
        strange = strangers.warnings(reference["samples"], "reference", model.model.model_config)
        tell("Apply Video Identity", strange, logging.WARNING)
        return io.NodeOutput(patched)


NODES = [UnderstudyPrepareReference, UnderstudyLoadVideoIdentityAdapter, UnderstudyApplyVideoIdentity]
