"""Action identifiers inside a sampling run: attached to a conditioning, resolved by the patched model.

Attached contexts are one of the conditioning's model conditions, so that they go wherever it goes: combined, masked,
limited to some steps. ComfyUI stops at one that no model resolves. The patched model resolves them before each of its
calls, and gives plain prompts a neutral condition, so that ComfyUI still runs them in one batch.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ..fingerprint import fingerprint
from ..inputs.families import family
from ..messages import tell
from ..patching import models, unet_layers, wan_blocks
from . import method
from .method import ActionIdentifier, Place

KEY = "understudy_action"


def attach_contexts(
    conditioning: list, contexts: Sequence[torch.Tensor], actions: Sequence[ActionIdentifier]
) -> list:
    """The CONDITIONING with contexts [L, T, C], one tensor for each of its entries."""
    attached = []
    for (prompt, options), layers in zip(conditioning, contexts, strict=True):
        conditions = {**options.get("model_conds", {}), KEY: AttachedContexts(prompt, layers, tuple(actions))}
        attached.append([prompt, {**options, "model_conds": conditions}])
    return attached


def apply(model: Any, strength: float) -> Any:
    """A clone of `model` that resolves attached contexts, instead of an earlier strength.

    Raises ValueError for models whose cross-attention is not known.
    """
    network = model.get_model_object("diffusion_model")
    resolver = ContextResolver(places(network, family(model)), strength, fingerprint(model))
    wrappers = {WrappersMP.CALC_COND_BATCH: resolver.calc_cond_batch, WrappersMP.APPLY_MODEL: resolver.apply_model}
    patched = models.with_wrappers(model, key=KEY, wrappers=wrappers, attachment=resolver)
    if wan_blocks.is_wan(network):
        return models.with_block_patches(patched, key=KEY, patches=ActionBlockPatch.for_every_block(network))
    return models.with_attention_inputs(patched, patch=ActionInputsPatch(resolver.places))


def places(network: Any, kind: str = "") -> tuple[Place, ...]:
    """Where prompts enter this diffusion model, in the order in which they do.

    A transformer of a UNet is one place, however many layers it has: 16 places in SD 1.5 and 2.1, 11 with 70 layers
    in SDXL. A Wan transformer has one in each block. Raises ValueError, naming the `kind`, for any other model.
    """
    layers = wan_blocks.cross_attentions(network) or unet_layers.cross_attentions(network)
    if not layers:
        raise ValueError(
            f"model is {kind or f'a {type(network).__name__}'}, and action identifiers need layers that read nothing "
            "but the text: connect SD 1.5, SD 2.1, SDXL, or a Wan model that attends to the text once in each block; "
            "with this one, train Source and Driving Pair or use Frequency Guidance"
        )
    counts = collections.Counter((layer.part, layer.block) for layer in layers)
    return tuple(Place(part, block, count) for (part, block), count in counts.items())


@dataclasses.dataclass(frozen=True, eq=False)
class AttachedContexts:
    """A condition of ComfyUI's that carries contexts [L, T, C], and lets no model run before they are resolved.

    `prompt` [1, T, C] is the conditioning that they came with, which other nodes may change.
    """

    prompt: torch.Tensor
    contexts: torch.Tensor
    actions: tuple[ActionIdentifier, ...]

    def process_cond(self, **_kwargs):
        """ComfyUI's call before each pass of the model. Raises ValueError: no model resolved it."""
        raise ValueError(
            f"the prompt contains the action {method.placeholders(self.actions)}, which this model cannot read yet: "
            "connect Apply Action Identifier between the model and the sampler, or use CLIP Text Encode for a plain "
            "prompt"
        )

    def resolve(self, prompt: torch.Tensor, strength: float) -> torch.Tensor | None:
        """Contexts [L, T', C] for a conditioning that is now `prompt` [1, T', C], or None where it is plain.

        What Conditioning (Concat) added at its end is added to each. Raises ValueError for other changes.
        """
        length = self.prompt.shape[1]
        encoded, added = prompt[:, :length], prompt[:, length:]
        if strength == 0:
            return None
        if prompt is not self.prompt and not torch.equal(encoded.to(self.prompt), self.prompt):
            if not encoded.any():  # Conditioning Zero Out, for a negative
                return None
            raise ValueError(
                f"the prompt with {method.placeholders(self.actions)} was averaged, scaled or otherwise changed "
                "after Encode Action, which its layers cannot follow: leave that node out. Combine, areas, masks, "
                "steps, and Concat with this prompt as conditioning_to work"
            )
        contexts = method.blended(self.prompt, self.contexts, strength)
        if added.shape[1]:
            contexts = torch.cat([contexts, added.to(contexts).expand(len(contexts), -1, -1)], dim=1)
        return contexts


