"""A fusion applied to a small model, and ComfyUI's estimate under its conditionings."""

import comfy.samplers
import torch
from pack.nodes.fusion_embedding import sampling
from pack.nodes.fusion_embedding.config import ApplyConfig
from support import fusions

MODEL = fusions.model()
SIGMA = 3.0
NOISE = torch.randn(1, 4, 8, 8, generator=fusions.generator(3))


def applied(model=MODEL, fusion=None, states=None, fused=None, pose=None, strength=1.0):
    fusion = fusion or fusions.fusion(model, unet=None, unet_kind="")
    with torch.inference_mode():
        return sampling.apply(
            model, fusion, fusions.states() if states is None else states,
            fusions.fused() if fused is None else fused, fusions.poses() if pose is None else pose,
            ApplyConfig(strength),
        )


def denoised(model, *conditionings, noise=NOISE, guider=None, cfg=1.0):
    """The estimate at one sigma by ComfyUI's guider: one conditioning, or CFG's two."""
    guider = guider or comfy.samplers.CFGGuider(model)
    if len(conditionings) == 1:
        guider.set_conds(conditionings[0], conditionings[0])
    elif conditionings:
        guider.set_conds(*conditionings)
        guider.set_cfg(cfg)
    sampler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, torch.tensor([SIGMA, 0.0]), None, None, True, 1)
