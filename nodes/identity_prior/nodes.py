"""Nodes of the identity prior and the non-rigid edit (LIPE): load, encode, invert, blend, show masks."""

import torch
from comfy_api.latest import io

from .. import explanations, subject_tokens
from ..consent import gate
from ..inputs import widgets
from ..inputs.checked import CheckedNode
from ..messages import pictures, tell
from . import files, inversion, sampling
from .config import METHODS, PATHS, THRESHOLDS, BlendConfig, InversionConfig, MaskConfig

CATEGORY = "Understudy/Identity prior"
INVERSION = io.Custom("UNDERSTUDY_INVERSION")
_INVERSION = InversionConfig()
_MASK = MaskConfig()
_BLEND = BlendConfig()
_GAP = 8  # pixels between the two masks that Show Edit Masks shows


def _mask_text(what: str) -> io.Conditioning.Input:
    return io.Conditioning.Input(
        "mask_text", optional=True,
        tooltip=f"What {what} is found by, in place of positive: a text from Encode Identity that names the subject "
        "and what it does, without its clothes, which would draw the attention away. One more model call per step.",
    )


def _map_inputs() -> list:
    """How the subject's map is read, for experts; the same for the source mask and the edited one."""
    return [
        widgets.numbers(
            "layers", _MASK.layers, "Layers with attention to the text that count, in the order in which they run: "
            "'auto' chooses by size, 'all'", optional=True,
        ),
        io.Int.Input(
            "resolution", default=_MASK.resolution, min=0, max=1024, optional=True, advanced=True,
            tooltip="Cells on the longer side at which the layers are averaged. 0 is the finest layer's.",
        ),
        io.Float.Input(
            "smoothing", default=_MASK.smoothing, min=0.0, max=8.0, step=0.1, round=False, optional=True,
            advanced=True,
            tooltip="Blur of the map before the threshold: a standard deviation in the map's cells. 0 is off; higher "
            "values are rounder.",
        ),
    ]


def _threshold_method(threshold: str) -> io.Combo.Input:
    return io.Combo.Input(
        "threshold_method", options=list(THRESHOLDS), default=_MASK.threshold_method, optional=True, advanced=True,
        tooltip=f"How {threshold} is read. fraction: of the map's range. otsu: not at all, the level that parts the "
        "map best is found. mean_std: 0.5 is 1 standard deviation above the mean, 0.75 is 3. quantile: the share of "
        "the picture that is not the subject, say 0.75.",
    )


