"""The reference picture, a square around the face on white; apart, since its pixels are prepared before any model.

Source: Stand-In (arXiv 2508.07901): the largest face, its box half as long again, 512 x 512, white background. Faces
and masks come from ComfyUI's own nodes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..inputs import keypoints, pictures
from .config import ReferenceConfig

# Published: a box that is this near to all four edges, in pixels, takes the whole picture.
_BORDER = 10
_WHITE = 1.0
# Ours: an inverted mask holds at least so much of the picture's edges, and a person is at least so much of a picture.
_AROUND, _HOLE = 0.6, 0.02

_INVERTED = (
    "the mask looks inverted, so the person is white: it should be 1 where the person is, and Load Image's is 1 "
    "where its picture is transparent. Put Invert Mask between them"
)
_SCALED = "mask has {} pixels and image {}, so it is scaled: if it belongs to another picture, connect this one's"

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def prepare(
    images: torch.Tensor, config: ReferenceConfig, mask: torch.Tensor | None = None, bboxes: Any = None
) -> tuple[torch.Tensor, list[str]]:
    """[B, size, size, 3] from images [B, H, W, 1 to 4] in 0..1, and messages on masks and on what was not cropped.

    mask: [1 or B, H, W], 1 where the person is; without boxes its extent is the box. bboxes: in any form that
    inputs.keypoints knows, a box or, for each picture, a list of boxes of which the largest counts. What is
    transparent becomes white; without a mask, alpha is one. Grey becomes colour. Raises ValueError, naming the input,
    for an invalid picture, box or mask.
    """
    pictures.check_pictures(images, "image", least=1)
    alpha = images[..., 3].float().clamp(0, 1) if images.shape[-1] == 4 else None
    images = pictures.colour(images, "image")
    results, messages = [], []
    if mask is not None:
        sizes = [f"{size[1]} x {size[0]}" for size in (mask.shape[-2:], images.shape[1:3]) if len(size) == 2]
        mask = _fitted_mask(mask, images)
        messages += [_SCALED.format(*sizes)] * (sizes[0] != sizes[1])
    elif alpha is not None and bool((alpha < 1).any()):
        mask = alpha
    boxes = None if bboxes is None else _boxes(bboxes, images)
    for i, picture in enumerate(images.float()):
        person = None if mask is None else mask[min(i, len(mask) - 1)]
        box, message = _box(None if boxes is None else boxes[min(i, len(boxes) - 1)], person)
        if person is not None and bool((person > 0.5).any()):
            # What is transparent is often black, whoever is in the mask.
            shown = person if alpha is None or mask is alpha else person * alpha[i]
            picture = picture * shown[..., None] + _WHITE * (1 - shown[..., None])
            if mask is not alpha and _looks_inverted(person, box if boxes is not None else None):
                message = _INVERTED + ("; " + message if message else "")
        elif person is not None:
            what = "the picture is transparent everywhere" if mask is alpha else "the mask is empty"
            message = f"{what}, so the background stays" + ("; " + message if message else "")
        results.append(_square(_crop(picture, box, config.crop_factor), config.size))
        if message:
            messages.append(f"picture {i + 1}: {message}" if len(images) > 1 else message)
    return torch.stack(results), messages


def _looks_inverted(person: torch.Tensor, face: Box | None) -> bool:
    """Whether a mask [H, W] leaves out the face, or goes around something: it holds the upper corners and nearly all
    edges, and has a hole.
    """
    held = person > 0.5
    if face is not None:
        left, top, right, bottom = (max(0, round(limit)) for limit in face)
        part = held[top:bottom, left:right]
        return part.numel() > 0 and not part.float().mean() > 0.5
    edges = torch.cat([held[0], held[-1], held[:, 0], held[:, -1]]).float()
    return bool(held[0, 0] and held[0, -1] and edges.mean() > _AROUND and held.float().mean() < 1 - _HOLE)


def _fitted_mask(mask: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
    if mask.ndim != 3 or mask.shape[0] not in (1, images.shape[0]):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} for {images.shape[0]} pictures: connect one mask, or one per picture"
        )
    mask = mask.float().clamp(0, 1)
    if mask.shape[1:] != images.shape[1:3]:
        mask = torch.nn.functional.interpolate(mask[:, None], images.shape[1:3], mode="bilinear").squeeze(1)
    return mask


def _boxes(bboxes: Any, images: torch.Tensor) -> list[list[dict[str, float]]]:
    """The boxes of each picture in pixels, or a single list for all."""
    boxes = keypoints.boxes(bboxes, "bboxes")
    if len(boxes) not in (1, len(images)):
        raise ValueError(
            f"bboxes belong to {len(boxes)} pictures and image holds {len(images)}: connect the boxes of the same "
            "pictures"
        )
    height, width = images.shape[1:3]
    return [[keypoints.in_pixels(box, width, height) for box in of_picture] for of_picture in boxes]


def _box(boxes: Sequence[Mapping[str, float]] | None, mask: torch.Tensor | None) -> tuple[Box | None, str]:
    """The box to crop around, or None for the whole picture, and why."""
    if boxes:
        largest = max(boxes, key=lambda box: box["width"] * box["height"])
        x, y, width, height = (largest[name] for name in ("x", "y", "width", "height"))
        if width > 0 and height > 0:
            return (x, y, x + width, y + height), ""
        return None, "the face's box is empty, so the whole picture is used, padded to a square"
    if boxes is not None:
        return None, "no face was found, so the whole picture is used, padded to a square"
    if mask is None:
        return None, "neither a face nor a mask is connected, so the whole picture is used, padded to a square"
    rows, columns = ((mask > 0.5).any(axis).nonzero().flatten() for axis in (1, 0))
    if len(rows) == 0:
        return None, "the whole picture is used, padded to a square"
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)), ""


def _crop(picture: torch.Tensor, box: Box | None, factor: float) -> torch.Tensor:
    """The square around the box's centre, cut at the picture's edges; the whole picture without a box."""
    if box is None:
        return picture
    height, width = picture.shape[:2]
    left, top, right, bottom = map(int, box)  # published: whole pixels, cut off, then an even side
    if left <= _BORDER and top <= _BORDER and right >= width - _BORDER and bottom >= height - _BORDER:
        return picture
    half = max(1, int(max(right - left, bottom - top) * factor) // 2)
    y, x = (
        slice(min(max(middle - half, 0), limit), min(max(middle + half, 0), limit))
        for middle, limit in (((top + bottom) // 2, height), ((left + right) // 2, width))
    )
    if x.start >= x.stop or y.start >= y.stop:
        raise ValueError("the face's box is outside the picture: connect the boxes of the same picture")
    return picture[y, x]


def _square(picture: torch.Tensor, size: int) -> torch.Tensor:
    """[size, size, 3]: white bars on the shorter sides, then resized with antialiasing."""
    height, width = picture.shape[:2]
    side = max(height, width)
    canvas = picture.new_full((side, side, 3), _WHITE)
    y, x = (side - height) // 2, (side - width) // 2
    canvas[y : y + height, x : x + width] = picture
    resized = torch.nn.functional.interpolate(
        canvas.movedim(-1, 0)[None], (size, size), mode="bilinear", antialias=True
    )
    return resized[0].movedim(0, -1).clamp(0, 1)
