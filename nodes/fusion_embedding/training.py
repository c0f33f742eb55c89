"""Training of a fusion on pairs: the combiner, stage 1, and the generator, stage 2."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import comfy.conds
import torch

from ..fingerprint import fingerprint, weights_fingerprint
from ..messages import tell
from ..training import drawing, inputs, loop, loss_masks, memory
from ..training.checkpoints import Checkpoints
from ..training.config import LoraConfig, TrainingConfig
from ..training.differentiable import no_training
from ..training.lora import lora_model, parameter_count, trainable
from ..training.objective import Denoising
from ..training.parallel import check_contrast, check_shares, engine, largest_share
from ..training.reference_loss import ReferenceLoss
from ..training.runs import LossMap, run
from ..training.seeds import seed_for
from ..training.session import ModelDenoiser, encoder_session, session
from ..training.stored import digest
from ..training.whole_network import WholeNetwork
from . import encoding, layout, method, sampling
from .config import GUIDANCE, CombinerConfig, GeneratorConfig
from .layout import FusionError, Weights
from .method import LORA, WHOLE, EncodedPair, Fusion, PairBatch
from .pairs import Pairs

_CACHED_EMBEDDINGS = 100_000  # pairs of a frozen encoder, 9 kB each for CLIP ViT-L
_CACHE_BYTES = 2 << 30  # of encoded pairs; the others are encoded again whenever they are drawn
# A generator's paths as users know them, by how their parameters' names begin; those that read e_f; and ours: the
# share of the largest gradient below which one of them is named.
_PATHS = {
    "appearance": "generator.appearance.", "class embedding": "generator.embedding.",
    "embedding tokens": "generator.embedding_tokens.", "pose": "generator.pose.", "UNet": "unet.",
}
_OF_EMBEDDING = ("class embedding", "embedding tokens")
_STARVED = 0.01
_NODE = "Train Fusion Generator"
_UNKNOWN = (
    "the fusion that is trained further does not say whether its UNet predicts noise or v: connect the model that it "
    "was trained for, for the published one the v-prediction SD 2.1 (v2-1_768-ema-pruned), or nothing comes of it"
)


# Stage 1


def train_combiner(
    clip_vision: Any, pairs: Pairs, config: TrainingConfig, combiner: CombinerConfig, *,
    checkpoints: Checkpoints, resume_from: str,
) -> tuple[Fusion, LossMap]:
    """Train a combiner, and with `train_encoder` a copy of the encoder, to retrieve each pair's target among others.

    Returns a Fusion, fp32 on the CPU but for its encoder, which has ComfyUI's precision for encoders, and the
    LOSS_MAP. `clip_vision` is not modified. Raises TrainingDiverged, FusionError and ComfyUI's interruption.
    """
    if len(pairs) < 2:
        raise FusionError("there is one pair, but a target is retrieved among others: connect 2 or more")
    check_contrast(min(config.batch_size, len(pairs)))
    resume = checkpoints.resume(resume_from)
    width = encoding.embeddings(clip_vision, pairs[0].source).shape[-1]
    pictures = 3 * largest_share(min(config.batch_size, len(pairs)))
    with _loaded_encoder(clip_vision, config, combiner.train_encoder, pictures) as (module, trained):
        generator = torch.Generator().manual_seed(seed_for(config.seed, "combiner"))
        initial = layout.new_combiner(width, combiner.projection, combiner.hidden, generator)
        weights = _parameters(initial, clip_vision.load_device)
        embed: method.Embed
        if trained is None:
            embed = _FrozenEmbeddings(clip_vision, pairs)
        else:
            embed = _TrainableEmbeddings(encoding.differentiable(clip_vision, module), pairs)
        objective = method.RetrievalObjective(embed, len(pairs), weights, config.batch_size, combiner)
        parameters = {f"combiner.{key}": value for key, value in weights.items()}
        parameters |= {} if trained is None else {f"encoder.{k}": v for k, v in trained.parameters().items()}
        loss_map = run(
            objective, parameters, config, clip_vision.load_device,
            checkpoints=checkpoints, resume=resume, note=objective.accuracy, reference_loss=objective.reference_loss,
        )
        encoder_weights = None if trained is None else _on_cpu(module.state_dict())
    if encoder_weights is None:
        return Fusion(_on_cpu(weights), probe=encoding.probe(clip_vision)), loss_map
    return Fusion(_on_cpu(weights), encoding.rebuild(clip_vision.config, encoder_weights)), loss_map


@contextlib.contextmanager
def _loaded_encoder(
    clip_vision: Any, config: TrainingConfig, train: bool, pictures: int
) -> Iterator[tuple[Any, WholeNetwork | None]]:
    """The encoder's module, loaded for so many pictures, and its trainable copies, attached, or None if it is frozen.
    """
    if not train:
        with torch.inference_mode(False), torch.enable_grad():
            yield clip_vision.model, None
        return
    activations = memory.of_encoder(pictures, clip_vision.config, config.gradient_checkpointing)
    with encoder_session(clip_vision.patcher, activations, config) as module:
        trained = WholeNetwork(module, "switch train_encoder off", in_main_memory=config.offload)
        with trained.attached():
            yield module, trained


class _TrainableEmbeddings:
    """method.Embed in one pass with a graph."""

    def __init__(self, encode: Callable[[Sequence[torch.Tensor]], torch.Tensor], pairs: Pairs):
        self.encode, self.pairs = encode, pairs

    def __call__(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        batch = [self.pairs[i] for i in indices]
        return self.encode([picture for role in zip(*batch, strict=True) for picture in role]).chunk(3)


class _FrozenEmbeddings:
    """method.Embed of a frozen encoder, which encodes each pair once."""

    def __init__(self, clip_vision: Any, pairs: Pairs):
        self.clip_vision, self.pairs = clip_vision, pairs
        self.cache: dict[int, torch.Tensor] = {}
        self.shared = engine().encoded("embeddings", self._key, len(pairs), self._embedded)

    def _key(self) -> str:
        return digest(self.pairs.digest(), weights_fingerprint(self.clip_vision.get_sd()))

    def __call__(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        rows = [self._embedded(i) if self.shared is None else self.shared[i] for i in indices]
        return torch.stack(rows, dim=1).to(self.clip_vision.load_device).unbind()

    def _embedded(self, index: int) -> torch.Tensor:
        """[3, D]: source, pose and target of one pair."""
        if index in self.cache:
            return self.cache[index]
        with torch.no_grad():
            embedded = torch.cat([encoding.embeddings(self.clip_vision, picture) for picture in self.pairs[index]])
        if len(self.cache) < _CACHED_EMBEDDINGS:
            self.cache[index] = embedded
        return embedded


# Stage 2


class PairEncoder:
    """The pairs of a PoseTransferObjective, encoded when they are drawn, and cached up to a limit."""

    def __init__(
        self, pairs: Pairs, vae: Any, appearance: Any, combiner: Weights | None, encoder: Any, ratio: int,
        masks: Sequence[torch.Tensor] | None = None, floor: float = 0.0,
    ):
        self.masks, self.floor = masks, floor
        self.pairs, self.vae, self.appearance, self.ratio = pairs, vae, appearance, ratio
        self.combiner, self.encoder = combiner, encoder
        self.cache: dict[int, EncodedPair] = {}
        self.shared: Sequence[dict[str, torch.Tensor]] | None = None
        self.free_bytes = _CACHE_BYTES
        self._sizes: list[tuple[int, int]] = []

    def __getitem__(self, index: int) -> EncodedPair:
        if self.shared is not None:
            return EncodedPair(**{"fused": None, **self.shared[index]})
        if index in self.cache:
            return self.cache[index]
        with torch.no_grad():
            encoded = self._encoded(index)
        size = _bytes(encoded)
        if size <= self.free_bytes:
            self.free_bytes -= size
            self.cache[index] = encoded
        return encoded

    def _encoded(self, index: int) -> EncodedPair:
        source, pose, target = self.pairs[index]
        if pose.shape[1:3] != target.shape[1:3]:
            pose = _scaled(pose, target.shape[1:3])
        fused = None
        if self.combiner is not None:
            fused = encoding.fused(self.combiner, self.encoder, source, pose)
        latent = self.vae.encode(_cropped(target, self.ratio)).cpu().float()
        states = encoding.states(self.appearance, source)
        weights = None
        if self.masks is not None:
            weights = loss_masks.cells(self.masks[index], latent.shape, self.floor, f"mask {index + 1} of masks")
        return EncodedPair(latent, states, fused, _cropped(pose, self.ratio).movedim(-1, 1).float(), weights)

    def fill(self) -> None:
        """Encode all if they seem to fit, or are stored, before the model to train takes the memory."""
        self.shared = engine().encoded("pairs", self._key, len(self.pairs), self._by_name)
        if self.shared is None and _bytes(self[0]) * len(self.pairs) <= _CACHE_BYTES:
            for i in range(len(self.pairs)):
                self[i]

    def _by_name(self, index: int) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            encoded = self._encoded(index)
        return {name: part for name, part in encoded._asdict().items() if part is not None}

    def _key(self) -> str:
        parts = [self.vae.get_sd(), self.appearance.get_sd(), self.combiner or {}]
        parts += [] if self.encoder is None else [self.encoder.get_sd()]
        masked = [] if self.masks is None else [inputs.digest(self.masks), self.floor]
        return digest(self.pairs.digest(), *map(weights_fingerprint, parts), *masked)

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each pair's latent; read once, since a folder opens every file for it."""
        if not self._sizes:
            self._sizes = [tuple(n // self.ratio for n in self.pairs.size(i)) for i in range(len(self.pairs))]
        return self._sizes


def _bytes(pair: EncodedPair) -> int:
    return sum(part.nbytes for part in pair if part is not None)


class FusionDenoiser(ModelDenoiser):
    """A denoiser whose conditions are a batch of pairs, through a generator's weights."""

    def __init__(self, denoiser: ModelDenoiser, weights: Weights):
        super().__init__(denoiser.patcher)
        self.weights = weights
        self.templates: dict[torch.Size, dict] = {}

    def denoise(self, noisy: torch.Tensor, sigma: torch.Tensor, batch: PairBatch) -> torch.Tensor:
        inputs = method.unet_inputs(self.weights, *batch)
        shared = self._template(noisy)
        conditions = [{**shared, "c_crossattn": comfy.conds.CONDCrossAttn(row)} for row in inputs.tokens.split(1)]
        added = {sampling.EMBEDDING: inputs.embedding, sampling.POSE: inputs.residual}
        return super().denoise(noisy, sigma, conditions, {sampling.KEY: added})

    def _template(self, noisy: torch.Tensor) -> dict:
        """What else the model needs of a conditioning at this size."""
        if noisy.shape[2:] not in self.templates:
            self.templates[noisy.shape[2:]] = self.prepare(sampling.empty_conditioning(self.patcher), noisy[:1])
        return self.templates[noisy.shape[2:]]


def train_generator(
    model: Any, vae: Any, appearance: Any, pairs: Pairs, fusion: Fusion, clip_vision: Any, config: TrainingConfig,
    generator: GeneratorConfig, *, checkpoints: Checkpoints, resume_from: str,
    masks: Sequence[torch.Tensor] | None = None, mask_floor: float = 0.0,
) -> tuple[Fusion, LossMap]:
    """Train a generator's three paths, and a LoRA of the UNet or the whole UNet.

    Without a combiner in `fusion` the embedding path is off. With `train_further` training begins with its generator
    and its UNet; paths that it lacks begin anew. Outside of `masks` [1, H, W, 1] of the targets the loss has the
    weight `mask_floor`. Returns `fusion` with the generator, and the LOSS_MAP.
    No model or encoder is modified. Raises TrainingDiverged, FusionError, ValueError as `session` does, and
    ComfyUI's interruption.
    """
    check_shares(config.batch_size, len(pairs))
    resume = checkpoints.resume(resume_from)
    latent_format = model.model.latent_format
    ratio = latent_format.spacial_downscale_ratio
    encoder = None if fusion.combiner is None else encoding.encoder_for(fusion, clip_vision)
    encoded = PairEncoder(pairs, vae, appearance, fusion.combiner, encoder, ratio, masks, mask_floor)
    width = None if fusion.combiner is None else layout.combiner_width(fusion.combiner)
    first = encoded[0]
    sizes = sampling.model_sizes(model, first.states.shape[-1], width, generator.embedding_tokens)
    _check_latent(first.latent, (latent_format.latent_channels, *encoded.sizes()[0]))
    seeded = torch.Generator().manual_seed(seed_for(config.seed, "generator"))
    begun = model
    with torch.inference_mode(False):  # they are trained
        initial = layout.new_generator(sizes, generator.hidden, generator.pose_channels, seeded)
        if generator.train_further:
            sampling.check_prediction(model, fusion)
            initial = layout.begun_with(initial, fusion.generator, sizes)
            sampling.check_model(model, initial)
            begun = sampling.with_unet(model, fusion, strength=1.0, node=_NODE)
            if not fusion.prediction:
                tell(_NODE, [_UNKNOWN], logging.WARNING)
    encoded.fill()
    height, across = max(encoded.sizes(), key=lambda size: size[0] * size[1])
    shape = [config.batch_size, latent_format.latent_channels, height, across]
    patchers = {id(part): part.patcher for part in (vae, appearance, encoder) if part is not None}
    encoders = list(patchers.values()) if encoded.shared is None and len(encoded.cache) < len(pairs) else []
    patched = sampling.with_fusion_patches(begun)
    lora = None if generator.whole_unet else LoraConfig(rank=generator.rank)
    count = sum(tensor.numel() for tensor in initial.values())
    count += parameter_count(model.get_model_object("diffusion_model"), lora)
    options = {"whole": lora is None, "other_models": encoders, "extra_parameters": count}
    with session(patched, shape, config, **options) as denoiser:
        weights = _parameters(initial, denoiser.device)
        trained = trainable(denoiser.network, lora, config.seed, denoiser.device)
        denoising = Denoising(FusionDenoiser(denoiser, weights), config)
        objective = method.PoseTransferObjective(denoising, encoded, config.batch_size, generator)
        parameters = {f"generator.{key}": value for key, value in weights.items()}
        parameters |= {f"unet.{key}": value for key, value in trained.parameters().items()}
        paths = _paths(parameters, generator)

        with trained.attached():
            loss_map = run(
                objective, parameters, config, denoiser.device, checkpoints=checkpoints, resume=resume,
                preview=lambda: _preview(denoiser, vae, weights, encoded[0], config.seed),
                reference_loss=ReferenceLoss(len(pairs), objective.reference_loss), paths=paths,
                note=lambda: f"gradients {_listed(paths.medians())}",
            )
        _tell_gradients(paths)
        if generator.whole_unet:
            unet = {f"diffusion_model.{key}": value for key, value in _on_cpu(trained.parameters()).items()}
        else:
            unet = lora_model(trained, denoiser.model.model_config.unet_config)
    kind = WHOLE if generator.whole_unet else LORA
    trained_fusion = dataclasses.replace(
        fusion, generator=_on_cpu(weights), unet=unet, unet_kind=kind,
        prediction=sampling.prediction(model.get_model_object("model_sampling")), base=fingerprint(model),
    )
    return trained_fusion, loss_map


def _paths(parameters: loop.Parameters, generator: GeneratorConfig) -> loop.Paths:
    """What is trained by the path that it is in, with the rates and the clipping that are asked for."""
    parts = {part: [name for name in parameters if name.startswith(start)] for part, start in _PATHS.items()}
    factors = {part: generator.embedding_rate for part in _OF_EMBEDDING}
    return loop.Paths({part: names for part, names in parts.items() if names}, factors, generator.clip_by_path)


def _tell_gradients(paths: loop.Paths) -> None:
    """How large each path's gradient was at the end, and what to try where that of e_f is far below the others'."""
    if not (paths.norms and engine().main):  # none where a resumed run had no step left
        return
    medians = paths.medians()
    lines = [f"gradient norms of the last {len(paths.norms)} steps, medians: {_listed(medians)}"]
    small = [part for part in _OF_EMBEDDING if _STARVED * max(medians.values()) > medians.get(part, math.inf)]
    if small:
        lines.append(
            f"the gradient of the {' and the '.join(small)} is below a hundredth of the largest: if what the source "
            "wears does not arrive, set embedding_tokens, or try embedding_rate above 1"
        )
    tell(_NODE, lines)


def _listed(norms: dict[str, float]) -> str:
    return ", ".join(f"{part} {norm:.2g}" for part, norm in norms.items())


def _preview(denoiser: ModelDenoiser, vae: Any, weights: Weights, pair: EncodedPair, seed: int):
    """The first pair's source in its pose, from a fixed noise, or None if there is no memory to sample."""
    with no_training():
        positive, negative = sampling.conditionings(
            denoiser.patcher, {key: value.detach() for key, value in weights.items()}, pair.states, pair.fused,
            pair.pose.movedim(1, -1),
        )
    return drawing.preview_of(vae, positive, negative, pair.latent.shape, seed, GUIDANCE)(denoiser)


def _check_latent(latent: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(latent.shape[1:]) != expected:
        raise FusionError(
            f"vae encodes a target to a latent of shape {tuple(latent.shape[1:])}, but the model takes {expected}: "
            "connect the VAE of the model"
        )


def _cropped(picture: torch.Tensor, ratio: int) -> torch.Tensor:
    """The middle of a picture [1, H, W, 3] whose sides are multiples of `ratio`."""
    height, width = (n // ratio * ratio for n in picture.shape[1:3])
    if not height or not width:
        raise FusionError(f"a target is {picture.shape[2]} x {picture.shape[1]} pixels: use {ratio} or more per side")
    top, left = (picture.shape[1] - height) // 2, (picture.shape[2] - width) // 2
    return picture[:, top : top + height, left : left + width]


def _scaled(picture: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    moved = torch.nn.functional.interpolate(picture.movedim(-1, 1), tuple(size), mode="bilinear", antialias=True)
    return moved.movedim(1, -1)


def _parameters(weights: Weights, device: torch.device) -> dict[str, torch.nn.Parameter]:
    return {key: torch.nn.Parameter(value.detach().to(device)) for key, value in weights.items()}


def _on_cpu(weights: Weights) -> Weights:
    return {key: value.detach().cpu().clone() for key, value in weights.items()}
