"""Three stages of the transformer: it learns to keep the looks that it is shown."""

from pathlib import Path

import numpy as np
import text_encoder
import torch
import wan_adapter
import wan_alignment
import wan_stages as stages
from pack.nodes.puppets import captions, render, world
from pack.nodes.puppets.config import Take
from wan_stages import Batch, Config

_SHOTS = 0x5407
REACH = 8  # patches that a shot is moved at most; a frame is six high and wide


def texts(takes: list[tuple[Take, ...]], bare: np.ndarray, rng: np.random.Generator, drop: float):
    """A text for each take, without a word of the clothes where it is bare."""
    return (
        captions.group_caption(shown) if plain and rng.random() >= drop
        else text_encoder.training_text(shown, rng, drop)
        for shown, plain in zip(takes, bare, strict=True)
    )


def clips_with_first_frame(clips: np.ndarray, rng: np.random.Generator, config: Config) -> Batch:
    """Of the clips half name no clothes and half have a clean first frame."""
    chosen = rng.integers(0, len(clips), config.clip_batch)
    bare, given = rng.random((2, len(chosen))) < 0.5
    frames = np.zeros((len(chosen), clips.shape[2]), bool)
    frames[:, 0] = given
    takes = [stages.clip_takes(int(i)) for i in chosen]
    return Batch(clips[chosen], texts(takes, bare, rng, config.drop_caption), frames)


def train_looks(state: Path, config: Config, device, deadline: float, encoder: Path) -> bool:
    """Goes on from `train_dit`: the model invents looks, and keeps those of a first frame, as image-to-video does."""
    clips = stages.latents(state, config)[1]

    def draw(rng: np.random.Generator, index: int) -> Batch:
        return clips_with_first_frame(clips, rng, config)

    return stages.train_flow(
        "looks", trained(state, "dit", config, device), config.looks_steps, config.looks_rate, draw, state, config,
        device, deadline, encoder,
    )


def train_shots(state: Path, config: Config, device, deadline: float, encoder: Path) -> bool:
    """Goes on from `train_looks` with another shot of the same puppet before or after a picture or a clip.

    A first frame is copied place by place; what another shot tells of has to be found wherever it stands, so after
    some steps half of them stand at rotary positions of their own. Of four steps two have pictures, one has clips,
    and one is of the stage before.
    """
    return stages.train_flow(
        "shots", trained(state, "looks", config, device), config.shots_steps, config.shots_rate,
        _shots_drawer(state, config, device, config.shots_still), state, config, device, deadline, encoder,
    )


def train_aligned(state: Path, config: Config, device, deadline: float, encoder: Path) -> bool:
    """Goes on from `train_shots` in the same way, aligned with what the theatre's image encoder sees."""
    torch.manual_seed(config.seed)
    dit = trained(state, "shots", config, device)
    return stages.train_flow(
        "aligned", dit, config.aligned_steps, config.aligned_rate,
        _shots_drawer(state, config, device, 0, _seen(state, config)), state, config, device, deadline, encoder,
        wan_alignment.Alignment(dit, config.aligned_block, config.aligned_weight),
    )


def _shots_drawer(state: Path, config: Config, device, still: int, seen: tuple[np.ndarray, ...] = ()):
    """draw(random numbers, step) of `train_shots`, which moves shots from step `still` on.

    seen: features [N, n, W] of the pictures, and of all shots; their batches then have them.
    """
    images, clips = stages.latents(state, config)
    alone = wan_adapter.alone(config)[:config.shot_clips]
    shots = _shots(state, config, alone, device)

    def draw(rng: np.random.Generator, index: int) -> Batch:
        if index % 4 == 0:
            return clips_with_first_frame(clips, rng, config)
        moving = index % 4 == 1
        batch, count = (config.clip_batch, len(alone)) if moving else (config.shots_batch, config.shot_pictures)
        rows = rng.integers(0, count, batch)
        bare, given, before = rng.random((3, len(rows))) < np.array([0.5, 0.75, 0.5])[:, None]
        data = clips[np.array(alone)[rows]] if moving else images[rows]
        numbers = rows + (config.shot_pictures if moving else 0)
        shot = shots[numbers]
        latents = beside(shot, data, before)
        frames = np.zeros((len(rows), latents.shape[2]), bool)
        at = np.arange(len(rows)), np.where(before, 0, -1)
        frames[at] = given
        moved = features = None
        if index >= still:
            moved = np.zeros((*frames.shape, 3), np.float32)
            moved[at] = rng.integers(-REACH, REACH + 1, (len(rows), 3)) * (0, 1, 1)
            moved[rng.random(len(rows)) < 0.5] = 0
        if seen:
            of_pictures, of_shots = seen
            features = np.full((*frames.shape, *of_shots.shape[1:]), np.nan, np.float32)
            if not moving:
                features[:] = of_pictures[rows, None]
            features[at] = of_shots[numbers]
        takes = [stages.clip_takes(alone[i]) if moving else (world.sample_take(int(i), "train"),) for i in rows]
        return Batch(latents, texts(takes, bare, rng, config.drop_caption), frames, moved, features)

    return draw


