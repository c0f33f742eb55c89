"""The theatre's Wan learns looks: which frames are given, whose shot stands where, and what is said of whom."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launcher.scripts import ROOT
from pack.nodes.puppets import captions, world
from pack.nodes.puppets.config import SPECIES
from support.marked_latents import ALONE, CLIP, PICTURE, SHOT, marked

sys.path.append(str(ROOT / "workflows" / "theatre"))  # where the training script finds its own modules
import text_encoder  # noqa: E402
import wan_alignment  # noqa: E402
import wan_looks  # noqa: E402
import wan_stages  # noqa: E402

CPU = torch.device("cpu")
CONFIG = wan_stages.Config(
    size=32, pictures=40, clips=9, clip_batch=64, shot_pictures=33, shot_clips=6, shots_batch=64, shots_still=10,
    drop_caption=0.0,
)



@pytest.fixture
def draw(monkeypatch):
    """draw(stage, index) -> the batch of that step, and the number of each of its frames, [B, T]."""
    draws = {}
    monkeypatch.setattr(wan_stages, "latents", lambda *_a: (marked(PICTURE, 40, 1), marked(CLIP, 9, 5)))
    monkeypatch.setattr(wan_looks, "_shots", lambda _state, config, alone, _device: marked(SHOT, 33 + len(alone), 1))
    monkeypatch.setattr(wan_looks, "trained", lambda *_a: None)
    monkeypatch.setattr(wan_stages, "train_flow", lambda name, _d, _s, _r, found, *_a: draws.update({name: found}))
    monkeypatch.setattr(wan_looks, "_seen", lambda *_a: tuple(
        np.broadcast_to(np.arange(kind, kind + n, dtype=np.float16)[:, None, None], (n, 4, 2))
        for kind, n in ((PICTURE, 33), (SHOT, 33 + len(ALONE)))
    ))
    monkeypatch.setattr(wan_alignment, "Alignment", lambda *_a: None)
    for train in (wan_looks.train_looks, wan_looks.train_shots, wan_looks.train_aligned):
        train(None, CONFIG, CPU, 0.0, None)

    def of(stage, index):
        batch = draws[stage](np.random.default_rng(index), index)
        assert batch.latents.std((1, 3, 4)).max() == 0
        return batch, batch.latents[:, 0, :, 0, 0]

    return of



@pytest.mark.parametrize(("stage", "index"), [("looks", 1), ("shots", 12)])
def test_half_of_the_clips_have_a_clean_first_frame(draw, stage, index):
    batch, numbers = draw(stage, index)
    assert (numbers == numbers[:, :1]).all() and set(numbers[:, 0]) == {CLIP + i for i in range(9)}
    assert not batch.given[:, 1:].any() and 0.3 < batch.given[:, 0].mean() < 0.7 and batch.moved is None
    for number, text in zip(numbers[:, 0], batch.texts, strict=True):
        assert {name for name in SPECIES if name in text.split()} <= {
            take.identity.species for take in wan_stages.clip_takes(int(number) - CLIP)
        }


@pytest.mark.parametrize("index", [1, 2, 3, 13, 14, 15])
def test_a_shot_of_the_same_puppet_stands_before_or_behind_and_alone_is_given(draw, index):
    batch, numbers = draw("shots", index)
    shot = numbers >= SHOT
    assert (shot.sum(1) == 1).all() and (shot[:, 0] | shot[:, -1]).all()
    assert 0.3 < shot[:, 0].mean() < 0.7, "half of them before"
    assert not batch.given[~shot].any() and 0.6 < batch.given[shot].mean() < 0.9, "three in four are given"
    bare = 0
    for found, who, text in zip(numbers, numbers[shot], batch.texts, strict=True):
        (number,) = set(found[found < SHOT])
        if index % 4 == 1:
            clip = int(number) - CLIP
            assert len(found) == 6 and who == SHOT + CONFIG.shot_pictures + ALONE.index(clip)
            take, = wan_stages.clip_takes(clip)
        else:
            assert len(found) == 2 and who == SHOT + number
            take = world.sample_take(int(number), "train")
        assert not set(text.split()) & set(SPECIES) - {take.identity.species}
        bare += text == captions.group_caption([take])
    assert 0.3 < bare / len(numbers) < 0.7, "half of them say nothing of the clothes"


def test_from_some_step_on_half_of_the_shots_stand_elsewhere_in_the_frame(draw):
    for index in (1, 2, 3, 9):
        assert draw("shots", index)[0].moved is None
    for index in (10, 11, 13):
        batch, numbers = draw("shots", index)
        shot, moved = numbers >= SHOT, batch.moved
        assert not moved[~shot].any() and not moved[..., 0].any() and abs(moved).max() == wan_looks.REACH
        assert 0.3 < moved[shot].any(1).mean() < 0.7
        assert moved[shot][:, 1:].any(0).all() and (moved == moved.round()).all()


@pytest.mark.parametrize("index", [1, 2, 3])
def test_what_is_seen_belongs_to_the_picture_and_the_shot(draw, index):
    assert draw("aligned", 0)[0].seen is None and draw("shots", index)[0].seen is None
    batch, numbers = draw("aligned", index)
    assert batch.seen.shape == (*numbers.shape, 4, 2) and batch.moved is not None
    seen = batch.seen[:, :, 0, 0]
    known = numbers >= SHOT if index == 1 else np.ones_like(numbers, bool)  # of a clip's own frames nothing is seen
    assert (np.isfinite(seen) == known).all() and (seen[known] == numbers[known]).all()


def test_alignment_is_a_cosine_of_known_frames_and_reaches_the_blocks_before():
    dit = torch.nn.Module()
    dit.dim, dit.blocks = 6, torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))
    alignment = wan_alignment.Alignment(dit, 1, 0.5)
    alignment.projection = torch.nn.Identity()
    tokens = torch.randn(2, 3 * 4, 6)
    output = dit.blocks[2](dit.blocks[1](dit.blocks[0](tokens)))
    found = dit.blocks[1](dit.blocks[0](tokens)).unflatten(1, (3, 4))
    assert alignment.loss(3 * found.detach()).item() == pytest.approx(0, abs=1e-6)
    assert alignment.loss(-found.detach()).item() == pytest.approx(1)  # weight * (1 - cosine)
    half = -found.detach()
    half[:, 1:] = float("nan")
    half[:, 0, :2] *= -1
    loss = alignment.loss(half)
    assert loss.item() == pytest.approx(0.5) and output.shape == tokens.shape
    loss.backward()
    assert dit.blocks[0].weight.grad.abs().sum() > 0 and dit.blocks[2].weight.grad is None


def test_features_are_the_encoders_tokens_on_the_grid():
    pictures = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), np.uint8)
    pictures[:, :, :16] //= 8  # dark on the left
    found = wan_alignment.features(lambda numbers: pictures[list(numbers)], 70, 4)
    assert found.shape == (70, 16, 128) and found.dtype == np.float16
    assert np.abs(found.astype(np.float32).mean((0, 1))).max() < 1e-2
    assert np.abs(found.astype(np.float32).std((0, 1)) - 1).max() < 1e-2
    mirrored = wan_alignment.features(lambda numbers: pictures[list(numbers)][:, :, ::-1].copy(), 70, 4)
    left, right = found.reshape(70, 4, 4, 128)[:, :, 0], mirrored.reshape(70, 4, 4, 128)[:, :, 3]
    assert np.corrcoef(left.mean((0, 1)), right.mean((0, 1)))[0, 1] > 0.5, "columns stay columns"


def test_shots_are_numbered_by_pictures_then_clips(monkeypatch, tmp_path):
    drawn = []

    def note(take, number, config):
        drawn.append((number, take))
        return np.full((config.size, config.size, 3), number, np.uint8)

    monkeypatch.setattr(wan_looks, "drawn_shot", note)
    monkeypatch.setattr(wan_stages, "trained_vae", lambda *_a: {"vae": None})
    monkeypatch.setattr(
        wan_stages.whole_clip, "encode", lambda _vae, pixels: pixels[:, :1, :, ::8, ::8].expand(-1, 16, -1, -1, -1)
    )
    shots = wan_looks._shots(tmp_path, CONFIG, ALONE, CPU)
    takes = [world.sample_take(i, "train") for i in range(33)] + [wan_stages.clip_takes(i)[0] for i in ALONE]
    assert drawn == list(enumerate(takes))
    assert shots.shape == (39, 16, 1, 4, 4) and shots.dtype == np.float16
    assert np.abs((shots[:, 0, 0, 0, 0].astype(np.float32) + 1) * 127.5 - np.arange(39)).max() < 0.1


def test_a_shot_is_another_take_of_its_puppet_and_every_second_is_on_white(monkeypatch):
    asked, original = [], wan_looks.wan_adapter.reference_take

    def note(who, rng):
        asked.append((who, original(who, rng)))
        return asked[-1][1]

    monkeypatch.setattr(wan_looks.wan_adapter, "reference_take", note)
    takes = [world.sample_take(i, "train") for i in range(6)]
    pictures = [wan_looks.drawn_shot(take, i, CONFIG) for i, take in enumerate(takes)]
    for i, (take, picture, (who, other)) in enumerate(zip(takes, pictures, asked, strict=True)):
        assert who == take.identity == other.identity and other != take
        assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
        white = (picture[[0, 0, -1, -1], [0, -1, 0, -1]] > 247).all()
        assert white == (i % 2 == 1)
    assert (wan_looks.drawn_shot(takes[0], 0, CONFIG) == pictures[0]).all(), "seeded by the number"
    assert (wan_looks.drawn_shot(takes[0], 2, CONFIG) != pictures[0]).any()


# The loss


@pytest.fixture(scope="module")
def dit():
    generator = torch.Generator().manual_seed(0)
    found = wan_stages.make_dit(CONFIG, CPU)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return found.eval()


def test_frames_of_a_sample_have_levels_of_their_own():
    """In each sample alone those above 0 count, and each at its own level."""
    clean, noise = torch.randn(2, 2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    levels = torch.tensor([[0.0, 0.25, 0.5], [0.75, 1.0, 0.0]])
    seen = []

    def half(x, timestep, context):
        seen.append((x, timestep))
        return 0.5 * x

    loss = wan_stages.flow_loss(half, clean, noise, levels, None)
    (x, timestep), = seen
    assert torch.equal(timestep, 1000 * levels)
    errors = []
    for i in range(2):
        for t in range(3):
            level = float(levels[i, t])
            mixed = (1 - level) * clean[i, :, t] + level * noise[i, :, t]
            torch.testing.assert_close(x[i, :, t], mixed)
            if level:
                errors.append((0.5 * mixed - (noise - clean)[i, :, t]).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_moved_frames_have_the_rotary_positions_of_where_they_stand(dit):
    noisy = torch.zeros(2, 16, 3, 8, 12)
    _, rows, columns = dit.patch_size
    t, h, w = 3, 8 // rows, 12 // columns
    moved = torch.zeros(2, t, 3)
    moved[1, 2] = torch.tensor([0.0, 1.0, -2.0])
    found = wan_stages._moved_rotation(dit, noisy, moved)
    own = dit.rope_encode(3, 8, 12, device=CPU)
    torch.testing.assert_close(found[:1], own)
    own, there = own.unflatten(1, (t, h, w)), found[1:].unflatten(1, (t, h, w))
    torch.testing.assert_close(there[:, :2], own[:, :2])
    torch.testing.assert_close(there[:, 2, :-1, 2:], own[:, 2, 1:, :-2])
    later = wan_stages._moved_rotation(dit, noisy, torch.tensor([1.0, 0.0, 0.0]).expand(2, t, 3))
    torch.testing.assert_close(later[:1], dit.rope_encode(3, 8, 12, t_start=1, device=CPU))


def test_the_loss_knows_how_far_a_frame_is_moved_but_not_where_all_stand(dit):
    clean, noise = torch.randn(2, 2, 16, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    context = torch.randn(2, 7, dit.text_dim, generator=torch.Generator().manual_seed(4))

    def loss(moved):
        given = torch.tensor([[0.0, 0.5], [0.7, 0.7]])
        with torch.no_grad():
            return float(wan_stages.flow_loss(dit, clean, noise, given, context, moved))

    still = torch.zeros(2, 2, 3)
    one = still.clone()
    one[:, 0, 1] = 3
    assert loss(still) == pytest.approx(loss(None), rel=1e-5)
    assert loss(still + torch.tensor([0.0, 3.0, 5.0])) == pytest.approx(loss(None), rel=1e-4)
    assert abs(loss(one) / loss(None) - 1) > 1e-4


def test_a_step_learns_from_what_was_drawn(monkeypatch):
    """Given frames at level 0, in their sample; latents normalised; moves as they were drawn."""
    seen = []
    monkeypatch.setattr(wan_stages, "flow_loss", lambda *given: seen.append(given))
    monkeypatch.setattr(wan_stages, "Optimiser", lambda *_a: None)
    monkeypatch.setattr(wan_stages, "Stage", lambda *_a: SimpleNamespace(done=0, run=lambda step: step(0)))
    clips = np.random.default_rng(0).normal(3, 2, (9, 16, 5, 4, 4))
    monkeypatch.setattr(wan_stages, "latents", lambda *_a: (None, clips))
    monkeypatch.setattr(text_encoder, "trained", lambda *_a: lambda ids: SimpleNamespace(last_hidden_state=ids))
    given = np.array([[True, False], [False, False], [False, True]])
    moved = np.arange(18, dtype=np.float32).reshape(3, 2, 3)
    weight = np.ones((3, 2, 4, 4), np.float32)
    batch = wan_stages.Batch(marked(PICTURE, 3, 2), ["a cat", "a dog", ""], given, moved, weight=weight)
    free = dataclasses.replace(batch, given=np.zeros_like(given), moved=None, weight=None)
    for drawn in (batch, free):
        wan_stages.train_flow(
            "x", torch.nn.Linear(1, 1), 1, 1, lambda *_a, d=drawn: d, Path(), CONFIG, CPU, 1.0, None
        )
    (_, clean, noise, sigma, context, there, weighed), (*_, plain, _, nowhere, alike) = seen
    assert sigma.shape == (3, 2) and torch.equal(sigma == 0, torch.from_numpy(given))
    assert sigma[1, 0] == sigma[1, 1] and sigma[0, 1] != sigma[2, 0]
    assert torch.equal(weighed, torch.ones(3, 2, 4, 4)) and alike is None
    assert torch.equal(there, torch.from_numpy(moved)) and nowhere is None and plain.shape == (3,)
    assert clean.shape == noise.shape and float(clean[1, 0, 0, 0, 0]) == pytest.approx((1 - 3) / 2, abs=0.3)
    assert torch.equal(context, text_encoder.tokens(["a cat", "a dog", ""], CPU))
