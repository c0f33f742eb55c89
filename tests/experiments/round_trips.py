"""What comes back of a picture: by an inversion and its sampler, and after ten rounds with and without alignment.

    python tests/experiments/round_trips.py

Prints the figures of the help pages of Invert Image and Align Latent Drift, of test puppets. A drift is the mean
absolute difference of the first and the last round's mean colour, in levels of 255, over puppets.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows")]
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from experiments import cases, identity_prior, runs, sampling  # noqa: E402
from pack.nodes.puppets import captions  # noqa: E402

INVERSIONS = (("ddim", 1), ("fixed_point", 2), ("fixed_point", 4), ("fixed_point", 8), ("renoise", 4), ("renoise", 8))
STEPS, ROUNDS, DENOISE, BLOCK = 20, 10, 0.2, 16


def inversion_errors(theatre: sampling.Theatre) -> dict[tuple[str, int], float]:
    """Root mean square difference from the autoencoder's picture, in 0..1, by method and iterations; ddim, CFG 1."""
    from pack.nodes.identity_prior import nodes
    from pack.nodes.subject_tokens import Subject

    takes = [cases.subject(i).edits[0].source for i in range(cases.SUBJECTS)]
    latents = theatre.encode(cases.pictures(takes))
    positive = sampling.joined([
        nodes.UnderstudyEncodeIdentity.execute(
            theatre.clip, Subject(identity_prior.NOBODY, take.identity.species),
            identity_prior.prompt(take, "{subject}"),
        ).result[0][0]
        for take in takes
    ])
    right, found = theatre.decode(latents) / 255, {}
    for method, iterations in INVERSIONS:
        with torch.inference_mode():
            _, inverted, _ = nodes.UnderstudyInvertImage.execute(**sampling.widgets(
                nodes.UnderstudyInvertImage, model=theatre.model, positive=positive, latent={"samples": latents},
                sigmas=theatre.sigmas(STEPS), method=method, iterations=iterations,
            )).result
            again = theatre.decode(theatre.sample(
                theatre.sampler("ddim"), positive, [0], latents, steps=STEPS, cfg=1.0,
                noise=inverted.generate_noise({"samples": latents}),
            ))
        found[method, iterations] = float(np.sqrt(np.mean((again / 255 - right) ** 2)))
    return found


def rounds(theatre: sampling.Theatre, aligned: bool, drawn: bool) -> dict[str, float]:
    """How far colour, that of the background, and contrast inside blocks move; `drawn`: by img2img, not the VAE
    alone.
    """
    from pack.nodes.drift_alignment.config import DriftAlignmentConfig
    from pack.nodes.drift_alignment.method import align_drift

    takes = [cases.subject(i).edits[0].source for i in (0, 5, 10)]
    positive, masks = theatre.prompts([captions.caption(take) for take in takes]), cases.masks(takes)
    latents, pictures = [theatre.encode(cases.pictures(takes))], []
    for turn in range(ROUNDS):
        latent = latents[-1]
        if drawn:
            seeds = [1_000 * turn + i for i in range(len(takes))]
            latent = theatre.sample(theatre.sampler("ddim"), positive, seeds, latent, DENOISE, steps=5)
        latent = align_drift(latent, latents, DriftAlignmentConfig()) if aligned else latent
        pictures.append(theatre.decode(latent))
        latents.append(theatre.encode(pictures[-1]))
    first, last = pictures[0].astype(float), pictures[-1].astype(float)
    return {
        "colour": float(np.abs(first.mean((1, 2)) - last.mean((1, 2))).mean()),
        "background": float(np.mean([
            np.abs(a[~mask].mean(0) - b[~mask].mean(0)).mean() for a, b, mask in zip(first, last, masks, strict=True)
        ])),
        "contrast": float(np.abs(contrast(first) - contrast(last)).mean()),
    }


def contrast(pictures: np.ndarray) -> np.ndarray:
    """[N], the mean standard deviation inside blocks of `BLOCK` pixels."""
    count, height, width, channels = pictures.shape
    blocks = pictures.reshape(count, height // BLOCK, BLOCK, width // BLOCK, BLOCK, channels)
    return blocks.std((2, 4)).mean((1, 2, 3))


def main() -> None:
    theatre = sampling.Theatre(sampling.CHECKPOINT, runs.STATE)
    print("inversion, root mean square x 1,000:")
    for (method, iterations), error in inversion_errors(theatre).items():
        print(f"  {method}, {iterations}: {1_000 * error:.1f}", flush=True)
    for drawn in (True, False):
        for aligned in (False, True):
            found = ", ".join(f"{name} {moved:.1f}" for name, moved in rounds(theatre, aligned, drawn).items())
            how = f"img2img at {DENOISE}" if drawn else "the VAE alone"
            print(f"{ROUNDS} rounds of {how}, {'with' if aligned else 'without'} alignment: {found}", flush=True)


if __name__ == "__main__":
    main()
