"""The theatre's nodes, called as the host calls them."""

import pytest
import torch
from pack.nodes.puppets import captions, world
from pack.nodes.puppets.config import ACTIONS, FRAMINGS, LIGHTS, SCENES, actions_of
from pack.nodes.puppets.nodes import UnderstudyPuppet, UnderstudyPuppetSet

WORDS = "red striped robot with blue trousers and a yellow cap"


def run(node, **inputs):
    return node.execute(**inputs).result


@pytest.mark.parametrize(("frames", "size"), [(1, 128), (5, 64), (1, 200)])
def test_puppet_gives_picture_mask_pose_and_caption(frames, size):
    image, mask, pose, caption = run(
        UnderstudyPuppet, identity=WORDS, action="waving", scene="beach", frames=frames, seed=4, size=size
    )
    assert image.shape == pose.shape == (frames, size, size, 3) and mask.shape == (frames, size, size)
    assert image.dtype == mask.dtype == pose.dtype == torch.float32
    for tensor in (image, mask, pose):
        assert tensor.min() >= 0 and 0.5 < tensor.max() <= 1
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert caption == f"a {WORDS} waving on a beach"


def test_clip_moves_only_around_the_puppet():
    image, mask, _, _ = run(UnderstudyPuppet, identity="test 2", action="running", scene="city", frames=9,
                            seed=0)
    still = torch.nn.functional.max_pool2d(mask.amax(0)[None, None], 15, 1, 7)[0, 0] == 0
    still[96:] = False  # the shadow on the ground moves too
    assert (image - image[:1]).abs()[:, still].max() == 0
    assert (image - image[:1]).abs().max() > 0.3


def test_the_seed_and_nothing_else_varies_a_puppet():
    def draw(seed):
        return run(UnderstudyPuppet, identity="random", action="dancing", scene="night", frames=1, seed=seed)

    assert torch.equal(draw(3)[0], draw(3)[0])
    assert not torch.equal(draw(3)[0], draw(4)[0]) and draw(3)[3] != draw(4)[3]


def test_mirrored_moves_the_action_to_the_other_side():
    common = dict(identity=WORDS, action="pointing", scene="stage", frames=1, seed=1)
    assert "pointing right" in run(UnderstudyPuppet, **common)[3]
    assert "pointing left" in run(UnderstudyPuppet, **common, mirrored=True)[3]


def test_framing_light_and_view_follow_their_inputs():
    def draw(**inputs):
        return run(UnderstudyPuppet, identity=WORDS, action="waving", scene="city", frames=1, seed=6, **inputs)

    full, close = draw(), draw(framing="close_up")
    assert torch.equal(draw(framing="full", light="random", view="random")[0], full[0])
    assert close[3] == "close-up of a red striped robot with a yellow cap waving in a city"
    assert close[1].mean() > 1.5 * full[1].mean()
    lit = {light: draw(light=light, view="centre") for light in LIGHTS}
    assert all(torch.equal(picture[1], lit["day"][1]) for picture in lit.values())
    assert len({tuple(picture[0].mean((0, 1, 2)).tolist()) for picture in lit.values()}) == len(LIGHTS)
    columns = torch.arange(128).float()
    middle = {view: (draw(view=view)[1][0] * columns).sum() / draw(view=view)[1].sum()
              for view in ("left", "centre", "right")}
    assert middle["left"] + 8 < middle["centre"] < middle["right"] - 8
    assert draw(view="far")[1].sum() < 0.8 * draw(view="centre")[1].sum()


def test_a_set_in_close_up():
    result = run(UnderstudyPuppetSet, identities="", actions="", scenes="", count=10, seed=0, size=64,
                 framing="close_up", light="day", view="far")
    assert all(text.startswith("close-up of a") for text in result[3])
    assert all(mask[0, -1].any() for mask in result[1])


@pytest.mark.parametrize(("action", "framing"), [("kicking", "close_up"), ("nodding", "full")])
def test_a_framing_that_an_action_does_not_have_is_refused(action, framing):
    with pytest.raises(ValueError) as raised:
        run(UnderstudyPuppet, identity=WORDS, action=action, scene="beach", frames=1, seed=0, framing=framing)
    assert repr(action) in str(raised.value) and ", ".join(actions_of(framing)) in str(raised.value)
    assert UnderstudyPuppet.validate_inputs(action=action, framing=framing) == str(raised.value)
    with pytest.raises(ValueError):
        run(UnderstudyPuppetSet, identities="", actions=action, scenes="", count=1, seed=0, framing=framing)
    assert UnderstudyPuppetSet.validate_inputs(actions=action, framing=framing) == str(raised.value)


@pytest.mark.parametrize(("name", "allowed"), [("framing", FRAMINGS), ("light", LIGHTS), ("view", ("left", "far"))])
def test_unknown_cameras_are_refused(name, allowed):
    with pytest.raises(ValueError) as raised:
        run(UnderstudyPuppet, identity=WORDS, action="waving", scene="beach", frames=1, seed=0, **{name: "odd"})
    assert f"{name} is 'odd'" in str(raised.value) and all(word in str(raised.value) for word in allowed)


def test_preview_is_saved_for_the_browser():
    shown = UnderstudyPuppet.execute(WORDS, "bowing", "snow", 5, 0).ui.as_dict()["images"]
    assert len(shown) == 5


