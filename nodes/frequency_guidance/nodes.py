"""Nodes of frequency guidance (ImPoster): the prompt switch and the guided SAMPLER."""

import logging

from comfy_api.latest import io

from ...kernels.spectral_guidance import DISTANCES, HIGHEST_CUTOFF, RULES
from ..inputs import latents, strangers, widgets
from ..inputs.checked import CheckedNode
from ..inputs.families import check_makes_pictures
from ..messages import tell
from ..patching import samplers
from . import method
from .config import APPLY_TO, MOST_DETAIL_BANDS, FrequencyGuidanceConfig

CATEGORY = "Understudy/Frequency guidance"
_DEFAULT = FrequencyGuidanceConfig()
# Published: 6 of 50 steps in the training script.
_SWITCH_PERCENT = 0.12


def _scale(id: str, tooltip: str) -> io.Float.Input:
    return widgets.fraction(id, getattr(_DEFAULT, id), tooltip)


def _choice(id: str, options: tuple[str, ...], tooltip: str, advanced: bool = False) -> io.Combo.Input:
    return io.Combo.Input(
        id, options=list(options), default=getattr(_DEFAULT, id), tooltip=tooltip, optional=advanced,
        advanced=advanced or None,
    )


def _cutoff(id: str, tooltip: str) -> io.Float.Input:
    tooltip = f"{tooltip}, in cycles per latent pixel. 0 to {HIGHEST_CUTOFF} is everything."
    return widgets.cutoff(id, getattr(_DEFAULT, id), tooltip, optional=True, advanced=True)


class UnderstudyStepwisePrompt(CheckedNode):
    """Driving prompt first, target prompt from `switch_percent` on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyStepwisePrompt", display_name="Switch Prompt During Sampling (ImPoster)",
            category=CATEGORY,
            description="Uses the driving prompt in the first steps, which lay out the action, and the target after "
            "them.",
            search_aliases=[
                "prompt switch", "prompt schedule", "timestep range", "ImPoster", "action transfer",
                "motion", "プロンプト切り替え", "提示词切换",
            ],
            inputs=[
                io.Conditioning.Input("target", tooltip="Prompt of the picture to generate, used after the switch."),
                io.Conditioning.Input("driving", tooltip="Prompt of the driving picture, used first."),
                widgets.percent(
                    "switch_percent", _SWITCH_PERCENT,
                    "Where the target prompt takes over, as a fraction of the schedule: 0 uses the target "
                    "only, 1 the driving prompt only. A step exactly at it uses the target.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="Connect it to positive.")],
        )

    @classmethod
    def execute(cls, target, driving, switch_percent) -> io.NodeOutput:
        return io.NodeOutput(method.switch_prompt(driving, target, switch_percent))


class UnderstudyFrequencyGuidanceSampler(CheckedNode):
    """Wraps a SAMPLER with guidance toward the source's amplitudes and the driving picture's phases."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        latent_help = "at the size of the result. One latent, or one per latent of the batch. Its mask is ignored."
        return io.Schema(
            node_id="UnderstudyFrequencyGuidanceSampler", display_name="Frequency Guidance Sampler (ImPoster)",
            category=CATEGORY,
            description="Moves each step towards the layout of a driving picture (its phases) and the look of a "
            "source picture (its amplitudes). Wraps any sampler, for SamplerCustom and similar nodes.",
            search_aliases=[
                "ImPoster", "action transfer", "pose transfer", "FFT", "Fourier", "phase", "amplitude",
                "motion transfer", "swap action", "動作", "ポーズ", "姿态", "动作",
            ],
            inputs=[
                io.Sampler.Input("sampler", tooltip="The sampler to guide, for example from KSamplerSelect."),
                io.Latent.Input("source", tooltip=f"VAE-encoded picture of the subject, {latent_help}"),
                io.Latent.Input("driving", tooltip=f"VAE-encoded picture of the action, {latent_help}"),
                _scale(
                    "amplitude_scale",
                    "How far each step moves the amplitudes to the source's: 0 is off, 1 all the way. Higher "
                    "values keep more of the source's overall look.",
                ),
                _scale(
                    "phase_scale",
                    "How far each step moves the phases to the driving picture's: 0 is off, 1 all the way. "
                    "Higher values follow the action more, and then also the driving subject.",
                ),
                _choice(
                    "phase_distance", DISTANCES,
                    "circular compares angles around the circle. paper is the published |angle|, which "
                    "cannot tell a picture from its 180 degree rotation.",
                ),
                _choice(
                    "apply_to", APPLY_TO,
                    "denoised guides the estimate of the picture in each step and works with every sampler. "
                    "latent guides the noisy latent between steps, as published, and works with "
                    f"ddim, {', '.join(samplers.STEPWISE_SAMPLERS)}.",
                ),
                *widgets.percent_range(_DEFAULT, "guidance", "An early end leaves the details to the model."),
                _choice(
                    "update", RULES,
                    "per_bin moves each frequency by a share of its distance. gradient is plain descent on the "
                    "losses, as published; its phase steps are far rougher: use 0.03 or less.",
                    advanced=True,
                ),
                _cutoff("phase_low", "Lowest frequency of the phase term"),
                _cutoff(
                    "phase_high",
                    "Highest frequency of the phase term; about 0.3 carries the pose without the "
                    "driving subject's details",
                ),
                _cutoff("amplitude_low", "Lowest frequency of the amplitude term"),
                _cutoff("amplitude_high", "Highest frequency of the amplitude term"),
                io.Mask.Input(
                    "source_mask", optional=True,
                    tooltip="Where the source's subject is, of any size: the driving subject is moved and scaled to "
                    "it, and its phases are those that it has in the source's scene. It needs driving_mask.",
                ),
                io.Mask.Input(
                    "driving_mask", optional=True,
                    tooltip="Where the driving subject is, of any size: its phases alone act, inside the mask and in "
                    "the scene that is being made, so that the driving picture's scene does not come along.",
                ),
                io.Int.Input(
                    "detail_bands", default=_DEFAULT.detail_bands, min=0, max=MOST_DETAIL_BANDS, optional=True,
                    advanced=True,
                    tooltip="For editing models: how many of the finest wavelet bands of each step follow the "
                    "source, where the edit leaves what is coarser alone. 0 is off, 1 or 2 keep skin and fabric.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="Connect it to SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, sampler, source, driving, source_mask=None, driving_mask=None, **settings) -> io.NodeOutput:
        config = FrequencyGuidanceConfig(**settings)
        if config.off:
            return io.NodeOutput(sampler)
        guidance = method.FrequencyGuidance(
            source["samples"], driving["samples"], config, source_mask, driving_mask
        )

        def begin(model, shape):
            check_makes_pictures(model.model_config, "frequency guidance")
            guide = guidance.begin(model, shape)
            # Also the one that is off: who puts a photograph there expects to see it.
            for name, latent in (("source", source["samples"]), ("driving", driving["samples"])):
                lines = strangers.warnings(latent, name, model.model_config)
                lines += latents.without_frames(latent, name, len(shape))
                tell("Frequency Guidance Sampler", lines, logging.WARNING)
            return guide

        wrap = samplers.guide_latent if config.apply_to == "latent" else samplers.guide_denoised
        return io.NodeOutput(wrap(sampler, begin))


NODES = [UnderstudyFrequencyGuidanceSampler, UnderstudyStepwisePrompt]
