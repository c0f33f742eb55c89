"""Identity priors and non-rigid edits on the theatre: a test puppet in a picture takes another pose or view.

    python tests/experiments/identity_prior.py --develop    # settings compared on development cases
    python tests/experiments/identity_prior.py              # the arms on the test cases
    python tests/experiments/identity_prior.py --reconstruct  # how well inverted test pictures come back, no edit

As PROTOCOL.md says; resumes what is there: trained priors and every arm's pictures of a subject are kept. Writes
results/identity_prior.csv (one row a case and arm), .json (means with 95 % intervals) and .jpg; development writes
results/identity_prior_development.*.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows")]
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import numpy as np  # noqa: E402
from experiments import report, sampling  # noqa: E402
from experiments.identity_prior_arms import SAMPLER, SEED, STEPS, Arm, Editor, Learning  # noqa: E402
from experiments.non_rigid_edit import EDITS, MEASURES, Stage, measured, prompt, staged  # noqa: E402

STATE = ROOT / ".cache" / "experiments" / "identity_prior"
SUBJECTS, DEVELOPMENT_SUBJECTS = 8, 2
COMPARED = ("composition", "identity", "action", "background_error", "identity_error", "joint_error", "error")

OURS = "ours"
ENCODED = ("source through the autoencoder", "truth through the autoencoder")
WORDS_CFG = sampling.CFG  # without a prior, what the checkpoint was measured with
DENOISE = 0.75
PRIOR, PLAIN, SHORT = Learning(), Learning(prior_weight=0.0), Learning(short_captions=True)


def ours(learning: Learning = PRIOR, **more) -> Arm:
    return Arm(learning, start="inverted", background="blend", **more)


# What development compares, at most six settings a family.
FAMILIES: dict[str, dict[str, Arm]] = {
    "ours": {
        OURS: ours(),
        "CFG 2": ours(cfg=2.0),
        "fresh noise": dataclasses.replace(ours(), start="noise"),
        "grow 0": ours(blend=(*Arm().blend, ("grow", 0))),
        "threshold 0.6": ours(blend=(*Arm().blend, ("threshold", 0.6))),
        "until 0.8": ours(blend=(*Arm().blend, ("end_percent", 0.8))),
    },
    "learning": {
        OURS: ours(),
        "prior weight 1": ours(dataclasses.replace(PRIOR, prior_weight=1.0)),
        "rate 0.001": ours(dataclasses.replace(PRIOR, learning_rate=1e-3)),
        "min-SNR off": ours(dataclasses.replace(PRIOR, min_snr_gamma=0.0)),
    },
    "img2img": {f"img2img {d:g}": Arm(denoise=d, cfg=WORDS_CFG) for d in (0.6, 0.75, 0.9)},
}
ARMS = {
    "words": Arm(cfg=WORDS_CFG),
    "img2img": Arm(denoise=DENOISE, cfg=WORDS_CFG),
    "plain LoRA": Arm(PLAIN),
    "plain LoRA, inpainting": Arm(PLAIN, background="inpaint"),
    "inversion, no blend": Arm(PRIOR, start="inverted"),
    OURS: ours(),
    "short captions": ours(SHORT),
    "no regularisation": ours(PLAIN),
    "no mask union": ours(mask="edited"),
    "no prior": ours(Learning(steps=0)),
}


def pictures(editor: Editor, arms: dict[str, Arm], stage: Stage, kept: report.Pictures) -> dict[str, np.ndarray]:
    """Every arm's pictures, and what they are to be compared with; one subject after the other."""
    made: dict[str, list[np.ndarray]] = {name: [] for name in ("source itself", *ENCODED, *arms)}
    for i, one in enumerate(stage.subjects):
        some = slice(i * EDITS, (i + 1) * EDITS)
        key = report.fingerprint(one, [prompt(edit.truth) for edit in one.edits])
        made["source itself"].append(stage.source[some])
        for name, shown in zip(ENCODED, (stage.source, stage.truth)):
            decode = functools.partial(editor.theatre.round_trip, shown[some])
            made[name].append(kept.get(f"{name.split()[0]}_{key}", EDITS, EDITS, decode))
        for label, arm in arms.items():
            setting = report.fingerprint(key, arm, editor.settings(arm), STEPS, SAMPLER, SEED)
            edit = functools.partial(editor.edited, arm, i)
            made[label].append(kept.get(setting, EDITS, EDITS, lambda _start, _stop, edit=edit: edit()))
            print(f"subject {i}: {label}", flush=True)
    return {label: np.concatenate(parts) for label, parts in made.items()}