def test_set_takes_its_lists_in_turn():
    images, masks, poses, said, subjects = run(
        UnderstudyPuppetSet, identities=f"{WORDS}\ntest 5", actions="waving, sitting , hugging",
        scenes="beach", count=6, seed=2, size=64,
    )
    assert len(images) == len(masks) == len(poses) == len(said) == len(subjects) == 6
    assert images[0].shape == (1, 64, 64, 3) and masks[0].shape == (1, 64, 64)
    expected = [f"a {WORDS}", captions.subject_phrase(world.test_identities()[5])]
    assert subjects == expected * 3
    assert ["waving" in text for text in said] == [True, False, False] * 2
    assert ["sitting" in text for text in said] == [False, True, False] * 2
    assert not any("hugging" in text for text in said)
    assert all(text.endswith("on a beach") for text in said)


@pytest.mark.parametrize("comma", [", ", "，", "、", ",\u3000"])
def test_commas_of_any_script_within_a_puppet_s_words_are_spaces(comma):
    """A comma in a set begins another puppet only before words that say who it is."""
    words = f"red striped robot{comma}blue trousers{comma}a yellow cap"
    drawn = run(UnderstudyPuppet, identity=words, action="waving", scene="beach", frames=1, seed=0)
    assert drawn[3] == f"a {WORDS} waving on a beach"
    text = f"{words}{comma}test 5\nblue cat{comma}green frog"
    assert UnderstudyPuppetSet.validate_inputs(identities=text) is True
    subjects = run(UnderstudyPuppetSet, identities=text, actions="", scenes="", count=4, seed=2, size=64)[4]
    assert subjects[:2] == [f"a {WORDS}", captions.subject_phrase(world.test_identities()[5])]
    assert ["cat" in subjects[2], "frog" in subjects[3]] == [True, True]


def test_empty_lists_are_drawn_at_random():
    result = run(UnderstudyPuppetSet, identities="", actions="", scenes="", count=12, seed=0, size=64)
    said, subjects = result[3:]
    assert len(set(subjects)) == 12 and len({text.split()[-1] for text in said}) > 2


@pytest.mark.parametrize("words", [
    "red striped giraffe", "a robot and a cat", "robot with crimson trousers", "robot with no cap", "test 24",
    "blue", "", "striped dotted robot", "red blue green cat", "robot with trousers", "robot with blue",
    "robot blue cap red",
])
def test_wrong_identities_are_refused_with_the_allowed_words(words):
    with pytest.raises(ValueError, match="species person, cat|choose 0 to 23"):
        run(UnderstudyPuppet, identity=words, action="waving", scene="beach", frames=1, seed=0)
    assert isinstance(UnderstudyPuppet.validate_inputs(identity=words), str)


@pytest.mark.parametrize(("inputs", "names"), [
    ({"actions": "waving, flying"}, ACTIONS), ({"scenes": "moon"}, SCENES),
    ({"identities": "unicorn"}, ("penguin",)),
])
def test_wrong_entries_of_a_set_are_refused(inputs, names):
    arguments = {"identities": "", "actions": "", "scenes": "", "count": 2, "seed": 0, **inputs}
    with pytest.raises(ValueError) as raised:
        run(UnderstudyPuppetSet, **arguments)
    assert all(name in str(raised.value) for name in names)
    assert isinstance(UnderstudyPuppetSet.validate_inputs(**inputs), str)


def test_linked_inputs_are_not_validated_early():
    assert UnderstudyPuppet.validate_inputs(identity=None) is True
    assert UnderstudyPuppetSet.validate_inputs() is True
    assert UnderstudyPuppet.validate_inputs(identity=WORDS, action="nodding", framing=None) is True
    assert UnderstudyPuppetSet.validate_inputs(actions="nodding", framing=None) is True


@pytest.mark.parametrize("value", ([], ["a bear"], 3, {}))
def test_what_is_no_text_is_named_before_the_run(value):
    assert UnderstudyPuppet.validate_inputs(identity=value).startswith("identity is of type ")
    for name in ("identities", "actions", "scenes"):
        assert UnderstudyPuppetSet.validate_inputs(**{name: value}).startswith(f"{name} is of type ")


@pytest.mark.parametrize(("node", "inputs", "outputs"), [
    (UnderstudyPuppet, ["identity", "action", "scene", "frames", "seed"],
     ["IMAGE", "MASK", "IMAGE", "STRING"]),
    (UnderstudyPuppetSet, ["identities", "actions", "scenes", "count", "seed"],
     ["IMAGE", "MASK", "IMAGE", "STRING", "STRING"]),
])
def test_contract_of_saved_workflows(node, inputs, outputs):
    schema = node.GET_SCHEMA()
    assert schema.node_id == node.__name__ and schema.category == "Understudy/Theatre"
    assert [i.id for i in schema.inputs][:5] == inputs and all(i.optional for i in schema.inputs[5:])
    assert [i.id for i in schema.inputs][-4:] == ["size", "framing", "light", "view"]
    assert [i.default for i in schema.inputs[-3:]] == ["full", "random", "random"]
    assert [o.io_type for o in schema.outputs] == outputs
    assert all(i.tooltip for i in schema.inputs) and all(o.tooltip for o in schema.outputs)