@dataclasses.dataclass(frozen=True, eq=False)
class BatchContexts:
    """What the layers read of the prompts of a batch, part by part: contexts [L, T, C], or None for a plain prompt,
    and the number of samples of each part.

    A resolved condition is one part; ComfyUI joins those of a batch, whose prompts have `length` tokens in its call.
    """

    contexts: tuple[torch.Tensor | None, ...]
    counts: tuple[int, ...] = (1,)
    length: int = 0

    def process_cond(self, batch_size, **_kwargs) -> BatchContexts:
        return BatchContexts(self.contexts, (batch_size,))

    def can_concat(self, other) -> bool:
        return isinstance(other, BatchContexts)

    def concat(self, others) -> BatchContexts:
        parts = self, *others
        return BatchContexts(sum((part.contexts for part in parts), ()), sum((part.counts for part in parts), ()))

    def size(self) -> list[int]:
        """For ComfyUI's estimate of the memory of one part."""
        (contexts,) = self.contexts
        return [1] if contexts is None else [*self.counts, *contexts.shape]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor], length: int) -> BatchContexts:
        """With change(contexts) instead of each tensor of contexts, for prompts of `length` tokens."""
        changed = tuple(None if contexts is None else change(contexts) for contexts in self.contexts)
        return BatchContexts(changed, self.counts, length)

    def at(self, layer: int, context: torch.Tensor) -> torch.Tensor:
        """What layer number `layer` reads where all layers would read `context` [B, T, C].

        The prompts are its last `length` tokens; what a model puts before them stays.
        """
        before, prompts = context[:, : -self.length], context[:, -self.length :]
        parts = [
            plain if contexts is None else contexts[min(layer, len(contexts) - 1)].to(context).expand(count, -1, -1)
            for contexts, count, plain in zip(self.contexts, self.counts, prompts.split(self.counts), strict=True)
        ]
        # Attention gives the same for keys that are all repeated equally often.
        length = math.lcm(*(part.shape[1] for part in parts))
        joined = torch.cat([part.repeat(1, length // part.shape[1], 1) for part in parts])
        return torch.cat([before, joined], dim=1) if before.shape[1] else joined


@dataclasses.dataclass(eq=False)
class ContextResolver:
    """What one patched model does with attached contexts. It holds no tensor and knows no run."""

    RUN_STATE = ("warned",)

    places: tuple[Place, ...]
    strength: float
    base: str
    warned: set[tuple[str, str]] = dataclasses.field(default_factory=set)

    def calc_cond_batch(self, executor, model, conds, x_in, timestep, model_options):
        """ComfyUI's CALC_COND_BATCH: resolve what is attached, give the others a neutral condition."""
        if any(KEY in cond["model_conds"] for group in conds for cond in group or ()):
            conds = [group and [self._resolved(cond) for cond in group] for group in conds]
            # With plain prompts alone the call is as it would be without this patch, bit for bit.
            if all(cond["model_conds"][KEY].contexts[0] is None for group in conds for cond in group or ()):
                conds = [group and [_without(cond) for cond in group] for group in conds]
        return executor(model, conds, x_in, timestep, model_options)

    def _resolved(self, cond: dict) -> dict:
        attached = cond["model_conds"].get(KEY)
        contexts = None
        if attached is not None:
            for action in attached.actions:
                method.check_places(action, self.places)
                self._compare(action)
            # Where areas differ, ComfyUI gives these conditions to an entry that has another prompt.
            contexts = attached.resolve(cond["model_conds"]["c_crossattn"].cond, self.strength)
        return {**cond, "model_conds": {**cond["model_conds"], KEY: BatchContexts((contexts,))}}

    def _compare(self, action: ActionIdentifier) -> None:
        trained = action.placeholder, action.base
        if action.base and action.base != self.base and trained not in self.warned:
            self.warned.add(trained)
            warning = (
                f"{action.placeholder} was trained with other weights than this model has, so the action may be "
                "weaker or differ: load the model that it was trained with"
            )
            tell("Apply Action Identifier", [warning], logging.WARNING)

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs
    ):
        """ComfyUI's APPLY_MODEL: hand the contexts of the batch to the layers."""
        contexts = kwargs.pop(KEY, None)
        if contexts is not None:
            contexts = for_layers(executor.class_obj, contexts, c_crossattn.shape[1], x.device)
            transformer_options = {**transformer_options, KEY: contexts}
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def _without(cond: dict) -> dict:
    return {**cond, "model_conds": {key: value for key, value in cond["model_conds"].items() if key != KEY}}


def for_layers(base: Any, contexts: BatchContexts, length: int, device: torch.device) -> BatchContexts:
    """Contexts as the layers of this BaseModel read them, in a call whose prompts have `length` tokens.

    A Wan model reads prompts through a projection.
    """
    dtype = base.get_dtype_inference()
    project = getattr(base.diffusion_model, "text_embedding", None) or (lambda encoded: encoded)
    return contexts.map(lambda encoded: project(encoded.to(device, dtype)), length)


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


class ActionBlockPatch(wan_blocks.WanBlockPatch):
    """Runs in place of one Wan block: the same block, reading its own context."""

    key = KEY

    def __call__(self, args: dict, extra: dict) -> dict:
        contexts = args["transformer_options"].get(KEY)
        if contexts is not None:
            args = {**args, "txt": contexts.at(self.index, args["txt"])}
        return self._inner(args, extra)
