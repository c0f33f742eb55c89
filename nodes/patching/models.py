"""The only calls that patch a MODEL: clone, then replace, and never change the caller's.

Each function adds one kind of patch under a `key`, and they can be chained. A patch carries that key as its attribute
`key`; one that is already on the model is not added again, and one of another key is handed on as `earlier`, or
stays beside it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

# make(earlier) -> the patch; `earlier` is the patch that was on that place before, or None, and the new one calls it.
MakePatch = Callable[[Any], Callable]


def with_wrappers(
    model: ModelPatcher, *, key: str, wrappers: Mapping[str, Callable],
    callbacks: Mapping[str, Callable] | None = None, attachment: Any = None,
) -> ModelPatcher:
    """A clone of `model` with these wrappers and callbacks, by ComfyUI's kinds, instead of those of the same kind
    and key; `attachment` is what `attachment(model, key)` returns.
    """
    patcher = model.clone()
    for kind, wrapper in wrappers.items():
        patcher.remove_wrappers_with_key(kind, key)
        patcher.add_wrapper_with_key(kind, key, wrapper)
    for kind, callback in (callbacks or {}).items():
        patcher.remove_callbacks_with_key(kind, key)
        patcher.add_callback_with_key(kind, key, callback)
    patcher.set_attachments(key, attachment)
    return patcher


def attachment(model: ModelPatcher, key: str) -> Any:
    """What `with_wrappers` attached under `key`, or None."""
    return model.get_attachment(key)


def attachments(model: ModelPatcher) -> list[Any]:
    """Everything that `with_wrappers` attached, in that order."""
    return [attached for attached in model.attachments.values() if attached is not None]


def with_post_cfg(model: ModelPatcher, *, function: Callable) -> ModelPatcher:
    """A clone of `model` that calls `function` after CFG, in place of that with the same `key`, else after all."""
    patcher = model.clone()
    functions = list(patcher.model_options.get("sampler_post_cfg_function", []))
    place = next((i for i, other in enumerate(functions) if getattr(other, "key", None) == function.key), None)
    if place is None:
        functions.append(function)
    else:
        functions[place] = function
    patcher.model_options["sampler_post_cfg_function"] = functions
    return patcher


def without_step_caches(model: ModelPatcher) -> tuple[ModelPatcher, str]:
    """A clone of `model` without ComfyUI's EasyCache and LazyCache, and that node's name; else `model` and ""."""
    cache = model.model_options["transformer_options"].get("easycache")
    if cache is None:
        return model, ""
    patcher = model.clone()
    del patcher.model_options["transformer_options"]["easycache"]
    for kind in list(patcher.wrappers):
        for key in ("easycache", "lazycache"):
            patcher.remove_wrappers_with_key(kind, key)
    return patcher, getattr(cache, "name", type(cache).__name__)


def with_block_patches(model: ModelPatcher, *, key: str, patches: Mapping[int, MakePatch]) -> ModelPatcher:
    """A clone of `model` whose transformer blocks, by number, run as these patches."""
    return _with_replacements(model, key, "dit", {("double_block", block): make for block, make in patches.items()})


def with_cross_attention_patches(
    model: ModelPatcher, *, key: str, patches: Mapping[tuple[str, int, int], MakePatch]
) -> ModelPatcher:
    """A clone of `model` with these in place of the attention of a UNet's cross-attention layers, by (part, block,
    transformer), such as ("input", 4, 0).
    """
    return _with_replacements(model, key, "attn2", patches)


def with_attention_inputs(model: ModelPatcher, *, patch: Callable) -> ModelPatcher:
    """A clone of `model` whose UNet calls `patch` with the inputs of each cross-attention layer, before the patches
    that are there, which change keys and values each in their own way.
    """
    patcher = model.clone()
    _list(patcher, "attn2_patch", patch, first=True)
    return patcher


def with_unet_patches(model: ModelPatcher, *, patches: Mapping[str, Callable]) -> ModelPatcher:
    """A clone of `model` with these patches by ComfyUI's names, such as emb_patch, after those that are there."""
    patcher = model.clone()
    for name, patch in patches.items():
        _list(patcher, name, patch)
    return patcher


def with_compute_dtype(model: ModelPatcher, dtype: torch.dtype) -> ModelPatcher:
    """A clone of `model` that computes in `dtype`, its weights stored as they are."""
    patcher = model.clone()
    patcher.set_model_compute_dtype(dtype)
    return patcher


def with_lora(model: ModelPatcher, *, weights: Mapping[str, torch.Tensor], strength: float) -> ModelPatcher:
    """A clone of `model` with a LoRA on top, as Load LoRA applies it."""
    return comfy.sd.load_lora_for_models(model, None, dict(weights), strength, 0.0)[0]


def with_weights(model: ModelPatcher, *, weights: Mapping[str, torch.Tensor], strength: float) -> ModelPatcher:
    """A clone of `model` that samples with these weights, by full name, instead of its own; `strength` is how far it
    goes from its own weights to these, and at 1 it has exactly these.
    """
    patcher = model.clone()
    if strength == 1:
        patcher.add_patches({key: ("set", (weight,)) for key, weight in weights.items()})
    else:
        patcher.add_patches({key: ("diff", (weight,)) for key, weight in weights.items()}, strength, 1 - strength)
    return patcher


def _with_replacements(model: ModelPatcher, key: str, kind: str, patches: Mapping[tuple, MakePatch]) -> ModelPatcher:
    patcher = model.clone()
    replaced = patcher.model_options["transformer_options"].get("patches_replace", {}).get(kind, {})
    for place, make in patches.items():
        # ComfyUI falls back to a patch of the whole block where a transformer has no separate one.
        earlier = replaced.get(place, replaced.get(place[:2]))
        if getattr(earlier, "key", None) != key:
            patcher.set_model_patch_replace(make(earlier), kind, *place)
    return patcher


def _list(patcher: ModelPatcher, name: str, patch: Callable, first: bool = False) -> None:
    patches = patcher.model_options["transformer_options"].setdefault("patches", {})
    present = patches.get(name, [])
    if all(getattr(other, "key", None) != patch.key for other in present):
        patches[name] = [patch, *present] if first else [*present, patch]
