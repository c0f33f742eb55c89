"""The figures of the theatre's checkpoint: what plain prompting shows, on seen and unseen combinations.

    python tests/experiments/theatre.py                 # as PROTOCOL.md says; resumes what is there
    python tests/experiments/theatre.py --cases 8 --checkpoint other.safetensors --name trial

Writes results/theatre.csv (one row a case), theatre.json (means with 95 % intervals) and theatre.jpg. Where
results/theatre_by_eye.csv exists (arm, case, action, species: what a person saw), it also reports how often the
measuring net agrees.
"""

import argparse
import csv
import dataclasses
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
from pack.nodes.puppets.config import COLOURS, NAMED_ACTIONS, Identity, Take  # noqa: E402

STATE = ROOT / ".cache" / "experiments"
SPLITS = {"seen": "validation", "unseen": "unseen"}
SEED = 1_000_000  # of the first case's noise
SAMPLER, BATCH = "dpmpp_2m", 32
NEIGHBOUR_CASES = 48
MEASURES = ("worn_error", "identity", "action", "composition", "rejected", "psnr", "nearest_training_distance")


def worded(identity: Identity) -> Identity:
    """The identity that its caption describes: named colours at their centres, no detail."""
    def centre(colour):
        return COLOURS[captions.colour_name(colour)]

    return dataclasses.replace(
        identity, shirt=centre(identity.shirt), pattern_colour=centre(identity.pattern_colour),
        trousers=centre(identity.trousers), headwear_colour=centre(identity.headwear_colour), detail="none")


def cases(arm: str, count: int) -> list[Take]:
    """The first `count` takes of the arm's split that do a named action, as their captions describe them."""
    takes, seed = [], 0
    while len(takes) < count:
        take = world.sample_take(seed, SPLITS[arm])
        if take.action in NAMED_ACTIONS:
            takes.append(dataclasses.replace(take, identity=worded(take.identity)))
        seed += 1
    return takes


def rows_of(arm: str, takes: list[Take], pictures: np.ndarray) -> list[dict]:
    """The measures of every picture, under the parts that the eye itself finds."""
    measured = metrics.compositions(pictures, takes)
    return [{"arm": arm, "case": i, "prompt": captions.caption(take), "asked": take.action, **row,
             "rejected": row["seen_action"] == "reject"} for i, (take, row) in enumerate(zip(takes, measured))]


def training_thumbnails(count: int) -> np.ndarray:
    """Thumbnails of the first `count` training pictures, kept between runs."""
    path = STATE / f"training_thumbnails_{count}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = ROOT / ".cache" / "training" / "puppets_sd" / f"train_{count}_128.npy"
        if stored.exists():
            pictures = np.load(stored, mmap_mode="r")
            small = np.concatenate([metrics.thumbnails(pictures[i:i + 500]) for i in range(0, count, 500)])
        else:
            small = metrics.training_thumbnails(count)
        np.save(path, small)
    return np.load(path)


def agreement(rows: list[dict], path: Path) -> dict:
    """How often the eye says what a person wrote in `path`; empty without the file."""
    if not path.exists():
        return {}
    seen = {(row["arm"], row["case"]): row for row in rows}
    with open(path, newline="") as file:
        labels = [label for label in csv.DictReader(file) if (label["arm"], int(label["case"])) in seen]
    pairs = [(label, seen[label["arm"], int(label["case"])]) for label in labels]
    return {"pictures": len(pairs),
            **{key: metrics.mean_interval(np.array([label[key] == row[f"seen_{key}"] for label, row in pairs]))
               for key in ("action", "species")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=96, help="a split")
    parser.add_argument("--checkpoint", type=Path, default=sampling.CHECKPOINT)
    parser.add_argument("--name", default="theatre", help="of the result files")
    parser.add_argument("--steps", type=int, default=sampling.STEPS)
    parser.add_argument("--cfg", type=float, default=sampling.CFG)
    parser.add_argument("--neighbours", type=int, default=-1,
                        help="training pictures to search for the nearest one; all by default, 0 for none")
    arguments = parser.parse_args()
    theatre = sampling.Theatre(arguments.checkpoint, STATE)
    digest = sampling.sha256(arguments.checkpoint)
    kept = report.Pictures(STATE / f"theatre_{digest[:12]}_{SAMPLER}_{arguments.steps}_{arguments.cfg:g}")
    rows, shown = [], []
    neighbours = arguments.neighbours
    if neighbours < 0:
        neighbours = sampling.training_pictures(arguments.checkpoint)
    training = training_thumbnails(neighbours) if neighbours else None

    def add(arm: str, takes: list[Take], pictures: np.ndarray, truth: np.ndarray | None = None) -> None:
        found = rows_of(arm, takes, pictures)
        if truth is not None:
            for row, picture, original in zip(found, pictures, truth):
                row["psnr"] = metrics.psnr(picture, original)
        if training is not None:
            distances, nearest = metrics.nearest_training_distance(pictures[:NEIGHBOUR_CASES], training)
            for row, distance, position in zip(found, distances.tolist(), nearest.tolist()):
                row |= {"nearest_training_distance": distance, "nearest_training_take": position}
        rows.extend(found)
        print(arm, report.summary(found, MEASURES), flush=True)

    for arm in SPLITS:
        takes = cases(arm, arguments.cases)
        texts = [captions.caption(take) for take in takes]

        def sample(start: int, stop: int) -> np.ndarray:
            seeds = [SEED + i for i in range(start, stop)]
            latents = theatre.sample(theatre.sampler(SAMPLER), theatre.prompts(texts[start:stop]), seeds,
                                     steps=arguments.steps, cfg=arguments.cfg)
            return theatre.decode(latents)

        if arm == "seen":
            truth = np.stack([render.render(take).image for take in takes])
            add("render", takes, truth)
            decoded = kept.get("autoencoder", len(takes), BATCH,
                               lambda start, stop: theatre.decode(theatre.encode(truth[start:stop])))
            add("autoencoder", takes, decoded, truth)
            shown += [("true pictures", truth[:12]), ("through the autoencoder", decoded[:12])]
        pictures = kept.get(arm, len(takes), BATCH, sample)
        add(arm, takes, pictures)
        shown += [(f"{arm} combinations, cases {i} to {i + 11}", pictures[i:i + 12]) for i in (0, 12, 24)
                  if i < len(pictures)]
    report.write_csv(report.RESULTS / f"{arguments.name}.csv", rows)
    report.contact_sheet(report.RESULTS / f"{arguments.name}.jpg", shown)
    report.write_json(report.RESULTS / f"{arguments.name}.json", {
        "command": report.command("theatre.py"), "checkpoint_sha256": digest, "machine": report.machine(),
        "sampling": {"sampler": SAMPLER, "scheduler": sampling.SCHEDULER, "steps": arguments.steps,
                     "cfg": arguments.cfg, "first_seed": SEED},
        "training_pictures_searched": neighbours, "interval": "95 %: [mean, low, high]",
        "arms": {arm: report.summary([row for row in rows if row["arm"] == arm], MEASURES)
                 for arm in dict.fromkeys(row["arm"] for row in rows)},
        "agreement_with_a_person": agreement(rows, report.RESULTS / f"{arguments.name}_by_eye.csv"),
    })


if __name__ == "__main__":
    main()
