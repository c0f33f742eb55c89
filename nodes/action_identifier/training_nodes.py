"""Nodes that train an action identifier on a few pictures, and save it (ADI)."""

import dataclasses
import logging
from collections.abc import Sequence

import torch
from comfy_api.latest import io

from ...kernels.channel_mask import MERGES
from ..consent import gate
from ..files import publishing
from ..inputs.checked import CheckedNode
from ..messages import tell
from ..training import doctor, drawing, inputs, loss_masks, picture_training, previews, widgets
from ..training.checkpoints import Checkpoints
from ..training.config import TrainingConfig
from . import encoding, files, sampling, training
from .config import EVERY, MINIMUM_EXEMPLARS, PICTURES_A_STEP, ActionTrainingConfig
from .nodes import ACTION, CATEGORY

_DEFAULT = ActionTrainingConfig()


class UnderstudyTrainActionIdentifier(CheckedNode):
    """Trains what a few pictures have in common: their action."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyTrainActionIdentifier", display_name="Train Action Identifier (ADI)",
            category=CATEGORY,
            description="Learns the action that a few pictures share, and not who does it or where, as a word for "
            "prompts: usable on any person, animal or mascot.",
            search_aliases=[
                "ADI", "learn action", "pose", "textual inversion", "train embedding", "P+", "motion",
                "動作", "动作",
            ],
            is_input_list=True,
            inputs=[
                widgets.model("SD, SDXL or Wan"),
                io.Clip.Input("clip", tooltip="Its text encoder, for which the word is trained; it is not modified."),
                widgets.vae("the pictures"),
                io.Image.Input(
                    "images", tooltip="Pictures that share the action, of different subjects in different places: at "
                    "least 2, better 5 to 10, all of one size, as a batch or a list.",
                ),
                io.String.Input(
                    "subjects", multiline=True,
                    tooltip="Who is in each picture and where, without the action: a line or a list item per "
                    "picture, or one for all.",
                ),
                io.String.Input(
                    "placeholder", default=_DEFAULT.placeholder,
                    tooltip="The word that will stand for the action in prompts; choose one that no prompt has by "
                    "chance.",
                ),
                io.String.Input(
                    "initial_word", default=_DEFAULT.initial_word,
                    tooltip="What the word starts as, and means at strength 0: a word close to the action.",
                ),
                widgets.steps(_DEFAULT.steps, "Optimiser steps, each on three pictures in one pass."),
                io.Int.Input(
                    "context_steps", default=_DEFAULT.context_steps, min=1, max=10_000,
                    tooltip="Optimiser steps per picture that first learn its surroundings, to draw them with "
                    "another action. Too many learn the action with them. No effect with contrast_images.",
                ),
                widgets.learning_rate(_DEFAULT.learning_rate, "It is that of the action's tokens."),
                io.Float.Input(
                    "mask_percentile", default=_DEFAULT.mask_percentile, min=0.01, max=0.99, step=0.01, round=False,
                    tooltip="Where channels are divided, as a fraction of them: a higher value counts more of them "
                    "as independent of the surroundings, and fewer as the action's.",
                ),
                io.Combo.Input(
                    "merge", options=[*MERGES, EVERY], default=_DEFAULT.merge,
                    tooltip="Which channels a step may change: union takes those that pass either comparison, "
                    "intersection only those that pass both. With 'every channel' nothing is compared or drawn: "
                    "mask_percentile and all about contexts and contrasts have no effect.",
                ),
                widgets.seed("action"),
                io.Image.Input(
                    "contrast_images", optional=True,
                    tooltip="For each picture, one of the same surroundings with another action, in the same order. "
                    "If not connected, the model draws them.",
                ),
                widgets.resume_from(),
                widgets.dtype(),
                *widgets.on_the_way("Steps", "the first subject with the action"),
                io.String.Input(
                    "contrast_words", default=_DEFAULT.contrast_words, optional=True, advanced=True,
                    tooltip="Actions, separated by commas, that the model draws for comparison: none may be the one "
                    "to learn. No effect with contrast_images.",
                ),
                widgets.min_snr_gamma(),
                io.Boolean.Input(
                    "fixed_norm", default=_DEFAULT.fixed_norm, optional=True, advanced=True,
                    tooltip="Learns the direction of the action's tokens alone and leaves them as long as those of "
                    "the initial word, so that the other words of a prompt keep their weight.",
                ),
                *widgets.masks("one mask per picture, or one for all"),
                widgets.offload(),
                io.Boolean.Input(
                    "behind_encoder", default=_DEFAULT.behind_encoder, optional=True, advanced=True,
                    tooltip="Learns what to add behind the text encoder where the word stands, instead of the word's "
                    "own tokens. On the theatre, whose encoder knows few words, it carries more of the action and "
                    "keeps less of the subject; not measured elsewhere. The learning_rate falls to 0 at the last "
                    "step; there it was 0.06.",
                ),
                io.Float.Input(
                    "lowest_noise", default=_DEFAULT.lowest_noise, min=0.0, max=1.0, step=0.05, round=False,
                    optional=True, advanced=True,
                    tooltip="Trains only on noise levels from this fraction of the schedule up. Poses are decided at "
                    "high noise: on the theatre a range of 0.45 to 0.9 needs fewer steps.",
                ),
                io.Float.Input(
                    "highest_noise", default=_DEFAULT.highest_noise, min=0.0, max=1.0, step=0.05, round=False,
                    optional=True, advanced=True,
                    tooltip="Trains only on noise levels below this fraction of the schedule. At the very highest "
                    "nothing of a pose can be seen.",
                ),
                widgets.consent(),
            ],
            outputs=[
                ACTION.Output(display_name="action", tooltip="Connect it to Encode or Save Action Identifier."),
                widgets.loss_map(),
            ],
        )

    @classmethod
    def execute(cls, images, subjects, contrast_images=None, masks=None, **lists) -> io.NodeOutput:
        values = inputs.single_values(lists)
        action = _action(values)
        consent = gate.check_training("Train Action Identifier", values.get("consent"))
        config = widgets.config(values, **_run(action))
        exemplars = _exemplars(values["vae"], images, subjects, contrast_images)
        masks, floor = loss_masks.pictures(masks, len(exemplars.latents)), values.get("mask_floor", 0.0)
        findings = [
            *doctor.of_named(exemplars.subjects, "subjects", (action.initial_word,)),
            *doctor.examine(
                inputs.pictures(images, "images"), exemplars.subjects if any(exemplars.subjects) else (),
                texts="subjects", learned=(action.placeholder,), masks=masks, model=values["model"],
                vae=values["vae"],
            ),
        ]
        warnings = _warnings(values["clip"], action, exemplars)
        tell("Train Action Identifier", [*warnings, *doctor.lines(findings)], logging.WARNING)
        exemplars = dataclasses.replace(exemplars, weights=loss_masks.weights(masks, exemplars.latents, floor))
        method = {**_settings(action, exemplars), **loss_masks.settings(masks, floor, inputs.digest)}
        settings = widgets.settings(values, config, method)
        identifier, loss_map = training.train(
            values["model"], values["clip"], exemplars, action, config,
            checkpoints=Checkpoints("action_identifier", settings),
            resume_from=values["resume_from"], preview=_preview(values["vae"], exemplars, action, config),
        )
        return io.NodeOutput(dataclasses.replace(identifier, consent=consent), loss_map)


def _action(values: dict) -> ActionTrainingConfig:
    names = ("placeholder", "initial_word", "steps", "context_steps", "learning_rate", "mask_percentile", "merge")
    chosen = {name: values[name] for name in names}
    for name in ("placeholder", "initial_word"):
        chosen[name] = chosen[name].strip()
    for name in ("contrast_words", "fixed_norm", "behind_encoder", "lowest_noise", "highest_noise"):
        chosen[name] = values.get(name, getattr(_DEFAULT, name))
    return ActionTrainingConfig(**chosen)


def _run(action: ActionTrainingConfig) -> dict:
    """What the method decides of the run."""
    batch = {} if action.triples else {"batch_size": PICTURES_A_STEP}
    # Behind the encoder a rate that stays high wanders, and the last step decides what was found.
    return batch | ({"decay": 1.0} if action.behind_encoder else {})


def _exemplars(vae, images, subjects, contrast_images) -> training.Exemplars:
    """Encoded pictures and their texts. Raises ValueError, naming the input, where they do not fit together."""
    pictures = inputs.pictures(images, "images")
    if len(pictures) < MINIMUM_EXEMPLARS:
        raise ValueError(
            f"images holds {len(pictures)} picture: give at least {MINIMUM_EXEMPLARS} that share the action, better "
            "5 to 10, since what they share is what is learned"
        )
    texts = inputs.texts_for(subjects, len(pictures), "subjects")
    contrasts = None if contrast_images is None else inputs.pictures(contrast_images, "contrast_images")
    if contrasts is not None and len(contrasts) != len(pictures):
        raise ValueError(
            f"contrast_images holds {len(contrasts)} pictures for {len(pictures)} images: give one for each, in "
            "their order, or none"
        )
    _check_sizes([*pictures, *(contrasts or ())])
    encoded = None if contrasts is None else picture_training.encode_pictures(vae, contrasts)
    return training.Exemplars(picture_training.encode_pictures(vae, pictures), texts, encoded)


def _warnings(clip, action: ActionTrainingConfig, exemplars: training.Exemplars) -> list[str]:
    """What will probably weaken the action, though training can go on."""
    warnings = []
    if unknown := encoding.unknown_words(clip.tokenize, action.initial_word):
        warnings.append(
            f"initial_word: the text encoder does not know {', '.join(unknown)} as a whole word: use a verb that it "
            "knows, say dancing"
        )
    if not all(subject.strip() for subject in exemplars.subjects):
        warnings.append(
            "subjects are empty, so who is in the pictures and where will be learned with the action: describe each "
            "picture without it"
        )
    return warnings


def _check_sizes(pictures: Sequence[torch.Tensor]) -> None:
    sizes = sorted({(picture.shape[2], picture.shape[1]) for picture in pictures})
    if len(sizes) > 1:
        listed = ", ".join(f"{width} x {height}" for width, height in sizes)
        raise ValueError(
            f"the pictures have the sizes {listed}: scale all images and contrast_images to one size, since they are "
            "compared under the same noise"
        )


def _settings(action: ActionTrainingConfig, exemplars: training.Exemplars) -> dict:
    """The method's part of what a resumed run must share with the one that it continues."""
    contrasts = exemplars.contrasts
    return {
        "images": inputs.digest(exemplars.latents), "subjects": list(exemplars.subjects),
        "contrast_images": "drawn" if contrasts is None else inputs.digest(contrasts),
        "placeholder": action.placeholder, "initial_word": action.initial_word, "merge": action.merge,
        "context_steps": action.context_steps, "mask_percentile": action.mask_percentile,
        "contrast_words": action.contrasts, "fixed_norm": action.fixed_norm, **_since(action),
    }


