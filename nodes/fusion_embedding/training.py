"""From pairs to a trained Fusion through the shared loop: the combiner, stage 1, and the generator, stage 2."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import comfy.conds
import torch
from PIL import Image

from ..training import drawing, loop
from ..training.checkpoints import Checkpoints
from ..training.config import LoraConfig, TrainingConfig
from ..training.differentiable import no_training
from ..training.lora import LoraLayers
from ..training.lora_model import lora_model
from ..training.objective import Denoising, draw_batch
from ..training.runs import LossMap, run
from ..training.session import ModelDenoiser, encoder_session, session
from ..training.whole_network import BYTES_PER_PARAMETER, WholeNetwork
from . import encoding, method, running
from .config import GUIDANCE, CombinerConfig, GeneratorConfig
from .method import LORA, WHOLE, Fusion, FusionError, Weights, kernel
from .pairs import Pairs

_COMBINER_SEED, _GENERATOR_SEED = 2_000_000_033, 2_000_000_063  # beside those of the steps and of LoRAs
_REMEMBERED = 100_000  # pairs whose embeddings by a frozen encoder are kept, 9 kB each for CLIP ViT-L
_KEPT_BYTES = 2 << 30  # of pairs as the generator sees them; what is over is encoded again when its turn comes
_ACTIVATIONS = 4 << 30  # ours: room for an image encoder's backward pass
_SHOWN_STEPS = 20  # of retrieval, in what is shown while training


# Stage 1


def train_combiner(
    clip_vision: Any, pairs: Pairs, config: TrainingConfig, combiner: CombinerConfig, *,
    checkpoints: Checkpoints, resume_from: str,
) -> tuple[Fusion, LossMap]:
    """Train a combiner, with `train_encoder` a copy of the encoder too, to find each pair's target among others.

    Returns a Fusion, fp32 on the CPU, its encoder in the host's precision for encoders, and the host's LOSS_MAP.
    `clip_vision` is not changed. Raises loop.TrainingDiverged, FusionError and the host's interruption.
    """
    if len(pairs) < 2:
        raise FusionError("there is one pair: a target is found among others, so give 2 or more")
    resume = checkpoints.resume(resume_from)
    width = encoding.embeddings(clip_vision, pairs[0].source).shape[-1]
    with _encoder(clip_vision, config, combiner.train_encoder) as (module, trained):
        generator = torch.Generator().manual_seed(loop.step_seed(config.seed, _COMBINER_SEED))
        made = method.new_combiner(width, combiner.projection, combiner.hidden, generator)
        weights = _parameters(made, clip_vision.load_device)
        if trained is None:
            encode = _Remembering(clip_vision, pairs)
        else:
            encode = _Encoding(encoding.differentiable(clip_vision, module), pairs)
        objective = RetrievalObjective(encode, len(pairs), weights, config.batch_size, combiner)
        parameters = {f"combiner.{key}": value for key, value in weights.items()}
        parameters |= {} if trained is None else {f"encoder.{k}": v for k, v in trained.parameters().items()}
        loss_map = run(
            objective, parameters, config, clip_vision.load_device,
            checkpoints=checkpoints, resume=resume, note=objective.accuracy,
        )
        learnt = None if trained is None else _on_cpu(module.state_dict())
    if learnt is None:
        return Fusion(_on_cpu(weights), probe=encoding.probe(clip_vision)), loss_map
    return Fusion(_on_cpu(weights), encoding.rebuilt(clip_vision.config, learnt)), loss_map


@contextlib.contextmanager
def _encoder(clip_vision: Any, config: TrainingConfig, train: bool) -> Iterator[tuple[Any, WholeNetwork | None]]:
    """The encoder's module, loaded, and its trainable copies in place, or None where it is frozen."""
    if not train:
        with torch.inference_mode(False), torch.enable_grad():
            yield clip_vision.model, None
        return
    copies = BYTES_PER_PARAMETER * sum(weight.numel() for weight in clip_vision.model.parameters())
    required = copies + _ACTIVATIONS
    with encoder_session(clip_vision.patcher, required, config.gradient_checkpointing) as module:
        trained = WholeNetwork(module, "switch train_encoder off")
        with trained.attached():
            yield module, trained


