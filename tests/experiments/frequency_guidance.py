"""Frequency guidance on the theatre: a test identity takes over the action of another puppet's picture.

    python tests/experiments/frequency_guidance.py --develop    # chooses settings on development cases
    python tests/experiments/frequency_guidance.py              # the chosen settings on the test cases
    python tests/experiments/frequency_guidance.py --half named # makes the pictures of a half, writes no result

As PROTOCOL.md says; resumes what is there, so that the halves can be made side by side, each with
OMP_NUM_THREADS=1. Writes results/frequency_guidance.csv (one row a case and arm), .json (means with 95 %
intervals) and .jpg; development writes results/frequency_guidance_development.*.
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows")]
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from experiments import report, sampling  # noqa: E402
from experiments.action_transfer import HALVES, MEASURES, Stage, measured, staged  # noqa: E402

STATE = ROOT / ".cache" / "experiments"
SAMPLER, BATCH, TRAINED_BATCH, SEED = "ddim", 32, 8, 2_000_000
CASES, DEVELOPMENT_CASES = 40, 16
COMPARED = ("error", "composition", "identity", "action", "identity_error", "background_error")


@dataclasses.dataclass(frozen=True)
class Learning:
    """A run of UnderstudyTrainSourceDrivingPair before sampling, with its other defaults."""

    learning_rate: float
    whole_unet: bool = False
    steps: int = 60


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of making the result. `guide`: inputs of UnderstudyFrequencyGuidanceSampler, or None."""

    switch: float = 0.0  # switch_percent of UnderstudyStepwisePrompt: the driving prompt before it
    denoise: float = 1.0  # below 1: img2img from the driving picture
    guide: tuple[tuple[str, float | str], ...] | None = None
    learning: Learning | None = None


def guided(switch: float = 0.0, learning: Learning | None = None, **inputs) -> Arm:
    return Arm(switch=switch, guide=tuple(inputs.items()), learning=learning)


PHASE, NONE, ALL_BANDS = {"amplitude_scale": 0.0}, {"phase_scale": 0.0}, {"phase_high": 0.75, "end_percent": 1.0}
PUBLISHED_SWITCH = 0.13  # 6 of 50 steps
# At most six settings a family; the best on development cases is chosen, `rank` says by what.
FAMILIES: dict[str, dict[str, Arm]] = {
    "plain prompt": {"plain prompt": Arm()},
    "img2img": {f"img2img {d:g}": Arm(denoise=d) for d in (0.5, 0.6, 0.7, 0.8, 0.9)},
    "prompt switch": {f"prompt switch {s:g}": Arm(switch=s) for s in (PUBLISHED_SWITCH, 0.2, 0.27, 0.4)},
    "phase, all bands": {
        f"phase {s:g}, all bands": guided(phase_scale=s, **PHASE, **ALL_BANDS) for s in (0.1, 0.3, 0.5)
    },
    "phase, low band early": {
        f"phase {s:g} up to {b:g} until {e:g}": guided(phase_scale=s, phase_high=b, end_percent=e, **PHASE)
        for s, b, e in ((1.0, 0.3, 0.4), (1.0, 0.2, 0.4), (1.0, 0.3, 0.6), (0.5, 0.3, 0.6), (1.0, 0.2, 0.6))
    },
    "amplitude": {
        f"amplitude {s:g}": guided(amplitude_scale=s, end_percent=1.0, **NONE) for s in (0.1, 0.3, 1.0)
    },
    "both": {
        f"amplitude {a:g}, phase {p:g} up to {b:g} until {e:g}": guided(
            amplitude_scale=a, phase_scale=p, phase_high=b, end_percent=e
        )
        for a, p, b, e in ((0.1, 0.3, 0.75, 1.0), (0.1, 1.0, 0.3, 0.4), (0.3, 1.0, 0.3, 0.4), (0.1, 1.0, 0.3, 0.6))
    },
    "switch and phase": {
        f"switch {w:g}, phase {p:g} up to {b:g} until {e:g}": guided(
            switch=w, phase_scale=p, phase_high=b, end_percent=e, **PHASE
        )
        for w, p, b, e in ((0.13, 0.3, 0.75, 1.0), (0.13, 1.0, 0.3, 0.4), (0.27, 1.0, 0.3, 0.4))
    },
    "published distance": {
        f"paper phase {s:g}": guided(phase_scale=s, phase_distance="paper", **PHASE, **ALL_BANDS)
        for s in (0.3, 1.0)
    },
    # One more choice, of a learning rate, by what the whole method makes with it.
    "learning": {
        f"learnt at {rate:g}": guided(PUBLISHED_SWITCH, Learning(rate), **PHASE) for rate in (3e-4, 1e-3, 3e-3, 1e-2)
    },
    "learning, whole UNet": {
        f"whole UNet learnt at {rate:g}": guided(PUBLISHED_SWITCH, Learning(rate, whole_unet=True), **PHASE)
        for rate in (1e-5, 5e-5, 1e-4)
    },
}
FIXED = {"plain prompt": Arm(), "node defaults": guided()}


