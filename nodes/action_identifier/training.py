"""From pictures that share an action to its identifier: contexts, contrasts, then the tokens themselves."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from PIL import Image

from ..fingerprint import fingerprint
from ..inputs.families import family
from ..inputs.model_fit import check_encoded
from ..training import drawing, loop
from ..training.checkpoints import Checkpoints
from ..training.config import TrainingConfig
from ..training.loop import State
from ..training.objective import WEIGHTS, Denoising, Sample
from ..training.parallel import only_whole_batches
from ..training.reference_loss import ReferenceLoss, noise_and_level
from ..training.runs import LossMap, run
from ..training.seeds import seed_for
from ..training.session import ModelDenoiser, clone_without_streaming, session
from . import encoding, method, sampling
from .config import PICTURES_A_STEP, ActionTrainingConfig
from .method import ActionIdentifier
from .sampling import BatchContexts

_CONTEXT = "<understudy_context>"
_CONTRAST = "contrast."
# Among what is trained, offsets behind the text encoder instead of encoders' tokens.
_OFFSETS = "offsets"
_CONTRAST_STEPS = 20

Preview = Callable[[ModelDenoiser, Any, list], Image.Image | None]


@dataclass(frozen=True)
class Exemplars:
    """Pictures of one action, as VAE Encode gives them, [1, C, ...] of one shape, and who is in each.

    `contrasts` show each one's context with another action; without them the model draws them. `weights` [1, 1, ...]
    are those of the cells in the loss, also for the contrast of each.
    """

    latents: Sequence[torch.Tensor]
    subjects: Sequence[str]
    contrasts: Sequence[torch.Tensor] | None = None
    weights: Sequence[torch.Tensor] | None = None

    def prompt(self, index: int, action: str, placeholder: str) -> str:
        """The words of a picture with `action` where its subject's line has the placeholder, or else at the end."""
        subject = self.subjects[index]
        if encoding.contains(subject, placeholder):
            return encoding.in_words(subject, {placeholder: action})
        return f"{subject} {action}".strip()


def train(
    model: Any, clip: Any, exemplars: Exemplars, action: ActionTrainingConfig, config: TrainingConfig, *,
    checkpoints: Checkpoints, resume_from: str, preview: Preview | None = None,
) -> tuple[ActionIdentifier, LossMap]:
    """Train an identifier, fp32 on the CPU, and ComfyUI's LOSS_MAP. Model and clip are used, not changed.

    preview(denoiser, clip, [the identifier so far]) is drawn every `config.preview_every` steps. Raises
    loop.TrainingDiverged, ValueError as `session` does, and ComfyUI's interruption.
    """
    only_whole_batches("an action", "since a step compares three pictures of one draw")
    places = sampling.places(model.get_model_object("diffusion_model"), family(model))
    check_encoded([], [*exemplars.latents, *(exemplars.contrasts or ())], model)
    resume = checkpoints.resume(resume_from)
    base = fingerprint(model)
    encoder = TextEncoder(clip)
    count = PICTURES_A_STEP if action.triples else config.batch_size
    shape = [count, *exemplars.latents[0].shape[1:]]
    # With the patch of Apply Action Identifier, so that previews read the tokens as a user's run does.
    patched = sampling.apply(model, 1.0)
    with session(patched, shape, config, other_models=[encoder.patcher]) as denoiser:
        trainer = _ActionTrainer(denoiser, encoder, exemplars, action, config)
        contrasts = trainer.contrasts(resume) if action.triples else []
        tokens = trainer.initial_tokens(len(places) if action.layer_wise else 1)

        def identifier() -> ActionIdentifier:
            trained = {name: parameter.detach().cpu().clone() for name, parameter in tokens.items()}
            layers, offsets = places if action.layer_wise else (), trained.pop(_OFFSETS, None)
            if offsets is not None:
                trained = trainer.word_tokens(len(offsets))
            return ActionIdentifier(action.placeholder, action.initial_word, trained, layers, base, offsets=offsets)

        def show() -> Image.Image | None:
            return preview(denoiser, encoder.clip, [identifier()])

        objective, masks = trainer.objective(tokens, contrasts)
        loss_map = run(
            objective, tokens, config, denoiser.device, checkpoints=checkpoints, resume=resume, masks=masks,
            preview=None if preview is None else show, phase="action",
            reference_loss=trainer.reference_loss(tokens),
            # With them a resumed run draws no contrasts again.
            extra_tensors={f"{_CONTRAST}{i}": contrast for i, contrast in enumerate(contrasts)},
            fixed_norm=action.fixed_norm,
        )
        return identifier(), loss_map


