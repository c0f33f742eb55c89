"""Reference Weight inside a sampling run: an attention function around the user's, for calls that have references.

Nothing of the model is replaced. Before each call of the model the function is put into its `transformer_options`,
around the one that is there; it finds its rows by what ComfyUI writes there of the references.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.krea2.model import SingleStreamDiT
from comfy.ldm.mage_flow.model import MageFlowTransformer2DModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..inputs import ranges
from ..inputs.families import family, identity_instead
from ..messages import tell
from ..patching import joint_blocks, models
from ..patching.wan_blocks import OVERRIDE, AttentionOverride, is_wan
from . import method
from .method import Layout, Weighing

KEY = "understudy_reference_weight"
NODE = "Reference Weight"
_NETWORKS = (Flux, QwenImageTransformer2DModel, SingleStreamDiT, MageFlowTransformer2DModel)


def apply(model: Any, weighing: Weighing) -> Any:
    """A clone of MODEL `model` that weighs its references, after those weighings that it has; `model` if it is off.

    Raises ValueError, naming the family and the fix, for a model in which references are no rows of their own.
    """
    _, count = blocks(model)
    ranges.select_numbers("blocks", weighing.config.blocks, count)
    if weighing.off:
        return model
    earlier = models.attachment(model, KEY)
    run = WeighedReferences((*(earlier.weighings if earlier else ()), weighing))
    wrappers = {WrappersMP.PREPARE_SAMPLING: run.prepare_sampling, WrappersMP.APPLY_MODEL: run.apply_model}
    callbacks = {CallbacksMP.ON_CLEANUP: run.cleanup}
    return models.with_wrappers(model, key=KEY, wrappers=wrappers, callbacks=callbacks, attachment=run)


def blocks(model: Any) -> tuple[int, int]:
    """How many blocks of a MODEL have two streams, and how many there are; the others come after them.

    Raises ValueError, naming the family and what to use instead, for another kind of model.
    """
    network = model.get_model_object("diffusion_model")
    reads_more = isinstance(network, Flux) and network.in_channels != network.out_channels
    if not isinstance(network, _NETWORKS) or reads_more:
        instead = "Apply Video Identity has a strength of its own" if is_wan(network) else identity_instead(model)
        raise ValueError(
            f"model is {family(model)}, in which ComfyUI does not mark reference pictures among the tokens: connect "
            f"Flux Kontext, Flux.2, Qwen-Image-Edit, Krea 2 or Mage-Flow; with this one, {instead}"
        )
    if isinstance(network, Flux):
        return len(network.double_blocks), len(network.double_blocks) + len(network.single_blocks)
    layers = getattr(network, "transformer_blocks", None) or network.blocks
    return 0, len(layers)


class WeighedReferences:
    """The weighings of one patched model, in the order of its nodes, and what a run met."""

    RUN_STATE = ("_size", "_met", "_used")

    def __init__(self, weighings: tuple[Weighing, ...]):
        self.weighings = weighings
        self._begin()

    def _begin(self) -> None:
        self._size: tuple[int, ...] | None = None  # height and width of this run's latents
        self._met = self._used = False

    def cleanup(self, _patcher: Any) -> None:
        """ComfyUI's ON_CLEANUP: nothing outlives a run."""
        if self._used and not self._met:
            warning = (
                "no attention of this run had a reference: the model ignores those of its prompt, or a node replaces "
                "its attention. For Krea 2, set the method with Edit Model Reference Method"
            )
            tell(NODE, [warning], logging.WARNING)
        self._begin()

    def prepare_sampling(self, executor, model, noise_shape, conds, *args, **kwargs):
        """ComfyUI's PREPARE_SAMPLING: refuses prompts that do not show the reference, before anything runs."""
        shown = [len(cond.get("reference_latents") or ()) for group in conds.values() for cond in group or ()]
        most, wanted = max(shown, default=0), max(weighing.config.reference for weighing in self.weighings)
        if not most:
            raise ValueError(
                "the prompt shows no reference picture whose weight could be set: connect Reference Latent between "
                "the text's encoder and the sampler, or use a text encoder that takes images"
            )
        if wanted > most:
            raise ValueError(
                f"reference is {wanted} and the prompt shows {most}: use 1 to {most}, or 0 for all of them"
            )
        self._size = tuple(noise_shape[-2:])
        return executor(model, noise_shape, conds, *args, **kwargs)

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs
    ):
        """ComfyUI's APPLY_MODEL: hand the call its attention; one in which nothing is weighed is unchanged."""
        base = executor.class_obj
        active = [weighing for weighing in self.weighings if _is_active(weighing, base, t)]
        if active and kwargs.get("ref_latents"):
            attention = WeighedAttention(active, base.diffusion_model, x, transformer_options, self._size)
            transformer_options = {**transformer_options, OVERRIDE: attention}
            result = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
            self._used, self._met = True, self._met or attention.uses > 0
            return result
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


