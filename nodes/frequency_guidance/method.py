"""Frequency guidance: a source's amplitude spectrum and a driving picture's phase spectrum steer sampling.

Source: ImPoster (arXiv 2409.15650); the formulas are in kernels/spectral_guidance.py, those of fine detail in
kernels/wavelet_detail.py.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ...kernels import spectral_guidance, wavelet_detail
from ..inputs import latent_masks, latents, ranges
from ..training.objective import Sample
from ..training.seeds import seed_for
from .config import FrequencyGuidanceConfig

# Schedulers land on multiples of 1/steps and 1/1000; away from them, rounding decides nothing.
_SWITCH_OFFSET = 0.00037
# The narrowest step in percent that every model's percent-to-sigma map resolves in fp32.
_SWITCH_GAP = 1e-6
# Of the longer side: how far around a subject its place is filled from.
_FILL = 0.1

Guide = Callable[[torch.Tensor, float], torch.Tensor]


class FrequencyGuidance:
    """Guidance toward one source and one driving latent; it holds no state of a sampling run.

    source, driving: [B, C, H, W] or [B, C, T, H, W] as a VAE encodes them; one whose scale is 0 is ignored.
    With a driving_mask [F, H, W], of any size, the phases are those of its subject alone, and act inside the mask
    alone. With a source_mask as well they are those of the source's scene, in which the driving subject stands in the
    place of the source's. Both are ours.
    Raises ValueError, naming the input, for latents that are empty, all zero, not finite, or nested.
    """

    def __init__(
        self, source: torch.Tensor, driving: torch.Tensor, config: FrequencyGuidanceConfig,
        source_mask: torch.Tensor | None = None, driving_mask: torch.Tensor | None = None,
    ):
        self.config = config
        self._masks = source_mask, driving_mask
        if source_mask is not None and driving_mask is None:
            raise ValueError("source_mask says where the driving subject belongs: connect its driving_mask as well")
        self._driving = driving if config.phase_scale > 0 else None
        placed = self._driving is not None and source_mask is not None
        self._source = source if config.amplitude_scale > 0 or config.detail_bands or placed else None
        for name, latent in self.latents.items():
            latents.check_picture(latent, name)

    @property
    def latents(self) -> dict[str, torch.Tensor]:
        """Those that act, by the name of their input."""
        both = {"source": self._source, "driving": self._driving}
        return {name: latent for name, latent in both.items() if latent is not None}

    def begin(self, model: Any, shape: torch.Size) -> Guide:
        """The guide of one sampling run for latents of `shape`: guide(latent, sigma) -> latent of the same dtype.

        `model` is a BaseModel: its `process_latent_in` takes latents to the model's space.
        It acts in its part of the schedule, and returns the same tensor elsewhere.
        Raises ValueError where source or driving do not fit `shape`.
        """
        config = self.config
        guided = ranges.sigma_range(model.model_sampling, config.start_percent, config.end_percent)
        source = _fit("source", self._source, shape, model)
        driving = _fit("driving", self._driving, shape, model)
        source_mask, mask = (
            None if mask is None or driving is None else _cells(name, mask, shape)
            for name, mask in zip(("source_mask", "driving_mask"), self._masks, strict=True)
        )
        if source_mask is not None:
            driving, mask = collage(source, driving, source_mask, mask), None
        elif mask is not None:
            driving = alone(driving, mask)

        @functools.cache
        def target_on(device: torch.device) -> spectral_guidance.Target:
            return spectral_guidance.prepare(
                *(
                    None if latent is None or not scale else latent.to(device)
                    for latent, scale in ((source, config.amplitude_scale), (driving, config.phase_scale))
                ),
                distance=config.phase_distance,
                amplitude_band=spectral_guidance.Band(config.amplitude_low, config.amplitude_high),
                phase_band=spectral_guidance.Band(config.phase_low, config.phase_high),
            )

        def moved(latent: torch.Tensor) -> torch.Tensor:
            target, settings = target_on(latent.device), (config.amplitude_scale, config.phase_scale, config.update)
            inside = spectral_guidance.update(latent, target, *settings)
            if mask is None:
                return inside
            # Phases are of the whole plane: without this, about half of what they change is the scene around it.
            outside = spectral_guidance.update(latent, replace(target, phasor=None), *settings)
            return latent_masks.blend(inside, outside, mask)

        def guide(latent: torch.Tensor, sigma: float) -> torch.Tensor:
            if sigma not in guided:
                return latent
            if latent.shape != shape:
                raise ValueError(
                    f"the sampler changed the latent from {tuple(shape)} to {tuple(latent.shape)}: "
                    "frequency guidance needs a sampler that keeps the size"
                )
            if config.amplitude_scale or config.phase_scale:
                latent = moved(latent)
            return wavelet_detail.inject(latent, source, config.detail_bands)

        return guide


def _fit(name: str, latent: torch.Tensor | None, shape: torch.Size, model: Any) -> torch.Tensor | None:
    """The latent in the model's space, fp32, with a batch and a frame count that broadcast to `shape`."""
    if latent is None:
        return None
    if len(shape) not in (4, 5):
        raise ValueError(
            f"frequency guidance works on [B, C, H, W] and [B, C, T, H, W] latents, and this model's is "
            f"{tuple(shape)}: it cannot steer audio or packed latents; use another model"
        )
    if len(shape) == 5 and latent.ndim == 4:
        latent = latent.unsqueeze(2)  # a picture, for a video model
    if latent.ndim != len(shape):
        raise ValueError(f"{name} is a video latent and the model makes pictures: encode one frame of it")
    latents.check_channels(latent, name, shape[1])
    if latent.shape[-2:] != shape[-2:]:
        ratio = model.latent_format.spacial_downscale_ratio
        height, width = shape[-2] * ratio, shape[-1] * ratio
        raise ValueError(
            f"{name} is a latent of {latent.shape[-1]} x {latent.shape[-2]} (width x height) and the sampled "
            f"one is {shape[-1]} x {shape[-2]}: resize {name} to {width} x {height} pixels before VAE Encode"
        )
    latents.check_batch(len(latent), shape[0], name, "latent")
    if len(shape) == 5 and latent.shape[2] not in (1, shape[2]):
        raise ValueError(
            f"{name} has {latent.shape[2]} latent frames and the sampled video has {shape[2]}: "
            "encode a picture, or a video of the same length"
        )
    return model.process_latent_in(latent.to(torch.float32))


