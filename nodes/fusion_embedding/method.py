"""FPDM's parts as weights by name, what they compute, and the objectives of both training stages.

Source: arXiv 2412.07333. A combiner turns two embeddings into one (kernels/fusion_embedding.py). A generator has up
to three paths into a UNet: appearance tokens in place of the text's, an embedding that is added to the time's, and
a residual of the pose after the first convolution. A fourth is ours: tokens of the embedding, after the appearance's.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from ...kernels import fusion_embedding as kernel
from ..consent.record import ConsentRecord
from ..fingerprint import weights_fingerprint
from ..training.objective import Denoising, draw_batch
from ..training.parallel import engine, in_shares, share
from ..training.reference_loss import noise_and_level
from .config import PERSON_THRESHOLD, CombinerConfig, GeneratorConfig
from .layout import FusionError, Weights, pose_blocks

LORA, WHOLE = "lora", "whole"
# What training leaves out at random, each at its own rate.
CONDITIONS = ("source", "fusion", "pose")
_SHOWN_STEPS = 20  # of retrieval, in what is shown while training

# Ours: a drawing's background takes at least half of it, in values that survive JPEG.
_BLACK, _WHITE, _BACKGROUND = 0.15, 0.85, 0.5


@dataclass(frozen=True, eq=False)
class Fusion:
    """What the nodes hand on and files hold; parts that are not trained yet are None.

    combiner, generator: weights by name, as `new_combiner` and `new_generator` name them. encoder: ComfyUI's
    CLIP_VISION if stage 1 trained one. unet: weights by name, `unet_kind` LORA (a LORA_MODEL) or WHOLE (the weights
    themselves, under ComfyUI's names or diffusers'). probe: if stage 1 froze its encoder, that encoder's embedding of
    encoding.probe's picture, [D] on the CPU. prediction: of the generator's model, "noise" or "v"; "" if unknown.
    base: the fingerprint of that model, or "". consent: that to the pictures, if there is a record.
    """

    combiner: Weights | None = None
    encoder: Any = None
    generator: Weights | None = None
    unet: Weights | None = None
    unet_kind: str = ""
    probe: torch.Tensor | None = None
    prediction: str = ""
    base: str = ""
    consent: ConsentRecord | None = None

    @property
    def parts(self) -> list[str]:
        """The names of the parts that it has."""
        names = [name for name in ("combiner", "encoder", "generator") if getattr(self, name) is not None]
        return names + ([f"{self.unet_kind} UNet" if self.unet_kind == WHOLE else "LoRA"] if self.unet else [])


@dataclass(frozen=True)
class FusionEmbedding:
    """e_f of each picture, [B, D], of unit length, fp32 on the CPU, and the fingerprint of its combiner."""

    vectors: torch.Tensor
    combiner: str


def vectors_for(fusion: Fusion, embedding: FusionEmbedding | None) -> torch.Tensor | None:
    """e_f [B, D] for a fusion's generator, or None. Raises FusionError if it is not for this one."""
    if embedding is None:
        return None
    if fusion.generator is not None and "embedding.first.weight" not in fusion.generator:
        raise FusionError("this fusion was trained without a fusion embedding: disconnect fusion_embed")
    if fusion.combiner is not None and embedding.combiner != weights_fingerprint(fusion.combiner):
        raise FusionError(
            "fusion_embed is from another combiner than this fusion's: connect one fusion to both Combine Fusion and "
            "Apply Fusion"
        )
    return embedding.vectors


class UNetInputs(NamedTuple):
    """What a UNet reads of B pictures. tokens: [B, T, context], instead of the text's. embedding: [B, time], added to
    the time's, or 0 as [1, 1] if that path is off. residual: [B, channels, h, w], added after the first convolution.
    """

    tokens: torch.Tensor
    embedding: torch.Tensor
    residual: torch.Tensor


