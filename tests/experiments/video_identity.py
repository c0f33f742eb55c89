"""The video identity adapter on the theatre: does a test puppet keep its own looks through a clip?

    python tests/experiments/video_identity.py --develop    # prompt and adapter on development cases
    python tests/experiments/video_identity.py --arm NAME   # makes the clips of one arm, writes no result
    python tests/experiments/video_identity.py              # every arm on the test cases

As PROTOCOL.md says; resumes what is there. The two trained variants need the state of puppets_wan.py. Writes
results/video_identity.csv (one row a case and arm), .json (means with 95 % intervals) and .jpg; development writes
results/video_identity_development.*.
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
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from experiments import report, sampling, theatre_wan  # noqa: E402
from pack.nodes.puppets import captions, render, world  # noqa: E402
from pack.nodes.puppets.config import SCENES, Take, actions_of  # noqa: E402
from safetensors import safe_open  # noqa: E402

STATE = ROOT / ".cache" / "experiments"
TRANSFORMER = MODELS / "diffusion_models" / "puppets_wan.safetensors"
AUTOENCODER = MODELS / "vae" / "puppets_wan_vae.safetensors"
ADAPTER = MODELS / "loras" / "puppets_wan_identity.safetensors"
CASES, DEVELOPMENT_CASES, SEED = 72, 12, 4_000_000
TEST_KEY, DEVELOPMENT_KEY = 0x51A, 0x51B
BATCH = 8
MEASURES = (
    "identity_error", "identity", "action", "composition", "worn_error", "identity_throughout", "action_throughout",
    "species_read", "pattern_read", "headwear_read", "rejected", "movement",
)
COMPARED = ("identity_error", "worn_error", "identity", "action", "composition", "movement")
PROMPT, WORDS, OURS, UNTRAINED, FIRST = "prompt", "words", "adapter", "no training", "clean first frame"
VANILLA, SHARED = "vanilla attention", "shared positions"
ARMS = (PROMPT, WORDS, OURS, UNTRAINED, FIRST, VANILLA, SHARED)
PAIRS = (
    (WORDS, PROMPT), *((arm, PROMPT) for arm in ARMS[2:]), *((OURS, arm) for arm in ARMS[1:] if arm != OURS),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A clip to make, and the picture of who is to be in it."""

    truth: Take
    reference: Take


def case(index: int, develop: bool) -> Case:
    """Case `index`: identities cycle, the reference shows another action in another scene; both are close-ups."""
    rng = np.random.default_rng([DEVELOPMENT_KEY if develop else TEST_KEY, index])
    everybody = world.test_identities()
    who = world.sample_identity(900_000 + index) if develop else everybody[index % len(everybody)]
    allowed = [
        action for action in actions_of("close_up", True)
        if (who.species, action) not in world.HELD_OUT["close_up"]
        and not (action == "raising hat" and who.headwear == "none")
    ]
    actions = [allowed[int(i)] for i in rng.permutation(len(allowed))[:2]]
    scenes = [SCENES[int(i)] for i in rng.permutation(len(SCENES))[:2]]
    return Case(*(
        world.staged(who, action, scene, rng, "close_up") for action, scene in zip(actions, scenes, strict=True)
    ))


class Stage:
    """The theatre with the adapter, and the cases of a run."""

    def __init__(self, cases: list[Case]):
        self.cases = cases
        self.theatre = sampling.VideoTheatre(TRANSFORMER, AUTOENCODER, STATE, theatre_wan.FRAMES)
        # After the host is on the path.
        from pack.nodes.video_identity import method, reference_picture
        from pack.nodes.video_identity import sampling as applying
        from pack.nodes.video_identity.config import ReferenceConfig, VideoIdentityConfig

        self._method, self._applying, self._config = method, applying, VideoIdentityConfig()
        self._prepare = functools.partial(reference_picture.prepare, config=ReferenceConfig(96, 1.1))
        self.adapter = method.adapter_from(safetensors.torch.load_file(ADAPTER))
        with safe_open(str(ADAPTER), "pt") as file:
            self.training = json.loads(file.metadata()["config"])["training"]

    def picture(self, i: int) -> torch.Tensor:
        """float [1, 96, 96, 3]: the reference of case `i` as Prepare Reference gives it."""
        drawn = render.render(self.cases[i].reference, theatre_wan.SIZE)
        image, mask = (torch.from_numpy(np.array(a)).float()[None] for a in (drawn.image, drawn.mask))
        return self._prepare(image / 255, mask=mask)[0]

    def model(self, arm: str, i: int):
        """The arm's MODEL for case `i`."""
        plain = self.theatre.model
        if arm in (PROMPT, WORDS):
            return plain
        from experiments import video_identity_variants as variants

        latent = self.theatre.vae.encode(self.picture(i))
        if arm == FIRST:
            return variants.as_first_frame(plain, latent)
        if arm in variants.VARIANTS:
            return variants.applied(variants.VARIANTS[arm], plain, self.learned(arm), latent)
        adapter = self.adapter if arm == OURS else self._untrained()
        return self._applying.apply(plain, self._method.video_reference(adapter, latent, self._config))

    @functools.cached_property
    def _zero(self):
        return {name: torch.zeros_like(tensor) for name, tensor in self.adapter.tensors().items()}

    def _untrained(self):
        return self._method.adapter_from(self._zero)

    @functools.cache  # noqa: B019, one stage a run
    def learned(self, arm: str) -> dict[str, torch.Tensor]:
        """The adapter of a variant, trained as the shipped one was; kept as a file between runs."""
        from experiments import video_identity_variants as variants

        key = report.fingerprint(arm, self.training, sampling.sha256(TRANSFORMER))
        path = STATE / f"video_identity_{arm.split()[0]}_{key}.safetensors"
        if not path.exists():
            sys.path.append(str(ROOT / "workflows" / "theatre"))
            import wan_adapter
            fields = {field.name for field in dataclasses.fields(wan_adapter.Config)}
            settings = wan_adapter.Config(**{k: v for k, v in self.training.items() if k in fields})
            with variants.trained_with(variants.VARIANTS[arm]):
                adapter = wan_adapter.train(
                    ROOT / ".cache" / "training" / "puppets_wan", settings, TRANSFORMER, sampling.CHECKPOINT,
                    name=f"puppets_wan_{arm.split()[0]}",
                )
            report.replace(path, safetensors.torch.save(adapter.tensors()))
        return safetensors.torch.load_file(path)

    def clips(self, arm: str, start: int, stop: int) -> np.ndarray:
        """uint8 [N, T, H, W, 3] of cases `start` to `stop` - 1."""
        chosen, theatre = range(start, stop), self.theatre
        worded = functools.partial(captions.caption, clothes=arm == WORDS)
        texts = [worded(self.cases[i].truth) for i in chosen]
        # A reference belongs to a model, so those arms sample one case at a time.
        groups = [list(chosen)] if arm in (PROMPT, WORDS) else [[i] for i in chosen]
        latents = [
            theatre.sample(
                theatre.sampler(theatre_wan.SAMPLER), theatre.prompts([texts[i - start] for i in group]),
                [SEED + i for i in group], steps=theatre_wan.STEPS, cfg=theatre_wan.CFG, size=theatre_wan.SIZE,
                model=self.model(arm, group[0]),
            )
            for group in groups
        ]
        return theatre.decode(torch.cat(latents))


