"""The blend inside a sampling run: a model whose background follows the inverted picture, whatever sampler runs it.

A sampler keeps its latent x to itself, so the blend acts at the model call, which every sampler makes in the same
terms: before it, x outside the mask is the path at that sigma; after it, the estimate there is the one that leads
along the path, so that Euler and DDIM follow it exactly and other samplers as closely as their order allows. When
the sampler is done, what is outside is the end of the path itself.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from .. import explanations, subject_tokens
from ..inputs import latent_masks, latents, ranges
from ..inputs.families import check_one_latent, family
from ..messages import tell
from ..patching import models, samplers
from ..patching.unet_layers import CrossAttention
from . import attention, explaining, method
from .config import BlendConfig, MaskConfig
from .explaining import EditStep
from .inversion import Inversion, InversionSampler

KEY = "understudy_identity_blend"
_REMEMBERED_RUNS = 4
_OTHER_WEIGHTS = (
    "model has other weights than the one that the picture was inverted with, say a LoRA or a prior, so the path is "
    "not its own: connect one model to Invert Image and to this node"
)


def apply(
    model: Any, inversion: Inversion, positive: list, masks: MaskConfig, config: BlendConfig,
    mask: torch.Tensor | None, mask_text: list | None = None,
) -> Any:
    """A clone of `model` that blends, by `mask` [F, H, W] if there is one, else by masks from its own attention.

    That is attention to the subject in `positive`, or in `mask_text`, for which each step calls the model once more.

    Raises ValueError, naming the input and the fix, where it cannot.
    """
    check_one_latent(model, "the blend")
    clean = inversion.trajectory.clean
    latents.check_channels(clean, "inversion", model.model.latent_format.latent_channels, "invert with this model")
    if inversion.weights not in (None, model.patches_uuid):
        tell("Identity Mask Blend", [_OTHER_WEIGHTS], logging.WARNING)
    layers = attention.layers_of(model)
    if mask is not None:
        mask = latent_masks.latent_mask(mask, clean.shape)
    else:
        subject_tokens.require_subject(*((positive, "positive") if mask_text is None else (mask_text, "mask_text")))
        if not layers:
            raise ValueError(
                f"model is {family(model)}, which has no cross-attention to read the subject from: connect your own "
                "`mask`, for example from ComfyUI's SAM3 Detect"
            )
        attention.chosen_layers(layers, masks, max(clean.shape[-2:]))
        model = attention.with_recorder(model)
    blend = IdentityBlend(inversion, layers, masks, config, mask, mask_text if mask is None else None)
    wrappers = {
        WrappersMP.OUTER_SAMPLE: blend.outer_sample,
        WrappersMP.SAMPLER_SAMPLE: blend.sampler_sample,
        WrappersMP.PREDICT_NOISE: blend.predict_noise,
    }
    return models.with_wrappers(model, key=KEY, wrappers=wrappers, attachment=blend)


@dataclass(eq=False)
class IdentityBlend:
    """The blend of one patched model. A run's state travels with it; only its masks stay, for Show Edit Masks."""

    RUN_STATE = ("run_masks", "_last", "_last_steps", "explained")

    inversion: Inversion
    layers: Sequence[CrossAttention]
    masks: MaskConfig
    config: BlendConfig
    connected_mask: torch.Tensor | None
    mask_text: list | None = None
    # Source and edited mask [B, T, H, W] of the last runs, by the digest of their samples.
    run_masks: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=OrderedDict)
    _last: tuple[torch.Tensor, torch.Tensor] | None = None
    _last_steps: list[EditStep] | None = None
    # The masks of every step, of runs that Explain Result asks for.
    explained: explanations.Runs = field(default_factory=explanations.Runs)

    def explain(self, samples: torch.Tensor) -> explanations.Explanation:
        """Where each step of the run that made `samples` saw the subject. Raises ValueError, naming the fix."""
        return explaining.of_edit(self.explained.of(samples), connected=self.connected_mask is not None)

    def outer_sample(self, executor, *args, **kwargs):
        """ComfyUI's OUTER_SAMPLE: remember the masks under the samples that they made."""
        self._last = self._last_steps = None
        if self.mask_text is not None:
            attention.show_mask_text(executor.class_obj, self.mask_text)
        samples = executor(*args, **kwargs)
        if self._last is not None and not samples.is_nested:
            if self._last_steps is not None:
                self.explained.add(samples, self._last_steps)
            self.run_masks[explanations.samples_digest(samples)] = self._last
            while len(self.run_masks) > _REMEMBERED_RUNS:
                self.run_masks.popitem(last=False)
        return samples

    def sampler_sample(self, executor, guider, sigmas, extra_args, callback, noise, latent_image=None,
                       denoise_mask=None, disable_pbar=False):
        """ComfyUI's SAMPLER_SAMPLE: one run, from its checks to its last blend."""
        name = _check_sampler(executor.class_obj)
        grid, inverted = [float(sigma) for sigma in sigmas], self.inversion.trajectory.sigmas
        if not method.same_grid(grid, inverted):
            raise ValueError(
                f"the sampler has {len(grid)} sigmas from {grid[0]:.4g} to {grid[-1]:.4g}, and the picture was "
                f"inverted on {len(inverted)} from {inverted[0]:.4g}{_first_difference(grid, inverted)}: connect the "
                "same SIGMAS to Invert Image and to the sampler, which is SamplerCustom or SamplerCustomAdvanced. "
                "KSampler makes its own, and others for uni_pc and dpm_2"
            )
        conditions = guider.conds if self.mask_text is None else {attention.KEY: guider.conds[attention.KEY]}
        run = _BlendRun(self, guider.inner_model, noise, name, subject_tokens.positions_by_entry(conditions))
        if run.starts_off_path(guider, sigmas, noise, latent_image):
            warning = "noise is not Invert Image's, so the edit will not follow the picture: connect its `noise`"
            tell("Identity Mask Blend", [warning], logging.WARNING)
        elif self.config.fresh_noise and noise.any():
            mask = self.connected_mask
            mask = method.grown(run.source, self.masks.grow) if mask is None else mask
            noise = method.fresh(noise, mask.to(noise.device), self.config.fresh_noise, extra_args.get("seed") or 0)
        options = extra_args["model_options"]
        options = {**options, "transformer_options": {**options["transformer_options"], KEY: run}}
        samples = executor(
            guider, sigmas, {**extra_args, "model_options": options}, callback, noise, latent_image, denoise_mask,
            disable_pbar,
        )
        self._last, self._last_steps = run.masks(), run.history
        if run.heat is not None and (doubt := method.doubt(run.heat, run.edited)):
            tell("Identity Mask Blend", [f"the edited mask {doubt}: {attention.MASK_FIX}"], logging.WARNING)
        last = grid[-1]
        if run.is_active(last) and samples.shape == noise.shape:
            model_sampling = guider.inner_model.model_sampling
            end = run.path.at(last).to(samples)
            end = end if last == 0 else model_sampling.inverse_noise_scaling(sigmas[-1], end)
            # Partly masked cells were already blended at each step; some samplers end beside their last estimate.
            samples = method.blend(samples, end, (run.mask > 0).float())
        return samples

    def predict_noise(self, executor, x, timestep, model_options={}, seed=None):
        """ComfyUI's PREDICT_NOISE: the guider's estimate, its input and its output blended with the path."""
        run = model_options.get("transformer_options", {}).get(KEY)
        sigma = float(timestep.flatten()[0])
        if run is None or not run.is_active(sigma):
            return executor(x, timestep, model_options, seed)
        run.check(x)
        recorder, options = None, model_options
        if self.connected_mask is None:
            recorder = attention.AttentionRecorder(run.subject, self.layers, self.masks, x.shape)
            if self.mask_text is None:
                options = recorder.added_to(model_options)
        blended = method.blend(x, run.path.at(sigma), run.mask)
        denoised = executor(blended, timestep, options, seed)
        if recorder is not None and self.mask_text is not None:
            attention.look_by_mask_text(executor.class_obj, blended, timestep, model_options, recorder)
        if recorder is not None:
            run.update_mask(recorder)
        run.remember(sigma)
        return method.blend(run.path.corrected(denoised, sigma), run.path.denoised(sigma), run.mask)


