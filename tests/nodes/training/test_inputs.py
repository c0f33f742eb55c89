"""Pictures and texts as graphs supply them: batches, lists, folders from ComfyUI's dataset node, and invalid ones."""

import comfy.clip_vision
import folder_paths
import numpy as np
import pytest
import torch
from comfy_extras.nodes_dataset import LoadImageTextDataSetFromFolderNode
from pack.nodes.training import inputs
from PIL import Image


def picture(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_batches_lists_and_sizes_become_single_pictures_in_order():
    batch, single = picture(3, 8, 8, 3), picture(1, 16, 8, 3, seed=1)
    actual = inputs.pictures([batch, single], "images")
    assert [tuple(image.shape) for image in actual] == [(1, 8, 8, 3)] * 3 + [(1, 16, 8, 3)]
    assert torch.equal(torch.cat(actual[:3]), batch) and torch.equal(actual[3], single)
    assert len(inputs.pictures(batch, "images")) == 3


def test_alpha_is_dropped_and_grey_is_repeated():
    rgba, grey = picture(1, 4, 4, 4), picture(1, 4, 4, 1)
    assert torch.equal(inputs.pictures([rgba], "images")[0], rgba[..., :3])
    assert torch.equal(inputs.pictures([grey], "images")[0], grey.repeat(1, 1, 1, 3))


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([], "images holds no picture"),
        ([torch.zeros(0, 4, 4, 3)], "images holds no picture"),
        ([torch.zeros(1, 4, 4, 2)], r"images has shape \(1, 4, 4, 2\)"),
        ([torch.zeros(4, 4, 3)], r"images has shape \(4, 4, 3\)"),
        ([torch.full((1, 4, 4, 3), float("nan"))], "images holds NaN"),
    ],
)
def test_bad_pictures_are_refused_by_name(pictures, message):
    with pytest.raises(ValueError, match=message):
        inputs.pictures(pictures, "images")


@pytest.mark.parametrize(
    ("texts", "count", "expected"),
    [
        (["a", "b"], 2, ["a", "b"]),
        ("a\nb", 2, ["a", "b"]),
        (["a\n\n b "], 2, ["a", "b"]),
        (["one"], 3, ["one"] * 3),
        (["of two\nlines"], 1, ["of two lines"]),
        ([""], 2, ["", ""]),
    ],
)
def test_one_text_per_picture_or_one_for_all(texts, count, expected):
    assert inputs.texts_for(texts, count, "captions") == expected


@pytest.mark.parametrize(("texts", "count"), [(["a", "b"], 3), (["a", "b"], 1), ("a\nb\nc", 2), ([], 1)])
def test_any_other_number_of_texts_is_refused_by_name(texts, count):
    actual = 3 if isinstance(texts, str) else len(texts)
    with pytest.raises(ValueError, match=f"captions has {actual} texts for {count} pictures"):
        inputs.texts_for(texts, count, "captions")


def test_a_folder_comes_through_comfyui_s_dataset_node(tmp_path, monkeypatch):
    folder = tmp_path / "puppets"
    folder.mkdir()
    for name, colour in (("first", 40), ("second", 200)):
        Image.fromarray(np.full((12, 8, 3), colour, np.uint8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"the {name} one")
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    images, texts = LoadImageTextDataSetFromFolderNode.execute("puppets").result
    actual, captions = inputs.pictures(images, "images"), inputs.texts_for(texts, 2, "captions")
    by_caption = dict(zip(captions, actual, strict=True))
    assert by_caption.keys() == {"the first one", "the second one"}
    assert by_caption["the first one"].mean() < by_caption["the second one"].mean()


def test_a_digest_tells_latents_apart():
    latents = [picture(1, 4, 8, 8)]
    other = [latents[0].clone()]
    assert inputs.digest(latents) == inputs.digest(other)
    other[0][0, 0, 0, 0] += 1e-3
    assert inputs.digest(latents) != inputs.digest(other)


def test_only_one_picture_and_one_text_are_accepted():
    with pytest.raises(ValueError, match="source holds 2 pictures"):
        inputs.one_picture([picture(2, 4, 4, 3)], "source")
    assert inputs.one_text(["a\n  fox"], "source_text") == "a fox"
    with pytest.raises(ValueError, match="source_text holds 2 texts"):
        inputs.one_text(["a", "b"], "source_text")


def test_a_digest_tells_conditionings_apart():
    text = torch.ones(1, 2, 3)

    def named(options, text=text):
        return inputs.conditioning_digest([[[text, options]]])

    output = comfy.clip_vision.Output()
    output.last_hidden_state = torch.ones(1, 4)
    other = comfy.clip_vision.Output()
    other.last_hidden_state = torch.zeros(1, 4)
    different = [
        named({}), named({}, text * 2), named({}, text.flatten()), named({"pooled_output": text}),
        named({"width": 64}), named({"height": 64}),
        named({"clip_vision_output": output}), named({"clip_vision_output": other}),
        named({"latents": [text, text]}), named({"latents": [text]}), named({"pooled_output": None}),
    ]
    assert len(set(different)) == len(different)
    assert named({"a": 1, "b": text}) == named({"b": text.clone(), "a": 1})


def test_two_values_where_one_is_meant_are_refused_by_name():
    assert inputs.single_values({"seed": [3], "fusion": None, "clip_vision": []}) == {"seed": 3}
    with pytest.raises(ValueError, match="seed is a list of 2: connect one"):
        inputs.single_values({"steps": [1], "seed": [3, 4]})


def test_latents_of_other_shapes_are_other_data():
    latent = torch.zeros(1, 4, 2, 8)
    assert inputs.digest([latent]) != inputs.digest([latent.reshape(1, 4, 4, 4)])
