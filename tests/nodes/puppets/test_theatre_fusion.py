"""The theatre's image encoder and fusion embedding: pairs, training stages, and their files in the pack's loaders."""

import copy
import csv
import dataclasses
import math
import sys

import comfy.model_management
import comfy.sd
import folder_paths
import numpy as np
import pytest
import torch
from launcher.scripts import ROOT
from pack.nodes.files import weights
from pack.nodes.fusion_embedding import encoding, sampling
from pack.nodes.fusion_embedding import files as fusion_files
from pack.nodes.fusion_embedding.config import ApplyConfig
from pack.nodes.fusion_embedding.method import WHOLE
from pack.nodes.puppets import theatre, vision, world
from safetensors.torch import load_file

sys.path.append(str(ROOT / "workflows" / "theatre"))  # where the training scripts find each other
import fusion_generator  # noqa: E402
import fusion_pairs  # noqa: E402
import fusion_stages  # noqa: E402
import half_files  # noqa: E402
import learned  # noqa: E402
import puppets_sd  # noqa: E402
import puppets_vision  # noqa: E402
import sd_autoencoder  # noqa: E402
import sd_unet  # noqa: E402
import vision_reader  # noqa: E402

TINY = fusion_generator.Config(
    size=64, pairs=6, kept_back=2, combiner_width=8, combiner_steps=2, combiner_batch=2, generator_width=8,
    generator_steps=2, generator_cool_down=1, generator_batch=2,
)
VISION = puppets_vision.Config(pairs=10, kept_back=2, size=64, steps=2, cool_down=1, batch=2)


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A folder of a run's state, in which its checkpoints stay, with image encoder and model of random weights."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", copy.deepcopy(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})  # of an earlier test's folders
    torch.manual_seed(0)
    path = tmp_path / "puppets_sd.safetensors"
    tensors = puppets_sd.checkpoint_tensors(sd_unet.Denoiser(5.0), sd_autoencoder.NarrowTAESD())
    half_files.save_half(path, tensors, {})
    monkeypatch.setattr(fusion_stages, "CHECKPOINT", path)
    encoder = vision.vision(vision_reader.Reader().weights())
    monkeypatch.setattr(fusion_stages, "shipped", lambda: encoder)
    return tmp_path


def test_a_pair_is_a_training_puppet_in_two_actions_of_one_scene():
    tests = set(map(world.identity_words, world.test_identities()))
    pairs = [fusion_pairs.takes(i, 7, close_ups=True) for i in range(70)]
    for source, target in pairs:
        assert source.identity == target.identity and source.action != target.action
        assert (source.scene, source.light, source.view, source.dx, source.scale, source.framing) == (
            target.scene, target.light, target.view, target.dx, target.scale, target.framing)
        assert world.identity_words(source.identity) not in tests
        assert (source.identity.species, source.action) not in world.HELD_OUT[source.framing]
    assert len({source.action for source, _ in pairs}) > 10
    assert [source.framing for source, _ in pairs[:7]] == ["full"] * 6 + ["close_up"]
    assert {source.framing for source, _ in (fusion_pairs.takes(i, 7) for i in range(14))} == {"full"}
    assert pairs[:3] == [fusion_pairs.takes(i, 7) for i in range(3)] != [fusion_pairs.takes(i, 8) for i in range(3)]


def test_renders_are_kept(tmp_path):
    data = fusion_pairs.rendered(tmp_path, 6, 64, 7)
    assert data["pictures"].shape == (6, 3, 64, 64, 3) and data["pictures"].dtype == np.uint8
    assert data["parts"].shape == (6, 2, 32, 32) and data["parts"].max() > 0
    assert data["joints"].shape == (6, 2, 18, 3) and data["joints"].dtype == np.float32
    inside = data["joints"][..., 2] > 0
    assert inside.any() and (data["joints"][inside] >= 0).all() and (data["joints"][inside] <= 1).all()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    fusion_pairs.rendered(tmp_path, 6, 64, 7)
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


# Image encoder


def test_sources_come_before_targets_and_pose_drawings(tmp_path):
    data = fusion_pairs.rendered(tmp_path, 3, 64, 7, close_ups=True)
    pixels, words, colours, shown, joints, cells = vision_reader.batch(data, np.array([2, 0]), 7)
    for place, picture in ((0, data["pictures"][2, 0]), (3, data["pictures"][0, 2]), (4, data["pictures"][2, 1])):
        torch.testing.assert_close(pixels[place], vision_reader.prepared(picture[None])[0])
    takes = [fusion_pairs.takes(i, 7, close_ups=True)[which] for which in (0, 1) for i in (2, 0)]
    assert [vision_reader.WORDS["action"][i] for i in words[-1]] == [take.action for take in takes]
    assert colours.shape == (4, 7, 3) and colours[3, 2].tolist() == pytest.approx(takes[3].identity.shirt)
    assert shown[:, 3, 0].tolist() == [take.identity.pattern != "plain" for take in takes]
    torch.testing.assert_close(joints[4], joints[2])
    # The parts in the second patch of the first row: cells 4 to 7 of rows 0 to 3.
    assert cells.shape == (4, 64, 16)
    assert cells[3, 1].tolist() == data["parts"][0, 1, :4, 4:8].flatten().tolist()