def unet_inputs(
    weights: Mapping[str, torch.Tensor], states: torch.Tensor, fused: torch.Tensor | None, pose: torch.Tensor,
    keep: Mapping[str, torch.Tensor] | None = None,
) -> UNetInputs:
    """What a generator makes of hidden states [B, T, encoder], e_f [B, D] or None, and drawings [B, 3, H, W] in 0..1,
    on the device of its weights; each may have one row for all.

    keep: 1 or 0 per picture, [B], for each of CONDITIONS. What is left out is 0, as published: the tokens, e_f, and
    the residual.
    """
    device = weights["appearance.first.weight"].device
    source, fusion, drawn = (
        torch.ones(1, device=device) if keep is None else keep[name].to(device) for name in CONDITIONS
    )
    tokens = appearance_tokens(weights, states.to(device)) * source.reshape(-1, 1, 1)
    embedding = torch.zeros(1, 1, device=device)
    if fused is not None:
        embedding = class_embedding(weights, fused.to(device) * fusion.reshape(-1, 1))
    if "embedding_tokens.projection.weight" in weights:
        extra = embedding_tokens(weights, fused.to(device)) * fusion.reshape(-1, 1, 1)
        count = max(len(tokens), len(extra))
        tokens = torch.cat([to_batch(tokens, count), to_batch(extra, count)], dim=1)
    # Without a graph one at a time: a drawing at full size takes far more memory than its residual.
    at_once = len(pose) if torch.is_grad_enabled() else 1
    residual = torch.cat([pose_residual(weights, part.to(device)) for part in pose.split(at_once)])
    return UNetInputs(tokens, embedding, residual * drawn.reshape(-1, 1, 1, 1))


def left_out(weights: Mapping[str, torch.Tensor], inputs: UNetInputs) -> UNetInputs:
    """One row like `inputs` for which source, fusion and pose are left out."""
    embedding = inputs.embedding
    if "embedding.first.weight" in weights:
        first = weights["embedding.first.weight"]
        embedding = class_embedding(weights, first.new_zeros(1, first.shape[1]))
    return UNetInputs(torch.zeros_like(inputs.tokens[:1]), embedding, torch.zeros_like(inputs.residual[:1]))


