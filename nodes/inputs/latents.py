"""What nodes check of the latents that a graph connects, so that all of them say the same; without ComfyUI.

Every function raises ValueError, naming the input, what was found and what to do.
"""

import torch


def check_latent(latent: torch.Tensor, name: str) -> None:
    """Latents are [B, C, H, W] or [B, C, T, H, W], at least one of them, of finite values."""
    if latent.is_nested:
        raise ValueError(
            f"{name} is not an image or video latent but video and audio in one: connect the video alone, from "
            f"LTXV Separate AV Latent or VAE Encode, to `{name}`"
        )
    if latent.ndim not in (4, 5):
        raise ValueError(f"{name} is not an image or video latent: connect VAE Encode to `{name}`")
    if latent.numel() == 0:
        raise ValueError(f"{name} is an empty batch: connect VAE Encode of at least one picture to `{name}`")
    check_finite(latent, name, "encode it again, with the VAE in fp32")


def check_finite(values: torch.Tensor, name: str, fix: str, error: type[ValueError] = ValueError) -> None:
    """Neither NaN nor infinite."""
    if not torch.isfinite(values).all():
        raise error(f"{name} holds NaN or infinite values: {fix}")


def check_not_zero(latent: torch.Tensor, name: str) -> None:
    """An empty latent shows nothing."""
    if not latent.any():
        raise ValueError(f"{name} is all zero, as Empty Latent Image makes it: connect VAE Encode to `{name}`")


def check_picture(latent: torch.Tensor, name: str) -> None:
    """A latent as `check_latent` wants it, which shows something."""
    check_latent(latent, name)
    check_not_zero(latent, name)


def check_frames(latent: torch.Tensor, name: str) -> None:
    """Latents [B, C, T, H, W]: what a video model's VAE makes, of a single picture too."""
    if latent.ndim == 4:
        raise ValueError(
            f"{name} has shape {tuple(latent.shape)}, without frames, so the VAE of another kind of model made it: "
            "encode it with the VAE of this model"
        )


def without_frames(latent: torch.Tensor, name: str, dimensions: int) -> list[str]:
    """A line where a model's latents, of so many dimensions, have frames and this one has none, though it may be read
    as one frame: a picture model's VAE made it, whose channels mean something else.
    """
    if latent.ndim == dimensions or dimensions != 5:
        return []
    return [f"{name} has no frames, as a picture model's VAE makes it: encode it with this video model's VAE"]


def check_channels(
    latent: torch.Tensor, name: str, channels: int, fix: str = "encode it with the VAE of this model"
) -> None:
    """The second dimension is the model's number of channels."""
    if latent.shape[1] != channels:
        raise ValueError(f"{name} has {latent.shape[1]} channels and the model's latents have {channels}: {fix}")


def check_batch(count: int, batch: int, name: str, what: str) -> None:
    """One of `what`, such as "latent", serves a whole batch; else there is one for each."""
    if count not in (1, batch):
        raise ValueError(
            f"{name} holds {count} {what}s and the batch is {batch}: connect one {what}"
            + (f", or {batch}" if batch > 1 else "")
        )
