"""Sizes, steps and rates of the stages that train the theatre's Wan."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    size: int = 96  # pixels; 128 costs 1.8 times as much in every stage
    pictures: int = 16_000
    clips: int = 2_400
    seed: int = 7
    matrix_lr: float = 0.02  # Muon's own scale; the rates below are AdamW's
    vae_dim: int = 16
    vae_steps: int = 1_600
    vae_batch: int = 8
    vae_crop: int = 64  # pixels; crops spend the steps on the puppet, not on the sky
    vae_lr: float = 2e-3
    latent_noise: float = 0.03  # deviation added before decoding; more costs detail
    colour_weight: float = 0.2  # of the linear readout
    motion_steps: int = 600
    motion_batch: int = 2  # never 1: torch then takes a convolution that is several times slower on a CPU
    motion_frames: int = 9  # of the cycle: two groups of four after the first
    motion_crop: int = 48
    motion_lr: float = 1e-3
    motion_noise: float = 0.06  # the decoder learns to forgive the transformer's errors, too
    image_steps: int = 3_100  # of the transformer, on single frames; a frame is a fifth of a clip's work
    image_batch: int = 48
    clip_steps: int = 1_300  # after those, on clips
    clip_batch: int = 12
    looks_steps: int = 1_600  # after those, with clean first frames and captions without clothes
    looks_rate: float = 0.5  # of the learning rates before
    shot_pictures: int = 3_000  # pictures and clips whose puppet is drawn once more, for `shots`
    shot_clips: int = 1_500
    shots_steps: int = 1_500
    shots_still: int = 900  # of them, the first, in which a shot stands where the others do
    shots_rate: float = 0.7
    shots_batch: int = 32  # of two pictures each
    aligned_steps: int = 800  # after those, aligned with the theatre's image encoder
    aligned_rate: float = 0.7
    aligned_block: int = 2  # of six
    aligned_weight: float = 0.5
    likeness_steps: int = 2_300  # after those, on new shots that are always given, while the loss looks at the puppet
    likeness_rate: float = 0.7
    likeness_pictures: int = 6_000
    likeness_bare: float = 0.85  # of the captions name no clothes
    likeness_weight: float = 4.0  # what a place on the puppet counts more than another, at first; in the end nothing
    dit_lr: float = 6e-4
    ema: float = 0.998
    drop_caption: float = 0.1
