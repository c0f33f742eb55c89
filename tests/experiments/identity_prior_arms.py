"""What is compared with the identity prior: ways of learning a puppet and of editing a picture of it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from experiments import report, sampling
from experiments.measuring import metrics
from experiments.non_rigid_edit import EDITS, Stage, prompt
from pack.nodes.puppets import captions, render

TOKEN = "sks"
SAMPLER, STEPS, SEED = "ddim", 20, 5_000_000
INVERSIONS = (
    ("ddim", 1), ("fixed_point", 2), ("fixed_point", 4), ("fixed_point", 8), ("renoise", 4), ("renoise", 8),
)
RECONSTRUCTED = 2  # edits a subject
Inputs = tuple[tuple[str, str | float], ...]
# The theatre's UNet is so small that its coarse layers show the subject best, and they have 8 x 8 cells.
MAPS: Inputs = (("layers", "0-4"), ("resolution", 8), ("smoothing", 1.0))


@dataclasses.dataclass(frozen=True)
class Learning:
    """UnderstudyTrainIdentityPrior on the references, with its other defaults; 0 steps is the plain model."""

    steps: int = 200
    learning_rate: float = 3e-3
    prior_weight: float = 0.3
    min_snr_gamma: float = 5.0
    short_captions: bool = False


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of making the result. Without learning, the prompt is the caption as the theatre has it."""

    learning: Learning | None = None
    cfg: float = 3.0
    start: str = "noise"  # or "inverted": the source picture's
    denoise: float = 1.0  # below 1: img2img from the source picture
    background: str = "free"  # or "inpaint" with the true mask, or "blend"
    mask: str = "union"  # of a blend; or "edited": the edited branch's alone, or "true"
    blend: Inputs = (("threshold", 0.5), ("grow", 1), *MAPS)  # of UnderstudyIdentityMaskBlend
    invert: Inputs = (("iterations", 2), ("mask_threshold", 0.5), *MAPS)  # of UnderstudyInvertImage


