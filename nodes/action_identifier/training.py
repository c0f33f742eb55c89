"""From pictures that share an action to its identifier: contexts, contrasts, then the tokens themselves."""

from __future__ import annotations

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
from ..training import drawing, loop
from ..training.checkpoints import Checkpoints
from ..training.config import TrainingConfig
from ..training.loop import State
from ..training.objective import Denoising
from ..training.runs import LossMap, run
from ..training.session import ModelDenoiser, session
from . import encoding, layers, method, running
from .config import ActionTrainingConfig
from .method import ActionIdentifier, BatchContexts, Rows
from .text_encoder import TextEncoder

_CONTEXT = "<understudy_context>"
_CONTEXTS = "understudy_contexts"
_CONTRAST = "contrast."
_CONTRAST_STEPS = 20
# Beside the seeds of steps, LoRAs and adapters.
_CONTEXT_SEED, _CONTRAST_SEED = 3_000_000_019, 3_000_000_037

Preview = Callable[[ModelDenoiser, Any, list], Image.Image | None]


@dataclass(frozen=True)
class Exemplars:
    """Pictures of one action, as VAE Encode gives them, [1, C, ...] of one shape, and who is in each.

    `contrasts` show each one's context with another action; without them the model draws them.
    """

    latents: Sequence[torch.Tensor]
    subjects: Sequence[str]
    contrasts: Sequence[torch.Tensor] | None = None

    def prompt(self, index: int, action: str, placeholder: str) -> str:
        """The words of a picture with `action` in the place of the action: where the placeholder is, or behind."""
        subject = self.subjects[index]
        if encoding.contains(subject, placeholder):
            return encoding.in_words(subject, {placeholder: action})
        return f"{subject} {action}".strip()


def train(
    model: Any, clip: Any, exemplars: Exemplars, action: ActionTrainingConfig, config: TrainingConfig, *,
    checkpoints: Checkpoints, resume_from: str, preview: Preview | None = None,
) -> tuple[ActionIdentifier, LossMap]:
    """Learn an identifier, fp32 on the CPU, and the host's LOSS_MAP. Model and clip are used, not changed.

    preview(denoiser, clip, [what is learnt so far]) is drawn every `config.preview_every` steps. Raises
    loop.TrainingDiverged, ValueError as `session` does, and the host's interruption.
    """
    resume = checkpoints.resume(resume_from)
    places = layers.places(model.get_model_object("diffusion_model"))
    base = fingerprint(model)
    encoder = TextEncoder(clip)
    count = 3 if action.triples else config.batch_size
    shape = [count, *exemplars.latents[0].shape[1:]]
    # With the patch of Apply Action Identifier, so that previews read the tokens as a user's run does.
    patched = running.apply(model, 1.0)
    with session(patched, shape, config, other_models=[encoder.patcher]) as denoiser:
        learner = _Learner(denoiser, encoder, exemplars, action, config)
        contrasts = learner.contrasts(resume) if action.triples else []
        tokens = learner.first_tokens(len(places) if action.layer_wise else 1)

        def learnt() -> ActionIdentifier:
            found = {name: parameter.detach().cpu().clone() for name, parameter in tokens.items()}
            kept = places if action.layer_wise else ()
            return ActionIdentifier(action.placeholder, action.initial_word, found, kept, base)

        def show() -> Image.Image | None:
            return preview(denoiser, encoder.clip, [learnt()])

        objective, masks = learner.objective(tokens, contrasts)
        loss_map = run(
            objective, tokens, config, denoiser.device, checkpoints=checkpoints, resume=resume, masks=masks,
            preview=None if preview is None else show, phase="action",
            # With them a resumed run draws no contrasts again.
            extra_tensors={f"{_CONTRAST}{i}": contrast for i, contrast in enumerate(contrasts)},
        )
        return learnt(), loss_map


