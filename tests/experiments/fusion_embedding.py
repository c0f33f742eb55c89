"""The fusion embedding on the theatre: test puppets in poses that no training picture shows.

    python tests/experiments/fusion_embedding.py --develop    # chooses the guidance on development cases
    python tests/experiments/fusion_embedding.py              # every arm on the test cases
    python tests/experiments/fusion_embedding.py --arm full   # makes the pictures of one arm, writes no result

As PROTOCOL.md says; resumes what is there. Writes results/fusion_embedding.csv (one row a case and arm), .json (means
with 95 % intervals) and .jpg; development writes results/fusion_embedding_development.*.
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "workflows" / "models"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows")]
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from experiments import report, sampling  # noqa: E402
from experiments.measuring import metrics  # noqa: E402
from pack.nodes.puppets import captions, render, world  # noqa: E402
from pack.nodes.puppets.config import ACTIONS, SCENES, Take  # noqa: E402

STATE = ROOT / ".cache" / "experiments" / "fusion_embedding"
FUSION = MODELS / "fusion_embeddings" / "puppets_fusion.safetensors"
VISION = MODELS / "clip_vision" / "puppets_vision.safetensors"
CASES, DEVELOPMENT_CASES, SEED = 144, 24, 5_000_000
A_PUPPET = 6  # cases
TEST_KEY, DEVELOPMENT_KEY = 0xF9D, 0xF9E
SAMPLER, STEPS, BATCH, SHOWN = "dpmpp_2m", 20, 12, 12
GUIDANCE = (1.0, 2.0, 3.0)  # 2 is published
MEASURES = (
    "ssim", "psnr", "puppet_psnr", "feature_distance", "identity_error", "worn_error", "identity", "action",
    "composition", "joint_error", "background_error", "species_read", "pattern_read", "headwear_read",
)
FULL, ALONE, POSE, APPEARANCE, WORDS = (
    "full", "stage 2 alone", "pose path only", "appearance tokens only", "words of the truth"
)
# The paths into the UNet that an arm keeps; the others have what they have in the negative conditioning.
KEPT = {
    FULL: ("appearance", "embedding", "pose"), ALONE: ("appearance", "pose"), POSE: ("pose",),
    APPEARANCE: ("appearance",),
}
SOURCE, CEILING = "source itself", "truth through the autoencoder"


@dataclasses.dataclass(frozen=True)
class Case:
    """The picture that there is, and the one that is to be made."""

    source: Take
    truth: Take


def case(index: int, develop: bool) -> Case:
    """Case `index`: puppets cycle; the cases of one share scene, light and camera, and differ in both poses."""
    key = DEVELOPMENT_KEY if develop else TEST_KEY
    puppets = DEVELOPMENT_CASES // A_PUPPET if develop else world.TEST_COUNT
    puppet, turn = index % puppets, index // puppets
    rng = np.random.default_rng([key, puppet])
    who = world.sample_identity(950_000 + puppet) if develop else world.test_identities()[puppet]
    actions = [ACTIONS[int(i)] for i in rng.permutation(len(ACTIONS))]
    shared = world.staged(who, actions[0], SCENES[int(rng.integers(len(SCENES)))], rng)

    def posed(action: str, moment: int) -> Take:
        own = np.random.default_rng([key, puppet, moment])
        return dataclasses.replace(
            shared, action=action, phase=round(float(own.random()), 4), mirrored=bool(own.random() < 0.5)
        )

    return Case(posed(actions[A_PUPPET + turn], 2 * turn), posed(actions[turn], 2 * turn + 1))


class Stage:
    """The theatre with its fusion, and the cases of a run, drawn: pictures uint8 [N, H, W, 3]."""

    def __init__(self, cases: list[Case], guidance: float):
        self.cases, self.guidance = cases, guidance
        sources, truths = ([render.render(getattr(c, name)) for c in cases] for name in ("source", "truth"))
        self.source, self.truth = (np.stack([p.image for p in pictures]) for pictures in (sources, truths))
        self.pose = np.stack([render.draw_pose(p.joints, p.image.shape[0]) for p in truths])
        self.joints = np.stack([p.joints for p in truths])
        self.masks = np.stack([s.mask | t.mask for s, t in zip(sources, truths, strict=True)])
        self.theatre = sampling.Theatre(sampling.CHECKPOINT, STATE)
        # After the host is on the path.
        from pack.nodes.files.weights import read
        from pack.nodes.fusion_embedding import encoding, files
        from pack.nodes.fusion_embedding import sampling as running
        from pack.nodes.fusion_embedding.config import ApplyConfig
        from pack.nodes.puppets import vision

        self._encoding, self._running, self._config = encoding, running, ApplyConfig()
        self.fusion = files.unpacked(*read(FUSION))
        self.vision = vision.shipped()

    def pictures(self, arm: str, start: int, stop: int) -> np.ndarray:
        """The arm's pictures of cases `start` to `stop` - 1, by our functions and the host's sampler."""
        seeds, theatre = [SEED + i for i in range(start, stop)], self.theatre
        sampler = theatre.sampler(SAMPLER)
        if arm == WORDS:
            texts = [captions.caption(c.truth) for c in self.cases[start:stop]]
            return theatre.decode(theatre.sample(sampler, theatre.prompts(texts), seeds, steps=STEPS))
        source, pose = (torch.from_numpy(p[start:stop]).float() / 255 for p in (self.source, self.pose))
        model, positive, negative = self._running.apply(
            theatre.model, self.fusion, self._encoding.states(self.vision, source),
            self._encoding.fused(self.fusion.combiner, self.fusion.encoder, source, pose), pose, self._config,
        )
        return theatre.decode(theatre.sample(
            sampler, self._partial(positive, negative, KEPT[arm]), seeds, steps=STEPS, cfg=self.guidance,
            model=model, negative=negative,
        ))

    def _partial(self, positive: list, negative: list, kept: tuple[str, ...]) -> list:
        """The positive CONDITIONING with what is not `kept` as it is in the negative one."""
        (tokens, options), (no_tokens, nothing) = positive[0], negative[0]
        names = {self._running.EMBEDDING: "embedding", self._running.POSE: "pose"}
        conditions = {
            key: (options if name in kept else nothing)["model_conds"][key] for key, name in names.items()
        }
        return [[tokens if "appearance" in kept else no_tokens, {**options, "model_conds": conditions}]]

    def retrieval(self) -> list[dict]:
        """Each case's target among all targets, looked for by the fusion embedding and by either of its sources."""
        from pack.kernels import fusion_embedding as kernel

        source, pose, truth = (torch.from_numpy(p).float() / 255 for p in (self.source, self.pose, self.truth))
        encoder = self.fusion.encoder
        by = {
            "fusion embedding": self._encoding.fused(self.fusion.combiner, encoder, source, pose),
            "source's embedding": self._encoding.embeddings(encoder, source),
            "pose's embedding": self._encoding.embeddings(encoder, pose),
        }
        targets = self._encoding.embeddings(encoder, truth)
        return [
            {"arm": f"retrieval by the {name}", "case": i, "rank": rank, "top_1": rank < 1, "top_5": rank < 5}
            for name, vectors in by.items()
            for i, rank in enumerate(kernel.retrieval_ranks(vectors, targets).tolist())
        ]

    def measured(self, arm: str, pictures: np.ndarray) -> list[dict]:
        """One row a case."""
        rows = []
        seen = metrics.compositions(pictures, [c.truth for c in self.cases])
        for i, (c, own) in enumerate(zip(self.cases, seen, strict=True)):
            picture, truth, inside, who = pictures[i], self.truth[i], self.masks[i], c.truth.identity
            rows.append({
                "arm": arm, "case": i, "species": who.species, "from": c.source.action, "asked": c.truth.action,
                **own,
                "species_read": own["seen_species"] == who.species,
                "pattern_read": own["seen_pattern"] == who.pattern,
                "headwear_read": own["seen_headwear"] == who.headwear,
                "ssim": metrics.ssim(picture, truth),
                "psnr": metrics.psnr(picture, truth),
                "puppet_psnr": metrics.psnr(picture[inside], truth[inside]),
                "feature_distance": metrics.feature_distance(picture, truth),
                "joint_error": metrics.joint_error(picture, self.joints[i]),
                "background_error": metrics.background_error(picture, truth, inside),
            })
        return rows


