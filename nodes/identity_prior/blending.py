"""The blend in the host: a model whose background follows the inverted picture, whatever sampler runs it.

A sampler owns its latent x, so the blend stands at the model call, which every sampler makes in the same terms:
before it, x outside the mask is the path at that sigma; after it, the estimate there is the one that leads along the
path, so that Euler and DDIM walk it exactly and other samplers as near as their order allows. When the sampler is
done, what lies outside is the end of the path itself.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import OrderedDict
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from .. import subject_tokens
from ..messages import tell
from ..patching import models, samplers
from . import capture, method
from .config import BlendConfig, MaskConfig
from .inversion import Inversion, Inverting

KEY = "understudy_identity_blend"
_KEPT_RUNS = 4


def apply(
    model: Any, inversion: Inversion, positive: list, masks: MaskConfig, config: BlendConfig,
    mask: torch.Tensor | None,
) -> Any:
    """A clone of `model` that blends. Raises ValueError, naming the input and the fix, where it cannot."""
    channels = model.model.latent_format.latent_channels
    clean = inversion.trajectory.clean
    if clean.shape[1] != channels:
        raise ValueError(
            f"inversion has {clean.shape[1]} channels and the model's latents have {channels}: invert with this model"
        )
    layers = capture.layers_of(model)
    outside = None if mask is None else method.latent_mask(mask, clean.shape)
    if outside is None:
        subject_tokens.require_subject(positive, "positive")
        if not layers:
            raise ValueError("this model has no cross-attention to find the subject by: connect an outside `mask`")
        capture.chosen_layers(layers, masks, max(clean.shape[-2:]))
        model = capture.watched(model)
    blending = Blending(inversion, layers, masks, config, outside)
    wrappers = {
        WrappersMP.OUTER_SAMPLE: blending.outer_sample,
        WrappersMP.SAMPLER_SAMPLE: blending.sampler_sample,
        WrappersMP.PREDICT_NOISE: blending.predict_noise,
    }
    return models.with_wrappers(model, key=KEY, wrappers=wrappers, attachment=blending)


class Blending:
    """The blend of one patched model. What a run needs travels with it; only its masks stay, for Show Edit Masks."""

    def __init__(self, inversion, layers, masks, config, outside):
        self.inversion = inversion
        self.layers = layers
        self.masks = masks
        self.config = config
        self.outside = outside
        # Source and edited mask [B, T, H, W] of the last runs, by the digest of their samples.
        self.runs: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def outer_sample(self, executor, *args, **kwargs):
        """The host's OUTER_SAMPLE: remember the masks under what came out."""
        self._last = None
        samples = executor(*args, **kwargs)
        if self._last is not None and not samples.is_nested:
            self.runs[_digest(samples)] = self._last
            while len(self.runs) > _KEPT_RUNS:
                self.runs.popitem(last=False)
        return samples

    def sampler_sample(self, executor, guider, sigmas, extra_args, callback, noise, latent_image=None,
                       denoise_mask=None, disable_pbar=False):
        """The host's SAMPLER_SAMPLE: one run, from its checks to its last blend."""
        name = _check_sampler(executor.class_obj)
        grid = [float(sigma) for sigma in sigmas]
        if not method.same_grid(grid, self.inversion.trajectory.sigmas):
            raise ValueError(
                f"the sampler has {len(grid)} sigmas from {grid[0]:.4g} to {grid[-1]:.4g}, and the picture was "
                f"inverted on others, from {self.inversion.trajectory.sigmas[0]:.4g} in "
                f"{len(self.inversion.trajectory.sigmas)}: connect the same SIGMAS to Invert Image and to the sampler"
            )
        run = _Run(self, guider.inner_model, noise, name, subject_tokens.positions_by_entry(guider.conds))
        if run.starts_elsewhere(guider, sigmas, noise, latent_image):
            said = "noise is not that of Invert Image, so the edit will not follow the picture: connect its `noise`"
            tell("Identity Mask Blend", [said], logging.WARNING)
        options = extra_args["model_options"]
        options = {**options, "transformer_options": {**options["transformer_options"], KEY: run}}
        samples = executor(
            guider, sigmas, {**extra_args, "model_options": options}, callback, noise, latent_image, denoise_mask,
            disable_pbar,
        )
        self._last = run.masks()
        last = grid[-1]
        if run.acts(last) and samples.shape == noise.shape:
            sampling = guider.inner_model.model_sampling
            end = run.path.at(last).to(samples)
            end = end if last == 0 else sampling.inverse_noise_scaling(sigmas[-1], end)
            # What is mixed is mixed already: some samplers end beside their last estimate.
            samples = method.blend(samples, end, (run.mask > 0).float())
        return samples

    def predict_noise(self, executor, x, timestep, model_options={}, seed=None):
        """The host's PREDICT_NOISE: every guider's every estimate, in between blended in and out."""
        run = model_options.get("transformer_options", {}).get(KEY)
        sigma = float(timestep.flatten()[0])
        if run is None or not run.acts(sigma):
            return executor(x, timestep, model_options, seed)
        run.check(x)
        watch = None
        if self.outside is None:
            watch = capture.Watch(run.entries, self.layers, self.masks, x.shape)
            options = {**model_options["transformer_options"], capture.KEY: watch}
            model_options = {**model_options, "transformer_options": options}
        denoised = executor(method.blend(x, run.path.at(sigma), run.mask), timestep, model_options, seed)
        # EasyCache and its like skip the model in some steps: the mask then stays as it was last seen.
        if watch is not None and (watch.maps or not run.seen):
            run.see(watch.heat())
        return method.blend(denoised, run.path.denoised(sigma), run.mask)


