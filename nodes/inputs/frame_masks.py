"""Masks of a video's frames, for a latent whose first frame is one video frame and each later one four."""

import torch


def frame_count(latent_frames: int) -> int:
    """The frames of the video that has so many latent frames."""
    return 4 * (latent_frames - 1) + 1


def by_latent_frame(mask: torch.Tensor, latent_frames: int) -> torch.Tensor:
    """A mask [F, ...] as [1, ...] for all latent frames, or [latent_frames, ...].

    F is 1, `latent_frames`, or the frames of the video, of which each later latent frame takes the mean of its four.
    0 and 1 stay exact. Raises ValueError for another F.
    """
    frames = len(mask)
    if frames in (1, latent_frames):
        return mask
    if frames == frame_count(latent_frames):
        return torch.cat([mask[:1], mask[1:].unflatten(0, (latent_frames - 1, 4)).mean(1)])
    raise ValueError(
        f"mask has {frames} frames and the video has {frame_count(latent_frames)} ({latent_frames} in the latent): "
        "connect one mask for all, or one per frame"
    )
