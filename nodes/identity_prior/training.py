"""Training a prior: the subject's pictures and their variants, pictures of its class, and the run on both."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ..fingerprint import fingerprint
from ..inputs.model_fit import check_encoded
from ..inputs.words import entries
from ..patching.changes import call_changes, weight_changes
from ..subject_tokens import Subject
from ..training import drawing, inputs, picture_training
from ..training.checkpoints import Checkpoints
from ..training.config import LoraConfig, TrainingConfig
from ..training.objective import Batches
from ..training.parallel import check_shares, engine
from ..training.runs import LossMap
from ..training.seeds import seed_for
from ..training.stored import Stored, chained, digest, is_stored
from . import method
from .config import IdentityPriorConfig
from .mirrored_captions import mirrored

# Ours: of the side; a crop may lose the outermost tenth.
_SMALLEST_CROP = 0.9
_CROPS = 3
_CLASS_STEPS = 20


@dataclass(frozen=True)
class ClassPictures:
    """The texts of the class's pictures, and their latents [1, C, ...]; without latents the model draws them."""

    texts: Sequence[str] = ()
    latents: Sequence[torch.Tensor] = ()


def train(
    model: Any, clip: Any, vae: Any, latents: Sequence[torch.Tensor], texts: Sequence[str], classes: ClassPictures,
    prior: IdentityPriorConfig, config: TrainingConfig, *, checkpoints: Checkpoints, resume_from: str,
    weights: Sequence[torch.Tensor] | None = None,
) -> tuple[dict[str, torch.Tensor], LossMap]:
    """Train a LORA_MODEL on the subject's latents [1, C, ...], one text each, and on its class; model and clip are
    not modified. `weights` [1, 1, ...] are those of the cells of the subject's latents in the loss.

    Raises what picture_training.train_on_pictures raises.
    """
    picture_training.check_family(model, LoraConfig(rank=prior.rank))
    check_shares(config.batch_size, len(latents) + len(classes.texts))
    checkpoints.resume(resume_from)  # one that does not fit is refused before the model draws
    *conditionings, empty = picture_training.encode_texts(clip, [*texts, *classes.texts, ""])
    check_encoded(conditionings, chained(latents, classes.latents), model)  # also before the model draws
    class_latents = classes.latents
    if classes.texts and not class_latents:
        class_latents = draw_class_pictures(model, conditionings[len(texts) :], empty, latents[0].shape, config.seed)

    if weights is not None:  # the class counts everywhere, with weights, so that one pass takes both
        weights = chained(weights, [torch.ones(1, 1, *latent.shape[2:]) for latent in class_latents])

    def objective(denoising, samples):
        if not class_latents:
            return denoising
        subject, class_ = (
            Batches(part, config.batch_size) for part in (samples[: len(latents)], samples[len(latents) :])
        )
        return method.PriorObjective(denoising.losses, subject, class_, prior.prior_weight)

    return picture_training.train_on_pictures(
        model, chained(latents, class_latents), conditionings, config, LoraConfig(rank=prior.rank),
        checkpoints=checkpoints, resume_from=resume_from, make_objective=objective,
        forward_batch=config.batch_size * (2 if class_latents else 1),
        preview=drawing.preview_of(vae, conditionings[0], empty, latents[0].shape, config.seed),
        references=len(latents), weights=weights,
    )


def variants(
    pictures: Sequence[torch.Tensor], texts: Sequence[str], augment: str, seed: int
) -> tuple[Sequence[torch.Tensor], list[str]]:
    """Pictures [1, H, W, 3] and texts with crops of each, and with mirror images of all, as `augment` asks.

    What is on the left in a picture is on the right in its mirror image's text.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "augmentation"))
    plan = []  # of each variant its picture, its text, where it is cut, whether it is mirrored
    for i, text in enumerate(texts):
        plan.append((i, text, None, False))
        if augment != "none":
            plan += [(i, text, torch.rand(3, generator=generator).tolist(), False) for _ in range(_CROPS)]
    if augment == "crop_and_flip":
        plan += [(i, mirrored(text), cut, True) for i, text, cut, _ in plan]

    def variant(number: int) -> torch.Tensor:
        i, _, cut, flipped = plan[number]
        picture = pictures[i] if cut is None else _crop(pictures[i], *cut)
        return picture.flip(2) if flipped else picture

    made: Sequence[torch.Tensor] = Stored(len(plan), variant, digest(getattr(pictures, "key", ""), plan))
    return made if is_stored(pictures) else list(made), [text for _, text, _, _ in plan]


def _crop(picture: torch.Tensor, share: float, left: float, top: float) -> torch.Tensor:
    """A part of the picture with its proportions, at its full size; all in 0..1."""
    height, width = picture.shape[1:3]
    share = _SMALLEST_CROP + (1 - _SMALLEST_CROP) * share
    rows, columns = max(1, round(height * share)), max(1, round(width * share))
    y, x = round(top * (height - rows)), round(left * (width - columns))
    part = picture[:, y : y + rows, x : x + columns].movedim(-1, 1)
    resized = torch.nn.functional.interpolate(part, (height, width), mode="bicubic", antialias=True)
    return resized.movedim(1, -1).clamp(0, 1)


def class_pictures(
    vae: Any, subject: Subject, texts: Sequence[str], prior: IdentityPriorConfig,
    images: Sequence[torch.Tensor] | None, captions: Sequence[str] | None,
) -> ClassPictures:
    """Those of `images` and `captions`, or the texts for the model to draw; none where prior_weight is 0.

    Without captions these are the class's actions, or where none are listed the subject's texts. Raises ValueError,
    naming the input, where their numbers differ.
    """
    if not prior.prior_weight:
        return ClassPictures()
    if images:
        pictures = inputs.pictures(images, "class_images")
        class_texts = inputs.texts_for(captions or f"a {subject.noun}", len(pictures), "class_captions")
        latents = picture_training.encode_pictures(vae, pictures)
        return ClassPictures([subject.as_class_prompt(text) for text in class_texts], latents)
    lines = [line for text in captions or () for line in text.splitlines() if line.strip()]
    actions = [f"a {subject.noun} {action}" for action in entries(prior.class_actions)]
    distinct = list(dict.fromkeys(subject.as_class_prompt(text) for text in lines or actions or texts))
    # No caption of the class is left out.
    count = max(prior.class_count, len(distinct)) if lines else prior.class_count
    return ClassPictures([distinct[i % len(distinct)] for i in range(count)])


def draw_class_pictures(
    model: Any, conditionings: Sequence[list], negative: list, shape: torch.Size, seed: int
) -> Sequence[torch.Tensor]:
    """One latent of `shape` [1, C, ...] for each CONDITIONING, drawn by the base model, as a VAE would encode it.

    In a job they are drawn once, shared by its processes, and kept for its next start.
    """
    progress = comfy.utils.ProgressBar(len(conditionings))

    def draw(i: int) -> torch.Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        logging.info("[Understudy] drawing class picture %d of %d", i + 1, len(conditionings))
        picture_seed = seed_for(seed, "class picture", i)
        latent = drawing.sample(model, conditionings[i], negative, shape, picture_seed, _CLASS_STEPS).cpu()
        progress.update(1)
        return latent

    def key() -> str:
        prompts = inputs.conditioning_digest([*conditionings, negative])
        return digest(
            fingerprint(model), weight_changes(model), call_changes(model), prompts, tuple(shape), seed, _CLASS_STEPS
        )

    shared = engine().encoded("class_pictures", key, len(conditionings), draw)
    return list(map(draw, range(len(conditionings)))) if shared is None else shared