def comparisons(rows: list[dict]) -> dict:
    """Paired differences of an arm to another, [mean, low, high]."""
    by_arm: dict[str, dict] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["case"]] = row
    return {
        f"{arm} - {other}": report.summary(
            [{m: float(row[m]) - float(by_arm[other][i][m]) for m in COMPARED} for i, row in by_arm[arm].items()],
            COMPARED,
        )
        for arm, other in PAIRS if arm in by_arm and other in by_arm
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--develop", action="store_true", help="prompt and adapter on development cases")
    parser.add_argument("--arm", choices=ARMS, help="make this arm's clips alone, write no result")
    parser.add_argument("--cases", type=int, help="by default as the protocol says")
    parser.add_argument("--name", default="video_identity", help="of the result files")
    options = parser.parse_args()
    count = options.cases or (DEVELOPMENT_CASES if options.develop else CASES)
    stage = Stage([case(i, options.develop) for i in range(count)])
    digests = {path.name: sampling.sha256(path) for path in (TRANSFORMER, AUTOENCODER, ADAPTER)}
    kept = report.Pictures(STATE / f"video_identity_{report.fingerprint(digests)}")
    arms = [options.arm] if options.arm else [PROMPT, OURS] if options.develop else list(ARMS)
    takes = [one.truth for one in stage.cases]
    truth = theatre_wan.drawn(takes, theatre_wan.SIZE, theatre_wan.FRAMES)
    rows, shown = [], [("reference", np.stack([reference(stage, i) for i in range(min(8, count))]))]
    for arm in ("autoencoder", *arms):
        make = functools.partial(stage.theatre.round_trip, truth)
        if arm != "autoencoder":
            make = functools.partial(stage.clips, arm)
        name = report.fingerprint(arm, stage.cases, SEED, theatre_wan.STEPS, theatre_wan.CFG, theatre_wan.SAMPLER)
        clips = kept.get(name, count, BATCH, make)
        found = theatre_wan.rows_of(arm, takes, clips, truth)
        rows.extend(found)
        middle = clips[:8, theatre_wan.FRAMES // 2]
        shown.append((f"{arm}, middle frame", middle))
        print(arm, report.summary(found, MEASURES), flush=True)
    if options.arm:
        return
    name = f"{options.name}_development" if options.develop else options.name
    report.write_csv(report.RESULTS / f"{name}.csv", rows)
    report.contact_sheet(report.RESULTS / f"{name}.jpg", shown)
    report.write_json(report.RESULTS / f"{name}.json", {
        "command": report.command("video_identity.py"),
        "sha256": digests,
        "machine": report.machine(),
        "training": stage.training,
        "sampling": {
            "sampler": theatre_wan.SAMPLER, "scheduler": stage.theatre.scheduler, "steps": theatre_wan.STEPS,
            "cfg": theatre_wan.CFG, "size": theatre_wan.SIZE, "frames": theatre_wan.FRAMES, "first_seed": SEED,
        },
        "interval": "95 %: [mean, low, high]",
        "arms": {
            arm: report.summary([row for row in rows if row["arm"] == arm], MEASURES)
            for arm in dict.fromkeys(row["arm"] for row in rows)
        },
        "comparisons": comparisons(rows),
    })


def reference(stage: Stage, i: int) -> np.ndarray:
    """uint8 [96, 96, 3]."""
    return (stage.picture(i)[0] * 255).round().to(torch.uint8).numpy()


if __name__ == "__main__":
    main()
