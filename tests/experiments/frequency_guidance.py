"""Method 1, frequency guidance: a test puppet takes over an unnamed action from a picture of another, elsewhere.

    python tests/experiments/frequency_guidance.py --development --arm all
    python tests/experiments/frequency_guidance.py --arm "masked and aligned"
    python tests/experiments/frequency_guidance.py --report

As PROTOCOL.md says; options are in runs.py. What development chose stands below as CHOSEN and RATE.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

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
from experiments.measuring import metrics  # noqa: E402
from pack.nodes.puppets import captions  # noqa: E402

SAMPLER, CFG, BATCH = "ddim", 4.0, 8
ITERATIONS, RANK, RATE = 60, 4, 3e-3
SWITCH = 0.12  # published: 6 of 50 steps
Guide = tuple[tuple[str, float], ...]  # inputs of UnderstudyFrequencyGuidanceSampler
CHOSEN: Guide = (("amplitude_scale", 1.0), ("phase_low", 0.0), ("phase_high", 0.75), ("end_percent", 0.5))
MEASURES = ("composition", "action", "identity", "worn_error", "background_error")
OURS, LEARNED, SWITCHED, WRONG = "masked and aligned", "learned", "learned, switch", "driver in a wrong action"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of making the result."""

    shown: str = ""  # as it is: "source" or "driver"; or "truth", through the autoencoder
    start: str = ""  # img2img from "source", "driver" or "collage" at `denoise`
    denoise: float = 1.0
    rate: float = 0.0  # of learning source and driver, 0 without
    switch: float = 0.0  # the driver's prompt in this share of the schedule
    guide: Guide = ()
    masks: tuple[str, ...] = ()  # of "driving_mask", "source_mask": the true ones
    driver: str = "driver"  # or "wrong": whose phases
    iterations: ClassVar[int] = ITERATIONS  # of learning


class Longer(Arm):
    """The same, with twice the learning."""

    iterations = 2 * ITERATIONS


def ours(**changes) -> Arm:
    """The method with some changes; `guide` is added to what was chosen. The switch brings the driver's scene in."""
    guide = CHOSEN + tuple(changes.pop("guide", ()))
    kind = changes.pop("kind", Arm)
    return dataclasses.replace(
        kind(rate=RATE, guide=guide, masks=("driving_mask", "source_mask")), **changes
    )


IMG2IMG = {
    f"img2img from the {start}, {denoise:g}": Arm(start=start, denoise=denoise)
    for start in ("driver", "source") for denoise in (0.5, 0.65, 0.8)
}
COLLAGE = {
    f"img2img from the collage, {denoise:g}": Arm(start="collage", denoise=denoise) for denoise in (0.5, 0.65, 0.8)
}
ARMS = {
    "prompt": Arm(),
    **IMG2IMG,
    **COLLAGE,
    LEARNED: Arm(rate=RATE),
    SWITCHED: Arm(rate=RATE, switch=SWITCH),
    "phase": ours(masks=()),
    "masked": ours(masks=("driving_mask",)),
    OURS: ours(),
    WRONG: ours(driver="wrong"),
    "learned, 120 iterations": Longer(rate=RATE),
    "learned, switch, 120 iterations": Longer(rate=RATE, switch=SWITCH),
    "driver in a wrong action, 120 iterations": ours(kind=Longer, driver="wrong"),
    "masked and aligned, 120 iterations": ours(kind=Longer),
    **{name: Arm(shown=name) for name in ("driver", "source", "truth")},
}
DEVELOPMENT = {
    **{f"rate {rate:g}": ours(rate=rate) for rate in (1e-3, 3e-3, 1e-2)},
    "amplitudes by 0.1": ours(guide=(("amplitude_scale", 0.1),)),
    "amplitudes by 0.1, phases from 0.1": ours(guide=(("amplitude_scale", 0.1), ("phase_low", 0.1))),
    "phases to 0.3 until 0.4": ours(guide=(("phase_high", 0.3), ("end_percent", 0.4))),
    "with the switch": ours(switch=SWITCH),
}
CLAIMS = [
    *(report.Claim("both right in 1.5 times as many as img2img", OURS, "composition", other, 1.5, at_least=True)
      for other in IMG2IMG),
    report.Claim("both right in 1.5 times as many as by the switch", OURS, "composition", SWITCHED, 1.5,
                 at_least=True),
    report.Claim("a wrong action does not help", WRONG, "composition", LEARNED, margin=0.05),
    report.Claim("the source's background stays", OURS, "background_error", LEARNED, 1.1),
]


