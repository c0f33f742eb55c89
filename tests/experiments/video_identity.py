"""The video identity adapter: does a close-up keep the looks of a small reference? Method 5 of PROTOCOL.md.

    python tests/experiments/video_identity.py --development --arm all   # how to train, and how to show
    python tests/experiments/video_identity.py --arm all                 # or one after the other
    python tests/experiments/video_identity.py --report

An arm's adapter is trained when it is first asked for, and kept in .cache/experiments/video_identity; "ours" is the
shipped one, of SHIPPED_TRAINING (shipped_file.py). Identity error and the rest are those of the first, the middle and
the last frame; "pilot_error" is that of head, hat and shirt under the true parts, as the pilot measured it.
"another's reference" is a puppet's of the same species, of which the prompt is as true.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows")]
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
    import torch

    scripts.alias_pack()
    scripts.add_comfy_path(ROOT / ".cache" / "experiments" / "host", cpu=not torch.cuda.is_available())

import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from experiments import cases, panels, report, runs, sampling, theatre_wan  # noqa: E402
from experiments import video_arms as arms  # noqa: E402
from experiments.measuring import metrics  # noqa: E402
from experiments.video_arms import Training  # noqa: E402
from pack.nodes.puppets import captions, world  # noqa: E402
from pack.nodes.puppets.config import SCENES, Take  # noqa: E402
from pack.nodes.video_identity import method  # noqa: E402
from pack.nodes.video_identity.config import EVEN, VideoIdentityConfig  # noqa: E402

MODELS = ROOT / "workflows" / "models"
TRANSFORMER = MODELS / "diffusion_models" / "puppets_wan.safetensors"
AUTOENCODER = MODELS / "vae" / "puppets_wan_vae.safetensors"
ADAPTER = MODELS / "loras" / "puppets_wan_identity.safetensors"
NAME, COUNTS = "video_identity", (72, 12)
PILOT = ("head", "headwear", "torso")
OWN, ANOTHER, SMALL, STILL, TRUTH = "own", "another", "small", "still", "truth"
CFG = theatre_wan.CFG

TRAININGS = {kind: Training(kind) for kind in arms.KINDS}
RATES = 3, 10, 30
SHIPPED_TRAINING = arms.ByMuon(rate=100, steps=3_000)
# What settings were compared by:
SHORT, SHORT_BY_MUON = (
    kind(rate=rate, decay=decay, steps=600, stills=False, batch=8)
    for kind, rate, decay in ((Training, 10, 0.0), (arms.ByMuon, 100, 1.0))
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """`training` is None where nothing is trained; `file` is the digest of the shipped adapter where that is shown;
    `shows` is what stands for the reference, or for the clip.
    """

    training: Training | None = None
    shows: str = ""
    words: bool = False
    cfg: float = CFG
    strength: float = 1.0
    guidance: float = 0.0
    file: str = ""


SHIPPED = Arm(shows=OWN, file=sampling.sha256(ADAPTER))
BEST = dataclasses.replace(SHIPPED, strength=2.0, guidance=2.0)  # on development
NONE, WORDS, OURS, OTHERS = "none", "all words", "ours", "another's reference"
ARMS = {
    NONE: Arm(),
    WORDS: Arm(words=True),
    **{name: Arm(training, OWN) for name, training in TRAININGS.items()},
    "shipped, as published": SHIPPED,
    OURS: BEST,
    OTHERS: dataclasses.replace(BEST, shows=ANOTHER),
    "small references": dataclasses.replace(BEST, shows=SMALL),
    "reference untouched": Arm(shows=STILL),
    "truth through the autoencoder": Arm(shows=TRUTH),
}


def development() -> dict[str, Arm]:
    """How to train, over few steps; then how to show what was trained."""
    adamw = {
        **{f"rate {rate}": {"rate": rate} for rate in RATES}, "even levels": {"weighting": EVEN},
        "rate 10, falling": {"decay": 1.0}, "rate 30, falling": {"rate": 30, "decay": 1.0},
    }
    muon = {
        "rate 100": {}, "rate 200": {"rate": 200}, "rank 4": {"rank": 4}, "rank 64": {"rank": 64},
        "face masks": {"masked": True},
    }
    trained = {name: dataclasses.replace(SHORT, **how) for name, how in adamw.items()}
    trained |= {f"Muon, falling, {name}": dataclasses.replace(SHORT_BY_MUON, **how) for name, how in muon.items()}
    shown = [(1, 0), (2, 0), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3)]
    return {
        NONE: Arm(),
        **{f"600 steps, {name}": Arm(training, OWN) for name, training in trained.items()},
        **{
            f"shipped, strength {strength}, guidance {guidance}":
            dataclasses.replace(SHIPPED, strength=float(strength), guidance=float(guidance))
            for strength, guidance in shown
        },
    }


MEASURES = (
    "identity_error", "worn_error", "pilot_error", "other_error", "nearer_other", "identity", "action", "composition",
    "species_read", "movement", "rejected", "step_seconds", "seconds",
)
CLAIMS = (
    report.Claim("identity error at most half of none's", OURS, "identity_error", NONE, 0.5),
    report.Claim("and no higher than all words'", OURS, "identity_error", WORDS),
    report.Claim("another's reference: 75 % nearer the other", OTHERS, "nearer_other", 0.75, at_least=True),
    report.Claim("action no lower than none's", OURS, "action", NONE, margin=0.05, at_least=True),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A clip to make, a picture of who is to be in it, and the same picture of another of the species."""

    puppet: int
    truth: Take
    reference: Take
    other: Take


