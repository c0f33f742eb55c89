"""A generator that is trained further: it begins with what the fusion holds, and refuses what it cannot take over."""

import dataclasses
import functools

import pytest
import torch
from pack.nodes.fusion_embedding import sampling, training, training_nodes
from pack.nodes.fusion_embedding.config import GeneratorConfig
from pack.nodes.fusion_embedding.layout import FusionError
from pack.nodes.fusion_embedding.method import WHOLE, Fusion
from pack.nodes.training import checkpoints
from support import fusion_trainings, fusions, tiny_model
from support.fusion_trainings import VAE, VISION

MODEL = tiny_model.as_loaded(fusions.model())  # its own, since a UNet is patched in
generated = functools.partial(fusion_trainings.generated, model=MODEL)
PLAIN = {key: value.clone() for key, value in MODEL.model.diffusion_model.state_dict().items()}  # loading patches it
UNET = {f"diffusion_model.{key}": 1.1 * value for key, value in PLAIN.items()}
WHOLE_FUSION = fusions.fusion(MODEL, unet=UNET, unet_kind=WHOLE)
FURTHER = {"whole_unet": True, "train_further": True}
UNTRAINED = {"steps": 1, "learning_rate": 1e-9}


def close(found, expected):
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight.float(), atol=1e-6, rtol=1e-5)


def test_it_begins_with_the_generator_and_the_unet_of_the_fusion():
    further, _ = generated(fusion=WHOLE_FUSION, generator=FURTHER, **UNTRAINED)
    close(further.generator, WHOLE_FUSION.generator)
    close(further.unet, UNET)
    assert further.generator.keys() == WHOLE_FUSION.generator.keys() and further.unet.keys() == UNET.keys()
    anew, _ = generated(fusion=WHOLE_FUSION, generator={"whole_unet": True}, **UNTRAINED)
    key = "pose.conv_out.weight"
    assert not torch.allclose(anew.generator[key], WHOLE_FUSION.generator[key], atol=1e-3)
    learned, _ = generated(fusion=WHOLE_FUSION, generator=FURTHER, steps=2)
    assert not torch.allclose(learned.generator[key], WHOLE_FUSION.generator[key], atol=1e-4)


def test_a_lora_becomes_part_of_the_whole_unet():
    fusion = fusions.fusion(MODEL)
    further, _ = generated(fusion=fusion, generator=FURTHER, **UNTRAINED)
    assert further.unet_kind == WHOLE
    key = "input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight"
    stem = next(iter(fusion.unet)).partition(".")[0]
    added = fusion.unet[f"{stem}.lora_up.weight"] @ fusion.unet[f"{stem}.lora_down.weight"]  # of scale 1
    changed = {
        name for name, weight in PLAIN.items()
        if not torch.allclose(further.unet[f"diffusion_model.{name}"], weight.float(), atol=1e-4)
    }
    assert changed == {key}
    close({key: further.unet[f"diffusion_model.{key}"]}, {key: PLAIN[key] + added})


def test_paths_that_it_lacks_begin_anew():
    pose = {key: weight for key, weight in WHOLE_FUSION.generator.items() if key.startswith("pose.")}
    part = dataclasses.replace(WHOLE_FUSION, generator=pose)
    further, _ = generated(fusion=part, generator=FURTHER | {"embedding_tokens": 3}, **UNTRAINED)
    close(further.generator, pose)
    sizes = sampling.check_model(MODEL, further.generator)
    assert sizes.embedding_tokens == 3 and sizes.embedding == fusions.WIDTH


@pytest.mark.parametrize(("fusion", "settings", "fix"), [
    (fusions.fusion(MODEL, generator=fusions.weights(MODEL, hidden=20)), {}, "appearance_encoder of its training"),
    (dataclasses.replace(WHOLE_FUSION, combiner=None), {}, "own combiner"),
    (dataclasses.replace(WHOLE_FUSION, prediction="v"), {}, "predicts v"),
    (generated(generator={"embedding_tokens": 2}, steps=1)[0], {}, "set embedding_tokens to 2"),
    (generated(generator={"embedding_tokens": 2}, steps=1)[0], {"embedding_tokens": 4}, "set embedding_tokens to 2"),
])
def test_what_cannot_be_taken_over_is_named_with_its_fix(fusion, settings, fix):
    with pytest.raises(FusionError, match=fix):
        generated(fusion=fusion, generator=FURTHER | settings, **UNTRAINED)


def run(fusion, **given):
    values = {
        "model": MODEL, "vae": VAE, "appearance_encoder": VISION, "clip_vision": VISION, "fusion": fusion,
        "steps": 1, "learning_rate": 1e-4, "batch_size": 2, "whole_unet": True, "seed": 0, "train_further": True,
        "dataset_folder": "none", "resume_from": "none", **given,
    }
    lists = {name: [value] for name, value in fusions.pair_lists(4).items()}
    with torch.inference_mode():
        return training_nodes.UnderstudyTrainFusionGenerator.execute(
            **{name: [value] for name, value in values.items()}, **lists
        ).result


def test_the_node_refuses_a_fusion_without_a_generator_and_a_lora(folder):
    with pytest.raises(FusionError, match="there is no generator to train further"):
        run(Fusion(fusions.combiner()))
    with pytest.raises(ValueError, match="switch whole_unet on"):
        run(WHOLE_FUSION, whole_unet=False)
    with pytest.raises(ValueError, match="switch whole_unet on"):
        GeneratorConfig(train_further=True)


def test_an_unknown_prediction_is_told_and_misfits_are_found_before_pairs_are_encoded(monkeypatch, caplog):
    with caplog.at_level("WARNING"):
        generated(fusion=WHOLE_FUSION, generator=FURTHER, **UNTRAINED)
    assert "does not say whether its UNet predicts noise or v" in caplog.text
    monkeypatch.setattr(training.PairEncoder, "fill", lambda _self: pytest.fail("all pairs were encoded first"))
    with pytest.raises(FusionError, match="predicts v"):
        generated(fusion=dataclasses.replace(WHOLE_FUSION, prediction="v"), generator=FURTHER, **UNTRAINED)


def test_a_budget_with_a_lora_is_refused_by_its_name(folder):
    with pytest.raises(ValueError, match="another budget than consumer"):
        run(WHOLE_FUSION, budget="consumer")


def test_a_run_is_not_resumed_from_another_start(folder):
    run(WHOLE_FUSION, checkpoint_every=1)
    longer = {"steps": 2, "resume_from": checkpoints.FOLDER.choices()[-1]}
    with pytest.raises(ValueError, match="fusion to train further"):
        run(dataclasses.replace(WHOLE_FUSION, generator=fusions.weights(MODEL, seed=9)), **longer)
    with pytest.raises(ValueError, match="fusion to train further"):
        run(WHOLE_FUSION, train_further=False, **longer)
    assert run(WHOLE_FUSION, **longer)[0].unet_kind == WHOLE