class Bench:
    """The theatre, and the cases as they are asked for."""

    batch = BATCH

    def __init__(self, options, folder: Path):
        self.theatre = sampling.Theatre(options.checkpoint, runs.STATE)
        self.development, self.folder = options.development, folder.parent / "learned"
        self.digest = sampling.sha256(options.checkpoint)
        self.settings = (SAMPLER, sampling.SCHEDULER, sampling.STEPS, CFG, ITERATIONS, RANK, self.digest)

    def make(self, arm: Arm, chosen: list[int]) -> tuple[list[dict], dict[str, np.ndarray]]:
        found = [cases.transfer(case, self.development) for case in chosen]
        if arm.shown:
            made = cases.pictures([getattr(case, arm.shown) for case in found])
            made = self.theatre.decode(self.theatre.encode(made)) if arm.shown == "truth" else made
        elif arm.rate:  # what is learned differs from case to case
            made = np.concatenate([self.sampled(arm, [i], [c]) for i, c in zip(chosen, found, strict=True)])
        else:
            made = self.sampled(arm, chosen, found)
        return self._rows(chosen, found, made), {str(i): picture for i, picture in zip(chosen, made, strict=True)}

    def _latents(self, found: list[cases.Transfer], name: str) -> torch.Tensor:
        """Of the collage: the picture whose phases act, with the driver in the source's place and scene."""
        if name == "collage":
            from pack.nodes.frequency_guidance import method

            source, driver = (self._latents(found, of) for of in ("source", "driver"))
            takes = ([getattr(case, of) for case in found] for of in ("source", "driver"))
            masks = (F.adaptive_avg_pool2d(torch.from_numpy(cases.masks(t)).float(), 16)[:, None] for t in takes)
            return method.collage(source, driver, *masks)
        return self.theatre.encode(cases.pictures([getattr(case, name) for case in found]))

    def _learned(self, arm: Arm, case: int, found: cases.Transfer):
        from pack.nodes.frequency_guidance.training_nodes import UnderstudyTrainSourceDrivingPair as Train

        def train() -> dict:
            given = {"model": self.theatre.model, "clip": self.theatre.clip, "vae": self.theatre.vae}
            for name, take in (("source", found.source), ("driving", found.driver)):
                given[name] = torch.from_numpy(cases.pictures([take])).float() / 255
                given[f"{name}_text"] = captions.caption(take)
            settings = sampling.widgets(
                Train, steps=arm.iterations, rank=RANK, learning_rate=arm.rate, seed=case, checkpoint_every=0, **given
            )
            return Train.execute(**sampling.as_lists(settings)).result[0]

        key = (found.source, found.driver, arm.rate, arm.iterations, RANK, case, self.digest)
        return self.theatre.with_lora(sampling.learned(self.folder, key, train))

    def sampled(self, arm: Arm, chosen: list[int], found: list[cases.Transfer]) -> np.ndarray:
        from pack.nodes.frequency_guidance import nodes

        theatre = self.theatre
        positive = theatre.prompts([captions.caption(case.truth) for case in found])
        if arm.switch:
            driving = theatre.prompts([captions.caption(case.driver) for case in found])
            positive = nodes.UnderstudyStepwisePrompt.execute(positive, driving, arm.switch).result[0]
        sampler = theatre.sampler(SAMPLER)
        if arm.guide:
            node = nodes.UnderstudyFrequencyGuidanceSampler
            drivers = [getattr(case, arm.driver) for case in found]
            true = {"driving_mask": drivers, "source_mask": [case.source for case in found]}
            masks = {name: torch.from_numpy(cases.masks(true[name])).float() for name in arm.masks}
            sampler = node.execute(**sampling.widgets(
                node, sampler=sampler, source={"samples": self._latents(found, "source")},
                driving={"samples": self._latents(found, arm.driver)}, **dict(arm.guide), **masks,
            )).result[0]
        return theatre.decode(theatre.sample(
            sampler, positive, [cases.noise_seed(cases.FREQUENCY, i, self.development) for i in chosen],
            self._latents(found, arm.start) if arm.start else None, arm.denoise, cfg=CFG,
            model=self._learned(arm, chosen[0], found[0]) if arm.rate else None,
        ))

    def _rows(self, chosen: list[int], found: list[cases.Transfer], made: np.ndarray) -> list[dict]:
        truths = [case.truth for case in found]
        subjects = cases.masks(truths) | cases.masks([case.source for case in found])
        return [
            {"case": i, "asked": case.truth.action, "driver_view": case.driver.view,
             **{name: row[name] for name in (*MEASURES[:4], "identity_error", "seen_action")},
             "background_error": metrics.background_error(picture, truth, subject)}
            for i, case, row, picture, truth, subject in zip(
                chosen, found, metrics.compositions(made, truths), made, cases.pictures(truths), subjects, strict=True
            )
        ]


def tables(rows: list[dict]) -> dict:
    # A source's puppet has every 24th case.
    rows = [{**row, "puppet": int(row["case"]) % cases.PEOPLE} for row in rows]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    moved = [row for row in rows if row["driver_view"] != "centre"]
    return {
        "arms": report.table(rows, arms, MEASURES, "puppet"),
        "driver in another framing": report.table(moved, arms, MEASURES[:3], "puppet"),
        "claims": report.claims(rows, CLAIMS, "puppet"),
    }


def picture(bench: Bench, rows: Callable[[str], list[dict]]) -> list[np.ndarray]:
    """Rows are three sources, columns three drivers of other scenes; beside them the same by img2img."""
    chosen = [int(case) for case in panels.middle(rows(OURS), "identity_error", 3)]
    found = [cases.transfer(case) for case in chosen]

    def made(arm: Arm) -> list[list[np.ndarray]]:
        return [
            [bench.sampled(arm, [case], [dataclasses.replace(one, driver=other.driver)])[0] for other in found]
            for case, one in zip(chosen, found, strict=True)
        ]

    sources, drivers = (list(cases.pictures([getattr(one, name) for one in found])) for name in ("source", "driver"))
    beside = zip(sources, made(ARMS[OURS]), made(ARMS["img2img from the driver, 0.65"]), strict=True)
    return [panels.grid([
        [None, *drivers, None, *drivers], *([one, *ours, None, *theirs] for one, ours, theirs in beside),
    ])]


if __name__ == "__main__":
    runs.main(__doc__, "frequency_guidance", ARMS, DEVELOPMENT, (120, 12), Bench, tables, picture)
