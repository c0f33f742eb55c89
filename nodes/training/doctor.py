"""What a set of pictures, captions and masks will teach badly, found before the first step; without ComfyUI.

Everything here is ours: simple measures of pixels and words, which see no meaning. They warn, and never stop a run.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..inputs.families import sign_of_few_steps
from ..inputs.strangers import FOR_PEOPLE, PUPPETS, PUPPETS_ONLY
from ..inputs.words import entries, words_pattern
from .stored import is_stored

# Pictures are compared at this size, in which grain, compression and a few pixels of cropping are gone.
_SIDE = 24
# Correlation of two pictures. Of a puppet, copies that are re-encoded, noisy, darker or cropped by 2 % have 0.973 and
# more, and 900 pairs of pictures of it in one scene, in other actions, 0.938 and less.
_SAME = 0.965
# Of levels 0..1: how far brightness, contrast and tint spread at least under several lights.
_ONE_LIGHT = 0.03
# Of the mean: how much brighter one half is in every picture that is lit from that side.
_LIT_SIDE = 0.15
# Shares of a mask: fewer pixels are no subject, more leave no background.
_EMPTY_MASK, _FULL_MASK = 0.01, 0.95
_OFF_CENTRE = 0.4  # of the width: the subject's middle in each picture, where it is always on one side
_LONGEST = 2.5  # longer side by shorter side
# What the puppets' autoencoder loses of a picture's finest detail, as a share of it: of 170 renders, also scaled, as
# JPEG or drawn by the model, at most 0.90; of 46 of 54 photographs and pictures of large models more than this.
_UNKNOWN = 0.92
_WINDOW = 256  # pixels: the middle of a larger picture tells as much
_LISTED = 6  # pictures and words that a finding names
_FEW = 3  # fewer pictures have too little in common to speak of
# Sides in pixels that ComfyUI's kinds of model were trained at, by the name of their configuration.
_NATIVE = {
    "SD15": 512, "SD20": 512, "SD21UnclipL": 768, "SD21UnclipH": 768, "SDXL": 1024, "SSD1B": 1024,
    "Segmind_Vega": 1024, "SD3": 1024, "Flux": 1024, "FluxSchnell": 1024,
}
_VIEWS = (
    "front", "back", "behind", "profile", "side", "left", "right", "three-quarter", "正面", "背面", "背後", "後ろ",
    "横顔", "側面", "侧面", "左", "右",
)
# Words that say nothing of a picture.
_SMALL_WORDS = frozenset(
    "a an the of in on at with and is are to from by as it its his her their this that one two photo photograph "
    "picture image drawing painting portrait view".split()
)


class Finding(NamedTuple):
    """What is wrong and its cure, in one sentence, and whether the result will probably suffer much."""

    text: str
    serious: bool = False


def examine(
    pictures: Sequence[torch.Tensor], captions: Sequence[str], *, images: str = "images", texts: str = "captions",
    learned: Sequence[str] = (), masks: Sequence[torch.Tensor] | None = None, model: Any = None, vae: Any = None,
) -> list[Finding]:
    """Findings on pictures [1, H, W, 3] in 0..1 with a caption each, serious ones first.

    `images` and `texts` name the inputs; `learned` are the words for what is learned, which captions need not
    explain; masks [H, W] or [1, H, W, 1], 0..1, one for each picture or none; a MODEL tells the size to train at,
    whether it is made for few steps, and with a VAE whether the pictures are puppets, where it knows nothing else.
    """
    if is_stored(pictures):  # a job's, which is examined in the graph
        return []
    masks = [mask[0, ..., 0] if mask.ndim == 4 else mask for mask in masks or ()]
    findings = [
        *of_copies([features(picture) for picture in pictures], images), *of_light(pictures, images),
        *of_sizes(sizes(pictures), images, native_size(model)), *of_masks(masks),
        *of_captions(captions, texts, learned), *of_model(model), *of_strangers(pictures, images, model, vae),
    ]
    return sorted(findings, key=lambda finding: not finding.serious)


def native_size(model: Any) -> int | None:
    """Side in pixels that a MODEL was trained at, where its kind is known."""
    return None if model is None else _NATIVE.get(type(model.model.model_config).__name__)


def of_model(model: Any) -> Iterator[Finding]:
    """A MODEL that is distilled to sample in few steps, which training at every noise level undoes."""
    if model is not None and (sign := sign_of_few_steps(model)):
        yield Finding(
            f"model is distilled, since {sign}: training takes away that it needs few steps, so train on the base "
            "model that it was made from, and load the result on the distilled one"
        )


# Pictures


def features(picture: torch.Tensor) -> torch.Tensor:
    """A picture [1, H, W, 3] or latent [1, C, (T,) H, W], small and without its mean brightness and contrast, [N]."""
    channels = picture.movedim(-1, 1) if picture.ndim == 4 and picture.shape[-1] == 3 else picture.flatten(1, -3)
    small = F.adaptive_avg_pool2d(channels.float(), _SIDE)
    centred = small - small.mean((-2, -1), keepdim=True)
    return F.normalize(centred.flatten(), dim=0)


def copies(of: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Pairs of equal features: pictures that show the same, mirror images included."""
    pairs = []
    for size in {len(feature) for feature in of}:
        numbers = [i for i, feature in enumerate(of) if len(feature) == size]
        stacked = torch.stack([of[i] for i in numbers])
        mirrored = stacked.unflatten(1, (-1, _SIDE, _SIDE)).flip(-1).flatten(1)
        alike = torch.maximum(stacked @ stacked.T, stacked @ mirrored.T) > _SAME
        pairs += [(numbers[i], numbers[j]) for i, j in alike.triu(1).nonzero().tolist()]
    return sorted(pairs)


