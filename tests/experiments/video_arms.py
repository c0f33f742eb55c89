"""Adapters for the theatre's video model: what they learn from, and the rivals that ours is compared with.

Every one is trained by the pack's own `video_identity.training.train`, on the same data with the same seed. A rival
takes the place of one part of it, in training and in sampling alike: inside `instead(kind)`, `training.train` learns
for that kind and `applied` shows it. None of them is part of the pack.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from unittest import mock

import comfy.model_management
import numpy as np
import torch
from experiments import report, theatre_wan, trainings
from pack.nodes.patching import models
from pack.nodes.puppets import captions, render, world
from pack.nodes.puppets.config import LIGHTS, SCENES, Identity, Take, actions_of
from pack.nodes.training import loss_masks
from pack.nodes.training.config import ADAMW, MUON, TrainingConfig
from pack.nodes.video_identity import method, reference_picture, sampling, training
from pack.nodes.video_identity.config import BELL, AdapterTrainingConfig, ReferenceConfig, VideoIdentityConfig
from support import published_wan

RESTRICTED, VANILLA, SHARED, ON_VIDEO = KINDS = (
    "restricted", "vanilla attention", "shared positions", "LoRA on video tokens"
)
REFERENCE = ReferenceConfig(size=96, crop_factor=1.1)  # head, hat and shirt: what a puppet wears is its face
FIRST_CLIP, AT_ONCE = 1_000_000, 250  # the clips that the base was trained on, too
BARE = 0.1  # share of the texts that are left out, for CFG
FLOOR = 0.2  # of the loss outside masks
FIXED = report.fingerprint(REFERENCE, FIRST_CLIP, BARE, FLOOR)  # of every training


@dataclasses.dataclass(frozen=True)
class Training:
    """One adapter. `rate` is times the node's default learning rate, and falls to 0 over the last `decay` of it;
    with `stills` the first frame of each clip is learned from as well.
    """

    kind: str = RESTRICTED
    rate: int = 30
    decay: float = 1.0
    rank: int = 16
    steps: int = 1_500
    weighting: str = BELL
    stills: bool = True
    masked: bool = False
    batch: int = 12
    clips: int = 3_000
    seed: int = 0
    dtype: str = "bf16"
    optimizer: ClassVar[str] = ADAMW


class ByMuon(Training):
    """The same by the other optimiser."""

    optimizer = MUON


# ---------------------------------------------------------------------------------------------------------- data


def allowed(who: Identity) -> list[str]:
    """The named actions of a close-up of this puppet that training shows."""
    return [
        action for action in actions_of("close_up", True)
        if (who.species, action) not in world.HELD_OUT["close_up"]
        and not (action == "raising hat" and who.headwear == "none")
    ]


def reference_take(clip: Take, rng: np.random.Generator) -> Take:
    """The same puppet in another action, scene and light."""

    def other(options, taken):
        return world.pick(rng, [option for option in options if option != taken])

    action, scene, light = (
        other(options, taken) for options, taken in
        ((allowed(clip.identity), clip.action), (SCENES, clip.scene), (tuple(LIGHTS), clip.light))
    )
    return world.staged(clip.identity, action, scene, rng, "close_up", light=light)


def reference_image(take: Take) -> torch.Tensor:
    """float [1, 96, 96, 3] in 0..1: the puppet alone on white, as Prepare Reference gives it."""
    drawn = render.render(take, REFERENCE.size)
    image, mask = (torch.from_numpy(np.array(part)).float()[None] for part in (drawn.image, drawn.mask))
    return reference_picture.prepare(image / 255, REFERENCE, mask)[0]


def small(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A reference half as large, off the middle of a white picture."""
    side = image.shape[1]
    half = torch.nn.functional.interpolate(image.movedim(-1, 1), side // 2, mode="area").movedim(1, -1)
    left, top = (int(rng.choice((0, side // 2))) for _ in "xy")
    white = torch.ones_like(image)
    white[:, top : top + side // 2, left : left + side // 2] = half
    return white


@dataclasses.dataclass(frozen=True)
class Data:
    """latents [N, 16, 3, 12, 12] as VAE Encode gives them, references [N, 16, 1, 12, 12], how much of each cell is
    inside the puppet [N, 1, 3, 12, 12], and texts without clothes.
    """

    latents: torch.Tensor
    references: torch.Tensor
    inside: torch.Tensor
    texts: tuple[str, ...]


def data(theatre, folder: Path, count: int) -> Data:
    """Clips of training puppets and other close-ups of them, drawn and encoded once, and kept in `folder`."""
    takes = [world.sample_take(FIRST_CLIP + i, "train", "close_up") for i in range(count)]
    rngs = [np.random.default_rng([0xADA, i]) for i in range(count)]
    texts = tuple(
        "" if rng.random() < BARE else captions.caption(take, clothes=False)
        for take, rng in zip(takes, rngs, strict=True)
    )
    found = []
    for start in range(0, count, AT_ONCE):
        path = folder / f"clips_{start}_{min(start + AT_ONCE, count)}.npz"
        if not path.exists():
            print(f"encoding clips from {start} of {count}", flush=True)
            rows = [_encoded(theatre, takes[i], rngs[i]) for i in range(start, min(start + AT_ONCE, count))]
            file = io.BytesIO()
            np.savez(file, *(torch.cat(part).half().cpu().numpy() for part in zip(*rows, strict=True)))
            report.replace(path, file.getvalue())
        with np.load(path) as stored:
            found.append([torch.from_numpy(part).float() for part in stored.values()])
    return Data(*(torch.cat(part) for part in zip(*found, strict=True)), texts)


@torch.no_grad()
def _encoded(theatre, take: Take, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """A row each of latents, references and inside."""
    frames = [render.render(theatre_wan.later(take, i), theatre_wan.SIZE) for i in range(theatre_wan.FRAMES)]
    shown = reference_image(reference_take(take, rng))
    device = comfy.model_management.vae_device().type
    with torch.autocast(device, torch.bfloat16):  # 0.3 of the time; 0.01 off, of 1.25
        latent, shown = theatre.encode(np.stack([frame.image for frame in frames])[None]), theatre.vae.encode(shown)
    masks = torch.from_numpy(np.stack([frame.mask for frame in frames])).float()
    return latent, shown, loss_masks.cells(masks, latent.shape, 0.0)


# ------------------------------------------------------------------------------------------------------ training


def learned(theatre, folder: Path, setting: Training) -> tuple[method.VideoAdapter, float]:
    """The adapter, trained where `folder` does not hold it, and what a step of its training cost in CPU seconds."""

    def train(steps: int, kept, resume_from: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        known = data(theatre, folder, setting.clips)
        config = TrainingConfig(
            steps, setting.rate * AdapterTrainingConfig.learning_rate, setting.seed, setting.batch,
            decay=setting.decay, optimizer=setting.optimizer, dtype=setting.dtype,
            checkpoint_every=trainings.CHECKPOINT_EVERY,
        )
        texts = {text: theatre.prompts([text]) for text in dict.fromkeys(known.texts)}
        weights = FLOOR + (1 - FLOOR) * known.inside
        columns = (
            known.latents.split(1), known.references.split(1), [texts[text] for text in known.texts], weights.split(1)
        )
        rows = list(zip(*columns, strict=True))
        if setting.stills:
            rows += [(clip[:, :, :1], shown, text, weight[:, :, :1]) for clip, shown, text, weight in rows]
        *columns, weights = zip(*rows, strict=True)
        with instead(setting.kind):
            adapter, losses = training.train(
                theatre.model, *columns, config, setting.rank, checkpoints=kept, resume_from=resume_from,
                weights=weights if setting.masked else None, loss_weighting=setting.weighting,
            )
        return adapter.tensors(), {"loss": f"{np.mean(losses['loss'][-100:]):.4f}"}

    tensors, metadata = trainings.trained(folder, "adapter", setting, setting.steps, train)
    return method.adapter_from(tensors), trainings.cost(metadata)


# -------------------------------------------------------------------------------------------------------- rivals


class Plain(published_wan.Wan):
    """The published network in fp32, as fast as PyTorch has it; unchanged, it samples what our nodes sample."""

    def __init__(self, model, adapter: dict[str, torch.Tensor]):
        wan = model.model.diffusion_model
        super().__init__(wan.state_dict(), wan.num_heads, wan.freq_dim, adapter, dtype=torch.float32)
        self.turns: dict[tuple, torch.Tensor] = {}

    def __call__(self, x, timestep, context, reference=None):
        self.attended.clear()  # what the tests of the published network look at
        with torch.device(x.device):
            return super().__call__(x, timestep, context, reference)

    def rotations(self, positions):
        key = tuple(positions)
        if key not in self.turns:
            self.turns[key] = super().rotations(positions)
        return self.turns[key]

    def rotate(self, x, turn):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (self.heads, -1, 2)))
        return torch.view_as_real(pairs * turn.to(pairs)[None, :, None]).flatten(2)

    def softmax(self, q, k, v, allowed=None):
        q, k, v = (x.to(v).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return found.transpose(1, 2).flatten(2)


class Vanilla(Plain):
    """Image tokens and video tokens all see each other."""

    def attention(self, q, k, v, count):
        return self.softmax(q, k, v)


class _Joint(training.ModelDenoiser):
    """Stands for the pack's denoiser with references: the same call, through another network."""

    def __init__(self, network: type[Plain], denoiser, adapter: method.VideoAdapter, _recompute: bool = False):
        super().__init__(denoiser.patcher)
        self.published = network(denoiser, adapter.tensors())

    def denoise(self, noisy, sigma, conditions):
        reference = torch.cat([condition[training._REFERENCE] for condition in conditions]).to(noisy.device)
        context = torch.cat([condition["c_crossattn"].cond for condition in conditions]).to(noisy.device)
        dtype = self.model.get_dtype_inference()
        with torch.autocast(noisy.device.type, dtype, enabled=dtype != torch.float32):
            velocity = self.published(noisy, self.model.model_sampling.timestep(sigma), context, reference)
        return noisy - sigma.reshape(-1, 1, 1, 1, 1) * velocity


class _OnVideo(training.WithReferences):
    """The updates act on the video's tokens, and the reference keeps the base's projections."""

    def __init__(self, denoiser, adapter: method.VideoAdapter, recompute: bool = False):
        super().__init__(denoiser, adapter, recompute)
        self.updates = adapter

    def denoise(self, noisy, sigma, conditions):
        self.adapter = negated(self.updates)
        with _added(self.network, self.updates):
            return super().denoise(noisy, sigma, conditions)


def negated(adapter: method.VideoAdapter) -> method.VideoAdapter:
    """The updates that take back what these add."""

    def without(block: method.BlockUpdates) -> method.BlockUpdates:
        updates = {name: getattr(block, name) for name in method.PROJECTIONS}
        return method.BlockUpdates(**{n: method.ProjectionUpdate(u.down, -u.up) for n, u in updates.items()})

    return method.VideoAdapter(tuple(map(without, adapter.blocks)))


@contextlib.contextmanager
def _added(network, adapter: method.VideoAdapter) -> Iterator[None]:
    """The network's q, k and v add the updates, whatever tokens they are given."""
    with contextlib.ExitStack() as stack:
        for block, updates in zip(network.blocks, adapter.blocks, strict=True):
            for name in method.PROJECTIONS:
                update = getattr(updates, name)
                hook = getattr(block.self_attn, name).register_forward_hook(
                    lambda _layer, inputs, output, update=update: output + update(inputs[0])
                )
                stack.callback(hook.remove)
        yield


def first_frame_positions(height: int, width: int, _video_height: float, _video_width: float) -> torch.Tensor:
    """A reference's tokens where the video's first frame has its own, from the upper left corner."""
    h, w = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(h), h, w], dim=-1).reshape(1, -1, 3).float()


@contextlib.contextmanager
def instead(kind: str) -> Iterator[None]:
    """Inside, the pack trains and samples this kind of KINDS in place of the restricted attention."""
    places = {
        VANILLA: (training, "WithReferences", functools.partial(_Joint, Vanilla)),
        SHARED: (method, "reference_positions", first_frame_positions),
        ON_VIDEO: (training, "WithReferences", _OnVideo),
    }
    with mock.patch.object(*places[kind]) if kind in places else contextlib.nullcontext():
        yield


def applied(
    kind: str, model, adapter: method.VideoAdapter, latent: torch.Tensor,
    config: VideoIdentityConfig = VideoIdentityConfig(),
):
    """A clone of MODEL that sees a reference latent [1, C, 1, h, w] as this kind does; sample inside `instead`.

    VANILLA knows no `config`.
    """
    if kind == VANILLA:
        return through(Vanilla, model, adapter, latent)
    if kind == ON_VIDEO:
        model = models.with_lora(model, weights=_as_lora(adapter), strength=1.0)
        adapter = negated(adapter)
    return sampling.apply(model, method.video_reference(adapter, latent, config))


def through(network: type[Plain], model, adapter: method.VideoAdapter, latent: torch.Tensor):
    """A clone of MODEL that samples through this network."""
    image = model.model.process_latent_in(latent.clone()).float()

    @functools.cache
    def made(device: torch.device) -> Plain:
        """Once the model is loaded there."""
        return network(model, {name: tensor.to(device) for name, tensor in adapter.tensors().items()})

    def call(_apply, args):
        x, sigma = args["input"], args["timestep"]
        wan = made(x.device)
        timestep = model.model.model_sampling.timestep(sigma)
        velocity = wan(x, timestep, args["c"]["c_crossattn"], image.to(x.device))
        return x - sigma.reshape(-1, 1, 1, 1, 1) * velocity

    patched = model.clone()
    patched.set_model_unet_function_wrapper(call)
    return patched


def _as_lora(adapter: method.VideoAdapter) -> dict[str, torch.Tensor]:
    """The updates as a LoRA of the model, of scale 1, under ComfyUI's names."""
    weights = {}
    for name, tensor in adapter.tensors().items():
        layer, part = name.replace("_loras", "").removesuffix(".weight").rsplit(".", 1)
        weights[f"diffusion_model.{layer}.lora_{part}.weight"] = tensor
        if part == "down":
            weights[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(len(tensor)))
    return weights
