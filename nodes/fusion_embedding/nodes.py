"""Nodes of the fusion embedding (FPDM): load, combine, apply, and retarget a pose."""

import logging

from comfy_api.latest import io

from ..consent import gate
from ..fingerprint import weights_fingerprint
from ..inputs import strangers, widgets
from ..inputs.checked import CheckedNode
from ..messages import tell
from . import encoding, files, method, retargeting, sampling
from .config import ApplyConfig, RetargetConfig
from .layout import FusionError

CATEGORY = "Understudy/Fusion embedding"
FUSION = io.Custom("UNDERSTUDY_FUSION")
FUSION_EMBED = io.Custom("UNDERSTUDY_FUSION_EMBED")
KEYPOINTS = io.Custom("POSE_KEYPOINT")
_APPLY = ApplyConfig()
_FULL_SIZE = (
    "appearance is DINOv2 at 518 pixels, and the generator was trained at 512, as published: connect Encode "
    "Appearance in place of CLIP Vision Encode"
)
_RETARGET = RetargetConfig()


class UnderstudyLoadFusion(widgets.LoadNode):
    """A fusion from a file of this pack, or from a published checkpoint as far as it fits."""

    FOLDER, FILE = files.FOLDER, "fusion_name"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyLoadFusion", display_name="Load Fusion (FPDM)",
            category=CATEGORY,
            description="Reads a fusion of this pack, or a published checkpoint of either stage, and shows on the "
            "node what it holds and what did not fit.",
            search_aliases=[
                "FPDM", "load fusion embedding", "pose transfer", "person image synthesis", "pose",
                "ポーズ", "姿态",
            ],
            inputs=[
                cls.file("A file in models/fusion_embeddings or output/fusion_embeddings, .safetensors or .ckpt."),
                cls.purpose(),
            ],
            outputs=[
                FUSION.Output(display_name="fusion", tooltip="Connect it to Combine Fusion and to Apply Fusion."),
            ],
        )

    @classmethod
    def execute(cls, fusion_name, purpose=gate.UNSPECIFIED) -> io.NodeOutput:
        fusion, report = files.load(fusion_name)
        tell("Load Fusion", report)
        gate.check_used("Load Fusion", fusion.consent, purpose)
        return io.NodeOutput(fusion, ui={"text": tuple(report)})


class UnderstudyCombineFusion(CheckedNode):
    """The embedding of a person in a pose."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyCombineFusion", display_name="Combine Fusion (FPDM)",
            category=CATEGORY,
            description="Combines a source picture and a pose into one embedding, close to that of the picture to "
            "generate.",
            search_aliases=[
                "FPDM", "fusion embedding", "combiner", "pose transfer", "image embedding", "ポーズ", "姿态",
            ],
            inputs=[
                FUSION.Input("fusion", tooltip="A fusion with a combiner, from Train Fusion Combiner or a file."),
                io.Image.Input("source", tooltip="The person: one picture per pose, or one for all."),
                io.Image.Input(
                    "pose", tooltip="OpenPose drawings, 18 points on black, from SDPose Draw Keypoints or Puppet.",
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True,
                    tooltip="The encoder that the combiner was trained with. Only for a fusion that holds none.",
                ),
            ],
            outputs=[
                FUSION_EMBED.Output(
                    display_name="fusion_embed", tooltip="Connect it to Apply Fusion, with the same pose."
                ),
            ],
        )

    @classmethod
    def execute(cls, fusion, source, pose, clip_vision=None) -> io.NodeOutput:
        if fusion.combiner is None:
            raise FusionError("this fusion has no combiner: train one with Train Fusion Combiner")
        encoder = encoding.encoder_for(fusion, clip_vision)
        method.check_poses(pose)
        strange = strangers.of_pictures(source, "source", encoder)
        tell("Combine Fusion", [*strange, *method.pose_warnings(pose)], logging.WARNING)
        count = method.common_batch_size({"source": len(source), "pose": len(pose)})
        vectors = encoding.fused(
            fusion.combiner, encoder, method.to_batch(source, count), method.to_batch(pose, count)
        )
        return io.NodeOutput(method.FusionEmbedding(vectors, weights_fingerprint(fusion.combiner)))


class UnderstudyEncodeAppearance(CheckedNode):
    """A picture's appearance as the generator was trained on it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyEncodeAppearance", display_name="Encode Appearance (FPDM)",
            category=CATEGORY,
            description="Encodes the source as Train Fusion Generator does: the whole picture, and for DINOv2 at 512 "
            "pixels, as published, where CLIP Vision Encode takes 518.",
            search_aliases=["FPDM", "appearance", "CLIP vision encode", "DINOv2", "image encoder", "外見", "外观"],
            inputs=[
                io.ClipVision.Input(
                    "clip_vision", tooltip="The encoder of the training: DINOv2 Large, as published.",
                ),
                io.Image.Input("source", tooltip="The person: one picture per pose, or one for all."),
            ],
            outputs=[
                io.ClipVisionOutput.Output(display_name="appearance", tooltip="Connect it to Apply Fusion."),
            ],
        )

    @classmethod
    def execute(cls, clip_vision, source) -> io.NodeOutput:
        return io.NodeOutput(encoding.appearance(clip_vision, source))