def beside(shot: np.ndarray, data: np.ndarray, before: np.ndarray, axis: int = 2) -> np.ndarray:
    """Frames of `data` with that of `shot` before them, where `before` [B] says so, or after them."""
    chosen = before.reshape(-1, *[1] * (data.ndim - 1))
    return np.where(chosen, np.concatenate([shot, data], axis), np.concatenate([data, shot], axis))


def trained(state: Path, name: str, config: Config, device):
    dit = stages.make_dit(config, device)
    kept = torch.load(state / f"{name}.pt", map_location=device, weights_only=True)
    dit.load_state_dict(kept["modules"]["average"])
    return dit


def _shots(state: Path, config: Config, alone: list[int], device) -> np.ndarray:
    """fp16 [N, 16, 1, H/8, W/8]: another take of each picture's puppet, then of each clip's; half on white."""
    path = state / f"shots_{config.size}_{config.shot_pictures}_{len(alone)}.npy"
    return stages.kept(path, lambda: encoded_shots(state, config, _shown(config, alone), 0, device))


def encoded_shots(state: Path, config: Config, takes: list[Take], first: int, device) -> np.ndarray:
    """fp16 [N, 16, 1, H/8, W/8]: shots number `first` and on, one of each take's puppet."""
    vae, found = stages.trained_vae(state, config, device)["vae"], []
    for start in range(0, len(takes), 32):
        numbers = range(start, min(start + 32, len(takes)))
        drawn = np.stack([drawn_shot(takes[i], first + i, config) for i in numbers])
        with torch.no_grad(), stages.autocast(device):
            pixels = stages.to_pixels(drawn[:, None], device)
            found.append(stages.whole_clip.encode(vae, pixels).to(torch.float16).cpu().numpy())
    return np.concatenate(found)


def _seen(state: Path, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """fp16 [N, n, W]: what the image encoder sees in each picture that has a shot, and in each shot."""
    takes = _shown(config, wan_adapter.alone(config)[:config.shot_clips])
    first = config.shot_pictures

    def make() -> np.ndarray:
        images = stages.pictures(state, "train", config.pictures, config.size)

        def drawn(numbers: range) -> np.ndarray:
            found = [images[i] if i < first else drawn_shot(takes[i - first], i - first, config) for i in numbers]
            return np.stack(found)

        side = config.size // stages.whole_clip.STRIDE // 2  # patches of two
        return wan_alignment.features(drawn, first + len(takes), side)

    both = stages.kept(state / f"seen_{config.size}_{first}_{len(takes)}.npy", make)
    return both[:first], both[first:]


def _shown(config: Config, alone: list[int]) -> list[Take]:
    """Whom each shot is of: takes of the pictures, then of the clips."""
    takes = [world.sample_take(i, "train") for i in range(config.shot_pictures)]
    return takes + [stages.clip_takes(i)[0] for i in alone]


def drawn_shot(take: Take, number: int, config: Config) -> np.ndarray:
    """uint8 [H, W, 3]."""
    other = wan_adapter.reference_take(take.identity, np.random.default_rng([_SHOTS, config.seed, number]))
    if number % 2:
        return (wan_adapter.reference_image(other, config.size)[0].numpy() * 255).round().astype(np.uint8)
    return render.render(other, config.size).image
