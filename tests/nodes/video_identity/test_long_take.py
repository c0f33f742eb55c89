"""The experiment's long takes: which window sees which text, reference and last frame, and what its figures mean."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfy.context_windows import ContextSchedules, IndexListContextWindow, get_matching_context_schedule
from experiments import cases
from experiments import long_take as experiment
from experiments.theatre_wan import later
from pack.nodes.video_identity.method import token_weights


def test_six_windows_share_a_latent_frame_each_and_each_has_its_text():
    """By ComfyUI's own schedule and rule of texts, for the numbers that the experiment hands to its node."""
    schedule = get_matching_context_schedule(ContextSchedules.STATIC_STANDARD)
    handler = SimpleNamespace(context_length=experiment.WINDOW, context_overlap=experiment.SHARED)
    windows = schedule.func(experiment.LATENT_FRAMES, handler, {})
    assert windows == [[2 * i, 2 * i + 1, 2 * i + 2] for i in range(experiment.WINDOWS)]
    total = experiment.LATENT_FRAMES
    regions = [IndexListContextWindow(w, dim=2, total_frames=total).get_region_index(6) for w in windows]
    assert regions == list(range(6))


def test_halves_part_the_frames_of_the_first_three_windows_from_the_later_ones():
    first, second = experiment.halves()
    assert len(first) == 49 and torch.equal(first + second, torch.ones_like(first))
    assert first[:25].all() and not first[25:].any()
    weights = token_weights(first, experiment.LATENT_FRAMES, 12, 12, (2, 2))
    assert weights[:7].eq(1).all() and weights[7:].eq(0).all()


@pytest.fixture(scope="module")
def one():
    return experiment.case(0)


@pytest.mark.parametrize("name", [experiment.NONE, experiment.REFERENCE, experiment.TWO])
def test_an_arm_shows_its_references_as_the_experiment_of_close_ups_does_each_to_its_half(monkeypatch, one, name):
    bench, seen = experiment.Bench.__new__(experiment.Bench), []
    bench.theatre = SimpleNamespace(model="model", vae=SimpleNamespace(encode=lambda image: image))
    monkeypatch.setattr(experiment.video, "shipped", lambda: "shipped")
    monkeypatch.setattr(experiment.method, "video_reference", lambda *given: given)
    monkeypatch.setattr(experiment.applying, "apply", lambda model, given: seen.append(given) or model)
    assert bench.model(experiment.ARMS[name], one) == "model"
    expected = {experiment.NONE: [], experiment.REFERENCE: [one.reference]}.get(name, [one.reference, one.second])
    assert len(seen) == len(expected)
    masks = [None] if len(seen) == 1 else experiment.halves()
    for (adapter, latent, config, mask), take, wanted in zip(seen, expected, masks, strict=False):
        assert adapter == "shipped" and (config.strength, config.reference_guidance) == (2, 2)
        assert torch.equal(latent, experiment.arms.reference_image(take))
        assert mask is wanted or torch.equal(mask, wanted)


def frames_of(one, people):
    """True frames where a window is judged, of these identities by window."""
    frames = np.zeros((49, 96, 96, 3), np.uint8)
    for i, (take, who) in enumerate(zip(one.windows, people, strict=True)):
        for frame in experiment.JUDGED:
            shown = later(dataclasses.replace(take, identity=who), frame)
            frames[i * experiment.OWN_FRAMES + frame] = cases.drawn(shown, 96).image
    return frames


def test_the_figures_of_true_frames(one):
    """Of one puppet throughout, and of one that becomes the other after half of the windows."""
    own, other = one.windows[0].identity, one.second.identity
    assert own.species == other.species and own != other
    assert {take.light for take in one.windows} == {"day"} != {one.reference.light}
    whole, turned = (
        experiment.row_of(one, frames_of(one, people)) for people in ([own] * 6, [own] * 3 + [other] * 3)
    )
    assert whole["nearer_first"] and not whole["nearer_second"]
    assert turned["nearer_first"] and turned["nearer_second"]
    assert turned["error_6"] > whole["error_6"] + 5 and turned["error_1"] == whole["error_1"]
    assert turned["drift"] > whole["drift"] + 5


class Theatre:
    """Hands on what it is asked for: a sample is its number, a decoded latent its frames."""

    def __init__(self):
        self.model, self.asked, self.vae = None, [], SimpleNamespace(encode=self.encode)

    def sample(self, _sampler, positive, _seeds, noise=None, latents=None, noise_mask=None, **_options):
        self.asked.append((positive, latents, noise_mask))
        return torch.full_like(noise, len(self.asked))

    def encode(self, image):
        return image.mean().expand(1, 16, 1, 12, 12) * 255

    def decode(self, latents):
        return np.full((1, 9, 96, 96, 3), int(latents[0, 0, 0, 0, 0]), np.uint8)

    def latent_shape(self, _size):
        return 16, 3, 12, 12

    sampler = prompts = staticmethod(lambda asked: [asked] if isinstance(asked, list) else asked)


def test_a_chained_window_begins_with_the_last_frame_of_the_one_before(one):
    bench = experiment.Bench.__new__(experiment.Bench)
    bench.develop, bench.theatre = False, Theatre()
    frames = bench.chained(experiment.ARMS[experiment.CHAINED], one, 0)
    assert frames.shape == (49, 96, 96, 3)
    assert [int(frames[i, 0, 0, 0]) for i in (0, 8, 9, 16, 17, 48)] == [1, 1, 2, 2, 3, 6]
    first, *others = bench.theatre.asked
    assert first[1] is None and first[2] is None
    for number, (positive, known, free) in enumerate(others, 1):
        assert positive == [[experiment.texts(one)[number]]]
        assert known[:, :, 0].eq(number).all() and not known[:, :, 1:].any()
        assert not free[:, :, 0].any() and free[:, :, 1:].all()