def trained_arms(chosen: dict[str, str]) -> dict[str, Arm]:
    """The method part by part: what was learnt, then the prompt switch, then guidance, each as chosen untrained."""
    best = {family: FAMILIES[family][name] for family, name in chosen.items()}
    switch = best["prompt switch"].switch
    amplitude, phase = dict(best["amplitude"].guide), dict(best["phase, all bands"].guide)
    both = phase | {"amplitude_scale": amplitude["amplitude_scale"]}
    bands = best["phase, low band early"].guide
    arms = {}
    for title, family in (("learnt", "learning"), ("whole UNet learnt", "learning, whole UNet")):
        learning = best[family].learning
        arms |= {
            title: Arm(learning=learning),
            f"{title}, switch": Arm(switch=switch, learning=learning),
            f"{title}, switch, low bands": Arm(switch=switch, learning=learning, guide=bands),
        }
    learning = best["learning"].learning
    return arms | {
        "learnt, switch, amplitude": guided(switch, learning, **amplitude),
        "learnt, switch, phase": guided(switch, learning, **phase),
        "learnt, switch, both": guided(switch, learning, **both),
        "learnt, low bands": Arm(learning=learning, guide=bands),
    }


def node_inputs(arm: Arm) -> dict[str, float | str]:
    """The guided sampler's inputs: the arm's, and the node's defaults for the rest."""
    from pack.nodes.frequency_guidance import nodes

    schema = nodes.UnderstudyFrequencyGuidanceSampler.define_schema()
    defaults = {i.id: i.default for i in schema.inputs if i.id not in ("sampler", "source", "driving")}
    return {**defaults, **dict(arm.guide or ())}


def learnt(theatre: sampling.Theatre, learning: Learning, stage: Stage, i: int, folder: Path):
    """The theatre's MODEL after it has learnt the two pictures of case `i`; kept as a file between runs."""
    import comfy.sd
    from pack.nodes.frequency_guidance.training_nodes import UnderstudyTrainSourceDrivingPair as Train

    case = stage.cases[i]
    path = folder / f"learnt_{report.fingerprint(case, learning)}.safetensors"
    if not path.exists():
        given = {
            "model": theatre.model, "clip": theatre.clip, "vae": theatre.vae, "seed": i,
            "source": torch.from_numpy(stage.source[i : i + 1]) / 255, "source_text": stage.source_text[i],
            "driving": torch.from_numpy(stage.driving[i : i + 1]) / 255, "driving_text": stage.driving_text[i],
            "rank": 4, "resume_from": "none", "checkpoint_every": 0, **dataclasses.asdict(learning),
        }
        with torch.inference_mode():
            weights = Train.execute(**{name: [value] for name, value in given.items()}).result[0]
        report.replace(path, safetensors.torch.save(weights))
    return comfy.sd.load_lora_for_models(theatre.model, None, safetensors.torch.load_file(path), 1.0, 0)[0]


def make(theatre: sampling.Theatre, arm: Arm, stage: Stage, folder: Path, start: int, stop: int) -> np.ndarray:
    """The arm's pictures of cases `start` to `stop` - 1, through our node classes and the host's sampler."""
    if arm.learning is None:
        return sampled(theatre, theatre.model, arm, stage, start, stop)
    return np.concatenate([
        sampled(theatre, learnt(theatre, arm.learning, stage, i, folder), arm, stage, i, i + 1)
        for i in range(start, stop)
    ])


def sampled(theatre: sampling.Theatre, model, arm: Arm, stage: Stage, start: int, stop: int) -> np.ndarray:
    from pack.nodes.frequency_guidance import nodes

    some = slice(start, stop)
    positive = theatre.prompts(stage.target_text[some])
    if arm.switch:
        driving = theatre.prompts(stage.driving_text[some])
        positive = nodes.UnderstudyStepwisePrompt.execute(positive, driving, arm.switch).result[0]
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
    return theatre.decode(theatre.sample(sampler, positive, seeds, begin, arm.denoise, model=model))


def rank(rows: list[dict], arm: str) -> tuple[float, float]:
    """Most compositions first, then the smallest mean error: error alone would choose copies of the driver."""
    own = [row for row in rows if row["arm"] == arm]
    return -sum(row["composition"] for row in own), float(np.mean([row["error"] for row in own]))


