"""The action identifier on the theatre's video model: actions without a word, learnt from single pictures.

    python tests/experiments/action_identifier_wan.py

As PROTOCOL.md says; resumes what is there. Writes results/action_identifier_wan.csv (one row a clip), .json (means
with 95 % intervals) and .jpg.
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
import torch  # noqa: E402
from experiments import action_identifier, report, sampling, theatre_wan  # noqa: E402
from experiments.action_bench import cases, exemplars  # noqa: E402
from experiments.action_identifier import FEW_ACTIONS, INITIAL_WORD, OURS, PROMPT, STATE, Learning  # noqa: E402
from experiments.video_identity import AUTOENCODER, TRANSFORMER  # noqa: E402
from pack.nodes.puppets import render  # noqa: E402
from pack.nodes.puppets.config import ACTIONS, Take  # noqa: E402

SEED = 6_000_000
CEILING = "truth through the autoencoder"
# Rate and steps as for pictures; Min-SNR is for models that predict noise or v.
_PLUS = Learning(0.004, triples=False, min_snr_gamma=0.0)
ARMS = {CEILING: None, PROMPT: None, OURS: dataclasses.replace(_PLUS, triples=True), "layer-wise tokens (P+)": _PLUS}
MEASURES = ("composition", "action", "identity", "identity_error", "action_throughout", "movement", "rejected")


class VideoStage(action_identifier.Stage):
    """The theatre's Wan, what was learnt in it, and its clips."""

    def __init__(self):
        self.theatre = sampling.VideoTheatre(TRANSFORMER, AUTOENCODER, STATE, theatre_wan.FRAMES)
        self.digest = sampling.sha256(TRANSFORMER)
        self.kept = report.Pictures(STATE / f"action_identifier_wan_{self.digest[:12]}")
        # After the host is on the path.
        from pack.nodes import extension

        extension.register_folders()

    def _latents(self, takes: list[Take]) -> list[torch.Tensor]:
        pictures = [render.render(take, theatre_wan.SIZE).image[None] for take in takes]
        return [self.theatre.encode(picture[None]).clone() for picture in pictures]

    def clips(self, learning: Learning | None, action: str) -> np.ndarray:
        """uint8 [cases, T, H, W, 3]."""
        takes = cases(action)

        @functools.cache
        def reading():
            return self.reading(learning, action)

        def make(start: int, _stop: int) -> np.ndarray:
            model, positive = reading()
            return self.theatre.decode(self.theatre.sample(
                self.theatre.sampler(theatre_wan.SAMPLER), positive(takes[start]),
                [SEED + 100 * ACTIONS.index(action) + start], steps=theatre_wan.STEPS, cfg=theatre_wan.CFG,
                size=theatre_wan.SIZE, model=model,
            ))

        known = learning, INITIAL_WORD, exemplars(action), takes, SEED, theatre_wan.STEPS, theatre_wan.CFG
        return self.kept.get(report.fingerprint(known), len(takes), 1, make)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    stage = VideoStage()
    rows, shown = [], []
    for action in FEW_ACTIONS:
        takes = cases(action)
        truth = theatre_wan.drawn(takes, theatre_wan.SIZE, theatre_wan.FRAMES)
        for arm, learning in ARMS.items():
            if arm == CEILING:
                name = f"autoencoder_{report.fingerprint(takes)}"
                clips = stage.kept.get(name, len(takes), 4, functools.partial(stage.theatre.round_trip, truth))
            else:
                clips = stage.clips(learning, action)
            found = theatre_wan.rows_of(arm, takes, clips, truth)
            rows.extend({"action_asked": action, **row} for row in found)
            shown.append((f"{action}: {arm}, middle frame", clips[:8, theatre_wan.FRAMES // 2]))
            print(action, arm, report.summary(found, MEASURES), flush=True)
    report.write_csv(report.RESULTS / "action_identifier_wan.csv", rows)
    report.contact_sheet(report.RESULTS / "action_identifier_wan.jpg", shown)
    of = {arm: [row for row in rows if row["arm"] == arm] for arm in ARMS}
    report.write_json(report.RESULTS / "action_identifier_wan.json", {
        "command": report.command("action_identifier_wan.py"),
        "transformer_sha256": stage.digest,
        "machine": report.machine(),
        "sampling": {
            "sampler": theatre_wan.SAMPLER, "scheduler": stage.theatre.scheduler, "steps": theatre_wan.STEPS,
            "cfg": theatre_wan.CFG, "size": theatre_wan.SIZE, "frames": theatre_wan.FRAMES, "first_seed": SEED,
        },
        "settings": {arm: dataclasses.asdict(learning) for arm, learning in ARMS.items() if learning},
        "interval": "95 %: [mean, low, high]",
        "arms": {arm: report.summary(own, MEASURES) for arm, own in of.items()},
        "ours less": {
            arm: report.summary([
                {m: float(mine[m]) - float(theirs[m]) for m in MEASURES}
                for mine, theirs in zip(of[OURS], of[arm], strict=True)
            ], MEASURES)
            for arm in ARMS if arm not in (OURS, CEILING)
        },
    })


if __name__ == "__main__":
    main()
