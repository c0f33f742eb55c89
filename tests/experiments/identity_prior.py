"""Method 2, identity prior: a learned puppet in a picture does something else; its clothes and detail have no word.

    python tests/experiments/identity_prior.py --development --arm masks     # first: which threshold serves all arms
    python tests/experiments/identity_prior.py --development --arm all
    python tests/experiments/identity_prior.py --arm ours
    python tests/experiments/identity_prior.py --report

As PROTOCOL.md says; options are in runs.py. What development chose is Learning, MASK, START, FRESH_NOISE.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows")]
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from experiments import cases, panels, report, runs, sampling  # noqa: E402
from experiments.measuring import eye, metrics  # noqa: E402
from pack.nodes.puppets import captions  # noqa: E402

SAMPLER, CFG, FRESH_NOISE, START = "ddim", 3.0, 0.6, 0.3
DIFFERENCE = 3  # how many times brighter a map of differences is
TOKEN, NOBODY = "sks", "a"  # "a cat" is the subject of a model without a prior
MASK = {"threshold_method": "quantile", "threshold": 0.7}
THRESHOLDS = {
    "fraction": (0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7), "otsu": (0.5,), "mean_std": (0.3, 0.4, 0.5, 0.6),
    "quantile": (0.6, 0.7, 0.75, 0.8, 0.85),
}
MEASURES = ("worn_error", "action", "identity", "composition", "background_error", "source_iou", "edited_iou")
OURS, NONE, ANOTHER, TRUE_MASK = "ours", "blend without prior", "prior of another", "by the true mask"
WEAKER = "ours at strength 0.85"  # after the first test pictures


@dataclasses.dataclass(frozen=True)
class Learning:
    """UnderstudyTrainIdentityPrior's inputs, with its other defaults."""

    steps: int = 800
    learning_rate: float = 3e-3
    rank: int = 8
    prior_weight: float = 0.0
    min_snr_gamma: float = 5.0
    class_actions: str | None = None  # None is the node's default, empty the learned captions
    short: bool = False  # captions


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of making an edit; without learning the plain model, by its own words for the subject."""

    learning: Learning | None = Learning()
    inverted: bool = True
    blend: bool = True
    another: bool = False  # the prior of another subject of the species
    true_mask: bool = False
    fresh_noise: float = FRESH_NOISE
    start: float = START  # of the blend, as a share of the schedule
    mirrored: bool = False  # of the four edits the mirrored view alone
    thresholds: bool = False  # rows of every threshold in place of the edit's
    strength: float = 1.0  # of the prior


ARMS = {
    OURS: Arm(),
    "class noun alone": Arm(None, inverted=False, blend=False),
    ANOTHER: Arm(another=True),
    "short captions": Arm(Learning(short=True)),
    "class pictures": Arm(Learning(prior_weight=0.3)),
    "class pictures, captions as learned": Arm(Learning(prior_weight=0.3, class_actions="")),
    "inversion alone": Arm(blend=False),
    NONE: Arm(None),
    TRUE_MASK: Arm(true_mask=True),
    WEAKER: Arm(strength=0.85),
    **{f"mirrored, fresh noise {share:g}": Arm(mirrored=True, fresh_noise=share) for share in (0.5, 1.0)},
}
DEVELOPMENT = {
    "masks": Arm(thresholds=True),
    **{f"rate {rate:g}": Arm(Learning(learning_rate=rate)) for rate in (1e-3, 2e-3, 3e-3)},
    **{f"class pictures by {weight:g}": Arm(Learning(prior_weight=weight)) for weight in (0.1, 0.3)},
    **{f"fresh noise {share:g}": Arm(fresh_noise=share) for share in (0.3, 0.9)},
    **{f"blend from {share:g}": Arm(start=share) for share in (0.0, 0.5)},
    **{f"strength {share:g}": Arm(strength=share) for share in (0.7, 0.85)},
}
CLAIMS = [
    report.Claim("what is worn is half as wrong as without a prior", OURS, "worn_error", NONE, 0.5),
    report.Claim("the action is no less often right", OURS, "action", NONE, margin=0.05, at_least=True),
    report.Claim("what is worn is half as wrong, by a weaker prior", WEAKER, "worn_error", NONE, 0.5),
    report.Claim("the action is no less often right, by it", WEAKER, "action", NONE, margin=0.05, at_least=True),
    report.Claim("another's prior is no better than none", ANOTHER, "worn_error", NONE, margin=5.0, at_least=True),
    report.Claim("nor worse", ANOTHER, "worn_error", NONE, margin=5.0),
    report.Claim("the background stays as by the true mask", OURS, "background_error", TRUE_MASK, 1.1),
]


def prompt(take: cases.Take, subject: str = "a {subject}") -> str:
    """What the take shows, without its clothes."""
    return captions.caption(take, clothes=False).replace(f"a {take.identity.species}", subject, 1)


def cells(masks: np.ndarray) -> torch.Tensor:
    """True masks [N, H, W] as latent cells, bool: those of which the puppet covers half."""
    return F.avg_pool2d(torch.from_numpy(masks).float().unsqueeze(1), 8).squeeze(1) >= 0.5


def overlap(found: torch.Tensor, true: torch.Tensor) -> float:
    """Intersection over union of two masks of cells."""
    found, true = found > 0.5, true > 0.5
    return float((found & true).sum() / (found | true).sum().clamp(min=1))


class Bench:
    """The theatre and what was learned of each subject; a case is subject * EDITS + edit."""

    batch = cases.EDITS

    def __init__(self, options, folder: Path):
        self.theatre = sampling.Theatre(options.checkpoint, runs.STATE)
        self.development, self.folder = options.development, folder.parent / "learned"
        self.digest = sampling.sha256(options.checkpoint)
        self.settings = (SAMPLER, sampling.SCHEDULER, sampling.STEPS, CFG, sorted(MASK.items()), self.digest)

    def make(self, arm: Arm, chosen: list[int]) -> tuple[list[dict], dict[str, np.ndarray]]:
        rows, made = [], {}
        for subject in sorted({case // cases.EDITS for case in chosen}):
            edits = cases.subject(subject, self.development).edits
            own = [case for case in chosen if case // cases.EDITS == subject]
            found, shown = self.edited(arm, subject, own, [edits[case % cases.EDITS] for case in own])
            # All four are made, for each to have the fresh noise that it has in the other arms.
            kept = {case for case in own if edits[case % cases.EDITS].mirrored or not arm.mirrored}
            rows += [row for row in found if row["case"] in kept]
            made |= {str(case): picture for case, picture in zip(own, shown, strict=True) if case in kept}
        return rows, made

    def _model(self, arm: Arm, index: int):
        """The MODEL, and who its subject is to it."""
        from pack.nodes.subject_tokens import Subject

        species = cases.subject(index, self.development).identity.species
        if arm.learning is None:
            return self.theatre.model, Subject(NOBODY, species)
        # Subjects 0 to 7 and 8 to 15 have the species in turn.
        whose = (index + 8) % cases.SUBJECTS if arm.another else index
        weights = self._learned(arm.learning, whose, cases.subject(whose, self.development))
        return self.theatre.with_lora(weights, arm.strength), Subject(TOKEN, species)

    def _learned(self, learning: Learning, index: int, subject: cases.Subject) -> dict[str, torch.Tensor]:
        from pack.nodes.identity_prior.training_nodes import UnderstudyTrainIdentityPrior as Train

        def train() -> dict:
            given = dataclasses.asdict(learning)
            if given.pop("short"):
                texts = ["a {subject}"] * len(subject.learned)
            else:
                texts = [prompt(take) for take in subject.learned]
            if given["class_actions"] is None:
                del given["class_actions"]
            values = sampling.widgets(
                Train, model=self.theatre.model, clip=self.theatre.clip, vae=self.theatre.vae, identity_token=TOKEN,
                class_noun=subject.identity.species, seed=index, checkpoint_every=0, **given,
            )
            del values["captions"]
            pictures = torch.from_numpy(cases.pictures(subject.learned)).float() / 255
            return Train.execute(images=[pictures], captions=texts, **sampling.as_lists(values)).result[0]

        return sampling.learned(self.folder, (subject.learned, learning, index, self.digest), train)

    def _said(self, subject, takes: list) -> list:
        from pack.nodes.identity_prior.nodes import UnderstudyEncodeIdentity as Encode

        # "a sks cat", or "a cat" where that is the subject.
        begins = "{subject}" if subject.token == NOBODY else "a {subject}"
        return sampling.joined(
            [Encode.execute(self.theatre.clip, subject, prompt(take, begins)).result[0][0] for take in takes]
        )

    def edited(self, arm: Arm, index: int, chosen: list[int], edits: list) -> tuple[list[dict], np.ndarray]:
        from pack.nodes.identity_prior import method, nodes
        from pack.nodes.identity_prior import sampling as blending

        theatre, (model, subject) = self.theatre, self._model(arm, index)
        sources, truths = [edit.source for edit in edits], [edit.truth for edit in edits]
        positive = self._said(subject, truths)
        seeds = [cases.noise_seed(cases.IDENTITY, case, self.development) for case in chosen]
        latents, noise, heats = None, None, []
        if arm.inverted:
            latents = theatre.encode(cases.pictures(sources))

            def remembered(heat, size, config, _mask=method.subject_mask):
                heats.append((heat.cpu(), size))
                return _mask(heat, size, config)

            maps = {"threshold_method": MASK["threshold_method"]}
            with torch.inference_mode(), mock.patch.object(method, "subject_mask", remembered):
                inversion, inverted, _ = nodes.UnderstudyInvertImage.execute(**sampling.widgets(
                    nodes.UnderstudyInvertImage, model=model, positive=self._said(subject, sources),
                    latent={"samples": latents}, sigmas=theatre.sigmas(), method="fixed_point", iterations=2,
                    mask_threshold=MASK["threshold"], **maps,
                )).result
                noise = inverted.generate_noise({"samples": latents})
                if arm.blend:
                    true = torch.from_numpy(cases.masks(sources) | cases.masks(truths)).float()
                    model = nodes.UnderstudyIdentityMaskBlend.execute(**sampling.widgets(
                        nodes.UnderstudyIdentityMaskBlend, model=model, inversion=inversion, positive=positive,
                        threshold=MASK["threshold"], fresh_noise=arm.fresh_noise, start_percent=arm.start,
                        mask=F.max_pool2d(true.unsqueeze(1), 8).squeeze(1) if arm.true_mask else None, **maps,
                    )).result[0]
                samples = self._sampled(model, positive, seeds, latents, noise)
        else:
            with torch.inference_mode():
                samples = self._sampled(model, positive, seeds, None, None)
        made = theatre.decode(samples)
        true_cells = cells(cases.masks(sources)), cells(cases.masks(truths))
        if arm.thresholds:
            return self._by_threshold(chosen, heats[0], heats[-1], true_cells), made
        rows = self._rows(index, chosen, edits, made)
        if arm.inverted and arm.blend and not arm.true_mask:
            for name, masks, true in zip(("source", "edited"), blending.masks_of(model, samples), true_cells):
                for row, mask, right in zip(rows, masks[:, 0], true, strict=True):
                    row[f"{name}_iou"] = overlap(mask, right)
        return rows, made

    def _sampled(self, model, positive: list, seeds: list[int], latents, noise) -> torch.Tensor:
        sampler = self.theatre.sampler(SAMPLER)
        return self.theatre.sample(sampler, positive, seeds, latents, cfg=CFG, model=model, noise=noise)

    @staticmethod
    def _by_threshold(chosen: list[int], source: tuple, edited: tuple, true: tuple) -> list[dict]:
        """A row for every case and threshold: the overlap of the source's map and of the edit's last one."""
        from pack.nodes.identity_prior import method
        from pack.nodes.identity_prior.config import MaskConfig

        rows = []
        for how, thresholds in THRESHOLDS.items():
            for threshold in thresholds:
                config = MaskConfig(threshold=threshold, threshold_method=how)
                found = [method.subject_mask(*heat, config)[:, 0] for heat in (source, edited)]
                rows += [
                    {"case": case, "setting": f"{how} {threshold:g}",
                     "source_iou": overlap(found[0][i], true[0][i]), "edited_iou": overlap(found[1][i], true[1][i])}
                    for i, case in enumerate(chosen)
                ]
        return rows

    @staticmethod
    def _rows(index: int, chosen: list[int], edits: list, made: np.ndarray) -> list[dict]:
        """A mirrored view has its action right only where the joints, too, are nearer to the truth."""
        joints, rows = eye.look(metrics.trained_eye(), made).joints, []
        seen = metrics.compositions(made, [edit.truth for edit in edits])
        for i, (case, edit, row) in enumerate(zip(chosen, edits, seen, strict=True)):
            source, truth = cases.drawn(edit.source), cases.drawn(edit.truth)
            to_truth, to_source = (
                np.nanmean(metrics.joint_distances(joints[i : i + 1], take.joints[None])) for take in (truth, source)
            )
            action = bool(row["action"] and (to_truth < to_source or not edit.mirrored))
            rows.append({
                "case": case, "subject": index, "mirrored": edit.mirrored, "asked": edit.truth.action,
                "worn_error": row["worn_error"], "identity_error": row["identity_error"], "action": action,
                "identity": row["identity"], "composition": row["identity"] and action,
                "background_error": metrics.background_error(made[i], source.image, source.mask | truth.mask),
            })
        return rows


def tables(rows: list[dict]) -> dict:
    """Overlaps of thresholds where there are any; the arms; their mirrored views."""
    found, edited = {}, [row for row in rows if "worn_error" in row]
    searched = [{**row, "arm": row["setting"]} for row in rows if "setting" in row]
    if searched:
        settings = dict.fromkeys(row["arm"] for row in searched)
        found["masks"] = report.table(searched, settings, ("source_iou", "edited_iou"))
    arms = dict.fromkeys(row["arm"] for row in edited)
    mirrored = [row for row in edited if row["mirrored"]]
    return found | {
        "arms": report.table(edited, arms, MEASURES, "subject"),
        "mirrored views": report.table(mirrored, arms, MEASURES[:5], "subject"),
        "claims": report.claims(edited, CLAIMS, "subject"),
    }


def picture(bench: Bench, rows: Callable[[str], list[dict]]) -> list[np.ndarray]:
    """A photograph, three edits by the weaker prior; under each what changed; below, the same without a prior."""
    index = int(panels.middle(rows(WEAKER), "worn_error", of="subject")[0])
    subject = cases.subject(index)
    source, learned = subject.edits[0].source, {take.action for take in subject.learned}
    new = [action for action in ("waving", "sitting", "handstand", "cheering", "kicking") if action not in learned]
    edits = [cases.Edit(source, dataclasses.replace(source, action=action)) for action in new[:3]]
    own = [index * cases.EDITS + i for i in range(len(edits))]
    ours, without = (bench.edited(ARMS[arm], index, own, edits)[1] for arm in (WEAKER, NONE))
    shown = cases.pictures([source])[0]
    changed = np.abs(ours.astype(int) - shown).max(-1, keepdims=True) * DIFFERENCE
    maps = changed.clip(0, 255).astype(np.uint8).repeat(3, -1)
    return [panels.grid([[shown, *ours], [None, *maps], [None, *without]])]


if __name__ == "__main__":
    counts = cases.SUBJECTS * cases.EDITS, 12
    runs.main(__doc__, "identity_prior", ARMS, DEVELOPMENT, counts, Bench, tables, picture)
