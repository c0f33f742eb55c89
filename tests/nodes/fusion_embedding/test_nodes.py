"""The nodes as ComfyUI calls them: the contract of their sockets, a run through all of them, and equal noise."""

import dataclasses

import comfy.sample
import comfy.samplers
import folder_paths
import pytest
import torch
from comfy_extras.nodes_rebatch import ImageRebatch
from pack.nodes.consent.record import ConsentRecord
from pack.nodes.fingerprint import fingerprint
from pack.nodes.fusion_embedding import files, method, nodes, training_nodes
from pack.nodes.fusion_embedding.method import FusionError
from pack.nodes.puppets import menus
from pack.nodes.training import checkpoints
from support import fusions, tiny_model

from nodes import CLIPVisionEncode

MODEL = fusions.model()
CONTRACT = {
    training_nodes.UnderstudyTrainFusionCombiner: (
        ["clip_vision", "source", "pose", "target", "steps", "learning_rate", "temperature", "batch_size",
         "train_encoder", "seed", "dataset_folder", "resume_from"], ["UNDERSTUDY_FUSION", "LOSS_MAP"]),
    training_nodes.UnderstudyTrainFusionGenerator: (
        ["model", "vae", "fusion", "appearance_encoder", "source", "pose", "target", "steps", "learning_rate",
         "batch_size", "whole_unet", "seed", "dataset_folder", "resume_from"], ["UNDERSTUDY_FUSION", "LOSS_MAP"]),
    training_nodes.UnderstudySaveFusion: (["fusion", "filename_prefix"], []),
    nodes.UnderstudyLoadFusion: (["fusion_name"], ["UNDERSTUDY_FUSION"]),
    nodes.UnderstudyCombineFusion: (["fusion", "source", "pose", "clip_vision"], ["UNDERSTUDY_FUSION_EMBED"]),
    nodes.UnderstudyEncodeAppearance: (["clip_vision", "source"], ["CLIP_VISION_OUTPUT"]),
    nodes.UnderstudyApplyFusion: (
        ["model", "fusion", "fusion_embed", "appearance", "pose", "strength"],
        ["MODEL", "CONDITIONING", "CONDITIONING"]),
    nodes.UnderstudyRetargetPose: (["keypoints", "source_keypoints", "amount"], ["POSE_KEYPOINT"]),
}


@pytest.mark.parametrize("node", CONTRACT)
def test_ids_inputs_and_outputs_are_the_contract(node):
    names, outputs = CONTRACT[node]
    schema = node.GET_SCHEMA()
    schema.validate()
    assert schema.node_id == node.__name__ and schema.category == "Understudy/Fusion embedding"
    assert [widget.id for widget in schema.inputs][: len(names)] == names
    assert all(widget.optional for widget in schema.inputs[len(names) :])
    assert [output.io_type for output in schema.outputs] == outputs


def as_lists(**values):
    return {name: [value] for name, value in values.items()}


def sampled(model, positive, negative, count=1, seed=5, batch_index=None):
    latent = torch.zeros(count, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, seed, batch_index)
    return comfy.sample.sample(model, noise, 2, 2.0, "euler", "normal", positive, negative, latent, disable_pbar=True)


def test_a_run_through_all_nodes(folder, caplog):
    pictures, vision = fusions.pair_lists(4), fusions.vision()
    lists = {name: [tensor[:1], tensor[1:]] for name, tensor in pictures.items()}
    first, second = ConsentRecord("Anna", ("training",)), ConsentRecord("Ben", ("training", "private"))
    with torch.inference_mode():
        combined, losses = training_nodes.UnderstudyTrainFusionCombiner.execute(
            **as_lists(clip_vision=vision, steps=2, learning_rate=1e-3, temperature=0.07, batch_size=4,
                       train_encoder=True, seed=1, resume_from="none", consent=first), **lists,
        ).result
        assert len(losses["loss"]) == 2 and combined.parts == ["combiner", "encoder"]
        assert combined.consent == first
        trained, losses = training_nodes.UnderstudyTrainFusionGenerator.execute(
            **as_lists(model=MODEL, vae=fusions.autoencoder(), fusion=combined, appearance_encoder=vision, steps=2,
                       learning_rate=1e-3, batch_size=2, whole_unet=False, seed=1, resume_from="none", rank=2),
            **lists,
        ).result
        assert len(losses["loss"]) == 2 and trained.consent == first and trained.base == fingerprint(MODEL)
        training_nodes.UnderstudySaveFusion.execute(trained, "both", consent=second)
        assert "replaced: consent of Anna for training" in caplog.text
        (name,) = set(files.FOLDER.choices()) - set(menus.MODEL_FILES[files.FOLDER.name])
        with caplog.at_level("INFO"):
            loaded = nodes.UnderstudyLoadFusion.execute(name)
        assert loaded.result[0].consent == second and loaded.result[0].base == fingerprint(MODEL)
        assert loaded.ui["text"] == ("holds: combiner, encoder, generator, LoRA",)
        assert "[Understudy] Load Fusion: holds: combiner, encoder, generator, LoRA" in caplog.messages
        results = []
        for fusion in (trained, loaded.result[0]):
            appearance = CLIPVisionEncode().encode(vision, pictures["source"][:1], "none")[0]
            source, pose = pictures["source"][:1], pictures["pose"][:3]
            (embed,) = nodes.UnderstudyCombineFusion.execute(fusion, source, pose).result
            assert embed.vectors.shape == (3, fusions.WIDTH)
            applied = nodes.UnderstudyApplyFusion.execute(
                MODEL, fusion, appearance, pose, 1.0, fusion_embed=embed
            ).result
            results.append(sampled(*applied, count=3))
        assert torch.equal(*results) and torch.isfinite(results[0]).all()


