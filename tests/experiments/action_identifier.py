"""The action identifier on the theatre: five pictures of an action without a word, then it on unseen puppets.

    python tests/experiments/action_identifier.py --develop    # chooses settings on development actions
    python tests/experiments/action_identifier.py              # every arm on the test actions, action by action

As PROTOCOL.md says; resumes what is there. Writes results/action_identifier.csv (one row a picture), .json (means
with 95 % intervals) and .jpg after every action; development writes results/action_identifier_development.* without
pictures.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows")]
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from experiments import report, sampling  # noqa: E402
from experiments.action_bench import (  # noqa: E402
    DEVELOPMENT_ACTIONS,
    MEASURES,
    TEST_ACTIONS,
    by_case,
    cases,
    drawn,
    exemplars,
    rows_of,
    text,
)
from pack.nodes.puppets.config import ACTIONS, Take  # noqa: E402

STATE = ROOT / ".cache" / "experiments"
SAMPLER, STEPS, SEED = "dpmpp_2m", 10, 5_000_000
FEW_ACTIONS, OTHER_BETAS = TEST_ACTIONS[::3], (0.3, 0.9)  # of the arms that vary our own settings
DEVELOPMENT_SIGMAS = (1.0, 1.6, 2.6)  # levels at which the words of named actions tell the most
PLACEHOLDER, INITIAL_WORD, RARE_WORD = "<action>", "dancing", "vkt"
_ELSEWHERE = ("lora", "min_snr_gamma", "batch")  # of Learning, what is no setting of ActionTrainingConfig
CEILING, PROMPT, OURS = "truth through the autoencoder", "prompt alone", "ours"


@dataclasses.dataclass(frozen=True)
class Learning:
    """One run on an action's exemplars. A step sees three pictures, a triple or a batch, unless `batch` says less."""

    learning_rate: float
    steps: int = 200
    layer_wise: bool = True
    triples: bool = True
    mask_percentile: float = 0.6
    merge: str = "union"
    context_steps: int = 20
    min_snr_gamma: float = 1.0
    lora: bool = False
    batch: int = 3


