"""Prompts with identifiers, against ComfyUI's embeddings in its own prompts."""

import dataclasses

import comfy.hooks
import pytest
import safetensors.torch
import torch
from comfy_extras.nodes_hooks import SetClipHooks
from pack.nodes.action_identifier import encoding, training
from pack.nodes.action_identifier.config import ActionTrainingConfig
from pack.nodes.action_identifier.method import ActionError, ActionIdentifier
from pack.nodes.puppets import theatre
from pack.nodes.subject_tokens import Subject
from support import action_identifiers, tiny_clip, tiny_model

KINDS = list(tiny_clip.WIDTHS)
MODEL = tiny_model.picture()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="module")
def clips(folder):
    return {kind: tiny_clip.clip(kind, embeddings=str(folder)) for kind in KINDS}


def write(folder, name, vectors):
    """An ordinary embedding that ComfyUI reads as embedding:NAME."""
    keys = {"l": "clip_l", "g": "clip_g", "h": "clip_h"}
    safetensors.torch.save_file({keys[e]: v.clone() for e, v in vectors.items()}, folder / f"{name}.safetensors")


def same_everywhere(kind, placeholder, count, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = {e: torch.randn(1, count, width, generator=generator) for e, width in tiny_clip.WIDTHS[kind].items()}
    return ActionIdentifier(placeholder, "dancing", tokens)


TEXTS = [
    "a cat <one> on a beach",
    "<one>",
    "a (cat <one>:1.3) with (<two>:0.7), and <one>",
    "((<one>)), [x] (a <two>)",
    "\\(a cat\\) <one>; embedding:other <two>",
    "<one>," * 30 + " and " * 40 + "<two>",  # three sections
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_tokens_equal_in_all_layers_are_comfyui_s_embeddings(kind, text, clips, folder):
    clip = clips[kind]
    actions = [same_everywhere(kind, "<one>", 2, 1), same_everywhere(kind, "<two>", 1, 2)]
    for action in actions:
        write(folder, action.placeholder[1:-1], {e: v[0] for e, v in action.tokens.items()})
    write(folder, "other", {e: torch.ones(1, width) for e, width in tiny_clip.WIDTHS[kind].items()})
    used = [action for action in actions if action.placeholder in text]
    native = text.replace("<one>", " embedding:one ").replace("<two>", " embedding:two ")
    _, (actual,) = encoding.encode(clip, text, used)
    (expected, _), = action_identifiers.plain(clip, native)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# What the brackets round <one> make of its weight.
WEIGHTS = dict(zip(TEXTS, [(1.0,), (1.0,), (1.3,), (1.21,), (1.0,), (1.0,)], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_offsets_are_added_where_the_placeholder_stands_by_its_weight(kind, text, clips, folder):
    """Where it stands is what moves first in a causal encoder when one of its tokens is another."""
    clip, places = clips[kind], action_identifiers.places(MODEL)
    write(folder, "other", {e: torch.ones(1, width) for e, width in tiny_clip.WIDTHS[kind].items()})
    action = action_identifiers.identifier(MODEL, kind, placeholder="<one>", count=2)
    other = action_identifiers.identifier(MODEL, kind, seed=1, placeholder="<two>")
    used = [one for one in (action, other) if one.placeholder in text]
    _, (before,) = encoding.encode(clip, text, used)
    offsets = torch.randn(len(places), 2, before.shape[-1], generator=torch.Generator().manual_seed(2))
    moved = [dataclasses.replace(one, offsets=offsets) if one is action else one for one in used]
    _, (actual,) = encoding.encode(clip, text, moved)
    added = actual - before
    if action not in used:
        assert not added.any()
        return
    for number in range(2):
        tokens = {e: vectors.clone() for e, vectors in action.tokens.items()}
        for vectors in tokens.values():
            vectors[:, number] *= -1
        _, (changed,) = encoding.encode(clip, text, [
            dataclasses.replace(one, tokens=tokens) if one is action else one for one in used
        ])
        first = int((changed - before).abs().amax((0, 2)).gt(1e-4).nonzero()[0])
        weight = added[0, first, 0] / offsets[0, number, 0]
        torch.testing.assert_close(added[:, first], weight * offsets[:, number], rtol=1e-3, atol=1e-4)
        assert any(abs(weight - known) < 1e-3 for known in WEIGHTS[text]), weight
    elsewhere = added.abs().amax((0, 2)).gt(1e-6).sum()
    assert elsewhere == 2 * text.count("<one>")


def test_offsets_of_another_width_are_refused(clips):
    action = action_identifiers.identifier(MODEL, placeholder="<one>")
    action = dataclasses.replace(action, offsets=torch.zeros(4, 1, 5))
    with pytest.raises(ActionError, match="offsets of <one> are 5 wide"):
        encoding.encode(clips["SD 1.5"], "a <one>", [action])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [None, -2, -3])
def test_each_layer_is_its_own_prompt_under_every_clip_skip(kind, skip, clips, folder):
    clip = clips[kind].clone()
    clip.clip_layer(skip)
    action = action_identifiers.identifier(MODEL, kind, count=2)
    plain, (contexts,) = encoding.encode(clip, "a (red <action>:1.2) robot", [action])
    for layer in range(len(action.places)):
        write(folder, f"layer{layer}", {e: v[layer] for e, v in action.tokens.items()})
        (expected, _), = action_identifiers.plain(clip, f"a (red embedding:layer{layer} :1.2) robot")
        torch.testing.assert_close(contexts[layer : layer + 1], expected, rtol=1e-4, atol=1e-5)
    (expected, options), = action_identifiers.plain(clip, "a (red dancing:1.2) robot")
    assert torch.equal(plain[0][0], expected)
    if options["pooled_output"] is not None:
        assert torch.equal(plain[0][1]["pooled_output"], options["pooled_output"])
    assert not torch.allclose(contexts[0], contexts[1], atol=1e-2)


def test_many_layers_go_through_in_several_batches(clips):
    tokens = {"l": torch.randn(35, 1, 16)}
    places = tuple(action_identifiers.places(MODEL)[0]._replace(index=i) for i in range(35))
    action = ActionIdentifier("<action>", "dancing", tokens, places)
    _, (contexts,) = encoding.encode(clips["SD 1.5"], "a <action> cat", [action])
    alone = ActionIdentifier("<action>", "dancing", {"l": tokens["l"][20:21]})
    _, (expected,) = encoding.encode(clips["SD 1.5"], "a <action> cat", [alone])
    torch.testing.assert_close(contexts[20:21], expected, rtol=1e-4, atol=1e-5)


def test_a_layer_wise_action_and_one_for_all_layers_meet_in_one_prompt(clips):
    layered = action_identifiers.identifier(MODEL, placeholder="<a>")
    other = same_everywhere("SD 1.5", "<b>", 1, 5)
    _, (contexts,) = encoding.encode(clips["SD 1.5"], "<a> and <b>", [layered, other])
    assert len(contexts) == len(layered.places)
    swapped = ActionIdentifier("<b>", "dancing", {"l": other.tokens["l"].repeat(4, 1, 1)}, layered.places)
    _, (expected,) = encoding.encode(clips["SD 1.5"], "<a> and <b>", [layered, swapped])
    assert torch.equal(contexts, expected)


@pytest.mark.parametrize(("text", "placeholder", "is_word"), [
    ("a wave", "wave", True), ("a waved hand", "wave", False), ("microwave", "wave", False),
    ("一只猫跳舞在海滩", "跳舞", True), ("犬が踊る、海で", "踊る", True), ("一只猫wave在海滩", "wave", True),
    ("강아지가 춤추기를", "춤추기", True), ("一只microwave", "wave", False),
    ("a wavé hand", "wav", False), ("a wave\u0301 hand", "wave", False),
    ("x<a>y", "<a>", True), ("a <ab>", "<a>", False), ("(wave:1.2)", "wave", True), ("a Wave", "wave", False),
])
def test_a_placeholder_is_found_as_a_word(text, placeholder, is_word, clips):
    action = same_everywhere("SD 1.5", placeholder, 1, 0)
    if is_word:
        encoding.check_prompt(text, [action])
    else:
        with pytest.raises(ValueError, match=f"text does not contain {placeholder}"):
            encoding.check_prompt(text, [action])


def test_a_subject_s_line_holds_the_placeholder_as_a_word_or_gets_it_at_its_end():
    lines = ["a cook <a>, at work", "a cook with a microwave", "to wave, a sailor", ""]
    exemplars = training.Exemplars([], lines)
    assert exemplars.prompt(0, "dancing", "<a>") == "a cook dancing, at work"
    assert [exemplars.prompt(i, "dancing", "wave") for i in (1, 2, 3)] == [
        "a cook with a microwave dancing", "to dancing, a sailor", "dancing",
    ]
    assert exemplars.prompt(1, "wave", "wave") == "a cook with a microwave wave"


def test_words_beside_scripts_without_spaces_are_words_of_their_own(clips):
    """CLIP reads letters that touch as one word: the initial word and a contrast's would not be what they mean."""
    action = same_everywhere("SD 1.5", "跳舞", 2, 0)
    assert encoding.plain_text("一只猫跳舞在海滩", [action]) == "一只猫 dancing 在海滩"
    assert training.Exemplars([], ["一只猫跳舞，在海滩"]).prompt(0, "sitting", "跳舞") == "一只猫 sitting，在海滩"
    plain, (contexts,) = encoding.encode(clips["SD 1.5"], "一只猫跳舞在海滩", [action])
    spaced, (expected,) = encoding.encode(clips["SD 1.5"], "一只猫 跳舞 在海滩", [action])
    assert torch.equal(plain[0][0], spaced[0][0]) and torch.equal(contexts, expected)


def test_contrast_words_are_separated_by_commas_of_any_script():
    config = ActionTrainingConfig(contrast_words="坐着，站着、跑步, jumping; 睡觉")
    assert config.contrasts == ["坐着", "站着", "跑步", "jumping", "睡觉"]


def test_longer_placeholders_win():
    actions = [same_everywhere("SD 1.5", name, 1, 0) for name in ("<a>", "<a>b")]
    actions[0] = ActionIdentifier("<a>", "dancing", actions[0].tokens)
    actions[1] = ActionIdentifier("<a>b", "sitting", actions[1].tokens)
    assert encoding.plain_text("<a>b <a>", actions) == "sitting dancing"


def test_stand_ins_give_way_to_the_text_s_own_words(clips):
    """All but the last are in the text; the vectors are only at the placeholder."""
    clip = clips["SD 1.5"]
    words = " ".join(encoding._STAND_INS[:-1])
    action = same_everywhere("SD 1.5", "<one>", 1, 3)
    prompt = encoding.Prompt(clip.tokenize, f"{words} <one>", {"<one>": action.tokens})
    filled = prompt.at_layer({"<one>": action.tokens}, 0)
    items = [token for section in filled["l"] for token, _ in section]
    assert sum(isinstance(token, torch.Tensor) for token in items) == 1
    with pytest.raises(ValueError, match="no word is free"):
        encoding.Prompt(clip.tokenize, f"{words} {encoding._STAND_INS[-1]} <one>", {"<one>": action.tokens})


def test_the_subject_of_an_identity():
    identity = Subject("sks", "robot")
    assert encoding.expand_subject("a {subject} <action>", identity) == "a sks robot <action>"
    assert encoding.expand_subject("a cat", None) == "a cat"
    with pytest.raises(ValueError, match="connect `identity`"):
        encoding.expand_subject("a {subject}", None)


def test_errors_say_what_to_do(clips):
    action = action_identifiers.identifier(MODEL)
    with pytest.raises(ValueError, match="text does not contain <action>: write it where"):
        encoding.encode(clips["SD 1.5"], "a cat", [action])
    with pytest.raises(ValueError, match="two actions have the placeholder <action>: give one of them another"):
        encoding.encode(clips["SD 1.5"], "<action>", [action, action])
    for kind in ("SD 2.1", "SDXL"):
        with pytest.raises(ActionError, match="another kind of model, with text encoder l of width 16, and this"):
            encoding.encode(clips[kind], "a <action>", [action])
    wide = ActionIdentifier("<action>", "dancing", {"l": torch.zeros(1, 1, 768)})
    with pytest.raises(ActionError, match="l of width 768, .* l of width 16"):
        encoding.encode(clips["SD 1.5"], "a <action>", [wide])
    other = action_identifiers.identifier(tiny_model.wan(), placeholder="<b>")
    with pytest.raises(ActionError, match="different models"):
        encoding.encode(clips["SD 1.5"], "<action> <b>", [action, other])


@pytest.mark.parametrize("kind", ["SD 1.5", "SDXL"])
def test_words_in_pieces_are_unknown(kind, clips):
    assert encoding.unknown_words(clips[kind].tokenize, "dancing starfishing") == ["starfishing"]


def test_a_word_that_one_of_two_encoders_lacks_is_unknown():
    def tokenize(text):
        pieces = [(7, 1.0)] if text == "dancing" else [(token, 1.0) for token in range(1, len(text) + 1)]
        return {"l": [[(0, 1.0), (7, 1.0)] if text else [(0, 1.0)]], "g": [[(0, 1.0), *pieces]]}

    assert encoding.unknown_words(tokenize, "dancing waving") == ["dancing", "waving"]
    assert encoding.unknown_words(lambda text: {"g": tokenize(text)["g"]}, "dancing waving") == ["waving"]


def test_words_that_share_the_token_of_all_unknown_ones_are_unknown():
    tokenize = theatre.PuppetsTokenizer().tokenize_with_weights
    assert encoding.unknown_words(tokenize, "waving starfishing") == ["starfishing"]


def test_an_imported_embedding_means_nothing_at_strength_0(clips):
    action = ActionIdentifier("<action>", "", {"any": torch.randn(1, 3, 16)})
    plain, (contexts,) = encoding.encode(clips["SD 1.5"], "a cat <action>", [action])
    (expected, _), = action_identifiers.plain(clips["SD 1.5"], "a cat")
    assert torch.equal(plain[0][0], expected)
    assert contexts.shape == (1, 77, 16) and not torch.allclose(contexts, expected)


def test_scheduled_loras_of_the_clip_give_each_entry_its_contexts(clips):
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    lora = {f"{layer}.lora_up.weight": torch.randn(32, 2), f"{layer}.lora_down.weight": torch.randn(2, 16)}
    hooks = comfy.hooks.create_hook_lora(lora, 0.0, 1.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(frames)
    (clip,) = SetClipHooks().apply_hooks(clips["SD 1.5"], True, False, hooks)
    action = action_identifiers.identifier(MODEL)
    plain, contexts = encoding.encode(clip, "a <action> cat", [action])
    assert [entry[1]["clip_start_percent"] for entry in plain] == [0.0, 0.5]
    _, (without,) = encoding.encode(clips["SD 1.5"], "a <action> cat", [action])
    torch.testing.assert_close(contexts[0], without)
    assert contexts[1].shape == without.shape and not torch.allclose(contexts[1], without, atol=1e-2)