def comparisons(rows: list[dict]) -> dict:
    """Paired differences of the full arm to each other one, [mean, low, high]."""
    by_arm: dict[str, dict] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["case"]] = row
    return {
        f"{FULL} - {other}": report.summary(
            [{m: float(row[m]) - float(by_arm[other][i][m]) for m in MEASURES} for i, row in by_arm[FULL].items()],
            MEASURES,
        )
        for other in (ALONE, POSE, APPEARANCE, WORDS, SOURCE) if other in by_arm
    }


def rank(rows: list[dict]) -> tuple[float, float]:
    """Most compositions first, then the smallest feature distance."""
    return -sum(row["composition"] for row in rows), float(np.mean([row["feature_distance"] for row in rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--develop", action="store_true", help="choose the guidance on development cases")
    parser.add_argument("--arm", choices=[*KEPT, WORDS], help="make this arm's pictures alone, write no result")
    parser.add_argument("--cases", type=int, help="by default as the protocol says")
    parser.add_argument("--name", default="fusion_embedding", help="of the result files")
    options = parser.parse_args()
    choice = report.RESULTS / f"{options.name}_development.json"
    if not options.develop and not choice.exists():
        raise SystemExit(f"{choice.name} is missing: run with --develop first, it chooses the guidance")
    for path in (FUSION, VISION):
        if not path.exists():
            raise SystemExit(f"{path.name} is missing: train it with workflows/theatre/puppets_fusion.py")
    guidance = GUIDANCE[0] if options.develop else json.loads(choice.read_text())["chosen"]
    count = options.cases or (DEVELOPMENT_CASES if options.develop else CASES)
    stage = Stage([case(i, options.develop) for i in range(count)], guidance)
    digests = {path.name: sampling.sha256(path) for path in (sampling.CHECKPOINT, VISION, FUSION)}
    kept = report.Pictures(STATE / report.fingerprint(digests))

    def made(arm: str) -> np.ndarray:
        setting = report.fingerprint(arm, stage.cases, stage.guidance, SEED, STEPS, SAMPLER)
        return kept.get(setting, count, BATCH, functools.partial(stage.pictures, arm))

    results = {SOURCE: stage.source}
    if options.develop:
        for stage.guidance in GUIDANCE:
            results[f"guidance {stage.guidance:g}"] = made(FULL)
    else:
        for arm in [options.arm] if options.arm else [*KEPT, WORDS]:
            results[arm] = made(arm)
            print(f"{arm}, {count} pictures", flush=True)
        if options.arm:
            return
    key = report.fingerprint("autoencoder", stage.cases)
    results[CEILING] = kept.get(key, count, BATCH, functools.partial(stage.theatre.round_trip, stage.truth))
    rows = {arm: stage.measured(arm, pictures) for arm, pictures in results.items()}
    found = stage.retrieval()
    every = [row for own in rows.values() for row in own]
    name = choice.stem if options.develop else options.name
    report.write_csv(report.RESULTS / f"{name}.csv", [*every, *found])
    shown = {"source": stage.source, "pose": stage.pose, "truth": stage.truth, **results}
    report.contact_sheet(
        report.RESULTS / f"{name}.jpg", [(arm, pictures[:SHOWN]) for arm, pictures in shown.items() if arm != SOURCE]
    )
    summary = {
        "command": report.command("fusion_embedding.py"),
        "sha256": digests,
        "machine": report.machine(),
        "sampling": {
            "sampler": SAMPLER, "scheduler": sampling.SCHEDULER, "steps": STEPS, "guidance": guidance,
            "guidance of the words": sampling.CFG, "first_seed": SEED,
        },
        "interval": "95 %: [mean, low, high]",
        "arms": {arm: report.summary(own, MEASURES) for arm, own in rows.items()},
        "retrieval": {
            arm: report.summary([row for row in found if row["arm"] == arm], ("top_1", "top_5"))
            for arm in dict.fromkeys(row["arm"] for row in found)
        },
    }
    if options.develop:
        summary["chosen"] = min(GUIDANCE, key=lambda value: rank(rows[f"guidance {value:g}"]))
        del summary["sampling"]["guidance"]
    else:
        summary["comparisons"] = comparisons(every)
    for arm, own in (summary["arms"] | summary["retrieval"]).items():
        print(arm, own, flush=True)
    report.write_json(report.RESULTS / f"{name}.json", summary)


if __name__ == "__main__":
    main()
