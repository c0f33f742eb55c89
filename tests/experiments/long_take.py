"""Long takes of six windows: does a puppet keep its looks from the first to the last? Method 6 of PROTOCOL.md.

    python tests/experiments/long_take.py --arm all     # by the shipped adapter, shown as in video_identity.py
    python tests/experiments/long_take.py --report

A take has 49 frames and six actions in turn. In ComfyUI's Context Windows every window has 9 frames, of which it
shares one latent frame with its neighbour, and a text of its own. Chained, each window is made for itself, from the
last frame of the one before, which a noise mask holds. A window is judged by three of the eight frames that it adds:
the first, the fourth and the last, which in Context Windows is of the latent frame that the next window has, too.
"""

import dataclasses
import sys
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
import torch  # noqa: E402
from comfy.context_windows import ContextFuseMethods, ContextSchedules  # noqa: E402
from comfy_extras.nodes_context_windows import WanContextWindowsManualNode  # noqa: E402
from experiments import cases, report, runs, theatre_wan  # noqa: E402
from experiments import video_arms as arms  # noqa: E402
from experiments import video_identity as video  # noqa: E402
from experiments.measuring import eye, metrics  # noqa: E402
from pack.nodes.drift_alignment.config import DriftAlignmentConfig  # noqa: E402
from pack.nodes.drift_alignment.method import align_drift  # noqa: E402
from pack.nodes.puppets import captions, world  # noqa: E402
from pack.nodes.puppets.config import SCENES, Take  # noqa: E402
from pack.nodes.video_identity import method  # noqa: E402
from pack.nodes.video_identity import sampling as applying  # noqa: E402
from pack.nodes.video_identity.config import VideoIdentityConfig  # noqa: E402

NAME, COUNTS = "long_take", (24, 12)
WINDOWS, WINDOW, SHARED = 6, 3, 1  # latent frames of a window, and of those that it shares
LATENT_FRAMES = WINDOWS * (WINDOW - SHARED) + SHARED
OWN_FRAMES = 4 * (WINDOW - SHARED)  # a window's frames that are no other's
JUDGED = 1, 4, 8  # of the nine frames
HALF = WINDOWS // 2


@dataclasses.dataclass(frozen=True)
class Arm:
    """`references`: how many puppets are shown; one makes all windows, two a half each."""

    references: int = 0
    chained: bool = False
    aligned: bool = False
    shown: video.Arm = video.BEST


NONE, REFERENCE, CHAINED, BOTH, ALIGNED, TWO = (
    "none", "reference", "chained", "chained + reference", "chained + reference + alignment", "two references"
)
ARMS = {
    NONE: Arm(shown=video.Arm()),
    REFERENCE: Arm(1),
    CHAINED: Arm(chained=True, shown=video.Arm()),
    BOTH: Arm(1, chained=True),
    ALIGNED: Arm(1, chained=True, aligned=True),
    TWO: Arm(2),
}

