"""The figures of the theatre's checkpoint: what plain prompting shows, on seen and unseen combinations.

    python tests/experiments/theatre.py                 # as PROTOCOL.md says; resumes what is there
    python tests/experiments/theatre.py --cases 8 --checkpoint other.safetensors --name trial

Writes results/theatre.csv.gz (one row a case), theatre.json (means with 95 % intervals) and theatre.webp. Where
results/theatre_by_eye.csv exists (arm, case, action, species: what a person saw, "reject" where nothing is
clear), it also reports how often the measuring net agrees. Sheets of all cases to label from lie in
.cache/experiments.
"""

import argparse
import csv
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
from experiments.cases import worded  # noqa: E402
from experiments.measuring import metrics  # noqa: E402
from pack.nodes.puppets import captions, render, world  # noqa: E402
from pack.nodes.puppets.config import ACTION_TABLE, Take  # noqa: E402

STATE = ROOT / ".cache" / "experiments"
SPLITS = {"seen": "validation", "unseen": "unseen"}
SEED = 1_000_000  # of the first case's noise
SAMPLER, BATCH = "dpmpp_2m", 32
NEIGHBOUR_CASES = 48
TRAINING_TAKES = 6_000  # of which colours and lights are drawn for `as_said`
GARMENTS = ("shirt", "pattern_colour", "trousers", "headwear_colour")
MEASURES = (
    "worn_error",
    "identity",
    "action",
    "composition",
    "rejected",
    "species_read",
    "pattern_read",
    "headwear_read",
    "psnr",
    "nearest_training_distance",
)


def cases(arm: str, count: int, framing: str = "full") -> list[Take]:
    """The first `count` takes of the arm's split that do a named action, as their captions describe them."""
    takes, seed = [], 0
    while len(takes) < count:
        take = world.sample_take(seed, SPLITS[arm], framing)
        if ACTION_TABLE[take.action].named:
            takes.append(dataclasses.replace(take, identity=worded(take.identity)))
        seed += 1
    return takes


@functools.cache
def colours() -> dict[tuple[str, str], list]:
    """The training colours of each garment that a name stands for."""
    found: dict[tuple[str, str], list] = {}
    for index in range(TRAINING_TAKES):
        who = world.still_take(index).identity
        for garment in GARMENTS:
            colour = getattr(who, garment)
            found.setdefault((garment, captions.colour_name(colour)), []).append(colour)
    return found


def as_said(takes: list[Take]) -> list[Take]:
    """What else their captions say: colours of the same names and any light, both as training has them."""
    rng, found = np.random.default_rng(SEED), []
    for take in takes:
        names = {garment: captions.colour_name(getattr(take.identity, garment)) for garment in GARMENTS}
        who = dataclasses.replace(take.identity, **{
            garment: world.pick(rng, colours()[garment, name]) for garment, name in names.items()
        })
        light = world.still_take(int(rng.integers(TRAINING_TAKES))).light
        found.append(dataclasses.replace(take, identity=who, light=light))
    return found


def rows_of(arm: str, takes: list[Take], pictures: np.ndarray) -> list[dict]:
    """The measures of every picture, under the parts that the eye itself finds."""
    measured = metrics.compositions(pictures, takes)
    return [
        {
            "arm": arm,
            "case": i,
            "asked": take.action,
            **row,
            "rejected": row["seen_action"] == "reject",
            **{
                f"{name}_read": row[f"seen_{name}"] == getattr(take.identity, name)
                for name in ("species", "pattern", "headwear")
            },
        }
        for i, (take, row) in enumerate(zip(takes, measured))
    ]


def training_thumbnails(count: int) -> np.ndarray:
    """Thumbnails of the first `count` training pictures, kept between runs."""
    path = STATE / f"training_thumbnails_{count}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = ROOT / ".cache" / "training" / "puppets_sd" / f"stills_train_{count}_128.npy"
        if stored.exists():
            pictures = np.load(stored, mmap_mode="r")
            small = np.concatenate([metrics.thumbnails(pictures[i : i + 500]) for i in range(0, count, 500)])
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
    return {
        "pictures": len(pairs),
        **{
            key: metrics.mean_interval(np.array([label[key] == row[f"seen_{key}"] for label, row in pairs]))
            for key in ("action", "species")
        },
    }


def sampled(
    theatre: sampling.Theatre, texts: list[str], steps: int, cfg: float, start: int, stop: int
) -> np.ndarray:
    """Pictures of prompts `start` to `stop` - 1."""
    seeds = [SEED + i for i in range(start, stop)]
    positive = theatre.prompts(texts[start:stop])
    return theatre.decode(theatre.sample(theatre.sampler(SAMPLER), positive, seeds, steps=steps, cfg=cfg))