class TextEncoder:
    """A copy of a CLIP over the same weights, with gradients to the vectors in a prompt inside a `session` that
    loads it with the model. Raises ValueError where its weights stream in and cannot be loaded whole.
    """

    def __init__(self, clip: Any):
        self.clip = clip.clone()
        self.clip.patcher = clone_without_streaming(clip.patcher)
        self.clip.cond_stage_model = self.clip.patcher.model
        self.patcher = self.clip.patcher

    def encode(self, tokens: encoding.Tokens) -> list[torch.Tensor]:
        """The one conditioning tensor [1, T, C] of ComfyUI's tokens, with its CLIP skip; the encoder is loaded."""
        stage = self.clip.cond_stage_model
        stage.reset_clip_options()
        if self.clip.layer_idx is not None:
            stage.set_clip_options({"layer": self.clip.layer_idx})
        stage.set_clip_options({"execution_device": self.patcher.load_device})
        return [stage.encode_token_weights(tokens)[0]]


class _ActionTrainer:
    """One run's model, text encoder and exemplars, and the errors that they give."""

    def __init__(self, denoiser, encoder: TextEncoder, exemplars: Exemplars, action, config: TrainingConfig):
        self.denoiser, self.encoder, self.exemplars = denoiser, encoder, exemplars
        self.action, self.config = action, config
        self.denoising = Denoising(_PerLayerDenoiser(denoiser.patcher), config)
        self.latents = [self._into(latent) for latent in exemplars.latents]
        name, words = action.placeholder, self.word_tokens(1)
        self.prompts = [
            self._prompt(exemplars.prompt(i, name, name), words, name) for i in range(len(exemplars.latents))
        ]
        self._encoded: dict[encoding.Prompt, torch.Tensor] = {}
        # What else the model reads of a prompt, such as SDXL's pooled vector, is that of the initial word.
        prompts = [
            self._encode(exemplars.prompt(i, action.initial_word, action.placeholder))
            for i in range(len(exemplars.latents))
        ]
        check_encoded(prompts, [], denoiser.patcher)
        self.conditions = [
            denoiser.prepare(prompt, latent) for prompt, latent in zip(prompts, exemplars.latents, strict=True)
        ]
        for conditions, weights in zip(self.conditions, exemplars.weights or (), strict=bool(exemplars.weights)):
            conditions[WEIGHTS] = weights

    def _into(self, latent: torch.Tensor) -> torch.Tensor:
        return self.denoiser.model.process_latent_in(latent.clone()).float()

    def _encode(self, text: str) -> list:
        clip = self.encoder.clip
        with torch.no_grad():
            return clip.encode_from_tokens_scheduled(clip.tokenize(text), show_pbar=False)

    def _prompt(self, text: str, tokens: dict[str, torch.Tensor], placeholder: str) -> encoding.Prompt:
        return encoding.Prompt(self.encoder.clip.tokenize, text, {placeholder: tokens})

    def contexts(self, prompt: encoding.Prompt, placeholder: str, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the layers read of a prompt with tokens [L, n, D], or with offsets [L, n, C] behind the text encoder:
        [L, T, C].
        """
        if _OFFSETS in tokens:
            if prompt not in self._encoded:  # none of it is trained
                words = prompt.at_layer({placeholder: self.word_tokens(1)}, 0)
                with torch.no_grad():
                    (self._encoded[prompt],) = self.encoder.encode(words)
            places = prompt.places(placeholder)
            return encoding.with_offsets(self._encoded[prompt], places, placeholder, tokens[_OFFSETS])
        count = len(next(iter(tokens.values())))
        prompts = [prompt.at_layer({placeholder: tokens}, layer) for layer in range(count)]
        return encoding.encode_each(self.encoder.encode, prompts)[0]

    def _with_contexts(self, exemplar_ids: Sequence[int], contexts: Sequence[torch.Tensor]) -> list[dict]:
        """The conditions of these exemplars, with contexts [L, T, C] for each."""
        return [
            {**self.conditions[i], sampling.KEY: BatchContexts((layers,))}
            for i, layers in zip(exemplar_ids, contexts, strict=True)
        ]

    def errors(self, pictures, exemplar_ids: Sequence[int], contexts: Sequence[torch.Tensor], generator):
        """The denoising error [B] of B pictures [1, C, ...], each with its exemplar's conditions and contexts.

        One forward pass, with the same noise and noise level for all.
        """
        noise = torch.randn(pictures[0].shape, generator=generator).expand(len(pictures), *pictures[0].shape[1:])
        level = self._levels(1, generator).expand(len(pictures))
        conditions = self._with_contexts(exemplar_ids, contexts)
        return self.denoising.loss_at(torch.cat(list(pictures)), conditions, noise, level)

    def _levels(self, count: int, generator: torch.Generator) -> torch.Tensor:
        table = len(self.denoiser.sigmas)
        lowest, end = (int(limit * table) for limit in (self.action.lowest_noise, self.action.highest_noise))
        return torch.randint(lowest, max(end, lowest + 1), (count,), generator=generator)

    def word_tokens(self, count: int) -> dict[str, torch.Tensor]:
        """The initial word's own embeddings for each of `count` places, [count, n, D]."""
        words = encoding.word_vectors(self.encoder.clip, self.action.initial_word)
        return {name: vectors.repeat(count, 1, 1) for name, vectors in words.items()}

    def initial_tokens(self, count: int) -> loop.Parameters:
        """What is trained, for each of `count` places: the initial word's tokens, or offsets of 0 behind them."""
        tokens = self.word_tokens(count)
        if self.action.behind_encoder:
            width = self._encode(self.action.initial_word)[0][0].shape[-1]
            tokens = {_OFFSETS: torch.zeros(*next(iter(tokens.values())).shape[:2], width)}
        return {name: torch.nn.Parameter(values.to(self.denoiser.device)) for name, values in tokens.items()}

    def objective(self, tokens: loop.Parameters, contrasts: Sequence[torch.Tensor]):
        """The training loop's objective for the identifier, and its masks or None."""
        name, count = self.action.placeholder, len(self.latents)
        prompts = self.prompts

        def triple_loss(triple: method.Triple, copies: dict[str, torch.Tensor], generator) -> torch.Tensor:
            exemplar_ids = (triple.anchor, triple.other, triple.anchor)
            pictures = (self.latents[triple.anchor], self.latents[triple.other], contrasts[triple.anchor])
            contexts = [
                self.contexts(prompts[i], name, {e: copy[sample] for e, copy in copies.items()})
                for sample, i in enumerate(exemplar_ids)
            ]
            return self.errors(pictures, exemplar_ids, contexts, generator)

        def batch_loss(exemplar_ids: list[int], generator: torch.Generator) -> torch.Tensor:
            contexts = [self.contexts(prompts[i], name, tokens) for i in exemplar_ids]
            conditions = self._with_contexts(exemplar_ids, contexts)
            batch = [Sample(self.latents[i], own) for i, own in zip(exemplar_ids, conditions, strict=True)]
            return self.denoising.losses(batch, generator, self._levels)

        if not self.action.triples:
            return method.BatchObjective(batch_loss, count, self.config.batch_size), None
        triples = method.TripleObjective(triple_loss, tokens, count, self.action.mask_percentile, self.action.merge)
        return triples, lambda: triples.masks

    def reference_loss(self, tokens: loop.Parameters) -> ReferenceLoss:
        """The error on the exemplars under prompts with the tokens, which begin as the initial word."""
        name = self.action.placeholder

        def loss_at(index: int, seed: int, place: float) -> torch.Tensor:
            latent = self.latents[index]
            conditions = self._with_contexts([index], [self.contexts(self.prompts[index], name, tokens)])
            return self.denoising.loss_at(latent, conditions, *noise_and_level(self.denoising, latent, seed, place))

        return ReferenceLoss(len(self.latents), loss_at)

    def contrasts(self, resume: State | None) -> list[torch.Tensor]:
        """For each exemplar its context with another action, in the model's space: connected, stored in the
        checkpoint, or drawn now. Raises ValueError where a drawn one is not finite, and as training contexts does.
        """
        if self.exemplars.contrasts is not None:
            return [self._into(latent) for latent in self.exemplars.contrasts]
        if resume is not None:
            # They are read to the CPU, and pictures may lie elsewhere.
            return [resume.tensors[f"{_CONTRAST}{i}"].to(latent) for i, latent in enumerate(self.latents)]
        contexts = self._train_contexts()
        words, name = self.action.contrasts, self.action.placeholder
        negative, drawn = self._encode(""), []
        bar = comfy.utils.ProgressBar(len(contexts))
        for i, context in enumerate(contexts):
            comfy.model_management.throw_exception_if_processing_interrupted()
            logging.info("[Understudy] drawing contrast %d of %d", i + 1, len(contexts))
            seed = seed_for(self.config.seed, "contrast", i)
            text = f"{self.exemplars.prompt(i, words[seed % len(words)], name)} {_CONTEXT}"
            prompt = self._prompt(text, context, _CONTEXT).at_layer({_CONTEXT: context}, 0)
            with torch.no_grad():
                positive = self.encoder.clip.encode_from_tokens_scheduled(prompt, show_pbar=False)
            shape = self.exemplars.latents[i].shape
            drawn.append(drawing.sample_in_training(self.denoiser, positive, negative, shape, seed, _CONTRAST_STEPS))
            if not torch.isfinite(drawn[-1]).all():
                raise ValueError("a drawn contrast has NaN or infinite values: use dtype fp32, or contrast_images")
            bar.update_absolute(i + 1)
        return [self._into(latent) for latent in drawn]

    def _train_contexts(self) -> list[dict[str, torch.Tensor]]:
        """A token [1, 1, D] for what each exemplar shows beside its subject and a word for the action.

        Raises loop.TrainingDiverged, naming the inputs that help.
        """
        action, count = self.action, len(self.latents)
        texts = [self.exemplars.prompt(i, action.initial_word, action.placeholder) for i in range(count)]
        # It begins as the mean of the picture's own words.
        tokens = [
            {e: torch.nn.Parameter(v.mean(0).to(self.denoiser.device)[None, None]) for e, v in vectors.items()}
            for vectors in (encoding.word_vectors(self.encoder.clip, text) for text in texts)
        ]
        prompts = [
            self._prompt(f"{text} {_CONTEXT}", token, _CONTEXT) for text, token in zip(texts, tokens, strict=True)
        ]

        def exemplar_loss(i: int, generator: torch.Generator) -> torch.Tensor:
            contexts = self.contexts(prompts[i], _CONTEXT, tokens[i])
            return self.errors([self.latents[i]], [i], [contexts], generator)

        parameters = {f"{i}.{e}": token for i, by_encoder in enumerate(tokens) for e, token in by_encoder.items()}
        config = TrainingConfig(
            steps=count * action.context_steps, steps_per_iteration=count,
            learning_rate=action.context_learning_rate,
            seed=seed_for(self.config.seed, "context"), checkpoint_every=0,
        )
        try:
            objective = method.ContextObjective(exemplar_loss, count)
            run(objective, parameters, config, self.denoiser.device, phase="contexts")
        except loop.TrainingDiverged as error:
            raise loop.TrainingDiverged(
                "the surroundings of the pictures could not be learned, since a loss or gradient is not a finite "
                "number: set dtype to fp32, use fewer context_steps, or connect contrast_images"
            ) from error
        return [{e: token.detach() for e, token in by_encoder.items()} for by_encoder in tokens]


class _PerLayerDenoiser(ModelDenoiser):
    """A denoiser whose layers read the contexts in each sample's conditions."""

    def denoise(self, noisy: torch.Tensor, sigma: torch.Tensor, conditions: Sequence[dict]) -> torch.Tensor:
        first, *others = [condition[sampling.KEY] for condition in conditions]
        plain = [{key: value for key, value in c.items() if key != sampling.KEY} for c in conditions]
        length = math.lcm(*(condition["c_crossattn"].cond.shape[1] for condition in plain))
        contexts = sampling.for_layers(self.model, first.concat(others), length, self.device)
        return super().denoise(noisy, sigma, plain, {sampling.KEY: contexts})
