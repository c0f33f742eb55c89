"""From pictures and texts to a trained LORA_MODEL: the path of every node that trains a LoRA or a whole UNet."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.ldm.cosmos.predict2 import MiniTrainDIT
from comfy.ldm.ernie.model import ErnieImageModel
from comfy.ldm.hidream_o1.model import HiDreamO1Transformer
from comfy.ldm.joyimage.model import JoyImageTransformer3DModel
from comfy.ldm.pixeldit.model import PixDiT_T2I

from ..fingerprint import weights_fingerprint
from ..inputs.families import check_one_latent, family
from ..inputs.model_fit import check_encoded
from ..messages import tell
from .checkpoints import Checkpoints
from .config import LoraConfig, TrainingConfig
from .drawing import ModelPreview
from .loop import Objective
from .lora import chosen_layers, lora_model, parameter_count, trainable
from .objective import WEIGHTS, Denoising, DenoisingObjective, Sample, prediction_kind, samples_of
from .parallel import engine
from .reference_loss import ReferenceLoss
from .runs import LossMap, run
from .session import session
from .stored import Stored, digest, is_stored

# The rotary embedding of most is a kernel of ComfyUI's without a gradient; the last writes over what its own needs.
_WITHOUT_GRADIENTS = (ErnieImageModel, JoyImageTransformer3DModel, MiniTrainDIT, PixDiT_T2I)

# make(denoising, samples) -> the method's objective
MakeObjective = Callable[[Denoising, Sequence[Sample]], Objective]


def encode_pictures(vae: Any, pictures: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """One latent [1, C, ...] for each picture [1, H, W, 3], as VAE Encode makes it.

    Raises ValueError for a picture too small to train on; warns of edges that the VAE cuts off.
    """
    if is_stored(pictures):
        key = functools.partial(_key, vae, pictures)
        shared = engine().encoded("latents", key, len(pictures), lambda i: encode_pictures(vae, [pictures[i]])[0])
        return pictures.map(lambda picture: encode_pictures(vae, [picture])[0]) if shared is None else shared
    cell = vae.spacial_compression_encode()
    for height, width in {tuple(picture.shape[1:3]) for picture in pictures}:
        size = f"{width} x {height} pixels"
        if min(height, width) < 4 * cell:
            raise ValueError(f"a picture of {size} is too small to train on: scale it to the size to generate")
        if height % cell or width % cell:
            tell("training", [f"pictures of {size} are cut to multiples of {cell} pixels"], logging.WARNING)
    return [vae.encode(picture).clone() for picture in pictures]


def _key(vae: Any, pictures: Stored) -> str:
    return digest(pictures.key, weights_fingerprint(vae.get_sd()))


def encode_texts(clip: Any, texts: Sequence[str]) -> list[list]:
    """One CONDITIONING for each text, as CLIP Text Encode makes it."""
    encoded: dict[str, list] = {}
    for text in texts:
        if text not in encoded:
            encoded[text] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return [encoded[text] for text in texts]


def train_on_pictures(
    model: Any, latents: Sequence[torch.Tensor], conditionings: Sequence[list], config: TrainingConfig,
    lora: LoraConfig | None, *, checkpoints: Checkpoints, resume_from: str,
    make_objective: MakeObjective | None = None, forward_batch: int | None = None,
    preview: ModelPreview | None = None, references: int | None = None,
    weights: Sequence[torch.Tensor] | None = None,
) -> tuple[dict[str, torch.Tensor], LossMap]:
    """Train a LoRA of `model`, or its whole network if `lora` is None, on latents and their CONDITIONINGs.

    Latents are as VAE Encode makes them; `weights` [1, 1, ...] are those of their cells in the loss. `forward_batch`
    is how many of them a forward pass takes, if not batch_size. The first `references` of them, or all, are those
    whose loss is compared before and after. Returns ComfyUI's LORA_MODEL and LOSS_MAP; the model is not modified.
    Raises loop.TrainingDiverged, ValueError for texts or latents of another model and as `session` does, and
    ComfyUI's interruption.
    """
    check_family(model, lora)
    check_encoded(conditionings, latents, model)
    resume = checkpoints.resume(resume_from)
    largest = max(latents, key=lambda latent: latent.numel())
    shape = [forward_batch or config.batch_size, *largest.shape[1:]]
    count = parameter_count(model.get_model_object("diffusion_model"), lora)
    with session(model, shape, config, whole=lora is None, extra_parameters=count) as denoiser:
        samples = samples_of(
            (latents, conditionings, *([] if weights is None else [weights])),
            latent=lambda latent, *_: denoiser.model.process_latent_in(latent.clone()).float(),
            conditions=lambda latent, conditioning, *weight: {
                **denoiser.prepare(conditioning, latent), **{WEIGHTS: cells for cells in weight},
            },
        )
        objective: Objective = DenoisingObjective(denoiser, samples, config)
        reference_loss = ReferenceLoss.of_samples(objective, samples[:references])
        if make_objective is not None:
            objective = make_objective(objective, samples)
        trained = trainable(denoiser.network, lora, config.seed, denoiser.device)
        with trained.attached():
            loss_map = run(
                objective, trained.parameters(), config, denoiser.device, checkpoints=checkpoints, resume=resume,
                preview=None if preview is None else lambda: preview(denoiser), reference_loss=reference_loss,
            )
        return lora_model(trained, denoiser.model.model_config.unet_config), loss_map


def check_family(model: Any, lora: LoraConfig | None) -> None:
    """Raises ValueError, naming the family and the fix, for a model that cannot be trained on pictures."""
    network = model.get_model_object("diffusion_model")
    check_one_latent(model, "training")
    prediction_kind(model.get_model_object("model_sampling"), "training", family(model))
    if isinstance(network, HiDreamO1Transformer):
        raise ValueError(
            f"model is {family(model)}, which keeps what it computed of a text from step to step, so that training "
            "would not reach it: use SD, SDXL, Flux, Qwen-Image, Z-Image or Wan"
        )
    if isinstance(network, _WITHOUT_GRADIENTS):
        raise ValueError(
            f"model is {family(model)}, whose attention has no backward pass in this ComfyUI, so it cannot be "
            "trained: use SD, SDXL, Flux, Qwen-Image, Z-Image or Wan"
        )
    if lora is not None and not chosen_layers(network, lora):
        raise ValueError(
            f"model is {family(model)}, none of whose layers are known as attention, which is what is trained: use "
            "SD, SDXL, Flux, Qwen-Image, Z-Image or Wan"
        )