class _BlendRun:
    """One sampling run: the path, and the mask as it changes."""

    def __init__(self, blend: IdentityBlend, base: Any, noise: torch.Tensor, sampler: str, subject: Mapping):
        self.masks_config = blend.masks
        self.connected_mask = blend.connected_mask
        self.sampler = sampler
        self.subject = subject
        self.shape = noise.shape
        # It stays on its device: a step needs two of its latents, not all.
        self.path = blend.inversion.trajectory
        config = blend.config
        self.steps = ranges.sigma_range(base.model_sampling, config.start_percent, config.end_percent)
        self.to_the_end = config.end_percent >= 1.0
        self.check(noise)
        if self.connected_mask is not None:
            latents.check_batch(len(self.connected_mask), len(noise), "mask", "mask")
        elif not subject:
            raise ValueError(
                "the sampler's positive does not say where the subject is named: connect the same Encode Identity to "
                "the sampler's positive as to Identity Mask Blend"
            )
        self.source = blend.inversion.source_mask.to(noise.device)
        self.edited = torch.zeros_like(self.source)
        self.heat: torch.Tensor | None = None
        # As published, nothing is blended before the first step has shown where the subject is.
        first = torch.ones_like(self.source) if self.connected_mask is None else self.connected_mask
        self.mask = first.to(noise.device)
        self.history: list[EditStep] | None = [] if explanations.is_asked() else None

    def is_active(self, sigma: float) -> bool:
        """Whether the blend acts at sigma; at sigma 0 is the finished latent."""
        return sigma in self.steps or (sigma == 0 and self.to_the_end)

    def starts_off_path(self, guider, sigmas, noise, latent_image) -> bool:
        """Whether the sampler makes another latent of the noise than the path's first one; a later stretch may."""
        first = self.path.sigmas[0]
        if not noise.any() or not math.isclose(float(sigmas[0]), first, rel_tol=ranges.SIGMA_TOLERANCE):
            return False
        max_denoise = comfy.samplers.Sampler().max_denoise(guider, sigmas)
        x = guider.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image, max_denoise)
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

    def update_mask(self, recorder: attention.AttentionRecorder) -> None:
        """The mask from now on, from where the edit's last call shows the subject."""
        self.heat = recorder.heat(self.heat)
        heat = self.heat.to(self.source.device)
        self.edited = method.subject_mask(heat, self.source.shape[-2:], self.masks_config)
        self.mask = method.grown(method.union(self.source, self.edited), self.masks_config.grow)

    def remember(self, sigma: float) -> None:
        """Add the masks as they are now to what Explain Result shows, once for each noise level."""
        if self.history is None:
            return
        if self.history and self.history[-1].sigma == sigma:
            self.history.pop()
        self.history.append(EditStep(sigma, *self.masks(), (self.mask > 0).float().cpu()))

    def masks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Source and edited mask [B, T, H, W], of one shape."""
        edited = self.edited if self.connected_mask is None else self.mask
        count, frames = max(len(self.source), len(edited)), self.source.shape[1]
        source, edited = (mask.expand(count, frames, -1, -1).cpu() for mask in (self.source, edited))
        return source, edited


def _first_difference(grid: Sequence[float], inverted: Sequence[float]) -> str:
    """Where two grids differ of which the number and the first sigma do not tell it."""
    if len(grid) != len(inverted) or not method.same_grid(grid[:1], inverted[:1]):
        return ""
    i = next(i for i in range(len(grid)) if not method.same_grid(grid[i : i + 1], inverted[i : i + 1]))
    return f"; sigma {i + 1} is {grid[i]:.4g} and was {inverted[i]:.4g}"


def masks_of(model: Any, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and edited mask [B, T, H, W] of the run that made `samples`. Raises ValueError, naming the fix."""
    blend = models.attachment(model, KEY)
    if blend is None:
        raise ValueError("model has no blend: connect the output of Identity Mask Blend to `model`")
    masks = blend.run_masks.get(explanations.samples_digest(samples))
    if masks is not None:
        return masks
    if not blend.run_masks:
        raise ValueError(
            "model has not been used by a sampler: connect the same output of Identity Mask Blend to the sampler and "
            "to `model`, and the sampler's latent to `samples`"
        )
    if len(blend.run_masks) > 1:
        warning = (
            f"samples are not what the sampler made, or older than its last {_REMEMBERED_RUNS} runs: Show Edit Masks "
            "shows the last run's: connect the sampler's latent to `samples`"
        )
        tell("Show Edit Masks", [warning], logging.WARNING)
    # The samples were upscaled, composited or cut since.
    return next(reversed(blend.run_masks.values()))


def _check_sampler(sampler: Any) -> str:
    """The sampler's name. Raises ValueError for one whose latents are not known to be the model's."""
    if isinstance(sampler, InversionSampler):
        raise ValueError(
            "Invert Image's model already has a blend: connect the model from before Identity Mask Blend to `model`"
        )
    while not isinstance(sampler, comfy.samplers.KSAMPLER) and hasattr(sampler, "sampler"):
        sampler = sampler.sampler
    name = samplers.sampler_name(sampler)
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        raise ValueError(
            f"sampler {name} scales its latents differently, which the blend cannot follow: choose one from "
            "KSamplerSelect"
        )
    return name
