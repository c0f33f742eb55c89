"""The figures of the theatre's video model: what plain prompting shows of close-ups, on seen and unseen combinations.

    python tests/experiments/theatre_wan.py             # as PROTOCOL.md says; resumes what is there
    python tests/experiments/theatre_wan.py --cases 8 --transformer other.safetensors --name trial

Judges the first, the middle and the last frame of every clip. Writes results/theatre_wan.csv.gz (one row a case),
theatre_wan.json (means with 95 % intervals) and theatre_wan.webp. Sheets of all cases lie in .cache/experiments.
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
from experiments.measuring import metrics  # noqa: E402
from experiments.theatre import SPLITS, STATE, cases  # noqa: E402
from pack.nodes.puppets import captions, render  # noqa: E402
from pack.nodes.puppets.config import Take  # noqa: E402

MODELS = ROOT / "workflows" / "models"
SEED = 3_000_000  # of the first case's noise
SAMPLER, STEPS, CFG = "euler", 20, 4.0
SIZE, FRAMES = 96, 9
CYCLE = 16  # frames of a whole action, of which a clip shows the first
BATCH = 8
MEASURES = (
    "action", "identity", "composition", "worn_error", "action_throughout", "identity_throughout", "species_read",
    "pattern_read", "headwear_read", "shirt_right", "rejected", "movement", "flicker", "psnr",
)


def judged(frames: int) -> tuple[int, int, int]:
    """The first, the middle and the last frame."""
    return 0, frames // 2, frames - 1


def drawn(takes: list[Take], size: int, frames: int) -> np.ndarray:
    """uint8 [N, T, H, W, 3]: the true clips."""
    return np.stack([[render.render(later(take, frame), size).image for frame in range(frames)] for take in takes])


def later(take: Take, frame: int) -> Take:
    """The take that frame `frame` of its clip shows."""
    return dataclasses.replace(take, phase=(take.phase + frame / CYCLE) % 1)


def movement(clip: np.ndarray) -> float:
    """Mean absolute difference of successive frames, in 0..255."""
    return float(np.abs(np.diff(clip.astype(np.float32), axis=0)).mean())


def flicker(clip: np.ndarray) -> float:
    """Mean absolute second difference over frames, in 0..255: what comes and goes, where movement goes on."""
    return float(np.abs(np.diff(clip.astype(np.float32), n=2, axis=0)).mean())


def rows_of(arm: str, takes: list[Take], clips: np.ndarray, truth: np.ndarray) -> list[dict]:
    """One row a clip: shares over its judged frames, whether every one is right, and how much it moves.

    A generated clip may begin at another moment of the action, so each frame is judged by its action and
    identity alone. `movement` and `flicker` are relative to the true clip's.
    """
    frames = judged(clips.shape[1])
    seen = []
    for frame in frames:
        seen.append(metrics.compositions(clips[:, frame], [later(take, frame) for take in takes]))
    rows = []
    for i, take in enumerate(takes):
        found = [column[i] for column in seen]
        read = {
            f"{name}_read": np.mean([row[f"seen_{name}"] == getattr(take.identity, name) for row in found])
            for name in ("species", "pattern", "headwear")
        }
        rows.append({
            "arm": arm, "case": i, "asked": take.action,
            **{f"seen_{frame}": row["seen_action"] for frame, row in zip(frames, found, strict=True)},
            **{name: float(np.mean([row[name] for row in found]))
               for name in ("action", "identity", "composition", "worn_error", "identity_error")},
            **{name: float(value) for name, value in read.items()},
            "rejected": float(np.mean([row["seen_action"] == "reject" for row in found])),
            "action_throughout": all(row["action"] for row in found),
            "identity_throughout": all(row["identity"] for row in found),
            "shirt_right": float(np.mean([row["shirt_error"] <= metrics.GARMENT_LIMIT for row in found])),
            "movement": movement(clips[i]) / max(movement(truth[i]), 1e-3),
            "flicker": flicker(clips[i]) / max(flicker(truth[i]), 1e-3),
        })
    return rows


def sampled(theatre: sampling.VideoTheatre, texts: list[str], options, start: int, stop: int) -> np.ndarray:
    """Clips of prompts `start` to `stop` - 1."""
    seeds = [SEED + i for i in range(start, stop)]
    positive = theatre.prompts(texts[start:stop])
    return theatre.decode(theatre.sample(
        theatre.sampler(SAMPLER), positive, seeds, steps=options.steps, cfg=options.cfg, size=options.size
    ))


def clips_of(theatre, kept: report.Pictures, takes: dict[str, list[Take]], options) -> dict[str, np.ndarray]:
    """Every arm's clips: true ones, those through the autoencoder, and the prompts of both splits."""
    truth = drawn(takes["seen"], options.size, options.frames)
    name = f"autoencoder_{report.fingerprint(takes['seen'], options.size, options.frames)}"
    decode = functools.partial(theatre.round_trip, truth)
    found = {"render": truth, "autoencoder": kept.get(name, len(truth), BATCH, decode)}
    for arm in SPLITS:
        texts = [captions.caption(take) for take in takes[arm]]
        settings = (options.steps, options.cfg, options.size, options.frames, SAMPLER, theatre.scheduler, SEED)
        name = f"{arm}_{report.fingerprint(texts, *settings)}"
        found[arm] = kept.get(name, len(texts), BATCH, functools.partial(sampled, theatre, texts, options))
    return found


