"""Action identifiers inside a sampling run: sealed in a conditioning, opened by the patched model.

Sealed contexts are one of the conditioning's model conditions, so that they go wherever it goes: combined, masked,
limited to some steps. The host stops at one that nobody opened. The patched model opens them before each of its
calls, and gives plain prompts a neutral condition, so that the host still runs them in one batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ..fingerprint import fingerprint
from ..patching import models, wan_blocks
from ..patching.wan_blocks import WanBlockPatch
from . import layers, method
from .method import ActionIdentifier, BatchContexts, Place, Rows

KEY = "understudy_action"


def seal(conditioning: list, contexts: Sequence[torch.Tensor], actions: Sequence[ActionIdentifier]) -> list:
    """The CONDITIONING with the contexts [L, T, C] of each of its entries inside."""
    sealed = []
    for (prompt, options), own in zip(conditioning, contexts, strict=True):
        conditions = {**options.get("model_conds", {}), KEY: SealedContexts(prompt, own, tuple(actions))}
        sealed.append([prompt, {**options, "model_conds": conditions}])
    return sealed


def apply(model: Any, strength: float) -> Any:
    """A clone of `model` that opens sealed contexts, in place of an earlier strength.

    Raises ValueError for models whose cross-attention it does not know.
    """
    network = model.get_model_object("diffusion_model")
    places = layers.places(network)
    contexts = ActionContexts(places, strength, fingerprint(model))
    wrappers = {WrappersMP.CALC_COND_BATCH: contexts.calc_cond_batch, WrappersMP.APPLY_MODEL: contexts.apply_model}
    patched = models.with_wrappers(model, key=KEY, wrappers=wrappers, attachment=contexts)
    if wan_blocks.is_wan(network):
        return models.with_block_patches(patched, key=KEY, patches=ActionBlockPatch.for_every_block(network))
    return models.with_attention_inputs(patched, patch=ActionInputsPatch(places))


class SealedContexts:
    """A condition of the host's that carries contexts [L, T, C], and lets no model run before they are opened.

    `prompt` [1, T, C] is the conditioning that they came with, which other nodes may change.
    """

    def __init__(self, prompt: torch.Tensor, contexts: torch.Tensor, actions: tuple[ActionIdentifier, ...]):
        self.prompt = prompt
        self.contexts = contexts
        self.actions = actions

    def process_cond(self, **_kwargs):
        """The host's call before each pass of the model. Raises ValueError: nobody opened it."""
        raise ValueError(
            f"the prompt holds the action {method.describe(self.actions)}, which this model cannot read yet: connect "
            "Apply Action Identifier between the model and the sampler, or use CLIP Text Encode for a plain prompt"
        )

    def opened(self, prompt: torch.Tensor, strength: float) -> torch.Tensor | None:
        """Contexts [1, L, T', C] for a conditioning that is now `prompt` [1, T', C], or None where it is plain.

        What Conditioning (Concat) added at its end is added to each. Raises ValueError for other changes.
        """
        length = self.prompt.shape[1]
        own, more = prompt[:, :length], prompt[:, length:]
        if strength == 0:
            return None
        if prompt is not self.prompt and not torch.equal(own.to(self.prompt), self.prompt):
            if not own.any():  # Conditioning Zero Out, for a negative
                return None
            raise ValueError(
                f"the prompt with {method.describe(self.actions)} was averaged, scaled or otherwise changed after "
                "Encode Action, which its layers cannot follow: leave that node out. Combine, areas, masks, steps, "
                "and Concat with this prompt as conditioning_to work"
            )
        contexts = method.blended(self.prompt, self.contexts, strength)
        if more.shape[1]:
            contexts = torch.cat([contexts, more.to(contexts).expand(len(contexts), -1, -1)], dim=1)
        return contexts.unsqueeze(0)


