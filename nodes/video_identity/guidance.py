"""A third branch of guidance, for the reference; apart, since it acts after CFG and not in a call of the model.

Idea: text and reference each have a scale of their own, in three streams (ST-DRC, arXiv 2606.02441, of which only the
abstract was read). The streams are ours: beside CFG's two, one with the text and without the reference.

    D = D_cfg + g (D(text, references) - D(text, the other references))

All D are estimates of the clean video; g is `reference_guidance` of one reference, and each costs a pass a step.
"""

import uuid
from collections.abc import Sequence
from typing import Any

import comfy.samplers
import torch

from . import method
from .blocks import KEY

LEFT_OUT = "understudy_video_identity_left_out"  # the number of the reference that a call does without


class ReferenceGuidance:
    """ComfyUI's post-CFG function: goes on in the direction in which each reference has changed the estimate."""

    key = KEY
    RUN_STATE = ("_directions",)

    def __init__(self, references: Sequence[method.VideoReference]):
        self.references = tuple(references)
        self.begin()

    def begin(self) -> None:
        """Forget the run."""
        self._directions: dict[int, torch.Tensor] = {}

    @property
    def off(self) -> bool:
        """True where no reference has a scale."""
        return not any(reference.config.reference_guidance for reference in self.references)

    def __call__(self, args: dict[str, Any]) -> torch.Tensor:
        denoised = args["denoised"]
        for number, reference in enumerate(self.references):
            scale = reference.config.reference_guidance
            if scale and args["cond"] and method.is_active(reference, args["model"].model_sampling, args["sigma"]):
                denoised = denoised + scale * self._direction(number, args)
        return denoised

    def _direction(self, number: int, args: dict[str, Any]) -> torch.Tensor:
        """What this reference changed in the estimate with the text."""
        options = args["model_options"]
        transformer_options = options.get("transformer_options", {})
        # In a step that EasyCache skips the estimate is an old one, and so is what the reference changed in it.
        skipped = getattr(transformer_options.get("easycache"), "skip_current_step", False)
        if not skipped or number not in self._directions:
            # Another name, or caches of a conditioning's results would take the one for the other.
            conds = [{**cond, "uuid": uuid.uuid5(cond["uuid"], f"{KEY} {number}")} for cond in args["cond"]]
            without = {**options, "transformer_options": {**transformer_options, LEFT_OUT: number}}
            (other,) = comfy.samplers.calc_cond_batch(args["model"], [conds], args["input"], args["sigma"], without)
            self._directions[number] = args["cond_denoised"] - other
        return self._directions[number]
