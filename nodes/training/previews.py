"""The picture beside a saved file, `<name>.preview.png`, in the form that other programs read."""

import io
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from ..files.publishing import publish_as
from ..inputs.pictures import check_pictures, colour
from ..messages import tell

ENDING = ".preview.png"
_SIDE = 512  # pixels, of the longer side at most


def save_with(node: str, save: Callable[[], Path], preview: torch.Tensor | None) -> Path:
    """What `save` writes, with the first picture of `preview`, [B, H, W, 1, 3 or 4] in 0..1, beside it.

    A picture that is there already stays, and the node says so, as where it cannot be written: the file is whole.
    Raises ValueError, before anything is written, for a preview that is no picture; and what `save` raises.
    """
    picture = None if preview is None else _encoded(preview)
    path = save()
    logging.info("[Understudy] saved %s", path)
    if picture is not None:
        beside = path.with_suffix(ENDING)
        try:
            publish_as(picture, beside)
        except FileExistsError:
            tell(node, [f"{beside.name} was there already, and stays: delete it to save another"], logging.WARNING)
        except OSError as error:
            tell(node, [f"{beside.name} could not be written: {error.strerror}"], logging.WARNING)
    return path


def _encoded(preview: torch.Tensor) -> bytes:
    """A PNG without any metadata."""
    check_pictures(preview, "preview", least=1)
    levels = colour(preview[:1], "preview")[0].detach().float().cpu().mul(255).round().clamp(0, 255).byte()
    picture = Image.fromarray(levels.numpy())
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()
