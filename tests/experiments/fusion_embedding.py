"""The fusion embedding: does a puppet from another scene keep its looks in a pose? Method 4 of PROTOCOL.md.

    python tests/experiments/fusion_embedding.py --development --arm all   # rates, and early steps
    python tests/experiments/fusion_embedding.py --arm all                 # or one after the other
    python tests/experiments/fusion_embedding.py --report

An arm's fusion is trained when it is first asked for, and kept in .cache/experiments/fusion_embedding. Another's is
that of the next puppet, put in the source's place.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows")]
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
    import torch

    scripts.alias_pack()
    scripts.add_comfy_path(ROOT / ".cache" / "experiments" / "host", cpu=not torch.cuda.is_available())

import numpy as np  # noqa: E402
import torch  # noqa: E402
from experiments import cases, panels, report, runs, sampling  # noqa: E402
from experiments import fusion_arms as arms  # noqa: E402
from experiments.fusion_arms import CLASS, EMBEDDING, TOKENS, Further, Training  # noqa: E402
from experiments.measuring import metrics  # noqa: E402
from pack.nodes.fusion_embedding import sampling as running  # noqa: E402
from pack.nodes.fusion_embedding.config import GUIDANCE, ApplyConfig  # noqa: E402
from pack.nodes.puppets import render, vision, world  # noqa: E402
from pack.nodes.puppets.config import ACTIONS, SCENES, Take  # noqa: E402

NAME, COUNTS, TURNS = "fusion_embedding", (144, 12), 6
SAMPLER, STEPS = "dpmpp_2m", 20
SOURCE, TRUTH, START = "source", "truth", "shipped"
FRAMES = 8  # of a cycle, in the picture that moves

# All at the rate that was best of RATES for full on development, before a test case was made.
TRAININGS = {
    "full": Training(),
    "tokens + pose": Training((TOKENS,)),
    "e_f + pose": Training((EMBEDDING,)),
    "class embedding + pose": Training((CLASS,)),
    "pose alone": Training(()),
}
LONGER = Further(rate=1, steps=2_500, seed=1, after=TRAININGS["full"])
RATES, DEVELOPMENT_STEPS = (1, 3, 10), arms.STOPS[0]


@dataclasses.dataclass(frozen=True)
class Arm:
    """`others` are the paths by which another puppet is shown; `copies` is a picture in place of a drawn one, or
    START, the fusion that all begin with.
    """

    training: Training | None = None
    others: tuple[str, ...] = ()
    copies: str = ""


FULL, POSE, E_F = "full", "pose alone", "e_f + pose"
ARMS = {
    **{name: Arm(training) for name, training in TRAININGS.items()},
    "e_f + pose, another's e_f": Arm(TRAININGS[E_F], (EMBEDDING,)),
    "class embedding + pose, another's e_f": Arm(TRAININGS["class embedding + pose"], (EMBEDDING,)),
    "tokens + pose, another's tokens": Arm(TRAININGS["tokens + pose"], (TOKENS,)),
    "full, another's e_f": Arm(TRAININGS[FULL], (EMBEDDING,)),
    "full, another's tokens": Arm(TRAININGS[FULL], (TOKENS,)),
    "full, 2,500 steps more": Arm(LONGER),
    "the shipped file": Arm(copies=START),  # until version 18
    "source untouched": Arm(copies=SOURCE),
    "truth through the autoencoder": Arm(copies=TRUTH),
}


def development() -> dict[str, Arm]:
    """Rates, pose alone at the best, and early steps, over few steps."""
    few = {
        name: dataclasses.replace(training, steps=DEVELOPMENT_STEPS)
        for name, training in TRAININGS.items() if name in (FULL, POSE)
    }
    trainings = {f"{FULL}, rate {rate}": dataclasses.replace(few[FULL], rate=rate) for rate in RATES} | {
        f"{POSE}, rate 3": few[POSE], f"{FULL}, early_steps 200": dataclasses.replace(few[FULL], early_steps=200),
    }
    return {name: Arm(training) for name, training in trainings.items()}


MEASURES = (
    "identity_error", "worn_error", "other_error", "nearer_other", "identity", "action", "composition", "joint_error",
    "species_read", "pattern_read", "headwear_read", "step_seconds", "seconds",
)
CLAIMS = (
    report.Claim("identity error of e_f + pose at most half of pose alone's", E_F, "identity_error", POSE, 0.5),
    report.Claim(
        "with another's e_f 75 % are nearer the other", "e_f + pose, another's e_f", "nearer_other", 0.75,
        at_least=True,
    ),
    report.Claim("full no worse than tokens + pose", FULL, "identity_error", "tokens + pose"),
    *(report.Claim("joint error at most 1.1 times pose alone's", name, "joint_error", POSE, 1.1)
      for name in TRAININGS if name != POSE),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """The picture that there is, the same picture of the next puppet, and the one that is to be made."""

    puppet: int
    source: Take
    other: Take
    truth: Take


def case(index: int, develop: bool = False) -> Case:
    """Case `index`: puppets in turn, the truths of one in daylight, in one scene and view and in six poses.

    The source is in another scene and light; of the odd cases it is far away, or a close-up.
    """
    puppet, turn = index % cases.PEOPLE, index // cases.PEOPLE
    everybody = cases.people(develop)
    whole = cases.generator(cases.FUSION, 1_000 + puppet, develop)
    order = [ACTIONS[int(i)] for i in whole.permutation(len(ACTIONS))]
    shared = world.staged(everybody[puppet], order[0], world.pick(whole, SCENES), whole, light="day")
    rng = cases.generator(cases.FUSION, index, develop)
    truth = dataclasses.replace(
        shared, action=order[turn], phase=round(float(rng.random()), 4), mirrored=bool(rng.random() < 0.5)
    )
    framing = world.pick(rng, ("full", "close_up")) if index % 2 else "full"
    view = "far" if index % 2 and framing == "full" else "centre"
    action = order[TURNS + turn] if framing == "full" else world.pick(rng, arms.allowed(truth, framing))
    source = arms.elsewhere(truth, action, rng, framing, view)
    other = dataclasses.replace(source, identity=everybody[(puppet + 1) % cases.PEOPLE])
    return Case(puppet, source, other, truth)


class Bench:
    """The theatre's checkpoint, and what an arm makes of cases."""

    batch = 12

    def __init__(self, options, folder: Path):
        self.develop, self.theatre = options.development, sampling.Theatre(options.checkpoint, runs.STATE)
        digests = sampling.sha256(options.checkpoint), sampling.sha256(vision.FILE), arms.FIXED
        self.folder = folder.parent / f"trained_{report.fingerprint(digests)}"
        self.settings = SAMPLER, STEPS, GUIDANCE, digests

    def prepare(self, arm: Arm) -> None:
        """Train what the arm needs."""
        if arm.training:
            arms.learned(self.theatre, self.folder, arm.training)

    @torch.no_grad()
    def make(self, arm: Arm, some: list[int]) -> tuple[list[dict], dict[str, np.ndarray]]:
        """Rows, and of each case source, pose, truth and what was drawn, side by side."""
        chosen = [case(i, self.develop) for i in some]
        truth = [cases.drawn(one.truth) for one in chosen]
        source = cases.pictures([one.source for one in chosen])
        pose = np.stack([render.draw_pose(picture.joints, source.shape[1]) for picture in truth])
        images = np.stack([picture.image for picture in truth])
        cost = {}
        if arm.training or arm.copies == START:
            training, fusion = arm.training or Training((TOKENS, CLASS)), arms.start()
            if arm.training:
                fusion, cost["step_seconds"] = arms.learned(self.theatre, self.folder, training)
            other = cases.pictures([one.other for one in chosen])
            seeds = [cases.noise_seed(cases.FUSION, i, self.develop) for i in some]
            shown = {path: other if path in arm.others else source for path in (TOKENS, EMBEDDING)}
            drawn = self.drawn(training, fusion, shown, pose, seeds)
        else:
            drawn = source if arm.copies == SOURCE else self.theatre.round_trip(images, 0, len(images))
        rows = rows_of(chosen, drawn)
        for i, row, one in zip(some, rows, chosen, strict=True):
            row.update(case=i, puppet=one.puppet, **cost)
        sides = zip(some, zip(source, pose, images, drawn, strict=True), strict=True)
        return rows, {f"{i:03}": np.concatenate(parts, axis=1) for i, parts in sides}

    def drawn(self, training: Training, fusion, shown: dict, pose: np.ndarray, seeds: list[int]) -> np.ndarray:
        """uint8 [N, H, W, 3]; `shown` are the sources uint8 [N, H, W, 3] by the path that reads them."""
        pose = torch.from_numpy(pose).float() / 255
        source = {path: torch.from_numpy(pictures).float() / 255 for path, pictures in shown.items()}
        states, fused = arms.read(training, fusion, vision.shipped(), source, pose)
        model, positive, negative = running.apply(self.theatre.model, fusion, states, fused, pose, ApplyConfig())
        return self.theatre.decode(self.theatre.sample(
            self.theatre.sampler(SAMPLER), positive, seeds, steps=STEPS, cfg=GUIDANCE, model=model, negative=negative
        ))


