"""Measures of a result whose truth can be drawn: who is shown, what it does, and what became of the rest.

Pictures are uint8 [H, W, 3] (or float in 0..1), part maps uint8 [H, W] of positions in PART_NAMES, joints
[18, 2 or 3] in pixels. Colours are compared in CIELAB under D65 by the Euclidean distance ΔE76 (2.3 is just
noticeable, red against blue about 175). Figures are given as (mean, low, high) of a 95 % interval.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from pack.nodes.puppets import render, world
from pack.nodes.puppets.config import ACTION_TABLE, PART_NAMES, Identity, Picture, Take

from . import eye as eyes

# What words give a colour to, and all parts that have one.
GARMENTS = {
    "shirt": ("torso", "right_arm", "left_arm"),
    "trousers": ("right_leg", "left_leg"),
    "headwear": ("headwear",),
}
CLOTHES = tuple(part for parts in GARMENTS.values() for part in parts)
COLOURED = ("head", "ears", *CLOTHES)
PARTS_SEEN = 20 / 128**2  # of the frame: a smaller part is not judged
MISSING = 50.0  # ΔE76 of a hat that should be there and is not, or is there and should not
GARMENT_LIMIT = 20.0  # ΔE76 up to which a garment has its colour; chosen on renders, PROTOCOL.md


def _unit(image: np.ndarray) -> np.ndarray:
    """float64 in 0..1."""
    image = np.asarray(image)
    return image / 255.0 if image.dtype == np.uint8 else image.astype(np.float64)


def lab(image: np.ndarray) -> np.ndarray:
    """sRGB [..., 3] (uint8, or float in 0..1) to CIELAB under D65, float64 (IEC 61966-2-1, CIE 15)."""
    rgb = _unit(image)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        (
            (0.4124564, 0.3575761, 0.1804375),
            (0.2126729, 0.7151522, 0.0721750),
            (0.0193339, 0.1191920, 0.9503041),
        )
    )
    xyz = linear @ matrix.T / np.array((0.95047, 1.0, 1.08883))
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


@functools.lru_cache(maxsize=4)
def trained_eye() -> eyes.Eye:
    """The shipped eye, loaded once."""
    return eyes.load()


def part_colours(
    image: np.ndarray, parts: np.ndarray, names: Sequence[str] = COLOURED
) -> dict[str, np.ndarray]:
    """The mean CIELAB colour of every part in `names` that covers enough of the picture."""
    colours, least = lab(image), PARTS_SEEN * parts.size
    found = {}
    for name in names:
        mask = parts == PART_NAMES.index(name)
        if mask.sum() >= least:
            found[name] = colours[mask].mean(0)
    return found


@functools.lru_cache(maxsize=512)
def _reference(take: Take, size: int) -> Picture:
    return render.render(take, size)


def identity_error(
    image: np.ndarray,
    identity: Identity,
    parts: np.ndarray | None = None,
    take: Take | None = None,
    names: Sequence[str] = COLOURED,
) -> dict[str, float]:
    """ΔE76 of every part of `names`, and under "mean" their mean.

    The right colours are those of `identity` drawn in `take` (its scene, light and action; without one:
    standing on the stage). `parts` is the true part map; without it the eye's own is used, and a hat that is
    missing or too much counts `MISSING`. A part too small in either picture is left out.
    """
    if parts is not None:
        return _part_errors(image, identity, parts, take, names)
    sight = eyes.look(trained_eye(), image[None])
    return _own_errors(image, identity, sight, 0, take, names)


def _part_errors(
    image: np.ndarray, identity: Identity, parts: np.ndarray, take: Take | None, names: Sequence[str]
) -> dict[str, float]:
    shown = Take(identity, "standing") if take is None else dataclasses.replace(take, identity=identity)
    reference = _reference(shown, image.shape[0])
    right, found = part_colours(reference.image, reference.parts, names), part_colours(image, parts, names)
    errors = {name: float(np.linalg.norm(found[name] - right[name])) for name in right if name in found}
    errors["mean"] = float(np.mean(list(errors.values()))) if errors else MISSING
    return errors


def _own_errors(
    image: np.ndarray,
    identity: Identity,
    sight: eyes.Sight,
    index: int,
    take: Take | None,
    names: Sequence[str],
) -> dict[str, float]:
    """Under the eye's own part map. Limbs may hide each other; a hat too many or missing is an error."""
    errors = _part_errors(image, identity, sight.parts[index], take, names)
    del errors["mean"]
    if "headwear" in names and (sight.headwear[index] == "none") != (identity.headwear == "none"):
        errors["headwear"] = MISSING
    errors["mean"] = float(np.mean(list(errors.values()))) if errors else MISSING
    return errors


