"""Fusions on disk: exact round trips, LoRA or whole UNet, published checkpoints, and what is refused."""

import argparse
import json

import comfy.clip_vision
import comfy.utils
import pytest
import safetensors.torch
import torch
from pack.nodes.files.names import WeightFileError
from pack.nodes.files.pickles import read_pickle
from pack.nodes.fusion_embedding import encoding, files, method, published
from pack.nodes.fusion_embedding.method import LORA, WHOLE, Fusion, FusionError
from support import fusions

MODEL = fusions.model()


@pytest.fixture
def folder(folder):
    """Where fusions are saved."""
    return folder / files.FOLDER.name


def unet():
    return {f"diffusion_model.{key}": value for key, value in MODEL.model.diffusion_model.state_dict().items()}


def same(first, second):
    return (first is None) == (second is None) and (first is None or first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first
    ))


FUSIONS = {
    "stage 1, frozen encoder": lambda: Fusion(fusions.combiner(), probe=encoding.probe(fusions.vision())),
    "of a v-prediction model": lambda: fusions.fusion(MODEL, prediction="v"),
    "stage 1": lambda: Fusion(fusions.combiner(), fusions.vision()),
    "LoRA": lambda: fusions.fusion(MODEL, encoder=fusions.vision()),
    "whole UNet": lambda: fusions.fusion(MODEL, unet=unet(), unet_kind=WHOLE),
    "stage 2 alone": lambda: fusions.fusion(MODEL, combiner=None, generator=fusions.weights(MODEL, None)),
}


@pytest.mark.parametrize("case", FUSIONS)
def test_every_kind_of_fusion_comes_back_to_the_bit(folder, case):
    fusion = FUSIONS[case]()
    path = files.save(fusion, "people/ann")
    assert path.parent == folder / "people" and f"people/{path.name}" in files.FOLDER.choices()
    actual, report = files.load(f"people/{path.name}")
    for part in ("combiner", "generator", "unet"):
        assert same(getattr(actual, part), getattr(fusion, part))
    assert (actual.probe is None) == (fusion.probe is None)
    assert actual.probe is None or torch.equal(actual.probe, fusion.probe)
    assert actual.prediction == fusion.prediction and actual.unet_kind == fusion.unet_kind
    assert (actual.encoder is None) == (fusion.encoder is None)
    if fusion.encoder is not None:
        assert same(actual.encoder.get_sd(), fusion.encoder.get_sd())
        pictures = fusions.pictures()
        assert torch.equal(*(encoding.embeddings(part.encoder, pictures) for part in (actual, fusion)))
    assert report == [f"holds: {', '.join(fusion.parts)}"]
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["unet"] == (fusion.unet_kind or "none")


def changed(tensors=lambda t: t, **metadata):
    def change(path):
        with safetensors.safe_open(path, framework="pt") as file:
            actual = {key: file.get_tensor(key) for key in file.keys()}
            file_metadata = file.metadata()
        file_metadata.update(metadata)
        safetensors.torch.save_file(tensors(actual), path, {k: v for k, v in file_metadata.items() if v is not None})

    return change


