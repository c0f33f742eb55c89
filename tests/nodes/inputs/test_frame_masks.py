"""Masks of a video's frames on the frames of its latent, against the rule as a loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.nodes.inputs.frame_masks import by_latent_frame, frame_count


@given(st.integers(1, 6), st.sampled_from(["one", "latent", "video"]), st.integers(0, 2**32))
def test_each_latent_frame_has_the_mean_of_its_frames(latent_frames, kind, seed):
    """The first latent frame is the first frame; the next ones are four frames each."""
    count = {"one": 1, "latent": latent_frames, "video": 1 + 4 * (latent_frames - 1)}[kind]
    mask = torch.rand(count, 3, 2, generator=torch.Generator().manual_seed(seed))
    actual = by_latent_frame(mask, latent_frames)
    if count in (1, latent_frames):
        assert actual is mask
        return
    assert count == frame_count(latent_frames) and actual.shape == (latent_frames, 3, 2)
    for i in range(latent_frames):
        frames = [0] if i == 0 else range(4 * i - 3, 4 * i + 1)
        expected = sum(mask[frame].double() for frame in frames) / len(frames)
        torch.testing.assert_close(actual[i].double(), expected, rtol=0, atol=1e-7)


@given(st.integers(2, 6), st.lists(st.booleans(), min_size=6, max_size=6))
def test_nothing_and_everything_stay_exact(latent_frames, whole):
    mask = torch.cat([torch.full((1 if i == 0 else 4, 2, 2), float(whole[i])) for i in range(latent_frames)])
    assert by_latent_frame(mask, latent_frames)[:, 0, 0].tolist() == [float(value) for value in whole[:latent_frames]]


@given(st.integers(1, 6), st.integers(0, 30))
def test_other_counts_are_refused_with_the_ones_that_fit(latent_frames, count):
    if count in (1, latent_frames, frame_count(latent_frames)):
        return
    message = rf"mask has {count} frames and the video has {frame_count(latent_frames)} \({latent_frames} in the"
    with pytest.raises(ValueError, match=message):
        by_latent_frame(torch.ones(count, 2, 2), latent_frames)