def pictures_of(
    theatre: sampling.Theatre, kept: report.Pictures, takes: dict[str, list[Take]], steps: int, cfg: float
) -> dict[str, np.ndarray]:
    """Every arm's pictures: true renders, those through the autoencoder, the prompts of both splits, and renders of
    what else those could mean, which is what a perfect model would draw.
    """
    truth = np.stack([render.render(take).image for take in takes["seen"]])
    decode = functools.partial(theatre.round_trip, truth)
    name = f"autoencoder_{report.fingerprint(takes['seen'])}"
    found = {"render": truth, "autoencoder": kept.get(name, len(truth), BATCH, decode)}
    for arm in SPLITS:
        texts = [captions.caption(take) for take in takes[arm]]
        run = functools.partial(sampled, theatre, texts, steps, cfg)
        name = f"{arm}_{report.fingerprint(texts, steps, cfg, SAMPLER, sampling.SCHEDULER, SEED)}"
        found[arm] = kept.get(name, len(texts), BATCH, run)
    for arm in SPLITS:
        found[f"{arm}, as said"] = np.stack([render.render(take).image for take in as_said(takes[arm])])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=96, help="a split")
    parser.add_argument("--checkpoint", type=Path, default=sampling.CHECKPOINT)
    parser.add_argument("--name", default="theatre", help="of the result files")
    parser.add_argument("--steps", type=int, default=sampling.STEPS)
    parser.add_argument("--cfg", type=float, default=sampling.CFG)
    parser.add_argument(
        "--neighbours", type=int, help="training pictures to search for the nearest; all by default"
    )
    arguments = parser.parse_args()
    theatre = sampling.Theatre(arguments.checkpoint, STATE)
    digest = sampling.sha256(arguments.checkpoint)
    kept = report.Pictures(STATE / f"theatre_{digest[:12]}")
    takes = {arm: cases(arm, arguments.cases) for arm in SPLITS}
    pictures = pictures_of(theatre, kept, takes, arguments.steps, arguments.cfg)
    neighbours = arguments.neighbours
    if neighbours is None:
        neighbours = sampling.training_pictures(arguments.checkpoint)
    training = training_thumbnails(neighbours) if neighbours else None
    rows: list[dict] = []
    sheets: dict[str, list[tuple[str, np.ndarray]]] = {}
    for arm, shown in pictures.items():
        found = rows_of(arm, takes.get(arm.partition(",")[0], takes["seen"]), shown)
        if arm == "autoencoder":
            for row, picture, truth in zip(found, shown, pictures["render"], strict=True):
                row["psnr"] = metrics.psnr(picture, truth)
        if training is not None:
            distances, nearest = metrics.nearest_training_distance(shown[:NEIGHBOUR_CASES], training)
            for row, distance, take in zip(found, distances.tolist(), nearest.tolist(), strict=False):
                row |= {"nearest_training_distance": distance, "nearest_training_take": take}
        rows.extend(found)
        starts = range(0, len(shown), 6)
        sheets[arm] = [(f"{arm}, cases {i} to {i + 5}", shown[i : i + 6]) for i in starts]
        report.contact_sheet(kept.folder / f"{arm}.jpg", sheets[arm], budget=4_000_000)
        print(arm, report.summary(found, MEASURES), flush=True)
    report.write_csv(report.RESULTS / f"{arguments.name}.csv.gz", rows)
    best = [sheets[arm][0] for arm in ("render", "autoencoder", *SPLITS)]
    report.contact_sheet(report.RESULTS / f"{arguments.name}.webp", best)
    summary = {
        "command": report.command("theatre.py"),
        "checkpoint_sha256": digest,
        "machine": report.machine(),
        "sampling": {
            "sampler": SAMPLER,
            "scheduler": sampling.SCHEDULER,
            "steps": arguments.steps,
            "cfg": arguments.cfg,
            "first_seed": SEED,
        },
        "training_pictures_searched": neighbours,
        "interval": "95 %: [mean, low, high]",
        "arms": {
            arm: report.summary([row for row in rows if row["arm"] == arm], MEASURES) for arm in pictures
        },
        "agreement_with_a_person": agreement(rows, report.RESULTS / f"{arguments.name}_by_eye.csv"),
    }
    report.write_json(report.RESULTS / f"{arguments.name}.json", summary)


if __name__ == "__main__":
    main()
