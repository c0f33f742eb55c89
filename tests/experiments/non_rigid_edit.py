"""Cases of a non-rigid edit with a known answer: a test identity in a picture takes another pose or view."""

from __future__ import annotations

import dataclasses

import numpy as np
from experiments.measuring import eye, metrics
from pack.nodes.puppets import captions, render, world
from pack.nodes.puppets.config import NAMED_ACTIONS, SCENES, SIDED_ACTIONS, Take

TEST_KEY, DEVELOPMENT_KEY = 0x11BE, 0x11BF
REFERENCES, ACTIONS, VIEWS = 4, 6, 2  # pictures to learn an identity from; its edits of either kind
EDITS = ACTIONS + VIEWS
MEASURES = (
    "composition", "identity", "action", "background_error", "identity_error", "worn_error", "joint_error", "error",
    "error_over_source", "nearer_truth",
)


@dataclasses.dataclass(frozen=True)
class Edit:
    """A picture, and the truth: the same puppet in the same scene, light and camera, doing something else."""

    source: Take
    truth: Take

    @property
    def view(self) -> bool:
        """Whether the same action is asked for to the other side."""
        return self.source.action == self.truth.action


@dataclasses.dataclass(frozen=True)
class Subject:
    """An identity by the pictures that it is learnt from, and the edits that are asked for of other pictures."""

    references: tuple[Take, ...]
    edits: tuple[Edit, ...]

    @property
    def species(self) -> str:
        return self.references[0].identity.species


def subject(index: int, develop: bool) -> Subject:
    """Subject `index`: species in turn; no edit shows a take that was learnt, nor asks for an action that was."""
    rng = np.random.default_rng([DEVELOPMENT_KEY if develop else TEST_KEY, index])
    # Of the test identities the second eight: one of each species, all with a detail that no word names.
    who = world.sample_identity(950_000 + index) if develop else world.test_identities()[8 + index]
    allowed = [action for action in NAMED_ACTIONS if (who.species, action) not in world.HELD_OUT_PAIRS]
    learnt = [allowed[i] for i in rng.permutation(len(allowed))[:REFERENCES]]
    new = [action for action in allowed if action not in learnt]

    def scene() -> str:
        return world.pick(rng, SCENES)

    references = tuple(world.staged(who, action, scene(), rng) for action in learnt)
    edits = []
    for i in range(ACTIONS):
        source = world.staged(who, learnt[i % REFERENCES], scene(), rng)
        edits.append(Edit(source, dataclasses.replace(source, action=new[i % len(new)])))
    sided = [action for action in allowed if action in SIDED_ACTIONS]
    for i in rng.permutation(len(sided))[:VIEWS]:
        source = world.staged(who, sided[i], scene(), rng)
        edits.append(Edit(source, dataclasses.replace(source, mirrored=not source.mirrored)))
    return Subject(references, tuple(edits))


def prompt(take: Take) -> str:
    """The take's caption with all its words, `{subject}` in place of the species."""
    return captions.caption(take).replace(f" {take.identity.species} ", " {subject} ", 1)


class Stage:
    """The subjects of a run and their pictures, one case an edit. Arrays are [cases, ...]."""

    def __init__(self, subjects: list[Subject]):
        self.subjects = subjects
        self.edits = [edit for one in subjects for edit in one.edits]
        drawn = [(render.render(edit.source), render.render(edit.truth)) for edit in self.edits]
        self.source = np.stack([source.image for source, _ in drawn])
        self.truth = np.stack([truth.image for _, truth in drawn])
        self.masks = np.stack([source.mask | truth.mask for source, truth in drawn])
        self.source_masks = np.stack([source.mask for source, _ in drawn])
        self.truth_masks = np.stack([truth.mask for _, truth in drawn])
        self.source_joints = np.stack([source.joints for source, _ in drawn])
        self.joints = np.stack([truth.joints for _, truth in drawn])


def staged(count: int, develop: bool) -> Stage:
    """`count` subjects with EDITS cases each."""
    return Stage([subject(i, develop) for i in range(count)])


def measured(name: str, stage: Stage, pictures: np.ndarray) -> list[dict]:
    """One row a case. A mirrored view counts as action right where its joints, too, are nearer to the truth's."""
    seen = metrics.compositions(pictures, [edit.truth for edit in stage.edits])
    found = eye.look(metrics.trained_eye(), pictures).joints
    to_truth, to_source = (
        np.nanmean(metrics.joint_distances(found, joints), 1) * 128 / pictures.shape[1]
        for joints in (stage.joints, stage.source_joints)
    )
    rows = []
    for i, (edit, row) in enumerate(zip(stage.edits, seen, strict=True)):
        turned = not edit.view or bool(to_truth[i] < to_source[i])
        action = row["action"] and turned
        picture, truth, source = (array[i] / 255 for array in (pictures, stage.truth, stage.source))
        error = float(np.square(picture - truth).mean())
        rows.append({
            "arm": name,
            "subject": i // EDITS,
            "case": i,
            "species": edit.truth.identity.species,
            "kind": "view" if edit.view else "action",
            "from": edit.source.action,
            "asked": edit.truth.action,
            **row,
            "action": action,
            "composition": row["identity"] and action,
            "joint_error": float(to_truth[i]),
            "background_error": metrics.background_error(pictures[i], stage.source[i], stage.masks[i]),
            "error": error,
            "error_over_source": error - float(np.square(source - truth).mean()),
            "nearer_truth": bool(error < np.square(picture - source).mean()),
        })
    return rows