def rows_of(chosen: list[Case], drawn: np.ndarray) -> list[dict]:
    """One row a picture, beside the case's own puppet and the other one."""
    takes = [one.truth for one in chosen]
    others = [dataclasses.replace(one.truth, identity=one.other.identity) for one in chosen]
    rows = metrics.compositions(drawn, takes)
    for row, beside, take, picture in zip(rows, metrics.compositions(drawn, others), takes, drawn, strict=True):
        row.update(
            asked=take.action, other_error=beside["identity_error"],
            nearer_other=beside["identity_error"] < row["identity_error"],
            joint_error=metrics.joint_error(picture, cases.drawn(take).joints),
            **{f"{name}_read": row[f"seen_{name}"] == getattr(take.identity, name)
               for name in ("species", "pattern", "headwear")},
        )
    return rows


def tables(rows: list[dict]) -> dict:
    """Of puppets, whose cases go together."""
    names = dict.fromkeys(row["arm"] for row in rows)
    return {"arms": report.table(rows, names, MEASURES, "puppet"), "claims": report.claims(rows, CLAIMS, "puppet")}


def picture(bench: Bench, rows: Callable[[str], list[dict]]) -> list[np.ndarray]:
    """Who it is, a moving pose, and the puppet in it; halfway only the source changes."""
    index, training = int(panels.middle(rows(FULL), "identity_error")[0]), TRAININGS[FULL]
    one, (fusion, _) = case(index), arms.learned(bench.theatre, bench.folder, training)
    moving = [dataclasses.replace(one.truth, action="dancing", phase=i / FRAMES) for i in range(FRAMES)]
    pose = np.stack([render.draw_pose(cases.drawn(take).joints, 128) for take in moving])
    seeds, frames = [cases.noise_seed(cases.FUSION, index)] * len(pose), []  # one noise: only the pose differs
    for take in (one.source, one.other):
        source = cases.pictures([take]).repeat(len(pose), 0)
        drawn = bench.drawn(training, fusion, {TOKENS: source, EMBEDDING: source}, pose, seeds)
        parts = zip(source, pose, drawn, strict=True)
        frames += [panels.grid([cells]) for cells in parts]
    return frames


if __name__ == "__main__":
    runs.main(__doc__, NAME, ARMS, development(), COUNTS, Bench, tables, picture)