class OpenContexts:
    """A condition of the host's: contexts [1, L, T, C] for `count` samples, or None for a plain prompt."""

    def __init__(self, contexts: torch.Tensor | None, count: int = 1):
        self.contexts = contexts
        self.count = count

    def process_cond(self, batch_size, **_kwargs) -> OpenContexts:
        return OpenContexts(self.contexts, batch_size)

    def can_concat(self, other) -> bool:
        return isinstance(other, OpenContexts)

    def concat(self, others) -> BatchContexts:
        """All of a batch in one."""
        return BatchContexts(tuple(Rows(cond.count, cond.contexts) for cond in (self, *others)))

    def size(self) -> list[int]:
        """For the host's estimate of memory."""
        return [1] if self.contexts is None else [self.count, *self.contexts.shape[1:]]


class ActionContexts:
    """What one patched model does with sealed contexts. It holds no tensor and knows no run."""

    def __init__(self, places: tuple[Place, ...], strength: float, base: str):
        self.places = places
        self.strength = strength
        self.base = base
        self.warned: set[tuple[str, str]] = set()

    def calc_cond_batch(self, executor, model, conds, x_in, timestep, model_options):
        """The host's CALC_COND_BATCH: open the sealed, give the others a neutral condition."""
        if any(KEY in cond["model_conds"] for group in conds for cond in group or ()):
            conds = [None if group is None else [self._opened(cond) for cond in group] for group in conds]
            if not any(cond["model_conds"][KEY].contexts is not None for group in conds for cond in group or ()):
                conds = [None if group is None else [_without(cond) for cond in group] for group in conds]
        return executor(model, conds, x_in, timestep, model_options)

    def _opened(self, cond: dict) -> dict:
        sealed = cond["model_conds"].get(KEY)
        contexts = None
        if sealed is not None:
            for action in sealed.actions:
                method.check_places(action.places, self.places, action.placeholder)
                self._compare(action)
            # Where areas differ, the host gives these conditions to an entry whose own prompt is another one.
            contexts = sealed.opened(cond["model_conds"]["c_crossattn"].cond, self.strength)
        return {**cond, "model_conds": {**cond["model_conds"], KEY: OpenContexts(contexts)}}

    def _compare(self, action: ActionIdentifier) -> None:
        known = action.placeholder, action.base
        if action.base and action.base != self.base and known not in self.warned:
            self.warned.add(known)
            logging.warning(
                "[Understudy] %s was learnt beside other weights than this model's; it may act less, or otherwise",
                action.placeholder,
            )

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs
    ):
        """The host's APPLY_MODEL: hand the batch's contexts to the layers."""
        contexts = kwargs.pop(KEY, None)
        if contexts is not None:
            options = for_layers(executor.class_obj, contexts, c_crossattn.shape[1], x.device)
            transformer_options = {**transformer_options, KEY: options}
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def _without(cond: dict) -> dict:
    return {**cond, "model_conds": {key: value for key, value in cond["model_conds"].items() if key != KEY}}


def for_layers(base: Any, contexts: BatchContexts, length: int, device: torch.device) -> BatchContexts:
    """Contexts as the layers of this BaseModel read them, in a call whose prompts have `length` tokens.

    A Wan model reads prompts through a projection.
    """
    dtype = base.get_dtype_inference()
    project = getattr(base.diffusion_model, "text_embedding", None) or (lambda own: own)
    return contexts.map(lambda own: project(own.to(device, dtype)), length)


class ActionInputsPatch:
    """ComfyUI's attn2_patch of a UNet: each place of the network reads its own context."""

    key = KEY

    def __init__(self, places: Sequence[Place]):
        self.numbers = {(place.kind, place.index): number for number, place in enumerate(places)}

    def __call__(self, n, context, value, extra_options):
        contexts = extra_options.get(KEY)
        if contexts is None:
            return n, context, value
        context = contexts.at(self.numbers[tuple(extra_options["block"][:2])], context)
        return n, context, context


class ActionBlockPatch(WanBlockPatch):
    """A Wan block that reads its own context."""

    key = KEY

    def __call__(self, args: dict, extra: dict) -> dict:
        contexts = args["transformer_options"].get(KEY)
        if contexts is not None:
            args = {**args, "txt": contexts.at(self.index, args["txt"])}
        return self._inner(args, extra)