def test_a_sequence_of_poses_has_equal_noise_as_a_list_and_as_a_batch():
    """Rebatch Images makes the list; a latent whose batch_index is one number, the batch."""
    fusion = fusions.fusion(MODEL, encoder=fusions.vision())
    source, poses = fusions.pictures(), fusions.poses(3)
    with torch.inference_mode():
        appearance = CLIPVisionEncode().encode(fusion.encoder, source, "none")[0]

        def applied(pose):
            (embed,) = nodes.UnderstudyCombineFusion.execute(fusion, source, pose).result
            return nodes.UnderstudyApplyFusion.execute(MODEL, fusion, appearance, pose, 1.0, embed).result

        listed = ImageRebatch.execute([poses], [1]).result[0]
        singles = torch.cat([sampled(*applied(pose)) for pose in listed])
        batch = sampled(*applied(poses), count=3, batch_index=[0, 0, 0])
    torch.testing.assert_close(batch, singles, rtol=1e-4, atol=1e-4 * float(singles.abs().max()))
    assert (singles[0] - singles[1]).abs().max() > 1e-3


def test_combine_refuses_what_does_not_fit():
    fusion = fusions.fusion(MODEL, encoder=fusions.vision())
    combine = nodes.UnderstudyCombineFusion.execute
    with pytest.raises(FusionError, match="source 2, pose 3"):
        combine(fusion, fusions.pictures(2), fusions.poses(3))
    with pytest.raises(FusionError, match="shows no person"):
        combine(fusion, fusions.pictures(), torch.zeros(1, 64, 64, 3))
    with pytest.raises(FusionError, match="connect that one to clip_vision"):
        combine(fusions.fusion(MODEL), fusions.pictures(), fusions.poses())
    with pytest.raises(FusionError, match="the combiner takes 12"):
        combine(fusions.fusion(MODEL), fusions.pictures(), fusions.poses(), fusions.vision(width=20))
    with pytest.raises(FusionError, match="Train Fusion Combiner"):
        combine(fusions.fusion(MODEL, combiner=None), fusions.pictures(), fusions.poses())
    colour = fusions.pictures()
    alpha = torch.cat([colour, torch.ones(1, 64, 64, 1)], dim=-1)
    actual = [combine(fusion, picture, fusions.poses()).result[0].vectors for picture in (colour, alpha)]
    assert torch.equal(*actual)


def test_every_node_with_a_pose_tells_of_a_photograph(folder, caplog):
    pictures, vision = fusions.pair_lists(4), fusions.vision()
    combined = fusions.fusion(MODEL)
    appearance = CLIPVisionEncode().encode(vision, pictures["source"][:1], "none")[0]
    photograph = fusions.pictures(1, seed=3)
    (embed,) = nodes.UnderstudyCombineFusion.execute(combined, pictures["source"][:1], photograph, vision).result
    nodes.UnderstudyApplyFusion.execute(MODEL, combined, appearance, photograph, 1.0, fusion_embed=embed)
    lists = {name: [tensor] for name, tensor in pictures.items()}
    lists["pose"] = [torch.cat([pictures["pose"][:3], photograph])]
    training_nodes.UnderstudyTrainFusionCombiner.execute(
        **as_lists(clip_vision=vision, steps=1, learning_rate=1e-3, temperature=0.07, batch_size=4,
                   train_encoder=False, seed=1, resume_from="none"), **lists,
    )
    told = [message for message in caplog.messages if "looks like a photograph" in message]
    assert [message.split(":")[0] for message in told] == [
        "[Understudy] Combine Fusion", "[Understudy] Apply Fusion", "[Understudy] Train Fusion Combiner",
    ]
    assert "pose 4 looks" in told[-1]


