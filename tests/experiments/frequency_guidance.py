"""Frequency guidance on the theatre: a test identity takes over the action of another puppet's picture.

    python tests/experiments/frequency_guidance.py --develop    # chooses settings on development cases
    python tests/experiments/frequency_guidance.py              # the chosen settings on the test cases
    python tests/experiments/frequency_guidance.py --cases 8 --checkpoint other.safetensors --name trial

As PROTOCOL.md says; resumes what is there. Writes results/frequency_guidance.csv (one row a case and arm),
.json (means with 95 % intervals) and .jpg; development writes results/frequency_guidance_development.*.
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from host import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import numpy as np  # noqa: E402
from experiments import report, sampling  # noqa: E402
from experiments.measuring import metrics  # noqa: E402
from pack.nodes.puppets import captions, render, world  # noqa: E402
from pack.nodes.puppets.config import NAMED_ACTIONS, SCENES, UNNAMED_ACTIONS, Take  # noqa: E402

STATE = ROOT / ".cache" / "experiments"
SAMPLER, BATCH = "ddim", 32
TEST_KEY, DEVELOPMENT_KEY, SEED = 0xF4EA, 0xDE5, 2_000_000
CASES, DEVELOPMENT_CASES = 64, 32
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
class Arm:
    """One way of making the result. `guide`: inputs of UnderstudyFrequencyGuidanceSampler, or None."""

    switch: float = 0.0  # switch_percent of UnderstudyStepwisePrompt: the driving prompt before it
    denoise: float = 1.0  # below 1: img2img from the driving picture
    guide: tuple[tuple[str, float | str], ...] | None = None


def guided(switch: float = 0.0, **inputs) -> Arm:
    return Arm(switch=switch, guide=tuple(inputs.items()))


PHASE, NONE = {"amplitude_scale": 0.0}, {"phase_scale": 0.0}
# At most six settings a family; the best on development cases is chosen, `rank` says by what.
FAMILIES: dict[str, dict[str, Arm]] = {
    "plain prompt": {"plain prompt": Arm()},
    "img2img": {f"img2img {d:g}": Arm(denoise=d) for d in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)},
    "prompt switch": {f"prompt switch {s:g}": Arm(switch=s) for s in (0.07, 0.13, 0.2, 0.27, 0.4)},
    "phase, all bands": {
        f"phase {s:g} until {e:g}": guided(phase_scale=s, end_percent=e, **PHASE)
        for s, e in ((0.1, 1.0), (0.2, 1.0), (0.3, 1.0), (0.5, 1.0), (0.3, 0.5), (1.0, 0.3))
    },
    "phase, low band early": {
        f"phase {s:g} up to {b:g} until {e:g}": guided(phase_scale=s, phase_high=b, end_percent=e, **PHASE)
        for s, b, e in (
            (1.0, 0.3, 0.4),
            (1.0, 0.2, 0.4),
            (1.0, 0.3, 0.6),
            (0.5, 0.3, 0.6),
            (1.0, 0.2, 0.6),
            (0.5, 0.3, 1.0),
        )
    },
    "amplitude": {f"amplitude {s:g}": guided(amplitude_scale=s, **NONE) for s in (0.1, 0.3, 0.6, 1.0)},
    "both": {
        f"amplitude {a:g}, phase {p:g} up to {b:g} until {e:g}": guided(
            amplitude_scale=a, phase_scale=p, phase_high=b, end_percent=e
        )
        for a, p, b, e in (
            (0.1, 0.3, 0.75, 1.0),
            (0.3, 0.3, 0.75, 1.0),
            (0.1, 1.0, 0.3, 0.4),
            (0.3, 1.0, 0.3, 0.4),
            (0.1, 1.0, 0.3, 0.6),
            (0.1, 0.5, 0.3, 0.6),
        )
    },
    "switch and phase": {
        f"switch {w:g}, phase {p:g} up to {b:g} until {e:g}": guided(
            switch=w, phase_scale=p, phase_high=b, end_percent=e, **PHASE
        )
        for w, p, b, e in (
            (0.13, 0.3, 0.75, 1.0),
            (0.13, 1.0, 0.3, 0.4),
            (0.13, 1.0, 0.3, 0.6),
            (0.27, 0.3, 0.75, 1.0),
            (0.27, 1.0, 0.3, 0.4),
        )
    },
    "published distance": {
        f"paper phase {s:g}": guided(phase_scale=s, phase_distance="paper", **PHASE) for s in (0.1, 0.3, 1.0)
    },
}
# Run on the test cases whatever development says.
FIXED = {
    "plain prompt": Arm(),
    "prompt switch 0.13": Arm(switch=0.13),
    "prompt switch 0.27": Arm(switch=0.27),
    "phase 0.3, all bands": guided(phase_scale=0.3, **PHASE),
    "phase 1 up to 0.3 until 0.4": guided(phase_scale=1.0, phase_high=0.3, end_percent=0.4, **PHASE),
    "amplitude 0.3": guided(amplitude_scale=0.3, **NONE),
    "node defaults": guided(),
}


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
    )


def node_inputs(arm: Arm) -> dict[str, float | str]:
    """The guided sampler's inputs: the arm's, and the node's defaults for the rest."""
    from pack.nodes.frequency_guidance import nodes

    schema = nodes.UnderstudyFrequencyGuidanceSampler.define_schema()
    defaults = {i.id: i.default for i in schema.inputs if i.id not in ("sampler", "source", "driving")}
    return {**defaults, **dict(arm.guide or ())}