# How tokens are learnt is chosen by what it does for P+-like tokens, and then holds for all tokens, ours too.
SETTINGS: dict[str, Learning] = {
    f"rate {rate:g}, Min-SNR {gamma:g}": Learning(rate, triples=False, min_snr_gamma=gamma)
    for rate, gamma in ((0.004, 1.0), (0.012, 1.0), (0.012, 0.0))
}
LORA_RATE = 3e-3  # the choice of frequency guidance's development


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is learnt, or None for the prompt alone; of which actions, and how many noise seeds a case has."""

    learning: Learning | None
    actions: tuple[str, ...] = TEST_ACTIONS
    seeds: int = 4


class Stage:
    """The theatre, what was learnt in it, and the pictures that it made; both are kept between runs."""

    def __init__(self, checkpoint: Path):
        self.theatre = sampling.Theatre(checkpoint, STATE)
        self.digest = sampling.sha256(checkpoint)
        self.kept = report.Pictures(STATE / f"action_identifier_{self.digest[:12]}")
        # After the host is on the path.
        from pack.nodes import extension

        extension.register_folders()

    def learnt(self, learning: Learning, action: str) -> dict[str, torch.Tensor]:
        """Tokens by encoder, or a LoRA's weights."""
        takes = exemplars(action)
        path = self.kept.folder / f"learnt_{report.fingerprint(takes, learning, INITIAL_WORD)}.safetensors"
        if not path.exists():
            with torch.inference_mode():
                train = self._lora if learning.lora else self._identifier
                report.replace(path, safetensors.torch.save(train(learning, takes)))
        return safetensors.torch.load_file(path)

    def _latents(self, takes: list[Take]) -> list[torch.Tensor]:
        return [self.theatre.encode(drawn([take])).clone() for take in takes]

    def _config(self, learning: Learning, takes: list[Take]):
        from pack.nodes.training.config import TrainingConfig

        return TrainingConfig(
            learning.steps, learning.learning_rate, ACTIONS.index(takes[0].action), learning.batch,
            min_snr_gamma=learning.min_snr_gamma, checkpoint_every=0,
        )

    def _identifier(self, learning: Learning, takes: list[Take]) -> dict[str, torch.Tensor]:
        from pack.nodes.action_identifier import training
        from pack.nodes.action_identifier.config import ActionTrainingConfig
        from pack.nodes.training.checkpoints import Checkpoints

        settings = {k: v for k, v in dataclasses.asdict(learning).items() if k not in _ELSEWHERE}
        action = ActionTrainingConfig(placeholder=PLACEHOLDER, initial_word=INITIAL_WORD, **settings)
        given = training.Exemplars(self._latents(takes), [text(take, PLACEHOLDER) for take in takes])
        return dict(training.train(
            self.theatre.model, self.theatre.clip, given, action, self._config(learning, takes),
            checkpoints=Checkpoints("action_identifier", {}), resume_from="none",
        )[0].tokens)

    def _lora(self, learning: Learning, takes: list[Take]) -> dict[str, torch.Tensor]:
        from pack.nodes.training import picture_training
        from pack.nodes.training.checkpoints import Checkpoints
        from pack.nodes.training.config import LoraConfig

        texts = picture_training.encode_texts(self.theatre.clip, [text(take, RARE_WORD) for take in takes])
        return picture_training.train_on_pictures(
            self.theatre.model, self._latents(takes), texts, self._config(learning, takes), LoraConfig(),
            checkpoints=Checkpoints("action_lora", {}), resume_from="none",
        )[0]

    def reading(self, learning: Learning | None, action: str):
        """(MODEL, text -> positive CONDITIONING) that knows the action."""
        import comfy.sd
        from pack.nodes.action_identifier import encoding
        from pack.nodes.action_identifier import sampling as action_sampling
        from pack.nodes.action_identifier.method import ActionIdentifier

        model, clip = self.theatre.model, self.theatre.clip
        if learning is None:
            return model, lambda take: self.theatre.prompts([text(take, "")])
        weights = self.learnt(learning, action)
        if learning.lora:
            model = comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0)[0]
            return model, lambda take: self.theatre.prompts([text(take, RARE_WORD)])
        places = action_sampling.places(model.get_model_object("diffusion_model")) if learning.layer_wise else ()
        known = [ActionIdentifier(PLACEHOLDER, INITIAL_WORD, weights, places)]

        def positive(take: Take) -> list:
            with torch.inference_mode():
                return action_sampling.attach_contexts(*encoding.encode(clip, text(take, PLACEHOLDER), known), known)

        return action_sampling.apply(model, 1.0), positive

    def autoencoder(self, arm: Arm, action: str) -> np.ndarray:
        """The true pictures through the autoencoder, for every case and seed: what no arm can surpass."""
        takes = cases(action)
        decode = functools.partial(self.theatre.round_trip, drawn(takes))
        return self.kept.get(f"autoencoder_{report.fingerprint(takes)}", len(takes), 4, decode).repeat(arm.seeds, 0)

    def pictures(self, arm: Arm, action: str) -> np.ndarray:
        """uint8 [cases * seeds, H, W, 3]: each case with every seed, the seeds the same in every arm."""
        takes, seeds, most = cases(action), arm.seeds, Arm.seeds

        @functools.cache
        def reading():
            return self.reading(arm.learning, action)

        def make(start: int, _stop: int) -> np.ndarray:
            model, positive = reading()
            noises = [SEED + 100 * ACTIONS.index(action) + most * (start // seeds) + i for i in range(seeds)]
            sampler = self.theatre.sampler(SAMPLER)
            return self.theatre.decode(self.theatre.sample(
                sampler, positive(takes[start // seeds]), noises, steps=STEPS, model=model
            ))

        known = arm.learning, INITIAL_WORD, exemplars(action)
        name = report.fingerprint(known, takes, seeds, SEED, SAMPLER, STEPS, sampling.CFG)
        return self.kept.get(name, len(takes) * seeds, seeds, make)

    def errors(self, learning: Learning | None, action: str) -> np.ndarray:
        """How far one denoising step leads from true pictures of other puppets in the action, in units of the noise.

        float [cases]; the mean square, over DEVELOPMENT_SIGMAS.
        """
        model, positive = self.reading(learning, action)
        euler, found = self.theatre.sampler("euler"), []
        for i, take in enumerate(cases(action, develop=True)):
            latent = self.theatre.encode(drawn([take]))
            steps = [
                self.theatre.sample(
                    euler, positive(take), [SEED + i], latent, cfg=1.0, model=model, sigmas=torch.tensor([sigma, 0.0])
                ) for sigma in DEVELOPMENT_SIGMAS
            ]
            found.append([
                float((denoised - latent).detach().square().mean()) / sigma**2
                for denoised, sigma in zip(steps, DEVELOPMENT_SIGMAS, strict=True)
            ])
        return np.array(found).mean(1)


def means(rows: Sequence[dict]) -> dict:
    """Intervals over cases."""
    return report.summary(list(by_case(rows).values()), MEASURES)


def less(rows: Sequence[dict], other: str) -> dict:
    """Ours less another arm, paired by case, over the cases and seeds that both have."""
    seeds = {(row["action_asked"], row["case"], row["seed"]) for row in rows if row["arm"] == other}
    mine = by_case([r for r in rows if r["arm"] == OURS and (r["action_asked"], r["case"], r["seed"]) in seeds])
    theirs = by_case([row for row in rows if row["arm"] == other])
    return report.summary([{m: mine[k][m] - theirs[k][m] for m in MEASURES} for k in mine], MEASURES)


def test_arms(chosen: str) -> tuple[dict[str, Arm], dict[str, Arm]]:
    """The arms to compare, and those that vary ours, with the setting that development chose."""
    layers = SETTINGS[chosen]
    ours = dataclasses.replace(layers, triples=True)
    varied = {"ours, intersection": {"merge": "intersection"}}
    for beta in OTHER_BETAS:
        varied[f"ours, β {beta:g}"] = {"mask_percentile": beta}
        varied[f"ours, intersection, β {beta:g}"] = {"mask_percentile": beta, "merge": "intersection"}
    varied["ours, without triples"] = {"triples": False, "batch": 1}
    compared = {
        OURS: ours, "layer-wise tokens (P+)": layers,
        "textual inversion": dataclasses.replace(layers, layer_wise=False),
        "LoRA": dataclasses.replace(layers, learning_rate=LORA_RATE, lora=True),
    }
    return (
        {CEILING: Arm(None), PROMPT: Arm(None), **{name: Arm(learning) for name, learning in compared.items()}},
        {k: Arm(dataclasses.replace(ours, **change), FEW_ACTIONS, 2) for k, change in varied.items()},
    )


def summary(rows: list[dict], settings: dict[str, Arm]) -> dict:
    """Every arm that has rows: over its cases, by action, and against ours."""
    of: dict[str, list[dict]] = {}
    for row in rows:
        of.setdefault(row["arm"], []).append(row)
    actions = {row["action_asked"] for row in rows}
    return {
        "sampling": {
            "sampler": SAMPLER, "scheduler": sampling.SCHEDULER, "steps": STEPS, "cfg": sampling.CFG,
            "first_seed": SEED,
        },
        "settings": {name: dataclasses.asdict(arm.learning) for name, arm in settings.items() if arm.learning},
        "interval": "95 %: [mean, low, high], over cases",
        "arms": {name: means(own) for name, own in of.items()},
        "ours less": {name: less(rows, name) for name in of if OURS in of and name != OURS},
        "by action": {
            name: {a: means([r for r in own if r["action_asked"] == a]) for a in TEST_ACTIONS if a in actions}
            for name, own in of.items() if {row["action_asked"] for row in own} == actions
        },
    }


def develop(stage: Stage, stem: str, facts: dict) -> None:
    """Every setting on the development actions; the choice goes into the summary."""
    rows = []
    for action, (name, learning) in itertools.product(DEVELOPMENT_ACTIONS, {PROMPT: None, **SETTINGS}.items()):
        errors = stage.errors(learning, action)
        rows.extend({"arm": name, "action": action, "case": i, "error": e} for i, e in enumerate(errors.tolist()))
        print(action, name, f"{errors.mean():.5f}", flush=True)
    found = {name: report.summary([row for row in rows if row["arm"] == name], ["error"]) for name in SETTINGS}
    report.write_csv(report.RESULTS / f"{stem}.csv", rows)
    report.write_json(report.RESULTS / f"{stem}.json", {
        **facts, "interval": "95 %: [mean, low, high], over cases", "error": found,
        "chosen": min(found, key=lambda name: found[name]["error"][0]),
    })


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--develop", action="store_true", help="choose how tokens are learnt, on development actions")
    parser.add_argument("--checkpoint", type=Path, default=sampling.CHECKPOINT)
    parser.add_argument("--name", default="action_identifier", help="of the result files")
    options = parser.parse_args()
    stage = Stage(options.checkpoint)
    facts = {
        "command": report.command("action_identifier.py"), "checkpoint_sha256": stage.digest,
        "machine": report.machine(),
    }
    choice = report.RESULTS / f"{options.name}_development.json"
    if options.develop:
        return develop(stage, choice.stem, facts)
    if not choice.exists():
        raise SystemExit(f"{choice.name} is missing: run with --develop first, it chooses how tokens are learnt")
    compared, varied = test_arms(json.loads(choice.read_text())["chosen"])
    rows: list[dict] = []
    errors: dict[str, dict[str, float]] = {}
    shown: list[tuple[str, np.ndarray]] = []
    # Action by action, so that a run that is cut off leaves tables whose arms have the same cases.
    for arms, action in itertools.product((compared, varied), TEST_ACTIONS):
        for name, arm in arms.items():
            if action not in arm.actions:
                continue
            made = stage.autoencoder(arm, action) if name == CEILING else stage.pictures(arm, action)
            rows.extend(rows_of(name, action, made))
            if name != CEILING:
                errors.setdefault(name, {})[action] = round(float(stage.errors(arm.learning, action).mean()), 5)
            print(action, name, errors.get(name, {}).get(action), means(rows[-len(made) :]), flush=True)
            if arms is compared and action in TEST_ACTIONS[:3]:
                shown.append((f"{action}: {name}", made[:: arm.seeds][:8]))
        report.write_csv(report.RESULTS / f"{options.name}.csv", rows)
        report.write_json(report.RESULTS / f"{options.name}.json", {
            **facts, **summary(rows, compared | varied), "error of a step": errors,
        })
        report.contact_sheet(report.RESULTS / f"{options.name}.jpg", shown)


if __name__ == "__main__":
    main()
