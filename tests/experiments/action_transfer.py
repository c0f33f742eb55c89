"""Cases of an action transfer with a known answer: a test identity takes over the action of another puppet."""

import dataclasses

import numpy as np
from experiments.measuring import metrics
from pack.nodes.puppets import captions, render, world
from pack.nodes.puppets.config import NAMED_ACTIONS, SCENES, UNNAMED_ACTIONS, Take

TEST_KEY, DEVELOPMENT_KEY = 0xF4EA, 0xDE5
HALVES = {"named": NAMED_ACTIONS[1:], "unnamed": UNNAMED_ACTIONS}
MEASURES = (
    "error",
    "error_over_plain",
    "nearer_truth",
    "identity_error",
    "worn_error",
    "identity",
    "action",
    "composition",
    "joint_error",
    "background_error",
    "phase_score",
    "circular_phase_score",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Source standing, driver in action, and the truth: the source in that action, scene and camera."""

    source: Take
    driving: Take
    truth: Take


def case(index: int, half: str, develop: bool) -> Case:
    """Case `index`: identities and actions cycle, the driver is of another species."""
    key = DEVELOPMENT_KEY if develop else TEST_KEY
    rng = np.random.default_rng([key, half == "unnamed", index])
    actions = HALVES[half]
    if develop:
        who = world.sample_identity(700_000 + index)
        others = [world.sample_identity(800_000 + 20 * index + i) for i in range(20)]
    else:
        everybody = world.test_identities()
        who, others = everybody[index % len(everybody)], everybody
    drivers = [other for other in others if other.species != who.species]
    driver = drivers[int(rng.integers(len(drivers)))]
    action, scene = actions[(index + index // 24) % len(actions)], SCENES[int(rng.integers(len(SCENES)))]
    truth = world.staged(who, action, scene, rng)
    return Case(
        dataclasses.replace(truth, action="standing"), dataclasses.replace(truth, identity=driver), truth
    )


@dataclasses.dataclass
class Stage:
    """The cases of a run, drawn, with their prompts."""

    cases: list[Case]
    source: np.ndarray
    driving: np.ndarray
    truth: np.ndarray
    masks: np.ndarray  # bool, the union of the truth's and the driver's
    parts: np.ndarray  # of the truth
    joints: np.ndarray
    target_text: list[str]
    driving_text: list[str]
    source_text: list[str]


def staged(count: int, half: str, develop: bool) -> Stage:
    cases = [case(i, half, develop) for i in range(count)]
    source, driving, truth = (
        [render.render(getattr(c, name)) for c in cases] for name in ("source", "driving", "truth")
    )
    return Stage(
        cases,
        *(np.stack([p.image for p in pictures]) for pictures in (source, driving, truth)),
        masks=np.stack([d.mask | t.mask for d, t in zip(driving, truth)]),
        parts=np.stack([p.parts for p in truth]),
        joints=np.stack([p.joints for p in truth]),
        target_text=[captions.caption(c.truth) for c in cases],
        driving_text=[captions.caption(c.driving) for c in cases],
        source_text=[captions.caption(c.source) for c in cases],
    )


def measured(name: str, half: str, stage: Stage, pictures: np.ndarray) -> list[dict]:
    """One row a case. `error` is the mean square of the difference to the true picture, channels in 0..1."""
    own = metrics.compositions(pictures, [c.truth for c in stage.cases])
    rows = []
    for i, (c, seen) in enumerate(zip(stage.cases, own)):
        picture, truth = pictures[i] / 255, stage.truth[i] / 255
        error = float(np.square(picture - truth).mean())
        rows.append(
            {
                "arm": name,
                "half": half,
                "case": i,
                "action_asked": c.truth.action,
                "source": c.source.identity.species,
                "driver": c.driving.identity.species,
                "error": error,
                "nearer_truth": bool(error < np.square(picture - stage.driving[i] / 255).mean()),
                **seen,
                # Under the true masks, since here the result has one right pose.
                "identity_error": metrics.identity_error(
                    pictures[i], c.truth.identity, stage.parts[i], c.truth
                )["mean"],
                "joint_error": metrics.joint_error(pictures[i], stage.joints[i]),
                "background_error": metrics.background_error(pictures[i], stage.truth[i], stage.masks[i]),
                "phase_score": metrics.phase_score(pictures[i], stage.driving[i]),
                "circular_phase_score": metrics.circular_phase_score(pictures[i], stage.driving[i]),
            }
        )
    return rows
