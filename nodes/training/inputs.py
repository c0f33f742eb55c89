"""Training data from a graph: batches, lists and single items, all brought into lists of single items."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.clip_vision
import comfy.nested_tensor
import torch

from ..inputs.latents import check_latent
from ..inputs.pictures import check_pictures, colour
from .stored import Stored


def pictures(images: Sequence[torch.Tensor] | torch.Tensor, name: str) -> Sequence[torch.Tensor]:
    """Each picture as [1, H, W, 3] in 0..1, without alpha and with grey repeated, in the same order.

    Raises ValueError, naming the input, if there is none or its values are not finite.
    """
    if isinstance(images, Stored):
        return images.map(lambda picture: pictures([picture], name)[0])
    batches = [images] if isinstance(images, torch.Tensor) else list(images)
    singles = []
    for batch in batches:
        check_pictures(batch, name)
        singles.extend(picture[None].clone() for picture in colour(batch, name))
    if not singles:
        raise ValueError(f"{name} holds no picture: connect at least one")
    return singles


def one_picture(images: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """The only picture of an input, [1, H, W, 3]. Raises ValueError, naming the input, for more than one."""
    singles = pictures(images, name)
    if len(singles) > 1:
        raise ValueError(f"{name} holds {len(singles)} pictures: connect one; Image From Batch picks it")
    return singles[0]


def single_latents(latents: Sequence[Mapping[str, torch.Tensor]], name: str) -> Sequence[torch.Tensor]:
    """Each latent of some LATENTs, a picture as a video of one frame: [1, C, T, H, W].

    Raises ValueError, naming the input, if there is none, and what check_latent raises.
    """
    if isinstance(latents, Stored):
        return latents.map(lambda latent: single_latents([latent], name)[0])
    singles = []
    for latent in latents:
        samples = latent["samples"]
        check_latent(samples, name)
        videos = samples.unsqueeze(2) if samples.ndim == 4 else samples
        singles.extend(video[None].clone() for video in videos)
    if not singles:
        raise ValueError(f"{name} holds no latent: connect at least one")
    return singles


def one_text(texts: Sequence[str], name: str) -> str:
    """The only text of an input, its lines joined. Raises ValueError, naming the input, for more than one."""
    if len(texts) != 1:
        raise ValueError(f"{name} holds {len(texts)} texts: connect one")
    return " ".join(texts[0].split())


def texts_for(texts: Sequence[str] | str, count: int, name: str) -> list[str]:
    """One text for each of `count` pictures: a list item or a line per picture, or one for all.

    Raises ValueError, naming the input, for any other number.
    """
    items = [texts] if isinstance(texts, str) else list(texts)
    if len(items) == 1:
        lines = [line.strip() for line in items[0].splitlines() if line.strip()] or [""]
        items = [" ".join(lines)] if count == 1 else lines
    return one_each(items, count, name, kind="texts", each="picture")


def one_each(items: Sequence[Any], count: int, name: str, *, kind: str, each: str) -> Sequence[Any]:
    """`count` items: all of them, or the only one for all. The error asks for one of this `kind` per `each`.

    Raises ValueError, naming the input, for any other number.
    """
    if len(items) not in (1, count):
        raise ValueError(f"{name} has {len(items)} {kind} for {count} {each}s: give one per {each}, or one for all")
    return items if len(items) == count else [items[0]] * count


def single_values(lists: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The only value of each input of a node whose inputs are all lists; what is not connected is left out.

    Raises ValueError, naming the input, for more than one value.
    """
    for name, values in lists.items():
        if values and len(values) > 1:
            raise ValueError(f"{name} is a list of {len(values)}: connect one")
    return {name: values[0] for name, values in lists.items() if values}


def digest(latents: Sequence[torch.Tensor]) -> str:
    """A short name for the values of these latents, which tells whether a resumed run trains on the same ones."""
    content = hashlib.sha256()
    for latent in latents:
        content.update(f"{tuple(latent.shape)}\n".encode())
        content.update(latent.detach().cpu().float().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def conditioning_digest(conditionings: Sequence[list]) -> str:
    """A short name for these CONDITIONINGs: their texts, and the pictures and numbers that they hold."""
    content = hashlib.sha256()
    for part in _leaves(conditionings):
        if isinstance(part, torch.Tensor):
            content.update(digest([part]).encode())
        else:
            content.update(f"{part}\n".encode())
    return content.hexdigest()[:16]


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors, numbers and names in what ComfyUI's nodes put into a conditioning."""
    if isinstance(value, torch.Tensor | str | int | float | None):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key)
            yield from _leaves(value[key])
    elif isinstance(value, Sequence):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, comfy.clip_vision.Output | comfy.nested_tensor.NestedTensor):
        yield from _leaves(vars(value))