def _since(action: ActionTrainingConfig) -> dict:
    """Settings that came later, where they are not those of checkpoints from before."""
    names = "behind_encoder", "lowest_noise", "highest_noise"
    chosen = {name: getattr(action, name) for name in names if getattr(action, name) != getattr(_DEFAULT, name)}
    # The rate falls to 0 at the last step: a run to another one is another run.
    return chosen | ({"steps": action.steps} if action.behind_encoder else {})


def _preview(vae, exemplars: training.Exemplars, action: ActionTrainingConfig, config: TrainingConfig):
    text = exemplars.prompt(0, action.placeholder, action.placeholder)

    def preview(denoiser, clip, actions):
        positive = sampling.attach_contexts(*encoding.encode(clip, text, actions), actions)
        (negative,) = picture_training.encode_texts(clip, [""])
        return drawing.preview_of(vae, positive, negative, exemplars.latents[0].shape, config.seed)(denoiser)

    return preview


class UnderstudySaveActionIdentifier(widgets.SaveNode):
    """An identifier as a file that the loader lists, and for other programs as an embedding."""

    FOLDER = files.FOLDER

    @classmethod
    def define_schema(cls) -> io.Schema:
        textual_inversion = io.Boolean.Input(
            "textual_inversion", default=False, optional=True, advanced=True,
            tooltip="Also saves the mean of all layers in output/embeddings, an ordinary embedding for programs "
            "without this pack. It preserves less of the action.",
        )
        return widgets.save_schema(
            "UnderstudySaveActionIdentifier", "Save Action Identifier (ADI)", CATEGORY,
            ACTION.Input("action", tooltip="A trained or loaded action."), prefix="action", folder=cls.FOLDER,
            options=[textual_inversion],
            description="Saves a trained action in output/action_identifiers, where Load Action Identifier lists "
            "it.",
            search_aliases=["ADI", "save action", "save embedding", "textual inversion", "export", "保存"],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None, textual_inversion: bool = False) -> bool | str:
        other = publishing.obstacle(files.EMBEDDINGS.name, filename_prefix) if textual_inversion else ""
        return other or super().validate_inputs(filename_prefix)

    @classmethod
    def execute(
        cls, action, filename_prefix, textual_inversion=False, consent=None, preview=None, tags="", author=""
    ) -> io.NodeOutput:
        action = gate.with_consent("Save Action Identifier", action, consent)
        previews.save_with(
            "Save Action Identifier", lambda: files.save(action, filename_prefix, tags, author), preview
        )
        if textual_inversion:
            files.check_exportable(action)  # after a training, so first what can be kept
            logging.info("[Understudy] saved %s", files.export(action, filename_prefix))
        return io.NodeOutput()


NODES = [UnderstudyTrainActionIdentifier, UnderstudySaveActionIdentifier]