def comparisons(rows: list[dict]) -> dict:
    """Ours less every other arm, paired: [mean, low, high] over cases, and over subjects resampled whole."""
    by_arm: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["case"]] = row
    found = {}
    for other in by_arm:
        if other == OURS:
            continue
        differences = [
            {"subject": row["subject"], **{m: float(row[m]) - float(by_arm[other][i][m]) for m in COMPARED}}
            for i, row in by_arm[OURS].items()
        ]
        subjects = [
            {m: float(np.mean([d[m] for d in differences if d["subject"] == subject])) for m in COMPARED}
            for subject in sorted({d["subject"] for d in differences})
        ]
        found[f"{OURS} - {other}"] = {
            **report.summary(differences, COMPARED), "by subject": report.summary(subjects, COMPARED)
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--develop", action="store_true", help="compare settings on development cases")
    task.add_argument("--reconstruct", action="store_true", help="compare the inversions instead")
    parser.add_argument("--subjects", type=int, help="by default as the protocol says")
    parser.add_argument("--checkpoint", type=Path, default=sampling.CHECKPOINT)
    parser.add_argument("--name", default="identity_prior", help="of the result files")
    options = parser.parse_args()
    arms, count, name = ARMS, options.subjects or SUBJECTS, options.name
    if options.develop:
        arms = {name: arm for family in FAMILIES.values() for name, arm in family.items()}
        count, name = options.subjects or DEVELOPMENT_SUBJECTS, f"{name}_development"
    stage = staged(count, options.develop)
    theatre = sampling.Theatre(options.checkpoint, STATE)
    digest = sampling.sha256(options.checkpoint)
    kept = report.Pictures(STATE / f"{name}_{digest[:12]}")
    editor = Editor(theatre, stage, kept.folder)
    made_with = {
        "command": report.command("identity_prior.py"),
        "checkpoint_sha256": digest,
        "machine": report.machine(),
        "sampling": {
            "sampler": SAMPLER, "scheduler": sampling.SCHEDULER, "steps": STEPS, "first_seed": SEED,
        },
        "interval": "95 %: [mean, low, high]",
    }
    if options.reconstruct:
        found = editor.reconstructions(arms[OURS], kept)
        print(found)
        report.write_json(report.RESULTS / f"{name}_inversion.json", made_with | {"methods": found})
        return
    results = pictures(editor, arms, stage, kept)
    rows = []
    for label, made in results.items():
        rows += measured(label, stage, made)
        print(label, report.summary([row for row in rows if row["arm"] == label], MEASURES), flush=True)
    report.write_csv(report.RESULTS / f"{name}.csv", rows)
    shown = [i * EDITS + (i % EDITS) for i in range(count)] if count > 2 else range(0, count * EDITS, 2)
    truth = [("truth", stage.truth[list(shown)])]
    report.contact_sheet(
        report.RESULTS / f"{name}.jpg", truth + [(label, made[list(shown)]) for label, made in results.items()]
    )
    summary = made_with | {
        "settings": {arm: dataclasses.asdict(setting) for arm, setting in arms.items()},
        "arms": {arm: report.summary([r for r in rows if r["arm"] == arm], MEASURES) for arm in results},
    }
    if not options.develop:
        summary["kinds"] = {
            kind: {
                arm: report.summary([r for r in rows if r["arm"] == arm and r["kind"] == kind], MEASURES)
                for arm in results
            }
            for kind in ("action", "view")
        }
        summary["comparisons"] = comparisons(rows)
    report.write_json(report.RESULTS / f"{name}.json", summary)


if __name__ == "__main__":
    main()