def _cells(name: str, mask: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A MASK [F, H, W] in latent cells [1 or B, 1 or T, H, W]. Raises ValueError where it is empty."""
    cells = latent_masks.latent_mask(mask, shape, name)
    latents.check_batch(len(cells), shape[0], name, "mask")
    if not (cells.flatten(1).amax(1) > 0).all():
        raise ValueError(f"{name} is empty: paint or detect the subject in it, or disconnect it")
    return cells


def aligned(
    driving: torch.Tensor, mask: torch.Tensor, source_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The driving latent [B, C, (T,) H, W] and its mask [B, T, H, W], put where the source's subject is.

    Enlarged until both masks have one area, which a pose changes less than a box, and moved until the boxes share the
    middle of their lower edge. A video is moved as its first frame is, so that what it does stays.
    """
    count = max(len(driving), len(mask), len(source_mask))
    driving, mask, source_mask = (t.expand(count, *t.shape[1:]) for t in (driving, mask, source_mask))
    moves = []
    for at, to in zip(mask[:, 0], source_mask[:, 0], strict=True):
        scale = math.sqrt(float(to.sum() / at.sum()))
        moves.append([[1 / scale, 0.0, _foot(at)[0] - _foot(to)[0] / scale],
                      [0.0, 1 / scale, _foot(at)[1] - _foot(to)[1] / scale]])
    if all(move == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]] for move in moves):
        return driving, mask
    theta = torch.tensor(moves, dtype=torch.float32)

    def moved(planes: torch.Tensor, padding: str) -> torch.Tensor:
        flat = planes.float().reshape(count, -1, *planes.shape[-2:])
        grid = F.affine_grid(theta.to(flat.device), list(flat.shape), align_corners=False)
        return F.grid_sample(flat, grid, padding_mode=padding, align_corners=False).reshape(planes.shape)

    return moved(driving, "border"), moved(mask, "zeros")


