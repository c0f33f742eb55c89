"""Injected wavelet bands, against Haar's transform written as matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.kernels.wavelet_detail import agreement, inject


def haar(size: int) -> np.ndarray:
    """One level of the orthonormal transform: means of neighbours above, their differences below."""
    half = size // 2
    matrix = np.zeros((size, size))
    for i in range(half):
        matrix[i, 2 * i : 2 * i + 2] = 1 / np.sqrt(2)
        matrix[half + i, 2 * i : 2 * i + 2] = 1 / np.sqrt(2), -1 / np.sqrt(2)
    return matrix


def transformed(plane: np.ndarray, levels: int) -> np.ndarray:
    plane = plane.copy()
    for level in range(levels):
        h, w = (side >> level for side in plane.shape)
        plane[:h, :w] = haar(h) @ plane[:h, :w] @ haar(w).T
    return plane


def restored(coefficients: np.ndarray, levels: int) -> np.ndarray:
    plane = coefficients.copy()
    for level in reversed(range(levels)):
        h, w = (side >> level for side in plane.shape)
        plane[:h, :w] = haar(h).T @ plane[:h, :w] @ haar(w)
    return plane


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bands", [1, 2, 3])
def test_the_finest_haar_bands_are_the_references_where_the_coarse_ones_agree(bands):
    x = noise(1, 1, 2, 16, 24)
    fine = noise(2, 1, 2, 16, 24).numpy()
    reference = np.empty_like(fine)
    for c in range(2):  # the reference has x's coarse part and details of its own
        coefficients = transformed(fine[0, c], bands)
        h, w = 16 >> bands, 24 >> bands
        coefficients[:h, :w] = transformed(x[0, c].numpy(), bands)[:h, :w]
        reference[0, c] = restored(coefficients, bands)
    np.testing.assert_allclose(inject(x, torch.from_numpy(reference), bands).numpy(), reference, atol=1e-12)


@given(st.integers(1, 3), st.integers(3, 13), st.integers(3, 13), st.integers(0, 2**20))
@settings(deadline=None)
def test_the_coarse_part_never_changes_and_each_block_mixes_by_its_weight(bands, height, width, seed):
    x, reference = noise(seed, 2, 3, height, width), noise(seed + 1, 1, 3, height, width)
    result, block = inject(x, reference, bands), 2**bands
    for b in range(2):
        means, others, places = [], [], []
        for top in range(0, height, block):
            for left in range(0, width, block):
                place = (slice(None), slice(top, top + block), slice(left, left + block))
                places.append(place)
                means.append(x[b][place].mean((1, 2)).numpy())
                others.append(reference[0][place].mean((1, 2)).numpy())
        others_ = np.array(others)
        spread = np.sqrt(np.mean((others_ - others_.mean(0)) ** 2))
        for place, mean, other in zip(places, means, others, strict=True):
            distance = np.sqrt(np.mean((mean - other) ** 2))
            weight = max(0.0, 1 - distance / max(spread, 1e-300))
            ours, theirs = x[b][place].numpy(), reference[0][place].numpy()
            expected = mean[:, None, None] + (1 - weight) * (ours - mean[:, None, None]) + weight * (
                theirs - other[:, None, None]
            )
            np.testing.assert_allclose(result[b][place].numpy(), expected, atol=1e-9)


def test_no_bands_return_x_itself_and_a_flat_reference_gives_nothing():
    x = noise(1, 1, 4, 8, 8).float()
    assert inject(x, x + 1, 0) is x
    flat = torch.zeros(1, 4, 8, 8)
    assert torch.equal(inject(x, flat, 2), x)
    assert inject(x.half(), noise(2, 1, 4, 8, 8).half(), 1).dtype == torch.float16


def test_agreement_falls_from_one_to_zero():
    reference = noise(3, 1, 4, 6, 6)
    assert torch.equal(agreement(reference, reference), torch.ones(1, 1, 6, 6, dtype=torch.float64))
    spread = float((reference - reference.mean((-2, -1), keepdim=True)).square().mean().sqrt())
    for share in (0.25, 0.5, 1.0, 3.0):
        weight = agreement(reference + share * spread, reference)
        torch.testing.assert_close(weight, torch.full_like(weight, max(0.0, 1 - share)))
