"""What was done to a model has a name: equal for the same graph, built again, loaded or used, and for no other."""

import comfy.hooks
import comfy.samplers
import comfy.sd
import numpy as np
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter import LoRAAdapter
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3
from pack.nodes.action_identifier import sampling as action
from pack.nodes.patching.changes import call_changes, weight_changes
from support import tiny_model

LAYER = "diffusion_model.blocks.0.self_attn.q"
SHAPE = (1, 16, 1, 4, 4)


def test_patches_count_by_place_strength_and_values():
    key = "diffusion_model.blocks.0.self_attn.q.weight"

    def patched(value=1.0, strength=0.7, key=key, kind="diff", offset=None, alpha=None):
        model = tiny_model.wan()
        weight = model.model.state_dict()[key]
        patch = (kind, (torch.full_like(weight, value),))
        if alpha is not None:
            ends = torch.ones(len(weight), 2), torch.ones(2, len(weight))
            patch = LoRAAdapter(set(), (*ends, alpha, None, None, None))
        model.add_patches({key if offset is None else (key, offset): patch}, strength)
        return weight_changes(model)

    assert weight_changes(tiny_model.wan()) == "" and patched() == patched() and len(patched()) == 16
    others = patched(2.0), patched(strength=0.5), patched(key=key.replace("blocks.0", "blocks.1"))
    parts = patched(offset=(0, 0, 24)), patched(offset=(0, 24, 24)), patched(alpha=1.0), patched(alpha=64.0)
    assert len({patched(), patched(kind="set"), *others, *parts}) == 9


def lora(value=0.5, dtype=torch.float32):
    up, down = torch.full((48, 2), value, dtype=dtype), torch.ones(2, 48, dtype=dtype)
    return {f"{LAYER}.lora_up.weight": up, f"{LAYER}.lora_down.weight": down, f"{LAYER}.alpha": torch.tensor(2.0)}


def bypass(strength=0.7, value=0.5, dtype=torch.float32):
    patched, _ = comfy.sd.load_bypass_lora_for_models(tiny_model.wan(), None, lora(value, dtype), strength, 0)
    assert patched.injections and not patched.patches
    return patched


def test_a_lora_in_bypass_counts_by_strength_and_values():
    known = weight_changes(bypass())
    assert known and known == weight_changes(bypass())
    assert len({known, weight_changes(bypass(0.5)), weight_changes(bypass(value=0.25)), ""}) == 4


def hooked(strength=0.7):
    model = tiny_model.wan()
    model.forced_hooks = comfy.hooks.create_hook_lora(lora(), strength, 0.0)
    return model


def test_hooks_count():
    assert weight_changes(hooked()) == weight_changes(hooked()) != ""
    assert weight_changes(hooked(0.5)) != weight_changes(hooked())


def scaled(factor):
    def patch(function, arguments):
        return function(arguments["input"], arguments["timestep"], **arguments["c"]) * factor

    model = tiny_model.wan()
    model.set_model_unet_function_wrapper(patch)
    return model


class Patch:
    RUN_STATE = ("runs",)

    def __init__(self, values, runs=0):
        self.values, self.runs = values, runs

    def __call__(self, q, k, v, extra):
        return q, k, v


def patched(*values):
    model = tiny_model.wan()
    model.set_model_attn1_patch(Patch(*values))
    return model


def wrapped(function):
    model = tiny_model.wan()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "key", function)
    return model


def option(name, value):
    model = tiny_model.wan()
    model.model_options["transformer_options"][name] = value
    return model


def shifted(shift=3.0):
    return ModelSamplingSD3().patch(tiny_model.wan(), shift)[0]


def with_action(strength=1.0):
    return action.apply(tiny_model.wan(), strength)


def test_whatever_else_changes_the_computation_counts():
    makers = [
        lambda: shifted(3.0), lambda: shifted(5.0),
        lambda: ModelSamplingDiscrete().patch(tiny_model.wan(), "v_prediction", False)[0],
        lambda: scaled(1.0), lambda: scaled(1.5),
        lambda: patched([1.0]), lambda: patched([2.0]), lambda: patched(torch.ones(2)), lambda: patched(np.ones(2)),
        lambda: wrapped(lambda executor, *args: executor(*args)),
        lambda: wrapped(lambda executor, *args: executor(*args) * 2),
        lambda: option("scale", 2), lambda: option("scale", 3), lambda: option("name", "a"),
        lambda: with_action(1.0), lambda: with_action(0.5),
    ]
    names = [call_changes(make()) for make in makers]
    assert call_changes(tiny_model.wan()) == "" and "" not in names and len(set(names)) == len(names)
    assert [call_changes(make()) for make in makers] == names, "built again"


def test_what_a_patch_remembers_of_its_runs_does_not_count():
    assert call_changes(patched([1.0], 3)) == call_changes(patched([1.0], 4))


@pytest.mark.parametrize("make", [
    shifted, with_action, hooked, bypass, lambda: bypass(value=1 / 3, dtype=torch.float64),
    lambda: bypass(value=1 / 3, dtype=torch.bfloat16),
])
def test_a_model_has_its_name_before_and_after_it_was_sampled_with(make):
    model = make()
    before = weight_changes(model), call_changes(model)
    tiny_model.sample(model, comfy.samplers.sampler_object("euler"), shape=SHAPE, steps=1)
    assert (weight_changes(model), call_changes(model)) == before
    model.patch_model()
    assert (weight_changes(model), call_changes(model)) == before, "while its objects are in their places"
    model.unpatch_model()


def test_objects_that_hold_each_other_end():
    first, second = Patch([1.0]), Patch([2.0])
    first.values.append(second)
    second.values.append(first)
    assert call_changes(patched(first))