class Editor:
    """Makes the arms' pictures through our node classes and the host's sampler, all edits of a subject at once."""

    def __init__(self, theatre: sampling.Theatre, stage: Stage, folder: Path):
        self.theatre, self.stage, self.folder = theatre, stage, folder
        # After the host is on the path.
        from pack.nodes.identity_prior import nodes, training_nodes
        from pack.nodes.subject_tokens import Subject

        self._nodes, self._train = nodes, training_nodes.UnderstudyTrainIdentityPrior
        self._identities = [Subject(TOKEN, one.species) for one in stage.subjects]

    def settings(self, arm: Arm) -> dict:
        """The edit nodes' inputs for an arm: its own, and the nodes' defaults for the rest."""
        used = {"blend": self._nodes.UnderstudyIdentityMaskBlend} if arm.background == "blend" else {}
        if arm.start == "inverted" or arm.background == "blend":
            used["invert"] = self._nodes.UnderstudyInvertImage
        return {name: self._defaults(node) | dict(getattr(arm, name)) for name, node in used.items()}

    @staticmethod
    def _defaults(node) -> dict:
        widgets = [given for given in node.define_schema().inputs if getattr(given, "default", None) is not None]
        return {widget.id: widget.default for widget in widgets}

    @functools.cache  # noqa: B019, one editor a run
    def learnt(self, learning: Learning, i: int):
        """The theatre's MODEL after it has learnt subject `i`; kept as a file between runs."""
        import comfy.sd

        if not learning.steps:
            return self.theatre.model
        one = self.stage.subjects[i]
        path = self.folder / f"prior_{report.fingerprint(one, learning)}.safetensors"
        if not path.exists():
            shown = np.stack([render.render(take).image for take in one.references])
            texts = ["a {subject}"] * len(shown) if learning.short_captions else [prompt(t) for t in one.references]
            given = {
                **self._defaults(self._train), "model": self.theatre.model, "clip": self.theatre.clip,
                "vae": self.theatre.vae, "identity_token": TOKEN, "class_noun": one.species, "seed": i,
                "checkpoint_every": 0, **dataclasses.asdict(learning),
            }
            del given["short_captions"]
            lists = {name: [value] for name, value in given.items() if name not in ("images", "captions")}
            with torch.inference_mode():
                weights = self._train.execute(
                    images=[torch.from_numpy(shown).float() / 255], captions=texts, **lists
                ).result[0]
            report.replace(path, safetensors.torch.save(weights))
        return comfy.sd.load_lora_for_models(self.theatre.model, None, safetensors.torch.load_file(path), 1.0, 0)[0]

    def _said(self, i: int, takes: list) -> list:
        """One CONDITIONING of a prompt a take, as Encode Identity makes it."""
        encode = self._nodes.UnderstudyEncodeIdentity.execute
        entries = [encode(self.theatre.clip, self._identities[i], prompt(t)).result[0][0] for t in takes]
        return sampling.joined(entries)

    @functools.cache  # noqa: B019
    def inverted(self, learning: Learning, inputs: tuple, i: int, count: int = EDITS) -> tuple:
        """UNDERSTUDY_INVERSION and NOISE of the first `count` source pictures of subject `i`."""
        node = self._nodes.UnderstudyInvertImage
        some = slice(i * EDITS, i * EDITS + count)
        widgets = self._defaults(node) | dict(inputs)
        with torch.inference_mode():
            return node.execute(
                model=self.learnt(learning, i), positive=self._said(i, [e.source for e in self.stage.edits[some]]),
                latent={"samples": self.theatre.encode(self.stage.source[some])},
                sigmas=self.theatre.sigmas(STEPS), **widgets,
            ).result[:2]

    def true_mask(self, some: slice) -> torch.Tensor:
        """[N, H, W] in latent cells: 1 where source or truth shows the puppet in a part of the cell."""
        masks = torch.from_numpy(self.stage.masks[some]).float()
        return F.max_pool2d(masks.unsqueeze(1), 8).squeeze(1)

    def edited(self, arm: Arm, i: int) -> np.ndarray:
        """The arm's pictures of all edits of subject `i`."""
        theatre, some = self.theatre, slice(i * EDITS, (i + 1) * EDITS)
        takes = [edit.truth for edit in self.stage.edits[some]]
        latents = theatre.encode(self.stage.source[some])
        noise = noise_mask = None
        if arm.learning is None:
            model, positive = theatre.model, theatre.prompts([captions.caption(take) for take in takes])
        else:
            model, positive = self.learnt(arm.learning, i), self._said(i, takes)
        if arm.start == "inverted" or arm.background == "blend":
            inversion, own = self.inverted(arm.learning, arm.invert, i)
            noise = own.generate_noise({"samples": latents}) if arm.start == "inverted" else None
        if arm.background == "blend":
            if arm.mask == "edited":
                inversion = dataclasses.replace(inversion, source_mask=torch.zeros_like(inversion.source_mask))
            model = self._nodes.UnderstudyIdentityMaskBlend.execute(
                model=model, inversion=inversion, positive=positive,
                mask=self.true_mask(some) if arm.mask == "true" else None, **self.settings(arm)["blend"],
            ).result[0]
        elif arm.background == "inpaint":
            noise_mask = self.true_mask(some).unsqueeze(1)
        # Only what goes on from the source picture starts at its latent.
        begin = latents if arm.denoise < 1 or arm.background == "inpaint" or arm.start == "inverted" else None
        with torch.inference_mode():
            made = theatre.sample(
                theatre.sampler(SAMPLER), positive, [SEED + i * EDITS + j for j in range(EDITS)], begin,
                arm.denoise, steps=STEPS, cfg=arm.cfg, model=model, noise=noise, noise_mask=noise_mask,
            )
            return theatre.decode(made)

    def reconstructions(self, arm: Arm, kept: report.Pictures) -> dict:
        """By method and iterations: how far a picture comes back under its own prompt without an edit.

        Root mean square difference (0..1) to the picture through the autoencoder, [mean, low, high].
        """
        chosen = [i * EDITS + j for i in range(len(self.stage.subjects)) for j in range(RECONSTRUCTED)]
        encoded = np.concatenate([self.theatre.round_trip(self.stage.source, i, i + 1) for i in chosen])
        key = report.fingerprint(self.stage.subjects, arm.learning, arm.invert, STEPS, SAMPLER)
        found = {}
        for name, iterations in INVERSIONS:
            inputs = (*arm.invert, ("method", name), ("iterations", iterations))

            def again(start: int, stop: int, inputs=inputs) -> np.ndarray:
                i = start // RECONSTRUCTED
                some = slice(i * EDITS, i * EDITS + RECONSTRUCTED)
                latents = self.theatre.encode(self.stage.source[some])
                noise = self.inverted(arm.learning, inputs, i, RECONSTRUCTED)[1].generate_noise({"samples": latents})
                positive = self._said(i, [edit.source for edit in self.stage.edits[some]])
                with torch.inference_mode():
                    return self.theatre.decode(self.theatre.sample(
                        self.theatre.sampler(SAMPLER), positive, [0] * RECONSTRUCTED, latents, steps=STEPS, cfg=1.0,
                        model=self.learnt(arm.learning, i), noise=noise,
                    ))

            made = kept.get(f"again_{key}_{name}_{iterations}", len(chosen), RECONSTRUCTED, again)
            errors = np.sqrt(np.square((made - encoded.astype(float)) / 255).mean((1, 2, 3)))
            found[f"{name}, {iterations}"] = [round(v, 4) for v in metrics.mean_interval(errors)]
        return found
