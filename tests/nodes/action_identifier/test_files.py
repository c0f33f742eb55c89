"""Identifiers on disk: exact round trips, ordinary embeddings both ways, and files that are none."""

import dataclasses
import json

import folder_paths
import pytest
import safetensors.torch
import torch
from comfy.sd1_clip import load_embed
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from pack.nodes.action_identifier import encoding, files
from pack.nodes.action_identifier.method import ActionError, ActionIdentifier
from pack.nodes.action_identifier.nodes import UnderstudyLoadActionIdentifier
from pack.nodes.action_identifier.training_nodes import UnderstudySaveActionIdentifier
from pack.nodes.files.names import WeightFileError
from support import action_identifiers, tiny_clip, tiny_model

MODEL = tiny_model.picture()


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Output and embeddings of this test alone."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    for key in (files.FOLDER.name, files.EMBEDDINGS.name):
        folder = tmp_path / "output" / key
        folder.mkdir(parents=True)
        listed = [str(folder)], {".safetensors", ".pt", ".bin"}
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, listed)
    folder_paths.filename_list_cache.clear()
    return tmp_path / "output"


def equal(a, b):
    assert (a.placeholder, a.initial_word, a.places, a.base) == (b.placeholder, b.initial_word, b.places, b.base)
    assert a.tokens.keys() == b.tokens.keys()
    assert all(torch.equal(a.tokens[key], b.tokens[key]) for key in a.tokens)


@pytest.mark.parametrize("kind", tiny_clip.WIDTHS)
def test_a_saved_identifier_is_read_back_bit_for_bit(kind, folders):
    action = action_identifiers.identifier(MODEL, kind, count=2, base="0123456789abcdef")
    path = files.save(action, "people/wave")
    assert path == folders / "action_identifiers" / "people" / "wave_00001_.safetensors"
    equal(files.load("people/wave_00001_.safetensors"), action)
    stored = safetensors.torch.load_file(path)
    assert {tuple(v.shape) for v in stored.values()} == {(4, 2, w) for w in tiny_clip.WIDTHS[kind].values()}
    assert files.FOLDER.choices() == ["people/wave_00001_.safetensors"]


def test_what_lies_behind_the_encoder_is_read_back_and_no_embedding(folders):
    action = action_identifiers.identifier(MODEL, count=2)
    action = dataclasses.replace(action, offsets=torch.randn(4, 2, 8))
    actual = files.load(files.save(action, "wave").name)
    equal(actual, action)
    assert torch.equal(actual.offsets, action.offsets)
    with pytest.raises(ValueError, match="<action> was learned behind the text encoder.* turn textual_inversion off"):
        UnderstudySaveActionIdentifier.execute(action, "other", textual_inversion=True)
    assert "other_00001_.safetensors" in files.FOLDER.choices(), "what was trained is kept"


def test_an_action_is_loaded_under_another_word(folders):
    action = action_identifiers.identifier(MODEL)
    listed = files.save(action, "wave").name
    for placeholder, expected in (("", "<action>"), (" <wave> ", "<wave>")):
        (actual,) = UnderstudyLoadActionIdentifier.execute(listed, placeholder).result
        equal(actual, dataclasses.replace(action, placeholder=expected))
    with pytest.raises(ValueError, match="placeholder is 'two words': use one word"):
        files.load(listed, "two words")


def test_tokens_of_8_bits_are_read_in_fp32(folders):
    tokens = torch.tensor([[[0.5, -1.0, 3.0]]])
    listed = write(folders, "file.safetensors", {"identifier.l": tokens.to(torch.float8_e4m3fn)}, SOUND)
    actual = files.load(listed).tokens["l"]
    assert actual.dtype == torch.float32 and torch.equal(actual, tokens)