BROKEN = {
    "another kind": (changed(kind="something"), "not part of a fusion"),
    "unet unsaid": (changed(unet="none"), "its UNet is 'none'"),
    "unet of no known kind": (changed(unet="quarter"), "quarter"),
    "no unet": (changed(lambda t: {k: v for k, v in t.items() if not k.startswith("unet.")}), "lora"),
    "a key of no part": (changed(lambda t: t | {"more": torch.zeros(1)}), "'more' belongs to no part"),
    "a key in no part": (changed(lambda t: t | {"combiner.more": torch.zeros(1)}), "combiner"),
    "another shape": (changed(lambda t: t | {"combiner.gate.bias": torch.zeros(3)}), r"gate.bias.*\(3,\)"),
    "no description": (changed(encoder=None), "describe its image encoder"),
    "no JSON": (changed(encoder="[[[["), "describe its image encoder"),
    "a list": (changed(encoder="[1]"), "describe its image encoder"),
    "a giant": (changed(encoder=json.dumps(fusions.vision().config | {"hidden_size": 1 << 30})), "hidden_size"),
    "a number for a convolution": (
        changed(lambda t: t | {"generator.pose.conv_out.weight": torch.tensor(1.0)}), "pose.conv_out.weight"
    ),
    "an encoder without a layer": (
        changed(lambda t: {k: v for k, v in t.items() if "visual_projection" not in k}), "visual_projection"
    ),
    "a probe that is none": (
        changed(lambda t: {**t, "probe.embedding": torch.ones(2, 2)}), "probe.embedding"),
    "a probe that says nothing": (
        changed(lambda t: {**t, "probe.embedding": torch.full((8,), float("nan"))}), "probe.embedding"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_are_no_fusion_are_refused_with_name_and_reason(folder, case):
    change, words = BROKEN[case]
    path = files.save(FUSIONS["LoRA"](), "a")
    change(path)
    with pytest.raises(WeightFileError, match=words) as error:
        files.load(path.name)
    assert path.name in str(error.value) and "Choose" in str(error.value)


def diffusers_unet():
    theirs = comfy.utils.unet_to_diffusers(MODEL.model.model_config.unet_config)
    names = {ours: name for name, ours in theirs.items()}
    return {names[key.removeprefix("diffusion_model.")]: value for key, value in unet().items()}


def checkpoint(stage=2):
    """A Lightning checkpoint's weights under the names of the published code, for the tiny model."""
    combiner, generator, encoder = fusions.combiner(), fusions.weights(MODEL), fusions.vision().get_sd()
    names = {ours: theirs for theirs, ours in published._COMBINER.items()}
    first = {f"combiner.{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in combiner.items()}
    for name in ("img_encoder", "pose_encoder"):
        first |= {f"{name}.{key}": value for key, value in encoder.items()}
    if stage == 1:
        return first
    layers = {"first": 0, "norm": 3, "second": 4}
    actual = {f"fusion_model.{key}": value for key, value in first.items()}
    for key, value in generator.items():
        part, _, rest = key.partition(".")
        layer, _, leaf = rest.partition(".")
        if part == "pose":
            actual[f"sd_model.pose_t_proj.{rest}"] = value
        elif part == "appearance":
            actual[f"sd_model.srcimage_proj_model.net.{layers[layer]}.{leaf}"] = value
        else:
            actual[f"sd_model.unet.class_embedding.net.{0 if layer == 'first' else 3}.{leaf}"] = value
    for prefix in ("unet.", "sd_model.unet."):
        actual |= {f"{prefix}{key}": value for key, value in diffusers_unet().items()}
    return actual | {"vae.encoder.conv_in.weight": torch.zeros(2, 2), "src_image_encoder.a": torch.zeros(1)}


def tiny_encoder(weights):
    return encoding.rebuild(fusions.vision().config, weights)


def test_both_published_stages_convert_whole():
    fusion, report = published.convert(checkpoint(1), tiny_encoder)
    assert same(fusion.combiner, fusions.combiner()) and fusion.generator is None and fusion.unet is None
    assert any("second copy of the image encoder" in line for line in report)
    fusion, report = published.convert(checkpoint(), tiny_encoder)
    assert same(fusion.combiner, fusions.combiner()) and same(fusion.generator, fusions.weights(MODEL))
    assert same(fusion.encoder.get_sd(), fusions.vision().get_sd())
    assert fusion.unet_kind == WHOLE and same(fusion.unet, diffusers_unet())
    text = "\n".join(report)
    assert "autoencoder" in text and "DINOv2" in text and "second copy of the UNet" in text
    assert "unknown weights" not in text


def test_what_did_not_fit_is_reported():
    tensors = checkpoint()
    tensors["sd_model.pose_t_proj.blocks.1.weight"] = torch.zeros(7, 7, 3, 3)
    tensors["something.else"] = torch.zeros(2)
    fusion, report = published.convert(tensors, lambda weights: None)
    text = "\n".join(report)
    assert fusion.generator is None and fusion.encoder is None and fusion.combiner is not None
    assert "left out, since its 'pose.blocks." in text and "connect clip_vision" in text
    assert "1 unknown weights, something.else first" in text
    with pytest.raises(FusionError, match="no part of it fits"):
        published.convert({"combiner.output_layer.weight": torch.zeros(2, 2)}, tiny_encoder)


@pytest.mark.parametrize("extra", [
    {}, {"embeddings.position_embedding": (257, 8), "encoder.layers.0.layer_norm1": (8,)},
])
def test_an_encoder_that_comfyui_cannot_read_is_left_out(extra):
    shapes = {"encoder.layers.22.layer_norm1": (8,), **extra}
    tensors = {key: value for key, value in checkpoint().items() if "img_encoder" not in key}
    tensors |= {f"fusion_model.img_encoder.vision_model.{k}.weight": torch.zeros(s) for k, s in shapes.items()}
    fusion, report = published.convert(tensors, comfy.clip_vision.load_clipvision_from_sd)
    assert fusion.encoder is None and same(fusion.combiner, fusions.combiner())
    assert any("connect clip_vision" in line for line in report)


def test_a_class_embedding_with_a_norm_is_known_too():
    tensors = checkpoint()
    for leaf in ("weight", "bias"):
        second = tensors.pop(f"sd_model.unet.class_embedding.net.3.{leaf}")
        tensors[f"sd_model.unet.class_embedding.net.4.{leaf}"] = second
        tensors[f"sd_model.unet.class_embedding.net.3.{leaf}"] = torch.ones(fusions.WIDTH)
    fusion, _ = published.convert(tensors, tiny_encoder)
    fused = fusions.fused(2)
    w = fusions.weights(MODEL)
    hidden = torch.nn.functional.gelu(fused @ w["embedding.first.weight"].T + w["embedding.first.bias"])
    normed = torch.nn.functional.layer_norm(hidden, (fusions.WIDTH,)) + 1
    expected = normed @ w["embedding.second.weight"].T + w["embedding.second.bias"]
    torch.testing.assert_close(method.class_embedding(fusion.generator, fused), expected)


class AttributeDict(dict):
    """As Lightning pickles settings: an importable class of this name that our process lacks."""


AttributeDict.__module__ = "pytorch_lightning.utilities.parsing"


def lightning(path, monkeypatch, settings):
    """A file as Lightning writes it, with settings of its own classes next to the weights."""
    import sys
    import types

    parts = "pytorch_lightning.utilities.parsing".split(".")
    for i in range(1, 4):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    sys.modules["pytorch_lightning.utilities.parsing"].AttributeDict = AttributeDict
    content = {"state_dict": checkpoint(), "epoch": 3, "hyper_parameters": settings, "lr_schedulers": [{"a": 1.0}]}
    torch.save(content, path)
    monkeypatch.undo()


def test_a_lightning_file_is_read_past_its_settings(folder, tmp_path):
    (folder).mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        settings = AttributeDict(args=argparse.Namespace(lr=1e-4, size=(352, 512)), steps=20)
        lightning(folder / "published.ckpt", monkeypatch, settings)
    assert "published.ckpt" in files.FOLDER.choices()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(comfy.clip_vision, "load_clipvision_from_sd", tiny_encoder)
        fusion, report = files.load("published.ckpt")
    assert same(fusion.generator, fusions.weights(MODEL)) and len(report) >= 5
    path = files.save(fusion, "converted")
    again, _ = files.load(path.name)
    assert same(again.unet, fusion.unet) and again.unet_kind == WHOLE
    assert read_pickle(folder / "published.ckpt").keys() == checkpoint().keys()


class Canary:
    def __reduce__(self):
        import os

        return os.mkdir, ("canary",)


def test_a_pickle_that_runs_code_is_refused(folder, tmp_path, monkeypatch):
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": checkpoint(), "hyper_parameters": Canary()}, folder / "evil.ckpt")
    with pytest.raises(WeightFileError, match="evil.ckpt"):
        files.load("evil.ckpt")
    assert not (tmp_path / "canary").exists()


def test_other_weights_are_refused(folder):
    folder.mkdir()
    safetensors.torch.save_file(fusions.lora(), folder / "lora.safetensors")
    with pytest.raises(WeightFileError, match="not part of a fusion"):
        files.load("lora.safetensors")
    assert FUSIONS["LoRA"]().unet_kind == LORA