def appearance_tokens(weights: Mapping[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """Tokens [B, T, context] of an appearance encoder's last hidden states [B, T, encoder], class token included."""
    return _projection(weights, "appearance", states)


def class_embedding(weights: Mapping[str, torch.Tensor], fused: torch.Tensor) -> torch.Tensor:
    """What is added to the time's embedding, [B, time], for e_f [B, D]; zeros stand for one that is left out."""
    return _projection(weights, "embedding", fused)


def embedding_tokens(weights: Mapping[str, torch.Tensor], fused: torch.Tensor) -> torch.Tensor:
    """Tokens [B, n, context] of e_f [B, D], which cross-attention reads after the appearance's.

    Ours: e_f is of length 1 and its class embedding small beside the time's, while its tokens have a norm, and so a
    scale, of their own.
    """
    name = "embedding_tokens.norm"
    width = weights[f"{name}.weight"].shape[0]
    projection = "embedding_tokens.projection"
    tokens = functional.linear(fused, weights[f"{projection}.weight"], weights[f"{projection}.bias"])
    tokens = tokens.unflatten(-1, (-1, width))
    return functional.layer_norm(tokens, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"])


def pose_residual(weights: Mapping[str, torch.Tensor], pose: torch.Tensor) -> torch.Tensor:
    """What is added after the first convolution, [B, channels, H / r, W / r], for drawings [B, 3, H, W] in 0..1, with
    r = pose_reduction(weights). Layers and names are those of diffusers' ControlNetConditioningEmbedding.
    """

    def convolved(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=stride, padding=1)

    x = functional.silu(convolved("pose.conv_in", pose))
    for i in range(pose_blocks(weights)):
        x = functional.silu(convolved(f"pose.blocks.{i}", x, stride=1 + i % 2))
    return convolved("pose.conv_out", x)


def _projection(weights: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """Linear, GELU, layer norm if it has one, linear."""
    x = functional.gelu(functional.linear(x, weights[f"{name}.first.weight"], weights[f"{name}.first.bias"]))
    scale = weights.get(f"{name}.norm.weight")
    if scale is not None:
        x = functional.layer_norm(x, scale.shape, scale, weights[f"{name}.norm.bias"])
    return functional.linear(x, weights[f"{name}.second.weight"], weights[f"{name}.second.bias"])


# embed(indices of B pairs) -> the embeddings of their sources, poses and targets, [B, D] each
Embed = Callable[[Sequence[int]], tuple[torch.Tensor, ...]]


class RetrievalObjective:
    """Stage 1: the published loss on seeded batches of `count` pairs, and how often a target is retrieved."""

    def __init__(self, embed: Embed, count: int, weights: Weights, batch_size: int, config: CombinerConfig):
        self.embed, self.count, self.weights, self.config = embed, count, weights, config
        self.batch_size = min(batch_size, count)
        self.ranks: collections.deque[torch.Tensor] = collections.deque(maxlen=_SHOWN_STEPS)

    def __call__(self, _step: int, generator: torch.Generator) -> torch.Tensor:
        order = torch.randperm(self.count, generator=generator)[: self.batch_size]
        part = share().of(self.batch_size)
        source, pose, target = self.embed([int(i) for i in order[part]])
        drop = None
        if self.config.dropout:
            drop = kernel.dropout(self.config.dropout, generator, part, self.batch_size)
        fused = kernel.combine(source, pose, self.weights, drop)
        # Targets are retrieved among those of all processes, so gradients come back from them.
        whole = engine().everyone(torch.cat([source, fused, target], dim=-1))
        sources, fuseds, targets = whole.chunk(3, dim=-1)
        self.ranks.append(kernel.retrieval_ranks(fuseds.detach(), targets.detach()).cpu())
        return kernel.source_enhanced_info_nce(
            source, target, fused, self.config.temperature, self.config.l1, (sources, fuseds, part.start)
        )

    def reference_loss(self) -> float:
        """The loss on the first pairs, as many as a batch, without dropout."""
        with torch.no_grad():
            source, pose, target = self.embed(list(range(self.batch_size)))
            fused = kernel.combine(source, pose, self.weights, None)
            loss = kernel.source_enhanced_info_nce(source, target, fused, self.config.temperature, self.config.l1)
        return float(loss)

    def accuracy(self) -> str:
        """Shares of targets that are first and among the first five of their batch, lately, under dropout."""
        ranks = torch.cat(list(self.ranks))
        first, five = ((ranks < n).float().mean() for n in (1, 5))
        return f"top-1 {first:.0%}, top-5 {five:.0%} of {self.batch_size}"


class EncodedPair(NamedTuple):
    """One pair as a generator reads it: latent [1, C, h, w] as VAE Encode makes it, hidden states [1, T, encoder],
    e_f [1, D] or None, the drawing [1, 3, H, W] at the latent's size, `weights` [1, 1, h, w] of its cells or None.
    """

    latent: torch.Tensor
    states: torch.Tensor
    fused: torch.Tensor | None
    pose: torch.Tensor
    weights: torch.Tensor | None = None


class PairBatch(NamedTuple):
    """The conditions of B pairs in one forward pass, as `unet_inputs` takes them."""

    states: torch.Tensor
    fused: torch.Tensor | None
    pose: torch.Tensor
    keep: dict[str, torch.Tensor]


class PoseTransferObjective:
    """Stage 2: the denoising loss on seeded batches of pairs of one size, with noise offset and independent drops.

    `encoded[i]` is an EncodedPair, and `encoded.sizes()` lists height and width of each pair's latent.
    """

    def __init__(self, denoising: Denoising, encoded: Any, batch_size: int, config: GeneratorConfig):
        self.denoising, self.encoded, self.batch_size, self.config = denoising, encoded, batch_size, config
        self._read: tuple[int, EncodedPair] | None = None
        buckets: dict[tuple[int, int], list[int]] = {}
        for i, size in enumerate(encoded.sizes()):
            buckets.setdefault(size, []).append(i)
        self.buckets = list(buckets.values())

    def __call__(self, step: int, generator: torch.Generator) -> torch.Tensor:
        drawn = draw_batch(self.buckets, self.batch_size, generator)
        count = len(drawn)
        pairs = [self.encoded[i] for i in drawn[share().of(count)] or drawn[:1]]
        shape = pairs[0].latent.shape[1:]
        noise = torch.randn((count, *shape), generator=generator)
        noise += self.config.noise_offset * torch.randn((count, shape[0], 1, 1), generator=generator)
        level = torch.randint(len(self.denoising.denoiser.sigmas), (count,), generator=generator)
        keep = {
            name: (torch.rand(count, generator=generator) >= self.config.drop(name, step)).float()
            for name in CONDITIONS
        }

        def losses(part: slice) -> torch.Tensor:
            kept = {name: values[part] for name, values in keep.items()}
            masked = {} if pairs[0].weights is None else {"weights": torch.cat([pair.weights for pair in pairs])}
            return self.denoising.loss_at(*self._batch(pairs, kept), noise[part], level[part], **masked)

        return in_shares(count, losses).mean()

    def _batch(self, pairs: Sequence[EncodedPair], keep: dict[str, torch.Tensor]) -> tuple[torch.Tensor, PairBatch]:
        tokens = sorted({pair.states.shape[1] for pair in pairs})
        if len(tokens) > 1:
            raise FusionError(
                f"appearance_encoder gives {tokens[0]} and {tokens[-1]} tokens for sources of different sizes: set "
                "batch_size to 1, scale the sources to one size, or use a CLIP or DINOv2 model"
            )
        into = self.denoising.denoiser.model.process_latent_in
        clean = torch.cat([into(pair.latent.clone()).float() for pair in pairs])
        fused = None if pairs[0].fused is None else torch.cat([pair.fused for pair in pairs])
        states, pose = (torch.cat([getattr(pair, name) for pair in pairs]) for name in ("states", "pose"))
        return clean, PairBatch(states, fused, pose, keep)

    def reference_loss(self, index: int, seed: int, place: float) -> torch.Tensor:
        """The error [1] of one pair with all its conditions, as ReferenceLoss asks for it."""
        if self._read is None or self._read[0] != index:  # it asks for each pair several times in a row
            self._read = index, self.encoded[index]
        pair = self._read[1]
        clean = self.denoising.denoiser.model.process_latent_in(pair.latent.clone()).float()
        keep = {name: torch.ones(1) for name in CONDITIONS}
        batch = PairBatch(pair.states, pair.fused, pair.pose, keep)
        return self.denoising.loss_at(clean, batch, *noise_and_level(self.denoising, clean, seed, place))


def check_poses(pose: torch.Tensor, name: str = "pose") -> None:
    """Raises FusionError, naming the picture, if a drawing [B, H, W, 3] in 0..1 shows nobody, or has no colours."""
    for i, drawn in enumerate(pose[..., :3].flatten(1, 2)):  # without alpha, which is 1 on black
        of = f" {i + 1} of {len(pose)}" if len(pose) > 1 else ""
        if not _spread(drawn, 0) > PERSON_THRESHOLD:
            raise FusionError(
                f"{name}{of} shows no person: connect a skeleton drawn from a picture in which a pose detector finds "
                "somebody, or the pose of the Puppet node"
            )
        # A grey file comes with three equal channels.
        if not _spread(drawn, 1) > PERSON_THRESHOLD:
            raise FusionError(
                f"{name}{of} is grey, but colours tell the limbs apart: connect the coloured OpenPose drawing"
            )


def pose_warnings(pose: torch.Tensor, name: str = "pose") -> list[str]:
    """What a drawing [B, H, W, 3] in 0..1 looks like that no training shows: a photograph, a skeleton on white."""
    brightest = pose[..., :3].amax(-1).flatten(1)
    black = (brightest < _BLACK).float().mean(1)
    white = (pose[..., :3].amin(-1).flatten(1) > _WHITE).float().mean(1)
    lines = []
    for i, (dark, light) in enumerate(zip(black.tolist(), white.tolist(), strict=True)):
        if dark < _BACKGROUND:
            of = f" {i + 1} of {len(pose)}" if len(pose) > 1 else ""
            kind = "a skeleton on white" if light >= _BACKGROUND else "a photograph"
            lines.append(
                f"{name}{of} looks like {kind}, and a pose is an OpenPose drawing on black: connect one, from SDPose "
                "Draw Keypoints or Puppet"
            )
    return lines


def _spread(drawn: torch.Tensor, dim: int) -> float:
    """The largest difference between pixels (0) or channels (1) of a drawing [H W, C]."""
    return float((drawn.amax(dim) - drawn.amin(dim)).max())


def common_batch_size(counts: Mapping[str, int]) -> int:
    """The batch size of inputs with these lengths, equal or 1. Raises FusionError, naming them, if they differ."""
    most = max(counts.values())
    if not most or any(count not in (1, most) for count in counts.values()):
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise FusionError(f"the numbers of pictures differ ({listed}): give equal numbers, or one for all")
    return most


def to_batch(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """[count, ...]: one row repeated without a copy, or the rows as they are."""
    return tensor.expand(count, *tensor.shape[1:]) if len(tensor) == 1 else tensor
