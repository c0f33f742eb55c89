"""The last stage of the theatre's Wan: whose shot stands beside whom, and where the loss looks."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from launcher.scripts import ROOT
from pack.nodes.puppets import captions, render, world
from support.marked_latents import ALONE, CLIP, PICTURE, SHOT, marked

sys.path.append(str(ROOT / "workflows" / "theatre"))  # where the training script finds its own modules
import wan_likeness  # noqa: E402
import wan_looks  # noqa: E402
import wan_stages  # noqa: E402

CONFIG = wan_stages.Config(
    size=32, pictures=40, clips=9, clip_batch=48, shots_batch=64, shot_clips=6, likeness_pictures=20,
    likeness_steps=100, likeness_weight=3.0, likeness_bare=0.75, drop_caption=0.0,
)


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """draw(step) -> its batch, and the number of each frame [B, T]."""
    found, shown = [], []

    def shots(_state, _config, takes, first, _device):
        shown.append((takes, first))
        return marked(SHOT, len(takes), 1)

    monkeypatch.setattr(wan_stages, "latents", lambda *_a: (marked(PICTURE, 40, 1), marked(CLIP, 9, 5)))
    monkeypatch.setattr(wan_looks, "encoded_shots", shots)
    monkeypatch.setattr(wan_looks, "trained", lambda *_a: None)
    monkeypatch.setattr(wan_stages, "train_flow", lambda _n, _d, _s, _r, drawn, *_a: found.append(drawn))
    for _ in range(2):  # the second time from what was kept
        wan_likeness.train(tmp_path, CONFIG, torch.device("cpu"), 0.0, None)
    (takes, first), = shown
    assert first >= 100_000 and [take.seed for take in takes] == [
        *(world.sample_take(i, "train").seed for i in range(20)), *(wan_stages.clip_takes(i)[0].seed for i in ALONE),
    ]

    def of(step):
        batch = found[1](np.random.default_rng(step), step)
        return batch, batch.latents[:, 0, :, 0, 0]

    return of


@pytest.mark.parametrize("step", [1, 2])
def test_every_shot_is_given_and_of_the_same_puppet(draw, step):
    batch, numbers = draw(step)
    shot = numbers >= SHOT
    assert np.array_equal(shot, batch.given) and (shot.sum(1) == 1).all() and shot[:, 0].any() and shot[:, -1].any()
    assert numbers.shape == ((64, 2) if step == 1 else (48, 6))
    for row, given, text in zip(numbers, shot, batch.texts, strict=True):
        own, number = int(row[~given][0]), int(row[given][0] - SHOT)
        assert own == (number if step == 1 else CLIP + ALONE[number - 20])
        take = world.sample_take(own, "train") if step == 1 else wan_stages.clip_takes(own - CLIP)[0]
        assert take.identity.species in text
        assert text == captions.group_caption([take]) or len(text.split()) > 6
    assert (batch.moved[~shot] == 0).all() and (batch.moved[..., 0] == 0).all()
    assert 0.3 < (batch.moved[shot] != 0).any(-1).mean() < 0.7  # the others stand where full attention has them


@pytest.mark.parametrize("step", [1, 2])
def test_the_loss_looks_at_the_puppet_less_and_less(draw, step):
    batch, numbers = draw(step)
    late = draw(97 + step)[0].weight
    shot, more = numbers >= SHOT, 3 * (1 - step / 100)
    assert (batch.weight[shot] == 1).all() and batch.weight.max() <= 1 + more and late.max() <= 1 + 3 * 0.02
    for row, given, weight in zip(numbers, shot, batch.weight, strict=True):
        own = int(row[~given][0])
        if step == 1:
            moments = [world.sample_take(own, "train")]
        else:
            take = wan_stages.clip_takes(own - CLIP)[0]
            moments = [dataclasses.replace(take, phase=take.phase + t / 17) for t in (0, 2.5, 6.5, 10.5, 14.5)]
        for moment, found in zip(moments, weight[~given], strict=True):
            mask = np.asarray(render.render(moment, 32).mask, float)
            assert found.mean() == pytest.approx(1 + more * mask.mean(), abs=1e-4)
            assert found[1, 2] == pytest.approx(1 + more * mask[8:16, 16:24].mean(), abs=1e-4)


def test_one_step_of_ten_is_of_the_stage_before(draw):
    batch, numbers = draw(10)
    assert batch.weight is None and batch.moved is None and numbers.shape == (48, 5) and (numbers < SHOT).all()
    assert not batch.given[:, 1:].any() and batch.given[:, 0].any()


def test_errors_are_of_the_whole_clip_and_of_the_puppet():
    """Two clips of one frame and two places, all sixteen channels off alike: 1 and 3, then 2 and 0."""
    velocity = torch.randn(2, 16, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    output = velocity + torch.tensor([[1.0, 3.0], [2.0, 0.0]]).reshape(2, 1, 1, 1, 2)
    weight = torch.tensor([[0.25, 0.75], [0.5, 0.0]]).reshape(2, 1, 1, 2)
    whole, puppet = wan_likeness.velocity_errors(output, velocity, weight)
    torch.testing.assert_close(whole, torch.tensor([5.0, 2.0]))
    torch.testing.assert_close(puppet, torch.tensor([7.0, 4.0]))
