"""The node of drift alignment (after VAE-LFA)."""

from comfy_api.latest import io

from ...kernels.spectral_guidance import HIGHEST_CUTOFF
from ..inputs import widgets
from ..inputs.checked import CheckedNode
from ..training.inputs import single_values
from . import method
from .config import DriftAlignmentConfig

CATEGORY = "Understudy/Drift alignment"
_DEFAULT = DriftAlignmentConfig()
_MOST_ROUNDS = 100  # as many as ComfyUI allows


class UnderstudyAlignLatentDrift(CheckedNode):
    """A latent whose low frequencies have the statistics of the rounds before it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyAlignLatentDrift", display_name="Align Latent Drift (VAE-LFA)",
            category=CATEGORY,
            is_input_list=True,
            description="Stops colour and contrast from wandering when a picture is edited round after round, or a "
            "video is made in pieces: gives the new latent the low-frequency statistics of the earlier ones.",
            search_aliases=[
                "VAE-LFA", "color drift", "colour drift", "color match", "contrast", "iterative editing",
                "multi-turn editing", "long video", "low frequency", "AdaIN", "色ずれ", "色補正", "偏色", "颜色漂移",
            ],
            inputs=[
                io.Latent.Input(
                    "latent", tooltip="The new round's latent, from the sampler or VAE Encode. A picture or a video.",
                ),
                io.Autogrow.Input(
                    "earlier",
                    tooltip="Latents of the rounds before, the first one first: single ones, or a list. They come "
                    "from the same VAE; sizes and frame counts may differ.",
                    template=io.Autogrow.TemplatePrefix(
                        io.Latent.Input("round", tooltip="Latent of an earlier round, or a list of them in order."),
                        prefix="round", min=1, max=_MOST_ROUNDS,
                    ),
                ),
                widgets.cutoff(
                    "cutoff", _DEFAULT.cutoff,
                    "Highest frequency that is aligned, in cycles per latent pixel. 0 moves each channel's "
                    f"mean alone; {HIGHEST_CUTOFF} aligns everything. Details above it stay as they are.",
                ),
                widgets.fraction(
                    "momentum", _DEFAULT.momentum,
                    "How much the running average holds on to the first rounds: 1 aligns to the first round alone, "
                    "0 to the last one.",
                ),
                widgets.strength("How far to align: 0 is off, 1 all the way.", _DEFAULT.strength),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="1 where to compare and align, for example a background that should stay. One for all, "
                    "or one for each of the batch; a video's holds for all its frames.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The aligned latent, for VAE Decode and for later rounds.")],
        )

    @classmethod
    def execute(cls, latent, earlier, **lists) -> io.NodeOutput:
        if len(latent) != 1:
            raise ValueError(f"latent is a list of {len(latent)}: connect one latent; a batch is fine")
        values = single_values(lists)
        mask = values.pop("mask", None)
        config = DriftAlignmentConfig(**values)
        if config.off:
            return io.NodeOutput(latent[0])
        rounds = [each["samples"] for connected in earlier.values() for each in connected or () if each is not None]
        samples = method.align_drift(latent[0]["samples"], rounds, config, mask)
        return io.NodeOutput({**latent[0], "samples": samples})


NODES = [UnderstudyAlignLatentDrift]