def named_only(identity: Identity) -> Identity:
    """The identity as words give it: without its detail."""
    return dataclasses.replace(identity, detail="none")


def garment_errors(errors: dict[str, float]) -> dict[str, float]:
    """ΔE76 of each garment, the mean over its parts that can be seen."""
    worn = {name: [errors[part] for part in parts if part in errors] for name, parts in GARMENTS.items()}
    return {name: float(np.mean(found)) for name, found in worn.items() if found}


def is_identity(sight: eyes.Sight, index: int, identity: Identity, garments: dict[str, float]) -> bool:
    """Species and pattern as the eye reads them, and the colour of every garment within the limit."""
    return bool(
        sight.species[index] == identity.species
        and sight.patterns[index] == identity.pattern
        and "shirt" in garments
        and max(garments.values()) <= GARMENT_LIMIT
    )


def action_answers(images: np.ndarray, among: str = "all") -> list[str]:
    """The action the eye sees in each picture [N, H, W, 3]; "reject" where none is clear.

    `among`: "all" actions, or only the "named" or the "unnamed" ones (a rejected picture stays rejected).
    """
    return _answers(eyes.look(trained_eye(), images), among)


def _answers(sight: eyes.Sight, among: str) -> list[str]:
    wanted = {"all": (True, False), "named": (True,), "unnamed": (False,)}[among]
    chosen = [action for action, facts in ACTION_TABLE.items() if facts.named in wanted]
    columns = [eyes.ANSWERS.index(name) for name in chosen]
    best = sight.action_scores[:, columns].argmax(1)
    return [
        eyes.REJECT if seen == eyes.REJECT else chosen[i] for seen, i in zip(sight.actions, best, strict=True)
    ]


def action_accuracy(images: np.ndarray, actions: Sequence[str], among: str = "all") -> float:
    """The share of pictures in which the eye sees the right action; a rejected picture is wrong."""
    answers = action_answers(images, among)
    return float(np.mean([seen == right for seen, right in zip(answers, actions, strict=True)]))


