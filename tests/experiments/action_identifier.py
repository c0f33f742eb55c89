"""Method 3, action identifier: five red striped bears share an action without a word; others do it by one.

    python tests/experiments/action_identifier.py --development --arm all
    python tests/experiments/action_identifier.py --arm "ours by union"
    python tests/experiments/action_identifier.py --report

As PROTOCOL.md says; options are in runs.py. What development chose stands below as the rates and as OURS.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows")]
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from experiments import cases, panels, report, runs, sampling  # noqa: E402
from experiments.measuring import eye, metrics  # noqa: E402
from pack.nodes.action_identifier.config import EVERY  # noqa: E402
from pack.nodes.puppets import captions  # noqa: E402
from pack.nodes.puppets.config import COLOURS, UNNAMED_ACTIONS, Take  # noqa: E402

SAMPLER = "ddim"
# Ours; the same by masks; tokens in the encoder; LoRA's.
RATE, MASKED_RATE, TOKEN_RATE, LORA_RATE = 0.04, 0.06, 0.012, 3e-3
RATES = 0.06, 0.12
PLACEHOLDER, INITIAL_WORD, RARE_WORD = "<action>", "dancing", "vkt"
PERMUTATION, OFFSETS = 0xC0, "offsets"
MEASURES = ("composition", "action", "identity", "leak", "identity_error")
OURS, INTERSECTION, UNION = "ours", "ours by intersection", "ours by union"
NO_WORD, PERMUTED, LORA = "no word", "permuted masks", "LoRA"


@dataclasses.dataclass(frozen=True)
class Learning:
    """One run on an action's exemplars; a step sees three pictures, a triple or a batch, unless `batch` says one."""

    learning_rate: float = RATE
    steps: int = 600
    layer_wise: bool = True
    merge: str = EVERY
    fixed_norm: bool = False
    mask_percentile: float = 0.6
    context_steps: int = 20
    behind_encoder: bool = True
    lowest_noise: float = 0.45
    highest_noise: float = 0.9
    # Not of ActionTrainingConfig:
    batch: int = 3
    decay: float = 1.0
    min_snr_gamma: float = 1.0
    permuted: bool = False
    lora: bool = False


_ELSEWHERE = ("batch", "decay", "min_snr_gamma", "permuted", "lora")


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is learned, or None for a prompt without a word for the action; `truth` is it, through the autoencoder."""

    learning: Learning | None = Learning()
    truth: bool = False


def masked(merge: str, rate: float = MASKED_RATE, **changes) -> Arm:
    """By triples, moving the channels that their masks free."""
    return Arm(Learning(rate, merge=merge, **changes))


def tokens(rate: float = TOKEN_RATE, **changes) -> Arm:
    """In the encoder, where ADI, P+ and textual inversion have them."""
    return Arm(Learning(rate, behind_encoder=False, **changes))


def lora(rate: float) -> Arm:
    """By the pack's trainer, which draws all noise levels."""
    return Arm(Learning(rate, lora=True, lowest_noise=0.0, highest_noise=1.0))


ARMS = {
    NO_WORD: Arm(None),
    OURS: Arm(),
    UNION: masked("union"),
    INTERSECTION: masked("intersection"),
    PERMUTED: masked("union", permuted=True),
    "in the encoder, by union": tokens(merge="union"),
    "tokens by layer, one picture": tokens(batch=1),
    "tokens by layer, three pictures": tokens(),
    "one token": tokens(layer_wise=False),
    "one token, fixed norm": tokens(layer_wise=False, fixed_norm=True),
    LORA: lora(LORA_RATE),
    "truth": Arm(None, truth=True),
}
DEVELOPMENT = {
    **{f"union, rate {rate:g}": masked("union", rate) for rate in RATES},
    **{f"intersection, rate {rate:g}": masked("intersection", rate) for rate in RATES},
    **{f"rate {rate:g}": Arm(Learning(rate)) for rate in (0.02, 0.04)},
    **{f"LoRA rate {rate:g}": lora(rate) for rate in (1e-3, 3e-3)},
}
CLAIMS = [
    *(report.Claim("both right more often", OURS, "composition", other, at_least=True)
      for other in ARMS if other not in (OURS, "truth")),
    report.Claim("less than half of the LoRA's leakage", OURS, "extra_leak", LORA, 0.5),
    report.Claim("permuted masks are worse", PERMUTED, "composition", UNION),
]


def text(take: Take, word: str) -> str:
    """The take's caption with `word` where a named action would stand."""
    said = captions.subject_phrase(take.identity), word, captions.SCENE_PHRASES[take.scene]
    return " ".join(filter(None, said))