def sheet(arm: str, clips: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Rows of three clips, each by its judged frames."""
    shown = clips[:, list(judged(clips.shape[1]))]
    return [
        (f"{arm}, cases {i} to {min(i + 2, len(clips) - 1)}: first, middle and last frame",
         shown[i:i + 3].reshape(-1, *clips.shape[2:]))
        for i in range(0, len(clips), 3)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=96, help="a split")
    parser.add_argument("--transformer", type=Path, default=MODELS / "diffusion_models" / "puppets_wan.safetensors")
    parser.add_argument("--autoencoder", type=Path, default=MODELS / "vae" / "puppets_wan_vae.safetensors")
    parser.add_argument("--name", default="theatre_wan", help="of the result files")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cfg", type=float, default=CFG)
    parser.add_argument("--size", type=int, default=SIZE, help="pixels")
    parser.add_argument("--frames", type=int, default=FRAMES, help="4n+1")
    options = parser.parse_args()
    theatre = sampling.VideoTheatre(options.transformer, options.autoencoder, STATE, options.frames)
    digests = {path.name: sampling.sha256(path) for path in (options.transformer, options.autoencoder)}
    kept = report.Pictures(STATE / f"theatre_wan_{report.fingerprint(digests)}")
    takes = {arm: cases(arm, options.cases, "close_up") for arm in SPLITS}
    clips = clips_of(theatre, kept, takes, options)
    truth = clips["render"]
    rows: list[dict] = []
    best = []
    for arm, shown in clips.items():
        own = drawn(takes[arm], options.size, options.frames) if arm in SPLITS else truth
        found = rows_of(arm, takes.get(arm, takes["seen"]), shown, own)
        if arm == "autoencoder":
            for row, clip, right in zip(found, shown, truth, strict=True):
                row["psnr"] = metrics.psnr(clip, right)
        rows.extend(found)
        rows_shown = sheet(arm, shown)
        report.contact_sheet(kept.folder / f"{arm}.jpg", rows_shown, budget=4_000_000)
        best.append(rows_shown[0])
        print(arm, report.summary(found, MEASURES), flush=True)
    report.write_csv(report.RESULTS / f"{options.name}.csv.gz", rows)
    report.contact_sheet(report.RESULTS / f"{options.name}.webp", best)
    report.write_json(report.RESULTS / f"{options.name}.json", {
        "command": report.command("theatre_wan.py"),
        "sha256": digests,
        "machine": report.machine(),
        "sampling": {
            "sampler": SAMPLER, "scheduler": theatre.scheduler, "steps": options.steps, "cfg": options.cfg,
            "size": options.size, "frames": options.frames, "first_seed": SEED,
        },
        "judged_frames": judged(options.frames),
        "interval": "95 %: [mean, low, high]",
        "arms": {arm: report.summary([row for row in rows if row["arm"] == arm], MEASURES) for arm in clips},
    })


if __name__ == "__main__":
    main()