def joint_distances(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Distances [N, 18] of joints [N, 18, 2] from [N, 18, 3]; NaN where the truth is outside the frame."""
    distance = np.linalg.norm(found[..., :2] - truth[..., :2], axis=-1)
    return np.where(truth[..., 2] > 0, distance, np.nan)


def joint_error(image: np.ndarray, joints: np.ndarray) -> float:
    """The mean distance, in 128ths of the frame, of the joints the eye finds from the true ones [18, 3]."""
    found = eyes.look(trained_eye(), image[None]).joints
    return float(np.nanmean(joint_distances(found, joints[None]))) * 128 / image.shape[0]


def background_error(image: np.ndarray, truth: np.ndarray, subjects: np.ndarray) -> float:
    """Root mean square of the sRGB difference (0..1) outside `subjects` (bool [H, W], both masks)."""
    outside = ~np.asarray(subjects, bool)
    if not outside.any():
        raise ValueError("the subjects cover the whole picture: there is no background to compare")
    return float(np.sqrt(np.square(_unit(image)[outside] - _unit(truth)[outside]).mean()))


def composition(image: np.ndarray, take: Take, parts: np.ndarray | None = None, among: str = "all") -> bool:
    """Identity and action both right. Details without words are not asked for."""
    return compositions(image[None], [take], None if parts is None else parts[None], among)[0]["composition"]


def compositions(
    images: np.ndarray, takes: Sequence[Take], parts: np.ndarray | None = None, among: str = "all"
) -> list[dict]:
    """For every picture: its errors, what the eye sees, and whether identity, action and both are right."""
    sight = eyes.look(trained_eye(), images)
    answers = _answers(sight, among)
    rows = []
    for i, take in enumerate(takes):
        who = take.identity

        def errors(asked: Identity, names: Sequence[str], i: int = i, take: Take = take) -> dict[str, float]:
            if parts is None:
                return _own_errors(images[i], asked, sight, i, take, names)
            return _part_errors(images[i], asked, parts[i], take, names)

        everything = errors(who, COLOURED)
        # A result that shows the detail, which no word asked for, is as right as one that does not.
        worn = min(
            (garment_errors(errors(asked, CLOTHES)) for asked in (who, named_only(who))),
            key=lambda garments: sum(garments.values()),
        )
        identity = is_identity(sight, i, who, worn)
        action = answers[i] == take.action
        rows.append(
            {
                "identity_error": everything["mean"],
                "worn_error": float(np.mean([*worn.values()])) if worn else MISSING,
                "shirt_error": worn.get("shirt", MISSING),
                "identity": identity,
                "action": action,
                "seen_action": answers[i],
                "seen_species": sight.species[i],
                "seen_pattern": sight.patterns[i],
                "seen_headwear": sight.headwear[i],
                "composition": identity and action,
            }
        )
    return rows


def phase_score(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the absolute phase spectra of two pictures, as in ImPoster; chance is about 0.75."""
    first, second = (np.abs(np.angle(np.fft.fft2(_unit(x), axes=(0, 1)))).ravel() for x in (a, b))
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


def circular_phase_score(a: np.ndarray, b: np.ndarray) -> float:
    """Mean cosine of the phase difference, weighted by b's amplitude, without DC: 1 is equal, chance 0."""
    first, second = (np.fft.fft2(_unit(x), axes=(0, 1)) for x in (a, b))
    weight = np.abs(second)
    weight[0, 0] = 0
    return float((weight * np.cos(np.angle(first) - np.angle(second))).sum() / weight.sum())


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
    error = float(np.square(_unit(image) - _unit(truth)).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(image: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004), mean over places and channels; 1 is equal.

    Gaussian window of 11 pixels and deviation 1.5, K1 = 0.01, K2 = 0.03, only where the window lies inside.
    """
    x, y = (torch.from_numpy(_unit(picture)).movedim(-1, 0).unsqueeze(1) for picture in (image, truth))
    places = torch.arange(11, dtype=x.dtype) - 5
    window = torch.exp(-places.square() / (2 * 1.5**2))
    window = window / window.sum()

    def mean(z: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(z, window.reshape(1, 1, 1, -1)), window.reshape(1, 1, -1, 1))

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean())


@torch.no_grad()
def feature_distance(image: np.ndarray, truth: np.ndarray) -> float:
    """How far two pictures are apart in the eye's own features; 0 is equal, 2 the most.

    After LPIPS (Zhang et al., arXiv 1801.03924), by the four levels of the eye's body net on 64 x 64 pixels: squared
    difference of unit channel vectors, mean over places, then over levels, all levels alike.
    """
    pair = F.interpolate(eyes.to_tensor(np.stack([image, truth])), size=(eyes.SIZE, eyes.SIZE), mode="area")
    features, apart = (pair - 0.5) * 2, []
    for level in trained_eye().body.levels:
        features = level(features)
        one, other = F.normalize(features, dim=1)
        apart.append(float((one - other).square().sum(0).mean()))
    return float(np.mean(apart))


def mean_interval(
    values: Sequence[float] | np.ndarray, resamples: int = 5_000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high) of 95 %: Wilson's interval for shares (bool), else the percentile bootstrap."""
    values = np.asarray(values)
    if not values.size:
        raise ValueError("no values: an interval needs at least one case")
    count, mean = len(values), float(values.mean())
    if values.dtype == bool:
        z = 1.959964
        middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
        return mean, middle - half, middle + half
    means = values[np.random.default_rng(seed).integers(0, count, (resamples, count))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return mean, float(low), float(high)


def thumbnails(images: np.ndarray, size: int = 32) -> np.ndarray:
    """float32 [N, size * size * 3] in 0..1 by averaging; the pictures' side is a multiple of `size`."""
    images, step = np.asarray(images), images.shape[1] // size
    blocks = images.reshape(len(images), size, step, size, step, 3).mean((2, 4), dtype=np.float32)
    return (blocks / (255 if images.dtype == np.uint8 else 1)).reshape(len(images), -1).astype(np.float32)


def training_thumbnails(count: int, size: int = 128) -> np.ndarray:
    """`thumbnails` of the first `count` training takes."""
    return np.concatenate(
        [thumbnails(render.render(world.still_take(i), size).image[None]) for i in range(count)]
    )


def nearest_training_distance(images: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Root mean square distance (0..1, on thumbnails) of each picture to its nearest training picture.

    images [N, H, W, 3]; `training` from `training_thumbnails`. Returns (distances [N], positions [N]).
    """
    queries = thumbnails(images)
    squares = np.square(training).sum(1)
    distances, nearest = [], []
    for query in queries:
        every = squares - 2 * training @ query + query @ query
        best = int(every.argmin())
        nearest.append(best)
        # Computed anew: the expanded square loses the small distances to rounding.
        distances.append(float(np.sqrt(np.square(training[best] - query).mean())))
    return np.array(distances), np.array(nearest)