class _Run:
    """One sampling run: the path, and the mask as it changes."""

    def __init__(self, blending: Blending, base: Any, noise: torch.Tensor, sampler: str, entries: dict):
        self.blending = blending
        self.sampler = sampler
        self.entries = entries
        self.shape = noise.shape
        # Where it lies: a step needs two of its latents, not all.
        self.path = blending.inversion.trajectory
        percent_to_sigma = base.model_sampling.percent_to_sigma
        self.start = percent_to_sigma(blending.config.start_percent) * (1 + method.SIGMA_TOLERANCE)
        self.end = percent_to_sigma(blending.config.end_percent) * (1 + method.SIGMA_TOLERANCE)
        self.to_the_end = blending.config.end_percent >= 1.0
        self.check(noise)
        if blending.outside is not None:
            method.check_masks(len(blending.outside), len(noise))
        if blending.outside is None and not entries:
            raise ValueError(
                "the sampler's positive does not say where the subject is named: connect the same Encode Identity to "
                "the sampler's positive as to Identity Mask Blend"
            )
        self.source = blending.inversion.source_mask.to(noise.device)
        self.edited = torch.zeros_like(self.source)
        self.seen = False
        # As published, nothing is blended before the first step has shown where the subject is.
        self.mask = torch.ones_like(self.source) if blending.outside is None else blending.outside.to(noise.device)

    def acts(self, sigma: float) -> bool:
        return self.start >= sigma and (sigma > self.end or self.to_the_end)

    def starts_elsewhere(self, guider, sigmas, noise, latent_image) -> bool:
        """Whether what the sampler makes of the noise is not the path's first latent; a later stretch may differ."""
        first = self.path.sigmas[0]
        if not noise.any() or not math.isclose(float(sigmas[0]), first, rel_tol=method.SIGMA_TOLERANCE):
            return False
        most = comfy.samplers.Sampler().max_denoise(guider, sigmas)
        x = guider.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image, most)
        start = self.path.at(first).to(x)
        # Rounding is far below a tenth, and another noise as large as the path itself.
        return bool((x - start).square().mean() > 0.01 * start.square().mean())

    def check(self, x: torch.Tensor) -> None:
        """Raises ValueError where x does not fit the path."""
        path = self.path.clean
        if x.shape != self.shape:
            raise ValueError(
                f"sampler {self.sampler} changed the latent from {tuple(self.shape)} to {tuple(x.shape)}, which the "
                "blend cannot follow: choose one that keeps the size, such as euler or dpmpp_2m"
            )
        if path.shape[1:] != x.shape[1:] or len(path) not in (1, len(x)):
            raise ValueError(
                f"the inverted latent is {tuple(path.shape)} and the sampled one {tuple(x.shape)}: sample at the "
                "size of the inverted picture, with one inverted latent or one for each of the batch"
            )

    def see(self, heat: torch.Tensor) -> None:
        """The edited branch's map of one call, [B, T, h, w]: the mask from now on."""
        masks = self.blending.masks
        self.edited = method.subject_mask(heat.to(self.source.device), self.source.shape[-2:], masks)
        self.mask = method.grown(method.union(self.source, self.edited), masks.grow)
        self.seen = True

    def masks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Source and edited mask [B, T, H, W], of one shape."""
        edited = self.edited if self.blending.outside is None else self.mask
        count, frames = max(len(self.source), len(edited)), self.source.shape[1]
        source, edited = (mask.expand(count, frames, -1, -1).cpu() for mask in (self.source, edited))
        return source, edited


def masks_of(model: Any, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and edited mask [B, T, H, W] of the run that made `samples`. Raises ValueError, naming the fix."""
    blending = models.attachment(model, KEY)
    if blending is None:
        raise ValueError("model has no blend: connect the output of Identity Mask Blend to `model`")
    found = blending.runs.get(_digest(samples))
    if found is None:
        # Upscaled, composited or cut meanwhile: the last run's is what remains known.
        found = next(reversed(blending.runs.values()), None)
        if len(blending.runs) > 1:
            logging.warning(
                "[Understudy] samples are not what the sampler made, or older than its last %d runs: Show Edit Masks "
                "shows the last run's. Connect the sampler's own latent to `samples`", _KEPT_RUNS,
            )
    if found is None:
        raise ValueError(
            "model has not been sampled with: connect the very output of Identity Mask Blend that the sampler has, "
            "and the sampler's latent to `samples`"
        )
    return found


def _digest(samples: torch.Tensor) -> str:
    return hashlib.sha256(samples.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()


def _check_sampler(sampler: Any) -> str:
    """The sampler's name. Raises ValueError for one whose latents are not known to be the model's."""
    if isinstance(sampler, Inverting):
        raise ValueError(
            "the model of Invert Image has a blend already: connect the model from before Identity Mask Blend to "
            "`model`"
        )
    while not isinstance(sampler, comfy.samplers.KSAMPLER) and hasattr(sampler, "sampler"):
        sampler = sampler.sampler
    name = samplers.sampler_name(sampler)
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        raise ValueError(
            f"sampler {name} keeps its latents in a scale of its own, which the blend cannot follow: choose one from "
            "KSamplerSelect"
        )
    return name
