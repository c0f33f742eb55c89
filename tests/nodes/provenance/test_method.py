"""What led to a result, from its graph."""

import math

import pytest
from pack.nodes.provenance import method


def node(class_type, title="", **inputs):
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}


PROMPT = {
    "1": node("LoadImage", image="anna.png"),
    "2": node("LoadImage", image="sub/dance.png [output]"),
    "3": node("VAEEncode", pixels=["1", 0], vae=["9", 2]),
    "4": node("VAEEncode", pixels=["2", 0], vae=["9", 2]),
    "5": node("PrimitiveFloat", value=0.25),
    "6": node(
        "UnderstudyFrequencyGuidanceSampler", source=["3", 0], driving=["4", 0], phase_low=["5", 0], bands="0-3"
    ),
    "7": node("SamplerCustom", sampler=["6", 0], latent_image=["3", 0], noise_seed=3),
    "8": node("VAEDecode", samples=["7", 0], vae=["9", 2]),
    "9": node("CheckpointLoaderSimple", ckpt_name="base.safetensors"),
    "10": node("UnderstudyLoadIdentityPrior", lora="anna.safetensors", model=["9", 0]),
    "11": node("UnderstudyTrainIdentityPrior", model=["10", 0], images=["12", 0]),
    "12": node("LoadImageDataSetFromFolder", folder="anna pictures"),
    "13": node("ApplyLora", model=["9", 0], lora=["11", 0]),
    "14": node("InvisibleMark", "Add Watermark", image=["8", 0]),
    "15": node("ImageScale", image=["14", 0]),
    "label": node("UnderstudyLabelMedia", images=["15", 0], sources="hand.png"),
    "other": node("LoadImage", image="not upstream.png"),
    "after": node("UnderstudyPuppet", images=["label", 0], identity="after"),
}
PROMPT["7"]["inputs"]["model"] = ["13", 0]


def test_files_are_named_by_what_they_were_used_for():
    texts = method.trace(PROMPT, "label").texts
    assert texts["anna.png"] == method.Text(
        ("image of LoadImage",), ("source of UnderstudyFrequencyGuidanceSampler",)
    )
    assert texts["sub/dance.png [output]"].uses == ("driving of UnderstudyFrequencyGuidanceSampler",)
    assert texts["base.safetensors"].inputs == ("ckpt_name of CheckpointLoaderSimple",)
    assert texts["anna.safetensors"].inputs == ("lora of UnderstudyLoadIdentityPrior",)
    assert not {"not upstream.png", "hand.png", "after"} & set(texts)


def test_the_nearest_method_names_the_use():
    """A picture that only a sampler reads has no use of its own; through two methods, that of the first."""
    prompt = {
        "a": node("LoadImage", image="a.png"), "b": node("KSampler", latent_image=["a", 0]),
        "label": node("UnderstudyLabelMedia", images=["b", 0]),
    }
    assert method.trace(prompt, "label").texts["a.png"].uses == ()
    prompt["c"] = node("UnderstudyPrepareReference", picture=["a", 0])
    prompt["d"] = node("UnderstudyApplyVideoIdentity", reference=["c", 0])
    prompt["b"]["inputs"]["model"] = ["d", 0]
    assert method.trace(prompt, "label").texts["a.png"].uses == ("picture of UnderstudyPrepareReference",)


def test_steps_are_the_methods_nodes_in_order_with_their_settings():
    steps = method.trace(PROMPT, "label").steps
    kinds = [step.class_type for step in steps]
    assert sorted(kinds) == [
        "UnderstudyFrequencyGuidanceSampler", "UnderstudyLoadIdentityPrior", "UnderstudyTrainIdentityPrior"
    ]
    assert kinds.index("UnderstudyLoadIdentityPrior") < kinds.index("UnderstudyTrainIdentityPrior")
    (guidance,) = (step for step in steps if step.class_type == "UnderstudyFrequencyGuidanceSampler")
    assert guidance.settings == {"phase_low": 0.25, "bands": "0-3"}


def test_folders_are_told_apart():
    assert method.trace(PROMPT, "label").folders == ("anna pictures",)


@pytest.mark.parametrize(("title", "marks", "removers"), [
    ("Add Watermark", ["InvisibleMark (Add Watermark)"], []), ("水印を入れる", ["InvisibleMark (水印を入れる)"], []),
    ("Remove Watermark", [], ["InvisibleMark (Remove Watermark)"]), ("Detect watermark", [], []), ("Blur", [], []),
])
def test_watermarks_are_known_by_name(title, marks, removers):
    prompt = {**PROMPT, "14": node("InvisibleMark", title, image=["8", 0])}
    traced = method.trace(prompt, "label")
    assert (list(traced.watermarks), list(traced.removers)) == (marks, removers)


def test_a_mark_before_an_encoder_is_not_in_the_result():
    prompt = {**PROMPT, "14": node("Blur", image=["8", 0]), "16": node("Watermark", image=["1", 0])}
    prompt["3"] = node("VAEEncode", pixels=["16", 0], vae=["9", 2])
    assert method.trace(prompt, "label").watermarks == ()


def test_a_node_that_the_graph_lacks_has_no_history():
    assert method.trace(PROMPT, "none") == method.Trace() == method.trace({}, "label")


def test_long_and_wide_graphs_are_walked_once():
    """Each of 3,000 nodes reads the one before it twice: 2^3000 paths, deeper than Python's stack."""
    prompt = {"0": node("LoadImage", image="a.png")}
    for i in range(1, 3000):
        prompt[f"{i}"] = node("Add", a=[f"{i - 1}", 0], b=[f"{i - 1}", 0])
    assert method.trace(prompt, "2999").texts == {"a.png": method.Text(("image of LoadImage",))}


@pytest.mark.parametrize("value", [
    2**64 - 1, math.nan, math.inf, "\ud800", {"a": (1, None, True)}, {1: [2**63, 2**63 - 1]},
])
def test_every_setting_can_be_stored(value):
    stored = method.storable(value)
    text = repr(stored)
    assert str(2**63) not in text or f"'{2**63}'" in text
    assert "nan" not in text.replace("'nan'", "") and "inf" not in text.replace("'inf'", "")
    text.encode()


def test_the_manifest_says_label_methods_marks_and_consent():
    traced = method.trace(PROMPT, "label")
    definition = method.manifest("x", "trainedAlgorithmicMedia", traced, 2, "2026-11-28T00:00:00Z", {"subject": "A"})
    actions, consent = definition["assertions"]
    created, *others = actions["data"]["actions"]
    assert created["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert created["parameters"]["ingredientIds"] == ["ingredient-0", "ingredient-1"]
    assert [each["action"] for each in others] == [*["io.github.understudy.method"] * 3, "c2pa.watermarked.unbound"]
    assert consent["data"] == {"subject": "A"}
    assert "parameters" not in method.manifest("x", "a", method.Trace(), 0, "")["assertions"][0]["data"]["actions"][0]