def collage(
    source: torch.Tensor, driving: torch.Tensor, source_mask: torch.Tensor, driving_mask: torch.Tensor
) -> torch.Tensor:
    """The source's scene with the driving subject in the place of the source's: latents [B, C, (T,) H, W], masks
    [B, T, H, W].
    """
    placed, mask = aligned(driving, driving_mask, source_mask)
    return latent_masks.blend(placed, without_subject(source, source_mask), mask)


def alone(driving: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The subject of a driving latent [B, C, (T,) H, W] by its mask [B, T, H, W], on a ground of its own mean.

    Whatever stands around it takes part in its phases. Its own scene may not, nor the estimate's, which would still
    hold the pose that is to change.
    """
    weight = (mask if driving.ndim == 4 else mask.unsqueeze(1)).to(driving.device)
    mean = (driving * weight).sum((-2, -1), keepdim=True) / weight.sum((-2, -1), keepdim=True).clamp(min=1e-6)
    shape = *mean.shape[:-2], *driving.shape[-2:]
    return latent_masks.blend(driving.expand(shape), mean.expand(shape), mask)


def without_subject(source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A source latent [B, C, (T,) H, W] whose subject, by its mask [B, T, H, W], gives way to what is around it.

    The driving subject is then seen in the scene that is being made: on a ground of one value its outline has phases
    of its own, and a scene that still holds the source's subject keeps the old pose.
    """
    # A latent cell knows something of its neighbours.
    kept = (F.max_pool2d(mask, 3, 1, 1) == 0).to(source)
    kept = kept if source.ndim == 4 else kept.unsqueeze(1)
    deviation = _FILL * max(source.shape[-2:])
    near = latent_masks.blurred(kept, deviation).clamp(min=torch.finfo(source.dtype).tiny)
    filled = latent_masks.blurred(source * kept, deviation) / near
    return torch.where(kept > 0, source, filled)


def _foot(mask: torch.Tensor) -> tuple[float, float]:
    """The middle of the lower edge of the box around a mask [H, W], from -1 to 1 across the plane."""
    inside = mask >= 0.5 * mask.max()
    rows, columns = (inside.any(dim).nonzero() for dim in (1, 0))
    height, width = mask.shape
    middle = (float(columns.min()) + float(columns.max()) + 1) / 2
    return 2 * middle / width - 1, 2 * (float(rows.max()) + 1) / height - 1


def switch_prompt(driving: list, target: list, switch_percent: float) -> list:
    """A CONDITIONING that is `driving` before `switch_percent` (0..1 of the schedule), then `target`.

    Exactly one of them acts at any sigma, and a step on `switch_percent` takes `target`. ComfyUI's ranges include
    both ends, so the two leave a gap as wide as a few fp32 sigmas; `target` fills it as a default conditioning,
    which ComfyUI uses only where no other is active. Ranges that the conditionings already have are cut to their
    part. The input lists and their entries are not modified.
    """
    switch = switch_percent - _SWITCH_OFFSET
    if switch <= 0.0:
        return list(target)
    if switch_percent >= 1.0:
        return list(driving)
    filler = _within(target, switch, switch + _SWITCH_GAP)
    return [
        *_within(driving, 0.0, switch),
        *_within(target, switch + _SWITCH_GAP, 1.0),
        *([tensor, {**options, "default": True}] for tensor, options in filler),
    ]


def _within(conditioning: list, start: float, end: float) -> list:
    """Copies of the entries with their ranges cut to start..end; entries outside it are left out."""
    cut = []
    for tensor, options in conditioning:
        first = max(start, options.get("start_percent", 0.0))
        last = min(end, options.get("end_percent", 1.0))
        if first < last:
            cut.append([tensor, {**options, "start_percent": first, "end_percent": last}])
    return cut


@dataclass
class SourceDrivingObjective:
    """ImPoster's fine-tuning: steps take the source and the driving picture in turn, both with one noise and level.

    losses(samples, generator) -> [B] are denoising losses; `samples` are the source's and the driving picture's.
    """

    losses: Callable[..., torch.Tensor]
    samples: Sequence[Sample]
    seed: int

    def __call__(self, step: int, _generator: torch.Generator) -> torch.Tensor:
        iteration, index = divmod(step, len(self.samples))
        # The iteration's generator, not the step's: both pictures get the same noise and noise level.
        generator = torch.Generator().manual_seed(seed_for(self.seed, "step", iteration))
        return self.losses([self.samples[index]], generator).mean()