def test_what_is_not_to_be_seen_is_not_learned(tmp_path):
    data = fusion_pairs.rendered(tmp_path, 2, 64, 7, close_ups=True)
    reader, (pixels, words, colours, shown, joints, cells) = vision_reader.Reader(), vision_reader.batch(
        data, np.arange(2), 7
    )
    with torch.no_grad():
        before = reader(pixels, words, colours, shown, joints, cells)
        colours, joints = colours.clone(), joints.clone()
        colours[shown[..., 0] == 0] = 7
        joints[..., :2][joints[..., 2] == 0] = 7
        assert torch.equal(reader(pixels, words, colours, shown, joints, cells), before)
        joints[..., :2][joints[..., 2] > 0] = 7
        assert reader(pixels, words, colours, shown, joints, cells) > before + 10


def test_the_encoder_is_trained_and_exported(tmp_path):
    assert puppets_vision.train(tmp_path, VISION, math.inf)
    (row,) = csv.DictReader(open(tmp_path / "vision_losses.csv"))
    assert "species" in row["figures"] and "joints" in row["figures"]
    path = tmp_path / "puppets_vision.safetensors"
    puppets_vision.export(tmp_path, VISION, path)
    tensors, _ = weights.read(path)
    loaded = vision.vision(tensors)
    average = load_file(tmp_path / "vision" / "average.safetensors")
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(tensors[name], average[f"encoder.{name}"].half())
    assert encoding.embeddings(loaded, torch.rand(2, 64, 64, 3)).shape == (2, 128)


# Fusion


def test_every_stage_goes_on_where_it_stopped_and_the_file_loads(state):
    pictures = fusion_pairs.rendered(state, TINY.pairs, TINY.size, TINY.seed)["pictures"]
    for train in (fusion_stages.train_combiner, fusion_stages.train_generator):
        # Without time a run stops before its first step, and leaves no cancel behind.
        assert not train(state, pictures, TINY, -1)
        comfy.model_management.throw_exception_if_processing_interrupted()
        assert train(state, pictures, TINY, math.inf) and train(state, pictures, TINY, math.inf)
    path = state / "puppets_fusion.safetensors"
    fusion_stages.export(state, pictures, TINY, path)
    assert path.stat().st_size <= half_files.LIMIT
    tensors, metadata = weights.read(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    fusion = fusion_files.unpacked(tensors, metadata)
    average = load_file(state / "generator" / "average.safetensors")
    key = "unet/out/2/weight"
    assert fusion.unet_kind == WHOLE
    assert torch.equal(fusion.unet["diffusion_model.out.2.weight"], average[key].half())
    theatre.register()
    model = comfy.sd.load_checkpoint_guess_config(str(fusion_stages.CHECKPOINT))[0]
    source, pose, _ = (torch.from_numpy(np.array(part))[None].float() / 255 for part in pictures[-1])
    fused = encoding.fused(fusion.combiner, fusion.encoder, source, pose)
    states = encoding.states(fusion_stages.shipped(), source)
    _, positive, _ = sampling.apply(model, fusion, states, fused, pose, ApplyConfig())
    assert positive[0][0].shape == (1, 65, 128) and positive[0][0].isfinite().all()


@pytest.mark.parametrize("warm_start, kept", [(1, ("generator", "unet")), (2, ("generator",))])
def test_stage_2_begins_with_the_weights_of_a_file_where_it_is_told_to(state, monkeypatch, warm_start, kept):
    pictures = fusion_pairs.rendered(state, TINY.pairs, TINY.size, TINY.seed)["pictures"]
    assert fusion_stages.train_combiner(state, pictures, TINY, math.inf)
    assert fusion_stages.train_generator(state, pictures, TINY, math.inf)
    path = state / "puppets_fusion.safetensors"
    fusion_stages.export(state, pictures, TINY, path)
    first = fusion_files.unpacked(*weights.read(path))
    monkeypatch.setattr(fusion_stages, "FUSION", path)
    again = state / "again"
    still = dataclasses.replace(TINY, generator_matrix_lr=1e-12, generator_lr=1e-12, generator_decay=0.0)
    still = dataclasses.replace(still, warm_start=warm_start)
    again.mkdir()
    (state / "combiner.safetensors").rename(again / "combiner.safetensors")
    assert fusion_stages.train_generator(again, pictures, still, math.inf)
    second = fusion_stages.kept(again, "generator")
    for part in ("generator", "unet"):
        before, after = getattr(first, part), getattr(second, part)
        assert before.keys() == after.keys()
        same = all(torch.allclose(before[key].float(), after[key], atol=1e-6) for key in before)
        assert same == (part in kept)


def test_a_copy_of_learned_parameters_has_their_values_and_no_loss():
    live = learned.Learned({"a.b": torch.nn.Parameter(torch.ones(2)), "c": torch.nn.Parameter(torch.zeros(1))}, float)
    average = copy.deepcopy(live)
    with torch.no_grad():
        live.get_parameter("a/b").add_(1)
    assert average.loss is None and average.part("a.")["b"].tolist() == [1, 1]
    assert live.part()["a.b"].tolist() == [2, 2]
    assert live(*learned.draw_step(None, 7)) == 7.0
    assert not any(parameter.requires_grad for parameter in average.parameters())


@pytest.mark.skipif(not vision.FILE.exists(), reason="the theatre's image encoder is not trained yet")
def test_the_shipped_encoder_tells_puppets_and_poses_apart():
    from pack.nodes.puppets import nodes, render

    loaded = nodes.UnderstudyLoadPuppetVision.execute().result[0]
    source, target = (render.render(take) for take in fusion_pairs.takes(100_001, 7))
    other = render.render(world.sample_take(100_002, "train"))
    pictures = torch.from_numpy(np.stack([source.image, target.image, other.image])).float() / 255
    one, two, three = torch.nn.functional.normalize(encoding.embeddings(loaded, pictures), dim=-1)
    assert one @ two > one @ three and one @ two < 0.9999