def comparisons(rows: list[dict], chosen: dict[str, str]) -> dict:
    """What each option adds: paired differences of an arm to the arm without it, [mean, low, high], all cases."""
    pairs = [
        (chosen["prompt switch"], "plain prompt"), (chosen["amplitude"], "plain prompt"),
        (chosen["phase, all bands"], "plain prompt"), (chosen["phase, low band early"], "plain prompt"),
        (chosen["phase, low band early"], chosen["phase, all bands"]), ("node defaults", "plain prompt"),
        ("node defaults", chosen["phase, low band early"]),
        ("learnt", "plain prompt"), ("learnt, switch", "learnt"), ("learnt, switch, amplitude", "learnt, switch"),
        ("learnt, switch, phase", "learnt, switch"), ("learnt, switch, both", "learnt, switch, phase"),
        ("learnt, switch, low bands", "learnt, switch"), ("learnt, switch, low bands", "learnt, switch, phase"),
        ("learnt, switch, low bands", "learnt, low bands"), ("learnt, low bands", "learnt"),
        ("learnt, low bands", chosen["phase, low band early"]), ("whole UNet learnt", "learnt"),
        ("whole UNet learnt, switch, low bands", "learnt, switch, low bands"),
    ]
    by_arm: dict[str, dict] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["half"], row["case"]] = row
    found = {}
    for arm, without in pairs:
        differences = [
            {m: float(row[m]) - float(by_arm[without][key][m]) for m in COMPARED} for key, row in by_arm[arm].items()
        ]
        found[f"{arm} - {without}"] = report.summary(differences, COMPARED)
    return found


def chosen_arms(chosen: dict[str, str]) -> dict[str, Arm]:
    """The settings to run on the test cases, from the names that development chose for each family."""
    best = {name: FAMILIES[family][name] for family, name in chosen.items() if not family.startswith("learning")}
    return FIXED | best | trained_arms(chosen)


def pictures(theatre, arms: dict[str, Arm], stage: Stage, kept: report.Pictures) -> dict[str, np.ndarray]:
    """Every arm's pictures, and what they are to be compared with."""
    count = len(stage.cases)
    key = report.fingerprint(stage.cases, stage.target_text, stage.driving_text, stage.source_text)
    decode = functools.partial(theatre.round_trip, stage.truth)
    results = {
        "source itself": stage.source,
        "driving picture itself": stage.driving,
        "truth through the autoencoder": kept.get(f"autoencoder_{key}", count, BATCH, decode),
    }
    for label, arm in arms.items():
        setting = report.fingerprint(key, arm, node_inputs(arm), sampling.STEPS, sampling.CFG, SAMPLER, SEED)
        run = functools.partial(make, theatre, arm, stage, kept.folder)
        results[label] = kept.get(setting, count, TRAINED_BATCH if arm.learning else BATCH, run)
        print(f"{label}, {count} pictures", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--develop", action="store_true", help="choose each family's setting on development cases"
    )
    parser.add_argument("--half", choices=list(HALVES), help="make this half's pictures alone, write no result")
    parser.add_argument("--cases", type=int, help="a half; by default as the protocol says")
    parser.add_argument("--checkpoint", type=Path, default=sampling.CHECKPOINT)
    parser.add_argument("--name", default="frequency_guidance", help="of the result files")
    arguments = parser.parse_args()
    theatre = sampling.Theatre(arguments.checkpoint, STATE)
    digest = sampling.sha256(arguments.checkpoint)
    choice = report.RESULTS / f"{arguments.name}_development.json"
    if arguments.develop:
        arms = {name: arm for family in FAMILIES.values() for name, arm in family.items()}
        count, name = arguments.cases or DEVELOPMENT_CASES, choice.stem
    else:
        if not choice.exists():
            raise SystemExit(f"{choice.name} is missing: run with --develop first, it chooses the settings")
        arms = chosen_arms(json.loads(choice.read_text())["chosen"])
        count, name = arguments.cases or CASES, arguments.name
    kept = report.Pictures(STATE / f"{name}_{digest[:12]}")
    rows: list[dict] = []
    shown: list[tuple[str, np.ndarray]] = []
    for half in [arguments.half] if arguments.half else HALVES:
        stage = staged(count, half, arguments.develop)
        results = pictures(theatre, arms, stage, kept)
        if arguments.half:
            continue
        found = {label: measured(label, half, stage, made) for label, made in results.items()}
        for label, measures in found.items():
            # Paired with the same case's plain result: the cases' own spread leaves the interval.
            for row, before in zip(measures, found["plain prompt"], strict=True):
                row["error_over_plain"] = row["error"] - before["error"]
            rows.extend(measures)
            print(half, label, report.summary(measures, MEASURES), flush=True)
        shown.append((f"{half}: truth", stage.truth[:10]))
        shown.extend((f"{half}: {label}", made[:10]) for label, made in results.items())
    if arguments.half:
        return
    report.write_csv(report.RESULTS / f"{name}.csv", rows)
    report.contact_sheet(report.RESULTS / f"{name}.jpg", shown)
    summary = {
        "command": report.command("frequency_guidance.py"),
        "checkpoint_sha256": digest,
        "machine": report.machine(),
        "sampling": {
            "sampler": SAMPLER,
            "scheduler": sampling.SCHEDULER,
            "steps": sampling.STEPS,
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
            for half in HALVES
        },
    }
    if arguments.develop:
        summary["chosen"] = {
            family: min(settings, key=functools.partial(rank, rows)) for family, settings in FAMILIES.items()
        }
        print("chosen:", summary["chosen"])
    else:
        summary["comparisons"] = comparisons(rows, json.loads(choice.read_text())["chosen"])
    report.write_json(report.RESULTS / f"{name}.json", summary)


if __name__ == "__main__":
    main()