def test_an_embedding_is_for_the_fusion_whose_combiner_made_it():
    fusion, other = (fusions.fusion(MODEL, seed=seed, encoder=fusions.vision()) for seed in (0, 1))
    alone = fusions.fusion(MODEL, combiner=None, generator=fusions.weights(MODEL, embedding=None))
    with torch.inference_mode():
        (embed,) = nodes.UnderstudyCombineFusion.execute(fusion, fusions.pictures(), fusions.poses()).result
        appearance = CLIPVisionEncode().encode(fusion.encoder, fusions.pictures(), "none")[0]
        apply = nodes.UnderstudyApplyFusion.execute
        for fits in (fusion, dataclasses.replace(fusion, combiner=None)):
            assert len(apply(MODEL, fits, appearance, fusions.poses(), 1.0, embed).result) == 3
        with pytest.raises(FusionError, match="connect one fusion to both Combine Fusion and Apply Fusion"):
            apply(MODEL, other, appearance, fusions.poses(), 1.0, embed)
        with pytest.raises(FusionError, match="disconnect fusion_embed"):
            apply(MODEL, alone, appearance, fusions.poses(), 1.0, embed)


def test_a_run_is_not_resumed_with_another_model_of_the_same_shape(folder):
    lists = {name: [tensor] for name, tensor in fusions.pair_lists(3).items()}
    vision, vae, fusion = fusions.vision(), fusions.autoencoder(), fusions.fusion(MODEL, encoder=fusions.vision(2))
    common = dict(learning_rate=1e-3, seed=1, checkpoint_every=1)
    cases = {
        training_nodes.UnderstudyTrainFusionCombiner: (
            dict(clip_vision=vision, temperature=0.07, batch_size=3, train_encoder=False),
            {"clip_vision": fusions.vision(1)},
        ),
        training_nodes.UnderstudyTrainFusionGenerator: (
            dict(model=MODEL, vae=vae, fusion=fusion, appearance_encoder=vision, batch_size=1, whole_unet=False),
            {
                "model": tiny_model.picture(channels=fusions.CHANNELS), "vae": fusions.autoencoder(1),
                "appearance_encoder": fusions.vision(1),
                "clip_vision": fusions.fusion(MODEL, encoder=fusions.vision(3)),
                "combiner": fusions.fusion(MODEL, seed=1, encoder=fusions.vision(2)),
            },
        ),
    }
    with torch.inference_mode():
        for node, (models, others) in cases.items():
            node.execute(**as_lists(**models, **common, steps=1, resume_from="none"), **lists)
            longer = common | {"steps": 2, "resume_from": checkpoints.FOLDER.choices()[-1]}
            for name, other in others.items():
                changed = models | {"fusion" if isinstance(other, method.Fusion) else name: other}
                with pytest.raises(ValueError, match=f"different {name}: "):
                    node.execute(**as_lists(**changed, **longer), **lists)
            assert len(node.execute(**as_lists(**models, **longer), **lists).result[1]["loss"]) == 2


@pytest.mark.parametrize(
    "node", [training_nodes.UnderstudyTrainFusionCombiner, training_nodes.UnderstudyTrainFusionGenerator]
)
def test_a_folder_whose_pictures_changed_is_trained_on_again(node, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    for role in ("source", "pose", "target"):
        (tmp_path / "people" / role).mkdir(parents=True)
        for name in "ab":
            (tmp_path / "people" / role / f"{name}.png").write_bytes(b"1")
    asked = as_lists(dataset_folder="people", steps=1)
    before = node.fingerprint_inputs(**asked)
    assert node.fingerprint_inputs(**asked) == before
    (tmp_path / "people" / "target" / "b.png").write_bytes(b"another")
    assert node.fingerprint_inputs(**asked) != before
    assert node.fingerprint_inputs(**as_lists(dataset_folder=None)) == node.fingerprint_inputs() == ""


def test_train_nodes_name_what_is_missing_and_resume_checks_their_settings(folder):
    pictures, vision = fusions.pair_lists(3), fusions.vision()
    lists = {name: [tensor] for name, tensor in pictures.items()}
    settings = dict(steps=2, learning_rate=1e-3, temperature=0.07, batch_size=3, train_encoder=False, seed=1,
                    resume_from="none", checkpoint_every=1)
    execute = training_nodes.UnderstudyTrainFusionCombiner.execute
    with torch.inference_mode():
        with pytest.raises(FusionError, match="pose, target: nothing is connected"):
            execute(**as_lists(clip_vision=vision, **settings), source=lists["source"])
        execute(**as_lists(clip_vision=vision, **settings), **lists)
        (name,) = checkpoints.FOLDER.choices()
        longer = settings | {"steps": 3, "resume_from": name}
        assert len(execute(**as_lists(clip_vision=vision, **longer), **lists).result[1]["loss"]) == 3
        with pytest.raises(ValueError, match="temperature"):
            execute(**as_lists(clip_vision=vision, **longer | {"temperature": 0.1}), **lists)
        with pytest.raises(ValueError, match="pairs"):
            execute(**as_lists(clip_vision=vision, **longer), **lists | {"target": [pictures["source"]]})