def case(index: int, develop: bool = False) -> Case:
    """Case `index`: puppets in turn, each in three named actions, in daylight, since no input could tell another."""
    puppet, turn = index % cases.PEOPLE, index // cases.PEOPLE
    everybody = cases.people(develop)
    order = cases.generator(cases.VIDEO, 1_000 + puppet, develop).permutation(arms.allowed(everybody[puppet]))
    rng = cases.generator(cases.VIDEO, index, develop)
    truth = world.staged(everybody[puppet], str(order[turn]), world.pick(rng, SCENES), rng, "close_up", light="day")
    reference = arms.reference_take(truth, rng)
    # Of people, species come in turn, eight of them.
    other = dataclasses.replace(reference, identity=everybody[(puppet + 8) % cases.PEOPLE])
    return Case(puppet, truth, reference, other)


class Bench:
    """The theatre's video model, and what an arm makes of cases."""

    batch = 8

    def __init__(self, options, folder: Path):
        self.develop, self.theatre = options.development, video_theatre()
        self.folder = folder.parent / f"trained_{report.fingerprint(*digests())}"
        self.settings = theatre_wan.SAMPLER, theatre_wan.STEPS, theatre_wan.SIZE, theatre_wan.FRAMES, digests()

    def prepare(self, arm: Arm) -> None:
        """Train what the arm needs."""
        if arm.training:
            arms.learned(self.theatre, self.folder, arm.training)

    @torch.no_grad()
    def make(self, arm: Arm, some: list[int]) -> tuple[list[dict], dict[str, np.ndarray]]:
        """Rows, and of each case the clip's frames side by side behind the reference, or behind white."""
        chosen = [case(i, self.develop) for i in some]
        shown = [self.reference(one, arm.shows, i) for i, one in zip(some, chosen, strict=True)]
        clips = self.clips(arm, some, chosen, shown)
        rows = rows_of(chosen, clips)
        cost = {"step_seconds": arms.learned(self.theatre, self.folder, arm.training)[1]} if arm.training else {}
        for i, row, one in zip(some, rows, chosen, strict=True):
            row.update(case=i, puppet=one.puppet, **cost)
        beside = [as_bytes(image if arm.shows else torch.ones_like(image))[0] for image in shown]
        sides = zip(some, beside, clips, strict=True)
        return rows, {f"{i:03}": np.concatenate([image, *clip], axis=1) for i, image, clip in sides}

    def reference(self, one: Case, shows: str, index: int) -> torch.Tensor:
        """float [1, 96, 96, 3]: what stands for the reference in an arm."""
        image = arms.reference_image(one.other if shows == ANOTHER else one.reference)
        if shows == SMALL:
            return arms.small(image, cases.generator(cases.VIDEO, 2_000 + index, self.develop))
        return image

    def clips(self, arm: Arm, some: list[int], chosen: list[Case], shown: list[torch.Tensor]) -> np.ndarray:
        """uint8 [N, T, H, W, 3]."""
        theatre = self.theatre
        if arm.shows == STILL:
            return np.stack([as_bytes(image).repeat(theatre_wan.FRAMES, 0) for image in shown])
        if arm.shows == TRUTH:
            return theatre.decode(theatre.encode(truths(chosen)))
        texts = [captions.caption(one.truth, clothes=arm.words) for one in chosen]
        if not (arm.training or arm.file):
            return theatre.decode(self.sampled(theatre.model, texts, some, arm.cfg))
        kind = arm.training.kind if arm.training else arms.RESTRICTED
        adapter = arms.learned(theatre, self.folder, arm.training)[0] if arm.training else shipped()
        config, latents = VideoIdentityConfig(arm.strength, reference_guidance=arm.guidance), []
        with arms.instead(kind):  # a reference belongs to a model, so one case at a time
            for i, text, image in zip(some, texts, shown, strict=True):
                latent = theatre.vae.encode(image)
                model = arms.applied(kind, theatre.model, adapter, latent, config)
                latents.append(self.sampled(model, [text], [i], arm.cfg))
        return theatre.decode(torch.cat(latents))

    def sampled(self, model, texts: list[str], some: list[int], cfg: float) -> torch.Tensor:
        """Latents of these cases' noises."""
        theatre, seeds = self.theatre, [cases.noise_seed(cases.VIDEO, i, self.develop) for i in some]
        return theatre.sample(
            theatre.sampler(theatre_wan.SAMPLER), theatre.prompts(texts), seeds, steps=theatre_wan.STEPS, cfg=cfg,
            size=theatre_wan.SIZE, model=model,
        )