def make(theatre: sampling.Theatre, arm: Arm, stage: Stage, steps: int, start: int, stop: int) -> np.ndarray:
    """The arm's pictures of cases `start` to `stop` - 1, through our node classes and the host's sampler."""
    from pack.nodes.frequency_guidance import nodes

    some = slice(start, stop)
    positive = theatre.prompts(stage.target_text[some])
    if arm.switch:
        driving = theatre.prompts(stage.driving_text[some])
        positive = nodes.UnderstudyStepwisePrompt.execute(driving, positive, arm.switch).result[0]
    sampler, begin = theatre.sampler(SAMPLER), None
    if arm.denoise < 1:
        begin = theatre.encode(stage.driving[some])
    if arm.guide is not None:
        sampler = nodes.UnderstudyFrequencyGuidanceSampler.execute(
            sampler=sampler,
            source={"samples": theatre.encode(stage.source[some])},
            driving={"samples": theatre.encode(stage.driving[some])},
            **node_inputs(arm),
        ).result[0]
    seeds = [SEED + i for i in range(start, stop)]
    return theatre.decode(theatre.sample(sampler, positive, seeds, begin, arm.denoise, steps))


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


def rank(rows: list[dict], arm: str) -> tuple[float, float]:
    """Most compositions first, then the smallest mean error: error alone would choose copies of the driver."""
    own = [row for row in rows if row["arm"] == arm]
    return -sum(row["composition"] for row in own), float(np.mean([row["error"] for row in own]))


def chosen_arms(path: Path) -> dict[str, Arm]:
    """The settings to run: the fixed ones, and the best of every family where development has been run."""
    arms = dict(FIXED)
    if path.exists():
        for family, best in json.loads(path.read_text())["chosen"].items():
            arms.setdefault(best, FAMILIES[family][best])
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--develop", action="store_true", help="choose each family's setting on development cases"
    )
    parser.add_argument("--cases", type=int, help="a half; by default as the protocol says")
    parser.add_argument("--half", choices=[*HALVES, "all"], default="all")
    parser.add_argument("--checkpoint", type=Path, default=sampling.CHECKPOINT)
    parser.add_argument("--name", default="frequency_guidance", help="of the result files")
    parser.add_argument("--steps", type=int, default=sampling.STEPS)
    arguments = parser.parse_args()
    theatre = sampling.Theatre(arguments.checkpoint, STATE)
    digest = sampling.sha256(arguments.checkpoint)
    choice = report.RESULTS / f"{arguments.name}_development.json"
    if arguments.develop:
        arms = {name: arm for family in FAMILIES.values() for name, arm in family.items()}
        count, name = arguments.cases or DEVELOPMENT_CASES, choice.stem
        halves = ["named"]
    else:
        arms, count, name = chosen_arms(choice), arguments.cases or CASES, arguments.name
        halves = list(HALVES) if arguments.half == "all" else [arguments.half]
    kept = report.Pictures(STATE / f"{name}_{digest[:12]}")
    rows: list[dict] = []
    shown: list[tuple[str, np.ndarray]] = []
    for half in halves:
        stage = staged(count, half, arguments.develop)
        key = report.fingerprint(stage.cases, stage.target_text, stage.driving_text)
        decode = functools.partial(theatre.round_trip, stage.truth)
        results = {
            "source itself": stage.source,
            "driving picture itself": stage.driving,
            "truth through the autoencoder": kept.get(f"autoencoder_{key}", count, BATCH, decode),
        }
        for label, arm in arms.items():
            setting = report.fingerprint(
                key, arm, node_inputs(arm), arguments.steps, sampling.CFG, SAMPLER, SEED
            )
            run = functools.partial(make, theatre, arm, stage, arguments.steps)
            results[label] = kept.get(setting, count, BATCH, run)
            print(f"{half}: {label}, {count} pictures", flush=True)
        found = {label: measured(label, half, stage, pictures) for label, pictures in results.items()}
        for label, measures in found.items():
            # Paired with the same case's plain result: the cases' own spread leaves the interval.
            for row, before in zip(measures, found["plain prompt"], strict=True):
                row["error_over_plain"] = row["error"] - before["error"]
            rows.extend(measures)
            print(half, label, report.summary(measures, MEASURES), flush=True)
        shown.append((f"{half}: truth", stage.truth[:10]))
        shown.extend((f"{half}: {label}", pictures[:10]) for label, pictures in results.items())
    report.write_csv(report.RESULTS / f"{name}.csv", rows)
    report.contact_sheet(report.RESULTS / f"{name}.jpg", shown)
    summary = {
        "command": report.command("frequency_guidance.py"),
        "checkpoint_sha256": digest,
        "machine": report.machine(),
        "sampling": {
            "sampler": SAMPLER,
            "scheduler": sampling.SCHEDULER,
            "steps": arguments.steps,
            "cfg": sampling.CFG,
            "first_seed": SEED,
        },
        "settings": {arm: dataclasses.asdict(setting) for arm, setting in arms.items()},
        "interval": "95 %: [mean, low, high]",
        "halves": {
            half: {
                arm: report.summary([r for r in rows if r["arm"] == arm and r["half"] == half], MEASURES)
                for arm in results
            }
            for half in halves
        },
    }
    if arguments.develop:
        summary["chosen"] = {
            family: min(settings, key=functools.partial(rank, rows)) for family, settings in FAMILIES.items()
        }
        print("chosen:", summary["chosen"])
    report.write_json(report.RESULTS / f"{name}.json", summary)


if __name__ == "__main__":
    main()