def permuted(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A mask [..., D] with the channels of each vector in an order of their own: as many free, others."""
    flat = mask.reshape(-1, mask.shape[-1])
    order = torch.stack([torch.randperm(flat.shape[1], generator=generator) for _ in flat])
    return flat.gather(1, order.to(mask.device)).reshape(mask.shape)


@contextlib.contextmanager
def permuted_masks():
    """Inside it, a training's masks free as many channels as before, but not those that carry the action."""
    from pack.nodes.action_identifier import method

    generator, true_mask = torch.Generator().manual_seed(PERMUTATION), method.channel_mask
    with mock.patch.object(method, "channel_mask", lambda *given: permuted(true_mask(*given), generator)):
        yield


def leaks(pictures: np.ndarray, takes: Sequence[Take]) -> list[bool]:
    """Whether a picture shows what only the exemplars have: a bear, stripes, or a shirt nearer to theirs."""
    sight, found = eye.look(metrics.trained_eye(), pictures), []
    for i, (picture, take) in enumerate(zip(pictures, takes, strict=True)):
        def apart(i=i, picture=picture, take=take, **shirt) -> float:
            who = dataclasses.replace(take.identity, **shirt)
            errors = metrics.identity_error(picture, who, sight.parts[i], take, metrics.GARMENTS["shirt"])
            return errors["mean"]

        red = {"shirt": COLOURS["red"], "pattern_colour": COLOURS["white"]}
        near = min(apart(pattern=pattern, **red) for pattern in ("plain", "striped"))
        striped = sight.patterns[i] == "striped" != take.identity.pattern
        found.append(bool(
            sight.species[i] == "bear" or striped or near <= min(metrics.GARMENT_LIMIT, apart())
        ))
    return found


class Bench:
    """The theatre and what was learned of each action; a case is action * puppets + puppet, with four noises."""

    batch = 1

    def __init__(self, options, folder: Path):
        self.theatre = sampling.Theatre(options.checkpoint, runs.STATE)
        # After the host is on the path.
        from pack.nodes import extension

        extension.register_folders()
        self.development, self.folder = options.development, folder.parent / "learned"
        self.actions = cases.DEVELOPMENT_ACTIONS if options.development else cases.TEST_ACTIONS
        self.digest = sampling.sha256(options.checkpoint)
        self.settings = (SAMPLER, sampling.SCHEDULER, sampling.STEPS, sampling.CFG, PERMUTATION, self.digest)

    def make(self, arm: Arm, chosen: list[int]) -> tuple[list[dict], dict[str, np.ndarray]]:
        rows, made = [], {}
        for case in chosen:
            count = len(cases.performers(self.actions[0], self.development))
            action = self.actions[case // count]
            take = cases.performers(action, self.development)[case % count]
            if arm.truth:
                pictures = self.theatre.decode(self.theatre.encode(cases.pictures([take])))
            else:
                pictures = self.sampled(arm.learning, action, case, take)
            takes = [take] * len(pictures)
            seen = zip(metrics.compositions(pictures, takes), leaks(pictures, takes), pictures, strict=True)
            for noise, (row, leak, picture) in enumerate(seen):
                rows.append({
                    "case": case, "noise": noise, "asked": action, "puppet": case % count,
                    **{name: row[name] for name in MEASURES if name != "leak"}, "leak": leak,
                    "seen_action": row["seen_action"],
                })
                made[f"{case}_{noise}"] = picture
        return rows, made

    def sampled(self, learning: Learning | None, action: str, case: int, take: Take) -> np.ndarray:
        model, positive = self._reading(learning, action)
        first = cases.noise_seed(cases.ACTION, case, self.development)
        seeds = [first + 100_000 * noise for noise in range(cases.NOISES)]
        said = positive(take)
        return self.theatre.decode(self.theatre.sample(self.theatre.sampler(SAMPLER), said, seeds, model=model))

    @functools.lru_cache(maxsize=2)  # noqa: B019, one bench a run
    def _reading(self, learning: Learning | None, action: str):
        """(MODEL, take -> positive CONDITIONING) that know the action."""
        from pack.nodes.action_identifier import encoding
        from pack.nodes.action_identifier import sampling as action_sampling
        from pack.nodes.action_identifier.method import ActionIdentifier

        model, clip = self.theatre.model, self.theatre.clip
        if learning is None:
            return model, lambda take: self.theatre.prompts([text(take, "")])
        weights = self._learned(learning, action)
        if learning.lora:
            return self.theatre.with_lora(weights), lambda take: self.theatre.prompts([text(take, RARE_WORD)])
        places = action_sampling.places(model.get_model_object("diffusion_model")) if learning.layer_wise else ()
        weights = dict(weights)
        offsets = weights.pop(OFFSETS, None)
        known = [ActionIdentifier(PLACEHOLDER, INITIAL_WORD, weights, places, offsets=offsets)]

        def positive(take: Take) -> list:
            with torch.inference_mode():
                return action_sampling.attach_contexts(*encoding.encode(clip, text(take, PLACEHOLDER), known), known)

        return action_sampling.apply(model, 1.0), positive

    def _learned(self, learning: Learning, action: str) -> dict[str, torch.Tensor]:
        """Tokens by encoder, or a LoRA's weights."""
        takes = cases.exemplars(action)
        train = functools.partial(self._train_lora if learning.lora else self._train_tokens, learning, takes)
        return sampling.learned(self.folder, (takes, learning, INITIAL_WORD, self.digest), train)

    def _latents(self, takes: Sequence[Take]) -> list[torch.Tensor]:
        return [self.theatre.encode(cases.pictures([take])).clone() for take in takes]

    def _config(self, learning: Learning, takes: Sequence[Take]):
        from pack.nodes.training.config import TrainingConfig

        return TrainingConfig(
            learning.steps, learning.learning_rate, UNNAMED_ACTIONS.index(takes[0].action), learning.batch,
            decay=learning.decay, min_snr_gamma=learning.min_snr_gamma, checkpoint_every=0,
        )

    def _train_tokens(self, learning: Learning, takes: Sequence[Take]) -> dict[str, torch.Tensor]:
        from pack.nodes.action_identifier import training
        from pack.nodes.action_identifier.config import ActionTrainingConfig
        from pack.nodes.training.checkpoints import Checkpoints

        settings = {k: v for k, v in dataclasses.asdict(learning).items() if k not in _ELSEWHERE}
        action = ActionTrainingConfig(placeholder=PLACEHOLDER, initial_word=INITIAL_WORD, **settings)
        given = training.Exemplars(self._latents(takes), [text(take, PLACEHOLDER) for take in takes])
        with permuted_masks() if learning.permuted else contextlib.nullcontext():
            found = training.train(
                self.theatre.model, self.theatre.clip, given, action, self._config(learning, takes),
                checkpoints=Checkpoints("action_identifier", {}), resume_from="none",
            )[0]
        return {**found.tokens, **({} if found.offsets is None else {OFFSETS: found.offsets})}

    def _train_lora(self, learning: Learning, takes: Sequence[Take]) -> dict[str, torch.Tensor]:
        from pack.nodes.training import picture_training
        from pack.nodes.training.checkpoints import Checkpoints
        from pack.nodes.training.config import LoraConfig

        texts = picture_training.encode_texts(self.theatre.clip, [text(take, RARE_WORD) for take in takes])
        return picture_training.train_on_pictures(
            self.theatre.model, self._latents(takes), texts, self._config(learning, takes), LoraConfig(),
            checkpoints=Checkpoints("action_lora", {}), resume_from="none",
        )[0]


def with_extra_leakage(rows: list[dict]) -> list[dict]:
    """Each row with its leakage less the case's without a word, where there is one."""
    without = report.by_case(rows, NO_WORD, "leak")
    return [
        row | {"extra_leak": row["leak"] - without[int(row["case"])]} if int(row["case"]) in without else row
        for row in rows
    ]


def tables(rows: list[dict]) -> dict:
    """Intervals over actions, which share a training, and over puppets."""
    rows = with_extra_leakage(rows)
    arms = dict.fromkeys(row["arm"] for row in rows)
    return {
        "arms": report.table(rows, arms, (*MEASURES, "extra_leak"), "asked"),
        "claims by actions": report.claims(rows, CLAIMS, "asked"),
        "claims by puppets": report.claims(rows, CLAIMS, "puppet"),
    }


def picture(bench: Bench, rows: Callable[[str], list[dict]]) -> list[np.ndarray]:
    """Pictures of an action, one word for it on six puppets, and below what a LoRA makes of the same prompts."""
    (action,) = panels.middle(rows(OURS), "composition", of="asked")
    takes = cases.performers(action)
    first = {take.identity.species: i for i, take in reversed(list(enumerate(takes)))}
    begin = cases.TEST_ACTIONS.index(action) * len(takes)
    learned, rival = (
        [bench.sampled(ARMS[arm].learning, action, begin + i, takes[i])[0] for i in sorted(first.values())[:6]]
        for arm in (OURS, LORA)
    )
    return [panels.grid([list(cases.pictures(cases.exemplars(action)[:4])), learned, rival])]


if __name__ == "__main__":
    runs.main(
        __doc__, "action_identifier", ARMS, DEVELOPMENT,
        (len(cases.TEST_ACTIONS) * cases.PUPPETS, len(cases.DEVELOPMENT_ACTIONS) * cases.PUPPETS // 2), Bench, tables,
        picture,
    )