class WeighedAttention(AttentionOverride):
    """The attention of one call of the model; `uses` counts those that had references."""

    def __init__(
        self, weighings: Sequence[Weighing], network: Any, x: torch.Tensor, options: Mapping[str, Any],
        size: tuple[int, ...] | None,
    ):
        super().__init__(options.get(OVERRIDE))
        patch = getattr(network, "patch_size", None) or network.patch
        height, width = x.shape[-2:]
        if size is not None and (height, width) != size and any(weighing.mask is not None for weighing in weighings):
            raise ValueError(
                "mask cannot follow a conditioning with an area, which shows the model a part of the picture: take "
                "Conditioning (Set Mask) with set_cond_area `default` instead, or disconnect `mask`"
            )
        self.picture = -(-height // patch) * -(-width // patch) * (x.shape[2] if x.ndim == 5 else 1)
        self.network = network
        self.weighings = [
            (
                weighing.config.reference, weighing.config.strength,
                ranges.parse_numbers("blocks", weighing.config.blocks),
                _batch_mask(weighing.mask, height, width, patch, len(x)),
            )
            for weighing in weighings
        ]
        self._cache: dict[tuple, list[torch.Tensor | None]] = {}

    def __call__(self, function, q, k, v, heads, *args, **kwargs):
        kwargs = joint_blocks.named(args, kwargs)
        options = kwargs.get("transformer_options") or {}
        counts = tuple(options.get(joint_blocks.COUNTS) or ())
        if not counts or "block_index" not in options:
            return self._inner(function, q, k, v, heads, **kwargs)
        apart = kwargs.get("skip_reshape", False)  # [B, H, T, D]
        axis = 2 if apart else 1
        rows, columns = q.shape[axis], k.shape[axis]
        if columns <= self.picture + sum(counts):
            return self._inner(function, q, k, v, heads, **kwargs)  # not of the joint sequence
        self.uses += 1
        layout = Layout(columns - self.picture - sum(counts), self.picture, counts)
        number = joint_blocks.number(self.network, options)
        weights = [None if weight is None else weight[:, :rows] for weight in self._weights(layout, number)]
        if all(weight is None for weight in weights):
            return self._inner(function, q, k, v, heads, **kwargs)
        if kwargs.get("mask") is not None or kwargs.get("scale") is not None or kwargs.get("enable_gqa"):
            added = method.bias((rows, columns), layout.columns, weights).to(q)
            mask = joint_blocks.added_mask(kwargs.get("mask"), q.dtype)
            kwargs["mask"] = added if mask is None else mask + added
            return self._inner(function, q, k, v, heads, **kwargs)
        q, k, v = (part.transpose(1, 2) if apart else part.unflatten(-1, (heads, -1)) for part in (q, k, v))
        out = method.attend(q, k, v, layout.columns, weights)
        return out.transpose(1, 2) if kwargs.get("skip_output_reshape") else out.flatten(2)

    def _weights(self, layout: Layout, block: int) -> list[torch.Tensor | None]:
        """Of each reference, for every row of the whole sequence."""
        chosen = tuple(
            i for i, (_, _, numbers, _) in enumerate(self.weighings) if numbers is None or block in numbers
        )
        if (layout, chosen) not in self._cache:
            self._cache[layout, chosen] = [
                method.row_weights(layout, number, [
                    (strength, mask) for i, (reference, strength, _, mask) in enumerate(self.weighings)
                    if i in chosen and reference in (0, number + 1)
                ])
                for number in range(len(layout.references))
            ]
        return self._cache[layout, chosen]


def _batch_mask(
    mask: torch.Tensor | None, height: int, width: int, patch: int, batch: int
) -> torch.Tensor | None:
    """A mask of the picture's tokens, [1, P], or for each row of a call's batch, which holds both halves of CFG."""
    if mask is None:
        return None
    if len(mask) > 1 and batch % len(mask):
        raise ValueError(
            f"mask holds {len(mask)} masks and the batch is {batch}: connect one mask, or one per picture of the "
            "batch"
        )
    tokens = method.token_mask(mask, height, width, patch)
    return tokens.repeat(batch // len(mask), 1) if len(mask) > 1 else tokens


def _is_active(weighing: Weighing, base: Any, t: torch.Tensor) -> bool:
    config = weighing.config
    if config.start_percent <= 0.0 and config.end_percent >= 1.0:
        return True
    return float(t.max()) in ranges.sigma_range(base.model_sampling, config.start_percent, config.end_percent)