class UnderstudyApplyFusion(CheckedNode):
    """A model and its two conditionings, for the person of the source in the pose."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyApplyFusion", display_name="Apply Fusion (FPDM)",
            category=CATEGORY,
            description="Conditions the model that the fusion was trained for on the source's appearance instead of "
            "a text, the fusion embedding, and the pose. Connect all three outputs to the sampler.",
            search_aliases=[
                "FPDM", "pose transfer", "pose guided", "person image synthesis", "reposing",
                "swap pose", "motion transfer", "ポーズ", "姿态", "姿势",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The SD 1.5, 2.1 or SDXL model of the training; it is not modified."),
                FUSION.Input("fusion", tooltip="A fusion with a generator, from Train Fusion Generator or a file."),
                FUSION_EMBED.Input(
                    "fusion_embed", optional=True,
                    tooltip="From Combine Fusion. Disconnect it for a generator that was trained without a combiner.",
                ),
                io.ClipVisionOutput.Input(
                    "appearance",
                    tooltip="Encode Appearance of the source, with the encoder of the training.",
                ),
                io.Image.Input(
                    "pose", tooltip="OpenPose drawing at the size of the result in pixels; a batch gives a batch.",
                ),
                widgets.strength(
                    "Weight of the pose, the embedding and the UNet's training: 1 as published, 0 gives the base "
                    "model.", _APPLY.strength, highest=2.0,
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="Connect it to the sampler."),
                io.Conditioning.Output(display_name="positive", tooltip="Connect it to the sampler's positive."),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="Connect it to the sampler's negative: no appearance, no embedding, no pose.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, fusion, appearance, pose, strength, fusion_embed=None) -> io.NodeOutput:
        tell("Apply Fusion", method.pose_warnings(pose), logging.WARNING)
        fused = method.vectors_for(fusion, fusion_embed)
        states = encoding.hidden_states(appearance)
        if encoding.at_full_size(states):
            tell("Apply Fusion", [_FULL_SIZE], logging.WARNING)
        return io.NodeOutput(*sampling.apply(model, fusion, states, fused, pose, ApplyConfig(strength)))


class UnderstudyRetargetPose(CheckedNode):
    """The source's body proportions on the keypoints of a pose."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyRetargetPose", display_name="Retarget Pose (FPDM)",
            category=CATEGORY,
            description="Gives the person in a pose the limb lengths of another person, so that a child's pose fits "
            "an adult. Limbs keep their directions, and feet stay on the ground.",
            search_aliases=[
                "pose retargeting", "body proportions", "OpenPose", "keypoints", "skeleton", "pose",
                "ポーズ", "姿态", "姿势",
            ],
            inputs=[
                KEYPOINTS.Input(
                    "keypoints", tooltip="The poses to change, from SDPose Keypoint Extractor or a pose editor.",
                ),
                KEYPOINTS.Input(
                    "source_keypoints", tooltip="Keypoints of the source picture, whose proportions are used.",
                ),
                widgets.fraction(
                    "amount", _RETARGET.amount,
                    "How much of the source's proportions the pose takes: 0 is off, 1 is all.",
                ),
                widgets.fraction(
                    "score_threshold", _RETARGET.score_threshold,
                    "Points below this score count as not detected, as in SDPose Draw Keypoints.", optional=True,
                    advanced=True,
                ),
            ],
            outputs=[
                KEYPOINTS.Output(
                    display_name="keypoints", tooltip="Connect it to SDPose Draw Keypoints, and that to the pose."
                ),
            ],
        )

    @classmethod
    def execute(cls, keypoints, source_keypoints, amount, score_threshold=_RETARGET.score_threshold) -> io.NodeOutput:
        config = RetargetConfig(amount, score_threshold)
        return io.NodeOutput(retargeting.retarget(keypoints, source_keypoints, config))


NODES = [
    UnderstudyLoadFusion, UnderstudyCombineFusion, UnderstudyEncodeAppearance, UnderstudyApplyFusion,
    UnderstudyRetargetPose,
]
