"""What each kind of patch adds to a clone: nothing twice, nothing lost, and the caller's model stays unchanged."""

import copy

import pytest
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from pack.nodes.patching import models
from support import tiny_model

KEY = "test"
PLACE = ("input", 1, 0)


class Patch:
    """A patch of one key that knows what it was made around."""

    def __init__(self, earlier=None, key=KEY):
        self.earlier = earlier
        self.key = key

    def __call__(self, *args):
        return args[0]


@pytest.fixture
def model():
    return tiny_model.picture()


def options(model):
    return model.model_options["transformer_options"]


ADD = {
    "wrappers": lambda model: models.with_wrappers(model, key=KEY, wrappers={WrappersMP.APPLY_MODEL: Patch()}),
    "callbacks": lambda model: models.with_wrappers(
        model, key=KEY, wrappers={}, callbacks={CallbacksMP.ON_CLEANUP: Patch()}, attachment=3
    ),
    "blocks": lambda model: models.with_block_patches(model, key=KEY, patches={0: Patch}),
    "cross-attention": lambda model: models.with_cross_attention_patches(model, key=KEY, patches={PLACE: Patch}),
    "attention inputs": lambda model: models.with_attention_inputs(model, patch=Patch()),
    "others": lambda model: models.with_unet_patches(model, patches={"emb_patch": Patch()}),
}


def everything(model):
    """What a MODEL carries, so that two of them can be compared."""
    return model.wrappers, model.callbacks, model.attachments, options(model)


def counted(value) -> int:
    """How many patches are in there, however deep."""
    if isinstance(value, dict):
        return sum(map(counted, value.values()))
    return sum(map(counted, value)) if isinstance(value, (list, tuple)) else isinstance(value, Patch)


@pytest.mark.parametrize("add", ADD.values(), ids=ADD)
def test_one_of_each_kind_on_the_clone_and_none_on_the_callers(model, add):
    before = copy.deepcopy(everything(model))
    once = add(model)
    assert everything(model) == before
    assert counted(everything(once)) == 1 and counted(everything(add(once))) == 1
    assert once is not model and once.model is model.model


def test_wrappers_are_replaced_and_those_of_other_keys_stay(model):
    first, second, other = Patch(), Patch(), Patch(key="other")
    kind = WrappersMP.APPLY_MODEL
    patched = models.with_wrappers(model, key="other", wrappers={kind: other}, attachment="its own")
    for wrapper in (first, second):
        patched = models.with_wrappers(patched, key=KEY, wrappers={kind: wrapper}, attachment=wrapper)
    assert patched.wrappers[kind] == {KEY: [second], "other": [other]}
    assert models.attachment(patched, KEY) is second and models.attachment(patched, "other") == "its own"
    assert models.attachment(model, KEY) is None


@pytest.mark.parametrize("kind", ["blocks", "cross-attention"])
def test_a_replacement_is_handed_the_patch_of_another_key(model, kind):
    other = Patch(key="other")
    if kind == "blocks":
        model.set_model_patch_replace(other, "dit", "double_block", 0)
        (patch,) = options(ADD[kind](model))["patches_replace"]["dit"].values()
    else:
        # A patch of the whole block counts for its transformers.
        model.set_model_patch_replace(other, "attn2", *PLACE[:2])
        patch = options(ADD[kind](model))["patches_replace"]["attn2"][PLACE]
    assert patch.key == KEY and patch.earlier is other


def test_attention_inputs_come_first_and_other_patches_last(model):
    other = Patch(key="other")
    for name in ("attn2_patch", "emb_patch"):
        model.set_model_patch(other, name)
    patches = options(ADD["others"](ADD["attention inputs"](model)))["patches"]
    assert [patch.key for patch in patches["attn2_patch"]] == [KEY, "other"]
    assert [patch.key for patch in patches["emb_patch"]] == ["other", KEY]


def test_the_order_of_calls_makes_no_difference(model):
    def keys(model):
        """Its patches by their keys, since each call makes its own."""
        def named(value):
            if isinstance(value, dict):
                return {name: named(part) for name, part in value.items() if part not in ({}, [])}
            return [named(part) for part in value] if isinstance(value, list) else getattr(value, "key", value)

        return [named(part) for part in everything(model)[:2]], named(options(model))

    forwards = backwards = model
    for add, other in zip(ADD.values(), reversed(ADD.values()), strict=True):
        forwards, backwards = add(forwards), other(backwards)
    assert keys(forwards) == keys(backwards)
    assert counted(everything(forwards)) == len(ADD)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_whole_weights_are_met_at_their_strength(model, strength):
    key = "diffusion_model.input_blocks.0.0.weight"
    original = model.model.state_dict()[key]
    weight = original + torch.randn(original.shape, generator=torch.Generator().manual_seed(1))
    patched = models.with_weights(model, weights={key: weight}, strength=strength)
    met = patched.patch_weight_to_device(key, return_weight=True)
    torch.testing.assert_close(met, torch.lerp(original, weight, strength), rtol=1e-5, atol=1e-6)
    assert strength != 1 or torch.equal(met, weight)
