"""A run continues only with the weights and pictures of its checkpoint: others of one shape would fit as well."""

import logging
import re

import comfy.sd
import folder_paths
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from pack.nodes.action_identifier.training_nodes import UnderstudyTrainActionIdentifier
from pack.nodes.frequency_guidance.training_nodes import UnderstudyTrainSourceDrivingPair
from pack.nodes.training import checkpoints, loop
from pack.nodes.video_identity.training_nodes import UnderstudyTrainVideoIdentityAdapter
from support import tiny_clip, tiny_model

CLIP = tiny_clip.clip()
SOURCE, DRIVING, OTHER = torch.rand(3, 1, 64, 64, 3, generator=torch.Generator().manual_seed(0))


class Cells:
    """An encoder of eight pixels per cell."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, picture):
        return torch.cat([picture, picture[..., :1]], -1)[:, ::8, ::8].movedim(-1, 1)


def run(node, steps, resume_from, **changes):
    common = {"learning_rate": 1e-3, "seed": 0, "checkpoint_every": 1, "steps": steps, "resume_from": resume_from}
    lists = {name: value if isinstance(value, list) else [value] for name, value in (common | changes).items()}
    with torch.inference_mode():
        return node.execute(**lists).result[1]["loss"]


def pair(steps, resume_from, model=None, **changes):
    texts = {"source_text": "a cat", "driving_text": "a dog"}
    return run(
        UnderstudyTrainSourceDrivingPair, steps, resume_from, model=model or unet(0), rank=2,
        **{"clip": CLIP, "vae": Cells(), "source": SOURCE, "driving": DRIVING, **texts, **changes},
    )


def action(steps, resume_from, model=None, **changes):
    return run(
        UnderstudyTrainActionIdentifier, steps, resume_from, model=model or unet(0), placeholder="<action>",
        initial_word="dancing", context_steps=1, mask_percentile=0.6, merge="union", subjects=["a cat", "a dog"],
        **{"clip": CLIP, "vae": Cells(), "images": [SOURCE, DRIVING], "contrast_images": [DRIVING, OTHER]} | changes,
    )


def video(steps, resume_from, model=None, **changes):
    latents = [{"samples": torch.full((1, 16, frames, 4, 4), 0.5)} for frames in (2, 1)]
    return run(
        UnderstudyTrainVideoIdentityAdapter, steps, resume_from, model=model or wan(0), latents=latents[:1],
        references=latents[1:], rank=2, batch_size=1, **{"positive": [tiny_model.conditioning(0)], **changes},
    )


def unet(seed):
    return tiny_model.picture(seed=seed)


def wan(seed):
    return tiny_model.wan(num_layers=2, seed=seed)


def with_picture(conditioning):
    ((text, options),) = conditioning
    return [[text, {**options, "concat_latent_image": torch.ones(1)}]]


def with_lora(model):
    weight = model.model.diffusion_model.blocks[0].self_attn.q.weight
    update = LoRAAdapter(set(), (torch.ones(len(weight), 2), torch.ones(2, len(weight)), None, None, None, None))
    model.add_patches({"diffusion_model.blocks.0.self_attn.q.weight": update}, 0.7)
    return model


def with_bypass_lora(model):
    layer = "diffusion_model.blocks.0.self_attn.q"
    weights = {f"{layer}.lora_up.weight": torch.ones(48, 2), f"{layer}.lora_down.weight": torch.ones(2, 48)}
    return comfy.sd.load_bypass_lora_for_models(model, None, weights, 0.7, 0)[0]


def with_patch(model):
    model.set_model_attn2_patch(lambda n, context, value, options: (n, context * 0.5, value))
    return model


def clip_with_lora():
    clip = CLIP.clone()
    key = next(key for key in clip.patcher.model.state_dict() if key.endswith("q_proj.weight"))
    clip.add_patches({key: ("diff", (torch.ones_like(clip.patcher.model.state_dict()[key]),))}, 0.5)
    return clip


def clip_with_skip():
    clip = CLIP.clone()
    clip.clip_layer(-2)
    return clip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    key = checkpoints.FOLDER.name
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(tmp_path / key)], {".safetensors"}))


@pytest.mark.parametrize("train", [pair, action, video])
def test_a_run_reports_its_peak_memory_once(train, folder, caplog):
    with caplog.at_level(logging.INFO):
        train(1, "none")
    (line,) = [record.getMessage() for record in caplog.records if "peak memory" in record.getMessage()]
    assert re.fullmatch(r"\[Understudy\] training: peak memory \d+\.\d\d GB on cpu", line)


@pytest.mark.parametrize(("train", "others"), [
    (pair, {
        "different model": {"model": unet(1)},
        "different source picture: ": {"source": OTHER},
        "different driving picture: ": {"driving": OTHER},
        "different LoRAs on clip": {"clip": clip_with_lora()},
        "CLIP skip unset and this run has -2": {"clip": clip_with_skip()},
        "different clip": {"clip": tiny_clip.clip(seed=1)},
        "different patches on the model": {"model": with_patch(unet(0))},
        "source_text 'a cat' and this run has 'a cow'": {"source_text": "a cow"},
    }),
    (action, {"different model": {"model": unet(1)}, "different clip": {"clip": tiny_clip.clip(seed=1)}}),
    (video, {
        "different model": {"model": wan(1)},
        "different LoRAs on the model": {"model": with_lora(wan(0))},
        "different LoRAs on the model: ": {"model": with_bypass_lora(wan(0))},
        "different texts": {"positive": [with_picture(tiny_model.conditioning(0))]},
    }),
])
def test_other_weights_and_pictures_are_refused_by_name(train, others, folder):
    once = train(1, "none")
    (checkpoint,) = checkpoints.FOLDER.choices()
    for words, changes in others.items():
        with pytest.raises(ValueError, match=f"made with {words}"):
            train(2, checkpoint, **changes)
    assert train(2, checkpoint)[: len(once)] == once


class OtherCells(Cells):
    """The VAE of a model whose latents have 16 channels."""

    def encode(self, picture):
        return super().encode(picture).repeat(1, 4, 1, 1)


@pytest.mark.parametrize(("train", "others"), [
    (pair, {
        "clip encodes texts in 40 channels and the model reads 16": {"clip": tiny_clip.clip("SDXL")},
        "what vae encodes has 16 channels and the model's latents have 4": {"vae": OtherCells()},
    }),
    (action, {
        "clip encodes texts in 40 channels and the model reads 16": {"clip": tiny_clip.clip("SDXL")},
        "what vae encodes has 16 channels and the model's latents have 4": {"vae": OtherCells()},
    }),
    (video, {
        "positive encodes texts in 24 channels and the model reads 16": {"positive": [[[torch.ones(1, 8, 24), {}]]]},
    }),
])
def test_another_models_texts_and_latents_are_refused_by_name_before_a_step(train, others, folder, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("a step began"))
    for words, changes in others.items():
        with pytest.raises(ValueError, match=f"^{words}.*: connect|^{words}.*encode"):
            train(1, "none", **changes)


def test_a_picture_without_a_text_is_warned_of(folder, caplog):
    pair(1, "none")
    assert not [record for record in caplog.records if "is empty" in record.getMessage()]
    pair(1, "none", driving_text=" ")
    (said,) = [record.getMessage() for record in caplog.records if "is empty" in record.getMessage()]
    assert "driving_text is empty, so no prompt will mean the driving picture" in said


def half_mask(size):
    mask = torch.zeros(1, size, size)
    mask[:, : size // 2] = 1
    return mask


@pytest.mark.parametrize(("train", "size"), [(pair, 64), (action, 64), (video, 32)])
def test_a_node_learns_inside_its_masks(train, size, folder):
    """Masks of ones change nothing, half a mask changes the loss, and a floor of 1 takes the mask away."""
    plain = train(1, "none")
    assert train(1, "none", masks=[torch.ones(1, size, size)]) == plain
    assert train(1, "none", masks=[half_mask(size)]) != plain
    assert train(1, "none", masks=[half_mask(size)], mask_floor=1.0) == plain


def test_a_resumed_run_has_the_same_masks(folder):
    pair(1, "none", masks=[half_mask(64)])
    (checkpoint,) = checkpoints.FOLDER.choices()
    assert len(pair(2, checkpoint, masks=[half_mask(64)])) == 4
    with pytest.raises(ValueError, match="mask_floor 0.0 and this run has 0.5"):
        pair(2, checkpoint, masks=[half_mask(64)], mask_floor=0.5)