ERRORS = tuple(f"error_{i}" for i in range(1, WINDOWS + 1))
MEASURES = (*ERRORS, "identity_error", "drift", "action", "nearer_first", "nearer_second", "seconds")
CLAIMS = (
    *(report.Claim(f"window {i} nearer than without a reference", REFERENCE, name, NONE)
      for i, name in enumerate(ERRORS, 1)),
    report.Claim(
        "the last window at most 1.1 times the first", REFERENCE, ERRORS[-1], REFERENCE, 1.1, other_measure=ERRORS[0]
    ),
    report.Claim("colour drift at most half with alignment", ALIGNED, "drift", BOTH, 0.5),
    report.Claim("75 % of second halves nearer the second puppet", TWO, "nearer_second", 0.75, at_least=True),
    report.Claim("75 % of first halves nearer the first puppet", TWO, "nearer_first", 0.75, at_least=True),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A take a window, of one puppet in one scene; pictures of it and of another of its species."""

    windows: tuple[Take, ...]
    reference: Take
    second: Take


def case(index: int, develop: bool = False) -> Case:
    """Case `index`, a puppet's: the actions that a close-up has, in turn, in daylight."""
    everybody, rng = cases.people(develop), cases.generator(cases.LONG_TAKE, index, develop)
    who = everybody[index % cases.PEOPLE]
    actions = [str(action) for action in rng.permutation(arms.allowed(who))]
    first = world.staged(who, actions[0], world.pick(rng, SCENES), rng, "close_up", light="day")
    windows = tuple(dataclasses.replace(first, action=actions[i % len(actions)]) for i in range(WINDOWS))
    reference = arms.reference_take(first, rng)
    second = dataclasses.replace(reference, identity=everybody[(index + 8) % cases.PEOPLE])
    return Case(windows, reference, second)


class Bench:
    """The theatre's video model and its adapter."""

    batch = 1

    def __init__(self, options, folder: Path):
        self.develop, self.theatre = options.development, video.video_theatre()
        self.settings = theatre_wan.SAMPLER, theatre_wan.STEPS, WINDOWS, WINDOW, SHARED, video.digests()

    @torch.no_grad()
    def make(self, arm: Arm, some: list[int]) -> tuple[list[dict], dict[str, np.ndarray]]:
        """A row a take, and its windows below each other, each with all its frames."""
        rows, pictures = [], {}
        for i in some:
            one = case(i, self.develop)
            frames = self.chained(arm, one, i) if arm.chained else self.windowed(arm, one, i)
            rows.append({"case": i, **row_of(one, frames)})
            starts = range(0, len(frames) - 1, OWN_FRAMES)
            pictures[f"{i:03}"] = np.concatenate(
                [np.concatenate([*frames[start : start + OWN_FRAMES + 1]], axis=1) for start in starts]
            )
        return rows, pictures

    def noise(self, index: int) -> torch.Tensor:
        """[1, 16, LATENT_FRAMES, h, w], the same for every arm."""
        shape, seed = list(self.theatre.latent_shape(theatre_wan.SIZE)), self.seed(index)
        shape[1] = LATENT_FRAMES
        return torch.randn([1, *shape], generator=torch.Generator().manual_seed(seed))

    def seed(self, index: int) -> int:
        return cases.noise_seed(cases.LONG_TAKE, index, self.develop)

    def model(self, arm: Arm, one: Case):
        """The MODEL with the arm's references."""
        model = self.theatre.model
        masks = [None] if arm.references == 1 else halves()
        config = VideoIdentityConfig(arm.shown.strength, reference_guidance=arm.shown.guidance)
        for take, mask in zip((one.reference, one.second)[: arm.references], masks, strict=False):
            latent = self.theatre.vae.encode(arms.reference_image(take))
            model = applying.apply(model, method.video_reference(video.shipped(), latent, config, mask))
        return model

    def sample(self, arm: Arm, model, texts: list[str], index: int, noise: torch.Tensor, **held) -> torch.Tensor:
        """Latents of one video; its texts are those of the windows in turn."""
        theatre = self.theatre
        return theatre.sample(
            theatre.sampler(theatre_wan.SAMPLER), [theatre.prompts([text])[0] for text in texts], [self.seed(index)],
            steps=theatre_wan.STEPS, cfg=arm.shown.cfg, model=model, noise=noise, **held,
        )

    def windowed(self, arm: Arm, one: Case, index: int) -> np.ndarray:
        """uint8 [T, H, W, 3] by ComfyUI's Context Windows."""
        model = WanContextWindowsManualNode.execute(
            self.model(arm, one), 4 * WINDOW - 3, 4 * SHARED, ContextSchedules.STATIC_STANDARD, 1, False,
            ContextFuseMethods.PYRAMID, True, split_conds_to_windows=True,
        ).result[0]
        return self.theatre.decode(self.sample(arm, model, texts(one), index, self.noise(index)))[0]

    def chained(self, arm: Arm, one: Case, index: int) -> np.ndarray:
        """uint8 [T, H, W, 3], window after window, each from the last frame of the one before."""
        model, noise, theatre = self.model(arm, one), self.noise(index), self.theatre
        latents, frames = [], []
        for i, text in enumerate(texts(one)):
            start = i * (WINDOW - SHARED)
            own, held = noise[:, :, start : start + WINDOW], {}
            if frames:
                known, free = torch.zeros_like(own), torch.ones_like(own[:, :1])
                known[:, :, :1] = theatre.vae.encode(torch.from_numpy(frames[-1][None]).float() / 255)
                free[:, :, :1] = 0
                held = {"latents": known, "noise_mask": free}
            found = self.sample(arm, model, [text], index, own, **held)
            if arm.aligned and latents:
                found = align_drift(found, latents, DriftAlignmentConfig())
            latents.append(found)
            frames.extend(theatre.decode(found)[0][bool(frames):])
        return np.stack(frames)


def texts(one: Case) -> list[str]:
    """A window's caption, without clothes."""
    return [captions.caption(take, clothes=False) for take in one.windows]


def halves() -> list[torch.Tensor]:
    """Masks [T, 1, 1] of the frames of windows 1 to 3, and of the later ones."""
    later = torch.arange(4 * (LATENT_FRAMES - 1) + 1) > HALF * OWN_FRAMES
    return [mask.float()[:, None, None].expand(-1, 8, 8) for mask in (~later, later)]


def row_of(one: Case, frames: np.ndarray) -> dict:
    """Identity error of each window, against the second puppet as well by halves, and how far worn colours went."""
    errors, against, actions, colours = [], [], [], []
    for i, take in enumerate(one.windows):
        judged = frames[[i * OWN_FRAMES + frame for frame in JUDGED]]
        second = dataclasses.replace(take, identity=one.second.identity)
        own, other = (metrics.compositions(judged, [asked] * len(judged)) for asked in (take, second))
        errors.append(np.mean([row["identity_error"] for row in own]))
        against.append(np.mean([row["identity_error"] for row in other]))
        actions.append(np.mean([row["action"] for row in own]))
        colours.append(worn_colours(judged))
    first, later = (np.mean(against[part]) - np.mean(errors[part]) for part in (slice(HALF), slice(HALF, None)))
    return {
        **dict(zip(ERRORS, map(float, errors), strict=True)), "identity_error": float(np.mean(errors)),
        **drift(colours[0], colours[-1]), "action": float(np.mean(actions)),
        "nearer_first": bool(first > 0), "nearer_second": bool(later < 0),
    }


def worn_colours(pictures: np.ndarray) -> dict[str, np.ndarray]:
    """The mean CIELAB colour of what is worn, part by part, where the eye sees it, over pictures [N, H, W, 3]."""
    sight = eye.look(metrics.trained_eye(), pictures)
    found = [metrics.part_colours(*pair, metrics.CLOTHES) for pair in zip(pictures, sight.parts, strict=True)]
    names = {name for own in found for name in own}
    return {name: np.mean([own[name] for own in found if name in own], axis=0) for name in names}


def drift(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean ΔE76 of the parts that are seen in both: arms come and go with the actions."""
    both = sorted(before.keys() & after.keys())
    return {"drift": float(np.mean([np.linalg.norm(after[name] - before[name]) for name in both]))} if both else {}


def tables(rows: list[dict]) -> dict:
    """A take a puppet: cases need no clusters."""
    names = dict.fromkeys(row["arm"] for row in rows)
    return {"arms": report.table(rows, names, MEASURES), "claims": report.claims(rows, CLAIMS)}


if __name__ == "__main__":
    runs.main(__doc__, NAME, ARMS, ARMS, COUNTS, Bench, tables)