class RetrievalObjective:
    """The published loss on seeded batches of pairs, and how often the target is found meanwhile."""

    def __init__(
        self, encode: Callable[[Sequence[int]], tuple], count: int, weights: Weights, batch_size: int,
        config: CombinerConfig,
    ):
        self.encode, self.count, self.weights, self.config = encode, count, weights, config
        self.batch_size = min(batch_size, count)
        self.ranks: collections.deque[torch.Tensor] = collections.deque(maxlen=_SHOWN_STEPS)

    def __call__(self, _step: int, generator: torch.Generator) -> torch.Tensor:
        order = torch.randperm(self.count, generator=generator)[: self.batch_size]
        source, pose, target = self.encode([int(i) for i in order])
        drop = kernel.dropout(self.config.dropout, generator) if self.config.dropout else None
        fused = kernel.combine(source, pose, self.weights, drop)
        self.ranks.append(kernel.retrieval_ranks(fused.detach(), target.detach()).cpu())
        return kernel.source_enhanced_info_nce(source, target, fused, self.config.temperature, self.config.l1)

    def accuracy(self) -> str:
        """Shares of targets found first and among the first five of their batch, in the last steps, under dropout."""
        ranks = torch.cat(list(self.ranks))
        first, five = ((ranks < n).float().mean() for n in (1, 5))
        return f"top-1 {first:.0%}, top-5 {five:.0%} of {self.batch_size}"