class UnderstudyLoadIdentityPrior(widgets.LoadNode):
    """A model that knows a saved identity."""

    FOLDER, FILE = files.FOLDER, "lora_name"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyLoadIdentityPrior", display_name="Load Identity Prior (LIPE)",
            category=CATEGORY,
            description="Applies a saved prior to the model, with the identity that it knows. Chain it for several "
            "subjects.",
            search_aliases=["LIPE", "load LoRA", "identity", "subject", "personalization", "人物", "身份"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the prior was trained on; it is not modified."),
                cls.file(
                    "A file in models/loras or output/loras from Save Identity Prior. Other LoRAs are not "
                    "listed: use Load LoRA for them.",
                ),
                widgets.strength(
                    "Weight of the prior: 0 is off, 1 as it was trained. Lower values follow prompts more.",
                    lowest=-10.0, highest=10.0,
                ),
                cls.purpose(),
            ],
            outputs=[
                io.Model.Output(tooltip="Connect it to a sampler, to Invert Image, or to Load Identity Prior."),
                widgets.IDENTITY.Output(display_name="identity", tooltip="Connect it to Encode Identity."),
                io.String.Output(display_name="trigger", tooltip="The words that stand for the subject in prompts."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name) -> bool:
        """A file that is not listed passes: what it lacks is said when it is read."""
        return True

    @classmethod
    def execute(cls, model, lora_name, strength, purpose=gate.UNSPECIFIED) -> io.NodeOutput:
        tensors, subject = files.load(lora_name)
        gate.check_used("Load Identity Prior", subject.consent, purpose)
        patched = files.apply(model, tensors, subject, strength, lora_name)
        return io.NodeOutput(patched, subject, subject.trigger)


class UnderstudyEncodeIdentity(CheckedNode):
    """A prompt about the subject, in which the tokens that name it are tagged."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyEncodeIdentity", display_name="Encode Identity (LIPE)",
            category=CATEGORY,
            description="Encodes a text in place of CLIP Text Encode and tags which of its tokens are the subject, "
            "so that the edit can see where the subject is.",
            search_aliases=["LIPE", "prompt", "text encode", "subject", "identity", "CLIP", "人物", "提示词"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                widgets.IDENTITY.Input(
                    "identity", tooltip="The subject of the text, from Load or Train Identity Prior.",
                ),
                io.String.Input(
                    "text", multiline=True, default="a photo of {subject}",
                    tooltip="What the picture shows. {subject} becomes the token and class of the identity.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    tooltip="Connect it to positive of a guider, Invert Image or Identity Mask Blend."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, identity, text) -> io.NodeOutput:
        return io.NodeOutput(subject_tokens.encode(clip, identity, text))


class UnderstudyInvertImage(CheckedNode):
    """The noise from which a sampler leads back to a picture, and the path in between."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyInvertImage", display_name="Invert Image (LIPE)",
            category=CATEGORY,
            description="Runs the sampling of a picture backwards, step by step, and locates the subject in it by "
            "the model's own attention.",
            search_aliases=[
                "LIPE", "DDIM inversion", "unsample", "real image editing", "ReNoise", "fixed point", "画像編集",
                "图像编辑", "反演",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to edit with, including its prior; it is not modified."),
                io.Conditioning.Input(
                    "positive", tooltip="What the picture shows, from Encode Identity. It is used without CFG.",
                ),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode. A batch is inverted together."),
                io.Sigmas.Input(
                    "sigmas", tooltip="The noise levels of the edit, from a scheduler, down to 0. Connect the same "
                    "ones to the sampler.",
                ),
                io.Combo.Input(
                    "method", options=list(METHODS), default=_INVERSION.method,
                    tooltip="ddim calls the model once per step. fixed_point repeats the call until the step leads "
                    "back. renoise averages the repetitions, for steps at which they oscillate.",
                ),
                io.Int.Input(
                    "iterations", default=_INVERSION.iterations, min=1, max=50,
                    tooltip="Model calls per step of fixed_point and renoise. More reconstruct the picture better "
                    "and take longer.",
                ),
                widgets.fraction(
                    "mask_threshold", _MASK.threshold,
                    "Where the source mask cuts the subject's attention map, as threshold_method reads it: lower "
                    "values include more around the subject.",
                ),
                *_map_inputs(),
                _mask_text("the source mask"),
                io.Combo.Input(
                    "path", options=list(PATHS), default=_INVERSION.path, optional=True, advanced=True,
                    tooltip="inversion runs the sampling backwards. flow_edit goes straight from the picture to "
                    "noise and corrects each step of the edit: one model call per step, for models that invert "
                    "badly.",
                ),
                io.Int.Input(
                    "path_seed", default=_INVERSION.seed, min=0, max=0xFFFFFFFFFFFFFFFF, optional=True, advanced=True,
                    tooltip="Draws the noise of flow_edit; inversion needs none.",
                ),
                _threshold_method("mask_threshold"),
            ],
            outputs=[
                INVERSION.Output(display_name="inversion", tooltip="Connect it to Identity Mask Blend."),
                io.Noise.Output(display_name="noise", tooltip="Connect it to SamplerCustomAdvanced."),
                io.Mask.Output(display_name="mask", tooltip="Where the subject is in the picture: 1 is the subject."),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, latent, sigmas, method, iterations, mask_threshold, mask_text=None,
        path=_INVERSION.path, path_seed=_INVERSION.seed, **maps,
    ) -> io.NodeOutput:
        masks = MaskConfig(threshold=mask_threshold, grow=0, **maps)
        config = InversionConfig(method, iterations, path, path_seed)
        inverted = inversion.invert(model, positive, latent, sigmas, config, masks, mask_text)
        size = f"{inverted.megabytes:.1f} MB on {inverted.trajectory.latents.device}"
        summary = f"inverted over {len(sigmas) - 1} steps by {inverted.method}; the path takes {size}"
        tell("Invert Image", [summary])
        noise, mask = inversion.InvertedNoise(model, inverted), _pixels(inverted.source_mask, model)
        return io.NodeOutput(inverted, noise, mask, ui={"text": (summary,)})


class UnderstudyIdentityMaskBlend(CheckedNode):
    """A model that changes the subject and keeps the rest on the inverted path."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyIdentityMaskBlend", display_name="Identity Mask Blend (LIPE)",
            category=CATEGORY,
            description="Lets each step change only the subject: where it was in the picture, and where it is in the "
            "edit. The rest follows the inverted picture. Works with the samplers of KSamplerSelect.",
            search_aliases=[
                "LIPE", "NIMA", "non-rigid edit", "blend", "background preservation", "local edit",
                "swap action", "change pose", "人物", "姿态",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that the picture was inverted with; it is not modified."),
                INVERSION.Input("inversion", tooltip="The picture's path, from Invert Image."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The edit's prompt, from Encode Identity; connect the same one to the sampler.",
                ),
                widgets.fraction(
                    "threshold", _MASK.threshold,
                    "Where the edited mask cuts the subject's attention map, as threshold_method reads it: lower "
                    "values change more around the subject, 0 everything.",
                ),
                io.Int.Input(
                    "grow", default=_MASK.grow, min=0, max=64,
                    tooltip="Latent cells, of 8 pixels for most models, by which the joint mask is widened.",
                ),
                *widgets.percent_range(_BLEND, "the blend", "Below 1, the last steps change everything."),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Where to change the picture, 0 to 1, in place of both detected masks; of any size. One "
                    "for all, or one per picture or frame.",
                ),
                *_map_inputs(),
                _mask_text("the edited mask"),
                widgets.fraction(
                    "fresh_noise", _BLEND.fresh_noise,
                    "How much of the start noise is new where the subject is: 0 is the inverted noise, which holds "
                    "its old pose, 1 all new, from the seed of the sampler's noise.", optional=True, advanced=True,
                ),
                _threshold_method("threshold"),
            ],
            outputs=[io.Model.Output(tooltip="Connect it to a guider or sampler, and to Show Edit Masks.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_values) -> str:
        return explanations.fingerprint()

    @classmethod
    def execute(
        cls, model, inversion, positive, threshold, grow, start_percent, end_percent, mask=None, mask_text=None,
        fresh_noise=_BLEND.fresh_noise, **maps,
    ) -> io.NodeOutput:
        masks = MaskConfig(threshold=threshold, grow=grow, **maps)
        config = BlendConfig(start_percent, end_percent, fresh_noise)
        return io.NodeOutput(sampling.apply(model, inversion, positive, masks, config, mask, mask_text))


class UnderstudyEditMasks(CheckedNode):
    """Where the blend located the subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyEditMasks", display_name="Show Edit Masks (LIPE)",
            category=CATEGORY,
            description="Shows the masks of a finished edit: the subject in the source picture, and in the edit.",
            search_aliases=["LIPE", "show mask", "debug", "preview mask", "attention map", "マスク", "蒙版"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The output of Identity Mask Blend that the sampler uses."),
                io.Latent.Input("samples", tooltip="The sampler's output."),
            ],
            outputs=[
                io.Mask.Output(display_name="source", tooltip="Where the subject was: 1 is the subject."),
                io.Mask.Output(
                    display_name="edited", tooltip="Where it is in the last step, before growing; your own mask if "
                    "one was connected.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, samples) -> io.NodeOutput:
        source, edited = (_pixels(mask, model) for mask in sampling.masks_of(model, samples["samples"]))
        gap = source.new_full((*source.shape[:2], _GAP), 0.5)
        shown = torch.cat([source, gap, edited], dim=2).unsqueeze(-1).expand(-1, -1, -1, 3)
        preview = pictures("Show Edit Masks", shown, cls)
        return io.NodeOutput(source, edited, ui=preview and preview.as_dict())


def _pixels(mask: torch.Tensor, model) -> torch.Tensor:
    """A MASK [B * T, 8 H, 8 W] of a mask of latent cells [B, T, H, W]."""
    ratio = getattr(model.model.latent_format, "spacial_downscale_ratio", 8)
    mask = mask.flatten(0, 1).float()
    return mask.repeat_interleave(ratio, 1).repeat_interleave(ratio, 2)


NODES = [
    UnderstudyLoadIdentityPrior, UnderstudyEncodeIdentity, UnderstudyInvertImage, UnderstudyIdentityMaskBlend,
    UnderstudyEditMasks,
]