def of_copies(of: Sequence[torch.Tensor], name: str, numbers: Sequence[int] = ()) -> Iterator[Finding]:
    """Near-duplicates, from `features`; `numbers` are the pictures' own, where these are some of many."""
    pairs = copies(of)
    numbers = numbers or range(len(of))
    if pairs:
        listed = _listed([f"{numbers[i] + 1} and {numbers[j] + 1}" for i, j in pairs])
        surplus = len({j for _, j in pairs})
        yield Finding(
            f"{name}: pictures {listed} are nearly the same, so what they share counts more than the rest: keep one "
            "of each",
            serious=2 * surplus >= len(of),
        )


def of_light(pictures: Sequence[torch.Tensor], name: str) -> Iterator[Finding]:
    """One light, or one side that is lit, in all pictures."""
    if len(pictures) < _FEW:
        return
    measures = torch.stack([_light(picture) for picture in pictures])
    if bool((measures[:, :4].amax(0) - measures[:, :4].amin(0) < _ONE_LIGHT).all()):
        yield Finding(
            f"{name}: all {len(pictures)} pictures have the same brightness, contrast and tint, so their light is "
            "learned as well: add pictures in other light"
        )
    for side, sign in (("left", -1), ("right", 1)):
        if bool((sign * measures[:, 4] > _LIT_SIDE).all()):
            yield Finding(
                f"{name}: the {side} half is the brighter one in every picture, so one side only is seen in the "
                "light: add pictures lit from elsewhere, or mirrored ones"
            )