def video_theatre() -> sampling.VideoTheatre:
    """By ComfyUI's own loaders."""
    return sampling.VideoTheatre(TRANSFORMER, AUTOENCODER, runs.STATE, theatre_wan.FRAMES)


def shipped() -> method.VideoAdapter:
    """The adapter that comes with the theatre."""
    return method.adapter_from({name: part.float() for name, part in safetensors.torch.load_file(ADAPTER).items()})


def digests() -> tuple[str, ...]:
    """Of the models, the pictures' checkpoint for its text encoder, and of what all trainings share."""
    return *(sampling.sha256(path) for path in (TRANSFORMER, AUTOENCODER, sampling.CHECKPOINT)), arms.FIXED


def truths(chosen: list[Case]) -> np.ndarray:
    """uint8 [N, T, H, W, 3]."""
    return theatre_wan.drawn([one.truth for one in chosen], theatre_wan.SIZE, theatre_wan.FRAMES)


def as_bytes(image: torch.Tensor) -> np.ndarray:
    """uint8 [N, H, W, 3] of pictures in 0..1."""
    return (image * 255).round().to(torch.uint8).numpy()


def rows_of(chosen: list[Case], clips: np.ndarray) -> list[dict]:
    """One row a clip, beside the case's own puppet and the other one."""
    takes = [one.truth for one in chosen]
    rows = theatre_wan.rows_of("", takes, clips, truths(chosen))
    for i, one in enumerate(chosen):
        frames = theatre_wan.judged(clips.shape[1])
        others, under = [], []
        for frame in frames:
            take = theatre_wan.later(one.truth, frame)
            beside = dataclasses.replace(take, identity=one.other.identity)
            others.append(metrics.compositions(clips[i][frame][None], [beside])[0]["identity_error"])
            parts = cases.drawn(take, theatre_wan.SIZE).parts
            under.append(metrics.identity_error(clips[i][frame], take.identity, parts, take, PILOT)["mean"])
        rows[i].update(other_error=float(np.mean(others)), pilot_error=float(np.mean(under)))
        rows[i]["nearer_other"] = rows[i]["other_error"] < rows[i]["identity_error"]
        del rows[i]["arm"]
    return rows


def tables(rows: list[dict]) -> dict:
    """Of puppets, whose cases go together."""
    names = dict.fromkeys(row["arm"] for row in rows)
    return {"arms": report.table(rows, names, MEASURES, "puppet"), "claims": report.claims(rows, CLAIMS, "puppet")}


def picture(bench: Bench, rows: Callable[[str], list[dict]]) -> list[np.ndarray]:
    """One prompt and noise, three references; below, without a reference."""
    index = int(panels.middle(rows(OURS), "identity_error")[0])
    one, everybody = case(index), cases.people()
    people = [everybody[(one.puppet + step) % cases.PEOPLE] for step in (0, 8, 16)]  # of one species
    shown = [arms.reference_image(dataclasses.replace(one.reference, identity=who)) for who in people]
    ours, without = (
        bench.clips(ARMS[arm], [index] * len(shown), [one] * len(shown), shown) for arm in (OURS, NONE)
    )
    references = [as_bytes(image)[0] for image in shown]
    seen = range(0, ours.shape[1], 2)  # every second frame, for a smaller file
    return [panels.grid([references, list(ours[:, t]), list(without[:, t])]) for t in seen]


if __name__ == "__main__":
    runs.main(__doc__, NAME, ARMS, development(), COUNTS, Bench, tables, picture)