def write(folders, name, tensors, metadata=None, folder="action_identifiers"):
    path = folders / folder / name
    if name.endswith(".safetensors"):
        safetensors.torch.save_file({key: v.contiguous() for key, v in tensors.items()}, path, metadata=metadata)
    else:
        torch.save(tensors, path)
    return name if folder == "action_identifiers" else f"embeddings/{name}"


@pytest.mark.parametrize(("name", "tensors"), [
    ("wave hand.safetensors", {"emb_params": torch.ones(3, 16)}),
    ("wave hand.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(3, 16)}, "name": "w"}),
    ("wave hand.bin", {"<wave>": torch.ones(16)}),
    ("wave hand.safetensors", {"clip_l": torch.ones(2, 16), "clip_g": torch.ones(2, 24)}),
])
def test_ordinary_embeddings_are_equal_in_all_layers(name, tensors, folders):
    listed = write(folders, name, tensors, folder="embeddings")
    assert files.FOLDER.choices() == [listed]
    action = files.load(listed)
    assert (action.placeholder, action.initial_word, action.places) == ("<wave_hand>", "", ())
    kind = "SDXL" if "clip_g" in tensors else "SD 1.5"
    _, (contexts,) = encoding.encode(tiny_clip.clip(kind), "a <wave_hand> cat", [action])
    assert contexts.shape == (1, 77, sum(tiny_clip.WIDTHS[kind].values()))


@pytest.mark.parametrize("kind", tiny_clip.WIDTHS)
def test_an_exported_embedding_is_the_mean_that_comfyui_reads(kind, folders):
    action = action_identifiers.identifier(MODEL, kind, count=2)
    path = files.export(action, "wave")
    clip = tiny_clip.clip(kind, embeddings=str(path.parent))
    (actual, _), = action_identifiers.plain(clip, f"a embedding:{path.stem} cat")
    mean = ActionIdentifier("<action>", "", {e: v.mean(0, keepdim=True) for e, v in action.tokens.items()})
    _, (expected,) = encoding.encode(clip, "a <action> cat", [mean])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    again = files.load(f"embeddings/{path.name}")
    assert again.for_encoders(tiny_clip.WIDTHS[kind]).keys() == action.tokens.keys()


def vectors(count, width=768):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def textual_inversion(parameters=torch.nn.ParameterDict):
    """As the first programs saved them: with a module of torch."""
    return {"string_to_token": {"*": torch.tensor(265)}, "name": "w", "step": 9,
            "string_to_param": parameters({"*": torch.nn.Parameter(vectors(2))})}


@pytest.mark.parametrize(("content", "zipped", "encoders", "comfyui"), [
    (textual_inversion(dict), False, {"any": 2}, "any"),
    (textual_inversion(), True, {"any": 2}, "any"),
    (textual_inversion(), False, {"any": 2}, None),  # ComfyUI reads it in zip files only
    ({"<s1>": vectors(1)[0], "<s2>": vectors(2)[1]}, True, {"any": 2}, None),  # ComfyUI takes the first token
    ([{"<a>": vectors(1)[0]}, {"<b>": vectors(2)}], True, {"any": 3}, "any"),
    ([{"<a>": vectors(1)[0]}, {"<b>": vectors(2, 1280)}], False, {"l": 1, "g": 2}, "l"),
    ({"text_encoders_0": vectors(2), "text_encoders_1": vectors(2, 1280)}, True, {"l": 2, "g": 2}, "l"),
    ({"bundle_emb.a.string_to_param.*": vectors(2), "bundle_emb.b.string_to_param.*": vectors(1),
      "lora_te.alpha": torch.tensor(4.0)}, True, {"any": 3}, "any"),
])
def test_embeddings_in_every_layout_that_comfyui_reads(content, zipped, encoders, comfyui, folders):
    folder = folders / "embeddings"
    torch.save(content, folder / "wave.pt", _use_new_zipfile_serialization=zipped)
    action = files.load("embeddings/wave.pt")
    assert {encoder: tokens.shape[1] for encoder, tokens in action.tokens.items()} == encoders
    if comfyui:
        assert torch.equal(action.tokens[comfyui][0], load_embed("wave", str(folder), 768, "clip_l").detach())


def test_diffusers_reads_the_exported_embedding(folders):
    action = action_identifiers.identifier(MODEL)
    state = safetensors.torch.load_file(files.export(action, "wave"))
    tokens, embeddings = TextualInversionLoaderMixin._retrieve_tokens_and_embeddings(
        ["<wave>"], [state], type("Tokenizer", (), {"get_vocab": lambda self: {}})()
    )
    assert tokens == ["<wave>"]
    torch.testing.assert_close(embeddings[0], action.tokens["l"].mean(0))


SOUND = {"kind": "understudy action identifier", "placeholder": "<a>", "layers": json.dumps([["input", 1, 1]])}


@pytest.mark.parametrize(("tensors", "metadata", "message"), [
    ({"identifier.l": torch.ones(2, 1, 16)}, SOUND, r"shape \(2, 1, 16\), expected \[1, tokens, width\]"),
    ({"identifier.l": torch.ones(1, 16)}, SOUND, "expected .1, tokens, width."),
    ({"identifier.l": torch.full((1, 1, 16), float("nan"))}, SOUND, "not finite numbers"),
    ({"identifier.l": torch.ones(1, 1, 16, dtype=torch.int64)}, SOUND, "not finite numbers"),
    ({"identifier.l": torch.ones(1, 1, 16), "x": torch.ones(1)}, SOUND, "has 'x' beside its tokens"),
    ({"identifier.l": torch.ones(1, 1, 16)}, {**SOUND, "placeholder": "a b"}, "placeholder is 'a b'"),
    ({"identifier.l": torch.ones(1, 1, 16)}, {**SOUND, "placeholder": ""}, "placeholder is ''"),
    ({"identifier.l": torch.ones(1, 1, 16)}, {**SOUND, "layers": "["}, "no map of layers"),
    ({"identifier.l": torch.ones(1, 1, 16)}, {**SOUND, "layers": "[" * 100_000}, "no map of layers"),
    ({"identifier.l": torch.ones(1, 1, 16)}, {**SOUND, "layers": "{}"}, "is not a list"),
    ({"identifier.l": torch.ones(1, 1, 16)}, {**SOUND, "layers": '[["input", -1, 1]]'}, "has the entry"),
    ({"identifier.l": torch.ones(1, 1, 16)}, {**SOUND, "layers": '[["input", true, 1]]'}, "has the entry"),
    ({"identifier.l": torch.ones(1, 1, 16)}, {**SOUND, "layers": '[["elsewhere", 1, 1]]'}, "has the entry"),
    ({"lora_up": torch.ones(4, 4), "lora_down": torch.ones(4, 4)}, None, "not an embedding either"),
    ({"weight": torch.ones(4, 4, 3, 3)}, None, "not an embedding either"),
])
def test_other_files_are_refused_by_name(tensors, metadata, message, folders):
    listed = write(folders, "file.safetensors", tensors, metadata)
    with pytest.raises(WeightFileError, match=f"(?s)file.safetensors.*{message}.*Choose an action identifier"):
        files.load(listed)


def test_values_that_are_no_numbers_are_neither_made_nor_saved():
    with pytest.raises(ActionError, match="not finite numbers"):
        ActionIdentifier("<a>", "dancing", {"l": torch.full((1, 1, 4), float("inf"))})
    with pytest.raises(ActionError, match="no tokens"):
        ActionIdentifier("<a>", "dancing", {})


def test_a_pickle_with_more_than_weights_is_refused(folders):
    write(folders, "evil.pt", {"string_to_param": {"*": torch.ones(1, 16)}, "x": pytest.raises}, folder="embeddings")
    with pytest.raises(WeightFileError, match="evil.pt"):
        files.load("embeddings/evil.pt")
