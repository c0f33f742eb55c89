"""The pictures that the theatre's models learn from, rendered once and kept on disk, and sheets to look at."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import runner
import torch
from pack.nodes.puppets import render
from pack.nodes.puppets.config import Take
from pack.nodes.puppets.world import still_take

_PART = 500  # pictures that one process renders before it hands them over


def rendered(
    path: Path, take: Callable[[int], Take], count: int, size: int, draw: Callable[[Take, int], np.ndarray]
) -> np.ndarray:
    """uint8 [count, ...]: draw(take(i), size) of each i, made by all cores once and kept at `path`."""
    with runner.make_accelerator().main_process_first():  # the others find it made
        if not path.exists():
            _render(path, take, count, size, draw)
    return np.load(path, mmap_mode="r")


def _render(path: Path, take, count: int, size: int, draw) -> None:
    print(f"rendering {count} of {path.name}", flush=True)
    ranges = [range(start, min(start + _PART, count)) for start in range(0, count, _PART)]
    temporary = path.with_suffix(".part")
    with ProcessPoolExecutor(os.cpu_count()) as pool, open(temporary, "wb") as file:
        for number, part in enumerate(pool.map(functools.partial(_drawn, take, size, draw), ranges)):
            if number == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *part.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(part.tobytes())
    os.replace(temporary, path)


def _drawn(take, size, draw, indices: range) -> np.ndarray:
    return np.stack([draw(take(i), size) for i in indices])


def draw_still(take: Take, size: int) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return render.render(take, size).image


def draw_moment(take: Take, later: float, size: int) -> np.ndarray:
    """uint8 [H, W, 3], `later` cycles after the take's own phase."""
    return draw_still(dataclasses.replace(take, phase=take.phase + later), size)


def stills(folder: Path, split: str, count: int, size: int) -> np.ndarray:
    """uint8 [count, H, W, 3] of `still_take` 0 to count - 1."""
    path = folder / f"stills_{split}_{count}_{size}.npy"
    return rendered(path, functools.partial(still_take, split=split), count, size, draw_still)


def to_unit(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to channels-last float [B, 3, H, W] in 0..1, the range of TAESD's own networks."""
    tensor = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(255)
    return tensor.contiguous(memory_format=torch.channels_last)


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """Float [B, 3, H, W] in 0..1 to uint8 [B, H, W, 3]."""
    return (pixels.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def sheet(rows: Sequence[np.ndarray]) -> np.ndarray:
    """One picture of rows of pictures, each uint8 [n, H, W, 3] with the same n."""
    return np.concatenate([np.concatenate(list(row), 1) for row in rows], 0)


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array at `path`, made first where it is not there; not read into memory at once."""
    with runner.make_accelerator().main_process_first():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".part.npy")
            np.save(temporary, make())
            os.replace(temporary, path)
    return np.load(path, mmap_mode="r")