class _Learner:
    """One run's model, text encoder and exemplars, and the errors that they give."""

    def __init__(self, denoiser, encoder: TextEncoder, exemplars: Exemplars, action, config: TrainingConfig):
        self.denoiser, self.encoder, self.exemplars = denoiser, encoder, exemplars
        self.action, self.config = action, config
        self.denoising = Denoising(_Reading(denoiser), config)
        self.latents = [self._into(latent) for latent in exemplars.latents]
        # What else the model reads of a prompt, such as SDXL's pooled vector, is that of the initial word.
        self.conditions = [
            denoiser.prepare(self._encode(exemplars.prompt(i, action.initial_word, action.placeholder)), latent)
            for i, latent in enumerate(exemplars.latents)
        ]

    def _into(self, latent: torch.Tensor) -> torch.Tensor:
        return self.denoiser.model.process_latent_in(latent.clone()).float()

    def _encode(self, text: str) -> list:
        clip = self.encoder.clip
        with torch.no_grad():
            return clip.encode_from_tokens_scheduled(clip.tokenize(text), show_pbar=False)

    def _prompt(self, text: str, tokens: dict[str, torch.Tensor], placeholder: str) -> encoding.Prompt:
        counts = encoding.token_counts({placeholder: tokens})
        return encoding.Prompt(self.encoder.clip.tokenize, text, counts)

    def contexts(self, prompt: encoding.Prompt, placeholder: str, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the layers read of a prompt with tokens [L, n, D], [L, T, C]."""
        count = len(next(iter(tokens.values())))
        filled = [prompt.filled(encoding.at_layer({placeholder: tokens}, layer)) for layer in range(count)]
        return encoding.encode_each(self.encoder.encode, filled)[0]

    def errors(self, pictures, who: Sequence[int], contexts: Sequence[torch.Tensor], generator) -> torch.Tensor:
        """The denoising error of each picture [1, C, ...] of exemplar who[i] under contexts[i], [B].

        One forward pass, with the same noise and noise level for all.
        """
        noise = torch.randn(pictures[0].shape, generator=generator).expand(len(pictures), *pictures[0].shape[1:])
        level = torch.randint(len(self.denoiser.sigmas), (1,), generator=generator).expand(len(pictures))
        conditions = [{**self.conditions[i], _CONTEXTS: own} for i, own in zip(who, contexts, strict=True)]
        return self.denoising.loss_at(torch.cat(list(pictures)), conditions, noise, level)

    def first_tokens(self, count: int) -> loop.Parameters:
        """The initial word's own embeddings for each of `count` places, [count, n, D], to be trained."""
        return {
            name: torch.nn.Parameter(vectors.to(self.denoiser.device).repeat(count, 1, 1))
            for name, vectors in encoding.word_vectors(self.encoder.clip, self.action.initial_word).items()
        }

    def objective(self, tokens: loop.Parameters, contrasts: Sequence[torch.Tensor]):
        """The training loop's objective for the identifier, and its masks or None."""
        name, count = self.action.placeholder, len(self.latents)
        prompts = [self._prompt(self.exemplars.prompt(i, name, name), tokens, name) for i in range(count)]

        def of_triple(triple: method.Triple, copies: dict[str, torch.Tensor], generator) -> torch.Tensor:
            who = (triple.anchor, triple.other, triple.anchor)
            pictures = (self.latents[triple.anchor], self.latents[triple.other], contrasts[triple.anchor])
            contexts = [
                self.contexts(prompts[i], name, {e: copy[sample] for e, copy in copies.items()})
                for sample, i in enumerate(who)
            ]
            return self.errors(pictures, who, contexts, generator)

        def of_some(_step: int, generator: torch.Generator) -> torch.Tensor:
            some = torch.randperm(count, generator=generator)[: self.config.batch_size].tolist()
            conditions = [{**self.conditions[i], _CONTEXTS: self.contexts(prompts[i], name, tokens)} for i in some]
            return self.denoising.loss(torch.cat([self.latents[i] for i in some]), conditions, generator).mean()

        if not self.action.triples:
            return of_some, None
        triples = method.TripleObjective(of_triple, tokens, count, self.action.mask_percentile, self.action.merge)
        return triples, lambda: triples.masks

    def contrasts(self, resume: State | None) -> list[torch.Tensor]:
        """For each exemplar its context with another action, in the model's space: given, kept, or drawn now."""
        if self.exemplars.contrasts is not None:
            return [self._into(latent) for latent in self.exemplars.contrasts]
        if resume is not None:
            # Read to the CPU, where pictures need not lie.
            return [resume.tensors[f"{_CONTRAST}{i}"].to(latent) for i, latent in enumerate(self.latents)]
        contexts = self._learn_contexts()
        words, name = self.action.contrasts, self.action.placeholder
        negative, drawn = self._encode(""), []
        bar = comfy.utils.ProgressBar(len(contexts))
        for i, context in enumerate(contexts):
            comfy.model_management.throw_exception_if_processing_interrupted()
            logging.info("[Understudy] drawing contrast %d of %d", i + 1, len(contexts))
            seed = loop.step_seed(self.config.seed, _CONTRAST_SEED + i)
            text = f"{self.exemplars.prompt(i, words[seed % len(words)], name)} {_CONTEXT}"
            prompt = self._prompt(text, context, _CONTEXT).filled(encoding.at_layer({_CONTEXT: context}, 0))
            with torch.no_grad():
                positive = self.encoder.clip.encode_from_tokens_scheduled(prompt, show_pbar=False)
            shape = self.exemplars.latents[i].shape
            drawn.append(
                drawing.sample_in_training(self.denoiser, positive, negative, shape, seed, _CONTRAST_STEPS)
            )
            if not torch.isfinite(drawn[-1]).all():
                raise ValueError("a drawn contrast has NaN or infinite values: use dtype fp32, or contrast_images")
            bar.update_absolute(i + 1)
        return [self._into(latent) for latent in drawn]

    def _learn_contexts(self) -> list[dict[str, torch.Tensor]]:
        """A token [1, 1, D] for what each exemplar shows beside its subject and a word for the action."""
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

        def objective(step: int, generator: torch.Generator) -> torch.Tensor:
            i = step % count
            contexts = self.contexts(prompts[i], _CONTEXT, tokens[i])
            return self.errors([self.latents[i]], [i], [contexts], generator).mean()

        parameters = {f"{i}.{e}": token for i, found in enumerate(tokens) for e, token in found.items()}
        config = TrainingConfig(
            steps=count * action.context_steps, learning_rate=action.context_learning_rate,
            seed=loop.step_seed(self.config.seed, _CONTEXT_SEED), checkpoint_every=0,
        )
        try:
            run(objective, parameters, config, self.denoiser.device, phase="contexts")
        except loop.TrainingDiverged as error:
            raise loop.TrainingDiverged(
                "the surroundings of the pictures could not be learnt, since a loss or gradient is no finite number: "
                "set dtype to fp32, use fewer context_steps, or connect contrast_images"
            ) from error
        return [{e: token.detach() for e, token in found.items()} for found in tokens]


class _Reading:
    """A denoiser whose layers read each sample's own contexts."""

    def __init__(self, denoiser: ModelDenoiser):
        self.denoiser = denoiser
        self.model, self.device, self.sigmas = denoiser.model, denoiser.device, denoiser.sigmas

    def denoise(self, noisy: torch.Tensor, sigma: torch.Tensor, conditions: Sequence[dict]) -> torch.Tensor:
        rows = tuple(Rows(1, condition[_CONTEXTS].unsqueeze(0)) for condition in conditions)
        plain = [{key: value for key, value in c.items() if key != _CONTEXTS} for c in conditions]
        length = math.lcm(*(condition["c_crossattn"].cond.shape[1] for condition in plain))
        contexts = running.for_layers(self.model, BatchContexts(rows), length, self.device)
        return self.denoiser.denoise(noisy, sigma, plain, {running.KEY: contexts})