def _light(picture: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast, two numbers of the tint, and how much brighter the right half is."""
    red, green, blue = picture[0].float().mean((0, 1))
    grey = picture[0].float().mean(-1)
    middle = grey.shape[1] // 2
    lean = (grey[:, -middle:].mean() - grey[:, :middle].mean()) / grey.mean().clamp(min=1e-3)
    return torch.stack([grey.mean(), grey.std(), red - green, blue - green, lean])


def sizes(pictures: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Width and height of each picture [1, H, W, 3]."""
    return [(picture.shape[2], picture.shape[1]) for picture in pictures]


def of_sizes(
    of: Sequence[tuple[int, int]], name: str, native: int | None, kind: str = "picture"
) -> Iterator[Finding]:
    """Sizes that the model was not trained at, very long shapes, and a set of many sizes; `of` as from `sizes`."""
    different = sorted(set(of))
    for width, height in different:
        size = f"{name}: a {kind} of {width} x {height} pixels"
        if max(width, height) > _LONGEST * min(width, height):
            yield Finding(f"{size} is very long: crop it to the subject")
        area = (width * height) ** 0.5
        if native and area < 0.7 * native:
            yield Finding(
                f"{size} is small for a model of {native} x {native}, so soft pictures are learned: use a larger one",
                serious=area < 0.5 * native,
            )
        if native and area > 1.5 * native:
            yield Finding(
                f"{size} is large for a model of {native} x {native}, which sees a part of it at a time and takes "
                f"longer: scale it to about {native * native:,} pixels"
            )
    if len(different) > max(_FEW, len(of) // 2):
        yield Finding(
            f"{name}: {len(of)} {kind}s have {len(different)} sizes, and a batch takes {kind}s of one size: scale "
            "them to a few sizes"
        )


def of_masks(
    masks: Iterable[torch.Tensor], numbers: Sequence[int] = (), kind: str = "picture"
) -> Iterator[Finding]:
    """Masks [H, W] that show no subject, no background, or the subject always on one side; each is read once.

    `numbers` as in `of_copies`.
    """
    measures = [(float(mask.float().mean()), _middle(mask.float())) for mask in masks]
    if not measures:
        return
    count = len(measures)
    numbers = numbers or range(count)
    for limit, are, what in (
        (lambda share: share < _EMPTY_MASK, "empty", f"so nothing of these {kind}s is learned"),
        (lambda share: share > _FULL_MASK, "nearly all 1", "so the background is learned as well"),
    ):
        found = [str(number + 1) for number, (share, _) in zip(numbers, measures, strict=True) if limit(share)]
        if found:
            yield Finding(
                f"masks: {_listed(found)} of {count} {'is' if len(found) == 1 else 'are'} {are}, {what}: draw 1 "
                f"where the subject is and 0 elsewhere, or leave the {kind} out",
                serious=are == "empty",
            )
    middles = [middle for share, middle in measures if share > 0]
    for side, beside in (("left", [middle < _OFF_CENTRE for middle in middles]),
                         ("right", [middle > 1 - _OFF_CENTRE for middle in middles])):
        if len(middles) >= _FEW and all(beside):
            yield Finding(
                f"masks: the subject is on the {side} of every {kind}, so its place is learned: crop the {kind}s "
                "in other ways, or add mirrored ones"
            )


def _middle(mask: torch.Tensor) -> float:
    """Where the mask's centre is, as a fraction of the width; NaN for an empty one."""
    columns = mask.sum(0)
    places = (torch.arange(len(columns), device=mask.device) + 0.5) / len(columns)
    return float((columns * places).sum() / columns.sum())


def of_strangers(
    pictures: Sequence[torch.Tensor], name: str, model: Any, vae: Any, numbers: Sequence[int] = ()
) -> Iterator[Finding]:
    """Photographs for the puppets' models, looked for in a few of the pictures; `numbers` as in `of_copies`."""
    if vae is None or model is None or type(model.model.model_config).__name__ != PUPPETS:
        return
    checked = sorted({i * len(pictures) // _LISTED for i in range(_LISTED)})
    of = "" if numbers else f" of {len(pictures)}"
    numbers = numbers or range(len(pictures))
    found = [str(numbers[i] + 1) for i in checked if lost_detail(pictures[i], vae) > _UNKNOWN]
    if found:
        yield Finding(
            f"{name}: {_listed(found)}{of} {'is' if len(found) == 1 else 'are'} no puppet, and {PUPPETS_ONLY}, so "
            f"nothing useful is learned: {FOR_PEOPLE}",
            serious=True,
        )


@torch.no_grad()
def lost_detail(picture: torch.Tensor, vae: Any) -> float:
    """What a VAE does not give back of the finest detail of a picture [1, H, W, 3], as a share of it."""
    top, left = (max(0, (side - _WINDOW) // 2) for side in picture.shape[1:3])
    pixels = vae.vae_encode_crop_pixels(picture[:, top : top + _WINDOW, left : left + _WINDOW])
    lost = pixels - vae.decode(vae.encode(pixels)).to(pixels)
    return float((_detail(lost) / (_detail(pixels) + 1e-5)).sqrt())


def _detail(picture: torch.Tensor) -> torch.Tensor:
    """The mean square of the Laplacian."""
    middle = picture[:, 1:-1, 1:-1]
    beside = picture[:, :-2, 1:-1] + picture[:, 2:, 1:-1] + picture[:, 1:-1, :-2] + picture[:, 1:-1, 2:]
    return (4 * middle - beside).square().mean()


# Captions


def of_captions(captions: Sequence[str], name: str, learned: Sequence[str] = ()) -> Iterator[Finding]:
    """Captions that are empty or all the same, that name what is to be learned, or tell of one view alone."""
    texts = [" ".join(caption.split()) for caption in captions]
    empty = [str(i + 1) for i, text in enumerate(texts) if not text]
    if empty:
        yield Finding(
            f"{name}: {_listed(empty)} of {len(texts)} {'is' if len(empty) == 1 else 'are'} empty, so all of the "
            "picture is learned: say what it shows besides the subject", serious=True,
        )
    if len(texts) >= 2 and len({text.casefold() for text in texts}) == 1 and texts[0]:
        yield Finding(
            f"{name}: all {len(texts)} say the same, {_short(texts[0])}, so what differs between the pictures is "
            "learned with the subject: describe each picture", serious=len(texts) >= _FEW,
        )
        return
    if len(texts) < _FEW or empty:
        return
    for view in _VIEWS:
        found = words_pattern([view], re.IGNORECASE)
        if all(found.search(text) for text in texts):
            yield Finding(
                f"{name}: every caption says {view!r}, so one side only is learned: add pictures of other views"
            )
    common = [word for word in _common_words(texts) if word not in _words(" ".join(learned)) and word not in _VIEWS]
    if common:
        yield Finding(
            f"{name}: every caption says {_listed([repr(word) for word in common])}. What belongs to the subject is "
            "learned by these words and not by its own: leave it out; what does not belong to it should vary"
        )


def of_named(captions: Sequence[str], name: str, learned: Sequence[str]) -> Iterator[Finding]:
    """Captions that say what is to be learned, in these words, which then teach nothing new."""
    for word in dict.fromkeys(word for text in learned for word in entries(text)):
        found = words_pattern([word], re.IGNORECASE)
        numbers = [str(i + 1) for i, text in enumerate(captions) if found.search(text)]
        if numbers:
            yield Finding(
                f"{name}: {_listed(numbers)} of {len(captions)} say {word!r}, which is what should be learned, so it "
                "is learned less: leave the word out", serious=2 * len(numbers) >= len(captions),
            )


def _words(text: str) -> set[str]:
    """Its words in lower case; a script without spaces is one word from one mark to the next."""
    return set(re.findall(r"[^\W\d_]+(?:[-'][^\W\d_]+)*", text.lower()))


def _common_words(texts: Sequence[str]) -> list[str]:
    """The words that every text has, in the order of the first, without those that say nothing."""
    first, *others = (_words(re.sub(r"\{\w+\}", " ", text)) for text in texts)
    common = first.intersection(*others) - _SMALL_WORDS
    return sorted(common, key=texts[0].lower().find)


def lines(findings: Iterable[Finding]) -> list[str]:
    """Their texts, to show on a node."""
    return [finding.text for finding in findings]


# After training


def compared(before: float, after: float) -> Finding:
    """What the loss on the references says once training is done; both with the same noise."""
    change = (after - before) / max(before, 1e-12)
    line = f"loss on the references {after:.4f}, and {before:.4f} before training ({change:+.0%})"
    if not after < before:
        return Finding(
            f"{line}: it learned nothing of them: raise steps or learning_rate, or lower learning_rate if the loss "
            "rose during the run", serious=True,
        )
    if after < 0.3 * before:
        return Finding(
            f"{line}: the pictures themselves are learned, and prompts will change them less: use fewer steps or a "
            "lower rank if prompts are ignored"
        )
    return Finding(line)


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:_LISTED]) + (", …" if len(items) > _LISTED else "")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}…")
