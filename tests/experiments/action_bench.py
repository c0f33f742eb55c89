"""The theatre's ActionBench: pictures that share an action without a word, and who is to do it next."""

from collections.abc import Sequence

import numpy as np
from experiments.measuring import metrics
from experiments.theatre import worded
from pack.nodes.puppets import captions, render, world
from pack.nodes.puppets.config import ACTIONS, SCENES, SPECIES, UNNAMED_ACTIONS, Take

DEVELOPMENT_ACTIONS = ("starfish", "hugging")
TEST_ACTIONS = tuple(action for action in UNNAMED_ACTIONS if action not in DEVELOPMENT_ACTIONS)
EXEMPLARS, TEST_PEOPLE = 5, 12
EXEMPLAR_KEY, TEST_KEY, DEVELOPMENT_KEY = 0xAD1, 0xAD2, 0xAD3
MEASURES = ("composition", "action", "identity", "identity_error", "worn_error", "rejected")


def exemplars(action: str) -> list[Take]:
    """Five pictures to learn from: no test identity, each of another species, in another scene."""
    index = ACTIONS.index(action)
    rng = np.random.default_rng([EXEMPLAR_KEY, index])
    species = [SPECIES[int(i)] for i in rng.permutation(len(SPECIES))[:EXEMPLARS]]
    scenes = [SCENES[int(i)] for i in rng.permutation(len(SCENES))[:EXEMPLARS]]
    people = (world.sample_identity(1_000_000 + 10_000 * index + i) for i in range(10_000))
    return [
        world.staged(next(who for who in people if who.species == kind), action, scene, rng)
        for kind, scene in zip(species, scenes, strict=True)
    ]


def cases(action: str, develop: bool = False) -> list[Take]:
    """Who is to do the action and where, as words say it: 12 test identities, or a puppet a species to develop on."""
    rng = np.random.default_rng([DEVELOPMENT_KEY if develop else TEST_KEY, ACTIONS.index(action)])
    people = world.test_identities()[:TEST_PEOPLE]
    if develop:
        anybody = (world.sample_identity(1_200_000 + i) for i in range(10_000))
        people = [next(who for who in anybody if who.species == kind) for kind in SPECIES]
    return [world.staged(worded(who), action, SCENES[int(rng.integers(len(SCENES)))], rng) for who in people]


def text(take: Take, word: str) -> str:
    """The take's caption with `word` where a named action would stand."""
    said = captions.subject_phrase(take.identity), word, captions.SCENE_PHRASES[take.scene]
    return " ".join(filter(None, said))


def drawn(takes: Sequence[Take]) -> np.ndarray:
    """uint8 [N, H, W, 3]."""
    return np.stack([render.render(take).image for take in takes])


def rows_of(arm: str, action: str, pictures: np.ndarray) -> list[dict]:
    """One row a picture; each test case has as many of them in turn as there are noise seeds."""
    asked = cases(action)
    seeds = len(pictures) // len(asked)
    takes = [take for take in asked for _ in range(seeds)]
    return [
        {
            "arm": arm, "action_asked": action, "case": i // seeds, "seed": i % seeds,
            "species": take.identity.species, **row, "rejected": row["seen_action"] == "reject",
        }
        for i, (take, row) in enumerate(zip(takes, metrics.compositions(pictures, takes), strict=True))
    ]


def by_case(rows: Sequence[dict]) -> dict[tuple, dict[str, float]]:
    """{(action, case): mean of each measure over the seeds}."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["action_asked"], row["case"]), []).append(row)
    return {key: {m: float(np.mean([row[m] for row in own])) for m in MEASURES} for key, own in groups.items()}