class _Encoding:
    """Embeddings of the sources, poses and targets of some pairs, [B, D] each, in one pass with a graph."""

    def __init__(self, encode: Callable[[Sequence[torch.Tensor]], torch.Tensor], pairs: Pairs):
        self.encode, self.pairs = encode, pairs

    def __call__(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        chosen = [self.pairs[i] for i in indices]
        return self.encode([picture for role in zip(*chosen, strict=True) for picture in role]).chunk(3)


class _Remembering:
    """The same by a frozen encoder, which meets each pair once."""

    def __init__(self, clip_vision: Any, pairs: Pairs):
        self.clip_vision, self.pairs = clip_vision, pairs
        self.known: dict[int, torch.Tensor] = {}

    def __call__(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        found = [self._one(i) for i in indices]
        return torch.stack(found, dim=1).to(self.clip_vision.load_device).unbind()

    def _one(self, index: int) -> torch.Tensor:
        if index in self.known:
            return self.known[index]
        with torch.no_grad():
            embedded = torch.cat([encoding.embeddings(self.clip_vision, picture) for picture in self.pairs[index]])
        if len(self.known) < _REMEMBERED:
            self.known[index] = embedded
        return embedded


# Stage 2


class Encoded(NamedTuple):
    """One pair as a generator sees it: latent [1, C, h, w] as VAE Encode gives it, hidden states [1, T, W], e_f
    [1, D] or None, and the drawing [1, 3, H, W] at the latent's size.
    """

    latent: torch.Tensor
    states: torch.Tensor
    fused: torch.Tensor | None
    pose: torch.Tensor


class PairEncoder:
    """Pairs by index, encoded when they are asked for, and kept as long as they fit a limit."""

    def __init__(self, pairs: Pairs, vae: Any, appearance: Any, combiner: Weights | None, encoder: Any, ratio: int):
        self.pairs, self.vae, self.appearance, self.ratio = pairs, vae, appearance, ratio
        self.combiner, self.encoder = combiner, encoder
        self.kept: dict[int, Encoded] = {}
        self.room = _KEPT_BYTES
        self._sizes: list[tuple[int, int]] = []

    def __getitem__(self, index: int) -> Encoded:
        if index in self.kept:
            return self.kept[index]
        with torch.no_grad():
            encoded = self._encoded(index)
        size = sum(part.nbytes for part in encoded if part is not None)
        if size <= self.room:
            self.room -= size
            self.kept[index] = encoded
        return encoded

    def _encoded(self, index: int) -> Encoded:
        source, pose, target = self.pairs[index]
        if pose.shape[1:3] != target.shape[1:3]:
            pose = _scaled(pose, target.shape[1:3])
        fused = None
        if self.combiner is not None:
            fused = encoding.fused(self.combiner, self.encoder, source, pose)
        latent = self.vae.encode(_cropped(target, self.ratio)).cpu().float()
        states = encoding.states(self.appearance, source)
        return Encoded(latent, states, fused, _cropped(pose, self.ratio).movedim(-1, 1).float())

    def fill(self) -> None:
        """Encode all, where they seem to fit, before the model that learns takes the memory."""
        size = sum(part.nbytes for part in self[0] if part is not None)
        if size * len(self.pairs) <= _KEPT_BYTES:
            for i in range(len(self.pairs)):
                self[i]

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each pair's latent; looked up once, since a folder opens every file for it."""
        if not self._sizes:
            self._sizes = [tuple(n // self.ratio for n in self.pairs.size(i)) for i in range(len(self.pairs))]
        return self._sizes


class _Batch(NamedTuple):
    """What a forward pass of B pairs is conditioned on, and which of it is left out, [B] of 0 and 1 by name."""

    states: torch.Tensor
    fused: torch.Tensor | None
    pose: torch.Tensor
    kept: dict[str, torch.Tensor]


class PairObjective:
    """The denoising error on seeded batches of pairs of one size, with noise offset and independent drops."""

    def __init__(self, denoising: Denoising, encoded: PairEncoder, batch_size: int, config: GeneratorConfig):
        self.denoising, self.encoded, self.batch_size, self.config = denoising, encoded, batch_size, config
        buckets: dict[tuple[int, int], list[int]] = {}
        for i, size in enumerate(encoded.sizes()):
            buckets.setdefault(size, []).append(i)
        self.buckets = list(buckets.values())

    def __call__(self, _step: int, generator: torch.Generator) -> torch.Tensor:
        chosen = [self.encoded[i] for i in draw_batch(self.buckets, self.batch_size, generator)]
        tokens = sorted({pair.states.shape[1] for pair in chosen})
        if len(tokens) > 1:
            raise FusionError(
                f"appearance_encoder gives {tokens[0]} and {tokens[-1]} tokens for sources of other sides: "
                "set batch_size to 1, scale the sources to one size, or use a CLIP or DINOv2 model"
            )
        into = self.denoising.denoiser.model.process_latent_in
        clean = torch.cat([into(pair.latent.clone()).float() for pair in chosen])
        noise = torch.randn(clean.shape, generator=generator)
        noise += self.config.noise_offset * torch.randn((*clean.shape[:2], 1, 1), generator=generator)
        level = torch.randint(len(self.denoising.denoiser.sigmas), (len(clean),), generator=generator)
        kept = {
            name: (torch.rand(len(chosen), generator=generator) >= getattr(self.config, f"{name}_drop")).float()
            for name in ("source", "fusion", "pose")
        }
        fused = None if chosen[0].fused is None else torch.cat([pair.fused for pair in chosen])
        batch = _Batch(
            torch.cat([pair.states for pair in chosen]), fused, torch.cat([pair.pose for pair in chosen]), kept
        )
        return self.denoising.loss_at(clean, batch, noise, level).mean()


class FusionDenoiser:
    """A denoiser that is conditioned on a batch of pairs through a generator's weights."""

    def __init__(self, denoiser: ModelDenoiser, weights: Weights):
        self.denoiser, self.weights = denoiser, weights
        self.model, self.device, self.sigmas = denoiser.model, denoiser.device, denoiser.sigmas
        self.templates: dict[torch.Size, dict] = {}

    def denoise(self, noisy: torch.Tensor, sigma: torch.Tensor, batch: _Batch) -> torch.Tensor:
        states, pose = batch.states.to(self.device), batch.pose.to(self.device)
        kept = {name: share.to(self.device) for name, share in batch.kept.items()}
        tokens = method.appearance_tokens(self.weights, states) * kept["source"].reshape(-1, 1, 1)
        added = {running.POSE: method.pose_residual(self.weights, pose) * kept["pose"].reshape(-1, 1, 1, 1)}
        if batch.fused is None:
            added[running.EMBEDDING] = torch.zeros(1, 1, device=self.device)
        else:
            # Published: what is left out is an e_f of zeros.
            fused = batch.fused.to(self.device) * kept["fusion"].reshape(-1, 1)
            added[running.EMBEDDING] = method.class_embedding(self.weights, fused)
        others = self._template(noisy)
        conditions = [{**others, "c_crossattn": comfy.conds.CONDCrossAttn(row)} for row in tokens.split(1)]
        return self.denoiser.denoise(noisy, sigma, conditions, {running.KEY: added})

    def _template(self, noisy: torch.Tensor) -> dict:
        """What else the model asks of a conditioning at this size."""
        if noisy.shape[2:] not in self.templates:
            conditioning = running.template(self.denoiser.patcher)
            self.templates[noisy.shape[2:]] = self.denoiser.prepare(conditioning, noisy[:1])
        return self.templates[noisy.shape[2:]]


def train_generator(
    model: Any, vae: Any, appearance: Any, pairs: Pairs, fusion: Fusion, clip_vision: Any, config: TrainingConfig,
    generator: GeneratorConfig, *, checkpoints: Checkpoints, resume_from: str,
) -> tuple[Fusion, LossMap]:
    """Train a generator's three paths with a LoRA of the UNet, or the whole of it.

    `fusion` brings a combiner, or none: then the embedding path is off. Returns it with the generator in it, and the
    host's LOSS_MAP. Neither the model nor an encoder is changed. Raises loop.TrainingDiverged, FusionError,
    ValueError as `session` does, and the host's interruption.
    """
    resume = checkpoints.resume(resume_from)
    latent_format = model.model.latent_format
    ratio = latent_format.spacial_downscale_ratio
    encoder = None if fusion.combiner is None else encoding.chosen(fusion, clip_vision)
    encoded = PairEncoder(pairs, vae, appearance, fusion.combiner, encoder, ratio)
    width = None if fusion.combiner is None else method.combiner_width(fusion.combiner)
    first = encoded[0]
    sizes = running.model_sizes(model, first.states.shape[-1], width)
    _check_latent(first.latent, (latent_format.latent_channels, *encoded.sizes()[0]))
    encoded.fill()
    height, across = max(encoded.sizes(), key=lambda size: size[0] * size[1])
    shape = [config.batch_size, latent_format.latent_channels, height, across]
    beside = {id(part): part.patcher for part in (vae, appearance, encoder) if part is not None}
    streaming = list(beside.values()) if len(encoded.kept) < len(pairs) else []
    extended = running.extended(model)
    with session(extended, shape, config, whole=generator.whole_unet, other_models=streaming) as denoiser:
        seeded = torch.Generator().manual_seed(loop.step_seed(config.seed, _GENERATOR_SEED))
        made = method.new_generator(sizes, generator.hidden, generator.pose_channels, seeded)
        weights = _parameters(made, denoiser.device)
        trained: LoraLayers | WholeNetwork
        if generator.whole_unet:
            trained = WholeNetwork(denoiser.network)
        else:
            trained = LoraLayers(denoiser.network, LoraConfig(rank=generator.rank), config.seed, denoiser.device)
        denoising = Denoising(FusionDenoiser(denoiser, weights), config)
        objective = PairObjective(denoising, encoded, config.batch_size, generator)
        parameters = {f"generator.{key}": value for key, value in weights.items()}
        parameters |= {f"unet.{key}": value for key, value in trained.parameters().items()}

        def draw() -> Image.Image | None:
            return _preview(denoiser, vae, weights, encoded[0], config.seed)

        with trained.attached():
            loss_map = run(
                objective, parameters, config, denoiser.device, checkpoints=checkpoints, resume=resume, preview=draw
            )
        if generator.whole_unet:
            unet = {f"diffusion_model.{key}": value for key, value in _on_cpu(trained.parameters()).items()}
        else:
            unet = lora_model(trained, denoiser.model.model_config.unet_config)
    kind = WHOLE if generator.whole_unet else LORA
    learnt = dataclasses.replace(fusion, generator=_on_cpu(weights), unet=unet, unet_kind=kind)
    return learnt, loss_map


def _preview(denoiser: ModelDenoiser, vae: Any, weights: Weights, pair: Encoded, seed: int):
    """The first pair's source in its pose, with a fixed noise, or None where there is no room to sample."""
    with no_training():
        positive, negative = running.conditionings(
            denoiser.patcher, {key: value.detach() for key, value in weights.items()}, pair.states, pair.fused,
            pair.pose.movedim(1, -1),
        )
    return drawing.preview_of(vae, positive, negative, pair.latent.shape, seed, GUIDANCE)(denoiser)


def _check_latent(latent: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(latent.shape[1:]) != expected:
        raise FusionError(
            f"vae makes a latent of shape {tuple(latent.shape[1:])} of a target and the model takes {expected}: "
            "connect the VAE of the model"
        )


def _cropped(picture: torch.Tensor, ratio: int) -> torch.Tensor:
    """The middle of a picture [1, H, W, 3] whose sides are multiples of `ratio`."""
    height, width = (n // ratio * ratio for n in picture.shape[1:3])
    if not height or not width:
        raise FusionError(f"a target is {picture.shape[2]} x {picture.shape[1]} pixels: use {ratio} or more each way")
    top, left = (picture.shape[1] - height) // 2, (picture.shape[2] - width) // 2
    return picture[:, top : top + height, left : left + width]


def _scaled(picture: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    moved = torch.nn.functional.interpolate(picture.movedim(-1, 1), tuple(size), mode="bilinear", antialias=True)
    return moved.movedim(1, -1)


def _parameters(weights: Weights, device: torch.device) -> dict[str, torch.nn.Parameter]:
    return {key: torch.nn.Parameter(value.detach().to(device)) for key, value in weights.items()}


def _on_cpu(weights: Weights) -> Weights:
    return {key: value.detach().cpu().clone() for key, value in weights.items()}
