"""The theatre's image encoder and fusion embedding: pairs, training stages, and their files in the pack's loaders."""

import copy
import math
import sys
import time

import comfy.model_management
import comfy.sd
import folder_paths
import numpy as np
import pytest
import torch
from launcher.scripts import ROOT
from pack.nodes.files import weights
from pack.nodes.fusion_embedding import encoding, files, sampling
from pack.nodes.fusion_embedding.config import ApplyConfig
from pack.nodes.fusion_embedding.method import WHOLE
from pack.nodes.puppets import theatre, vision, world

sys.path.append(str(ROOT / "workflows" / "theatre"))  # where the training script finds its own modules
import fusion_pairs  # noqa: E402
import fusion_stages  # noqa: E402
import fusion_vision  # noqa: E402

TINY = {
    "size": 64, "pairs": 6, "kept_back": 2, "vision_steps": 2, "vision_batch": 2, "combiner_width": 8,
    "combiner_steps": 2, "combiner_batch": 2, "generator_width": 8, "generator_steps": 2, "generator_batch": 2,
}
NEVER = math.inf


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A folder of a run's state, whose checkpoints stay in it, too."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", copy.deepcopy(folder_paths.folder_names_and_paths))
    return tmp_path


def test_a_pair_is_a_training_puppet_in_two_actions_of_one_scene():
    tests = set(map(world.identity_words, world.test_identities()))
    pairs = [fusion_pairs.takes(i, 7) for i in range(60)]
    for source, target in pairs:
        assert source.identity == target.identity and source.action != target.action
        assert (source.scene, source.light, source.dx, source.scale) == (
            target.scene, target.light, target.dx, target.scale)
        assert world.identity_words(source.identity) not in tests
        assert (source.identity.species, source.action) not in world.HELD_OUT_PAIRS
    assert len({source.action for source, _ in pairs}) > 10
    assert pairs[:3] == [fusion_pairs.takes(i, 7) for i in range(3)] != [fusion_pairs.takes(i, 8) for i in range(3)]


def test_renders_are_kept(tmp_path):
    config = fusion_pairs.Config(**TINY)
    data = fusion_pairs.rendered(tmp_path, config)
    assert data["pictures"].shape == (6, 3, 64, 64, 3) and data["pictures"].dtype == np.uint8
    assert data["parts"].shape == (6, 2, 32, 32) and data["parts"].max() > 0
    assert data["joints"].shape == (6, 2, 18, 2) and 0 < data["joints"].mean() < 1
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    fusion_pairs.rendered(tmp_path, config)
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_every_stage_goes_on_where_it_stopped_and_the_files_load(state):
    config = fusion_pairs.Config(**TINY)
    data = fusion_pairs.rendered(state, config)
    assert fusion_vision.train(state, data, config, NEVER)
    for train in (fusion_stages.train_combiner, fusion_stages.train_generator):
        # A deadline that has passed stops the run before its first step, and leaves no cancel behind.
        assert not train(state, data, config, time.monotonic() - 1)
        comfy.model_management.throw_exception_if_processing_interrupted()
        assert train(state, data, config, NEVER) and train(state, data, config, NEVER)
    assert fusion_stages.export(state, data, config, state)
    assert all((state / name).stat().st_size <= 16 * 2**20 for name in (fusion_stages.VISION, fusion_stages.FUSION))
    tensors, metadata = weights.read(state / fusion_stages.FUSION)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    fusion = files.unpacked(tensors, metadata)
    assert fusion.unet_kind == WHOLE
    seen = vision.vision(weights.read(state / fusion_stages.VISION)[0])
    theatre.register()
    model = comfy.sd.load_checkpoint_guess_config(str(fusion_stages.CHECKPOINT))[0]
    source, pose, _ = (torch.from_numpy(np.array(part))[None].float() / 255 for part in data["pictures"][-1])
    fused = encoding.fused(fusion.combiner, fusion.encoder, source, pose)
    _, positive, _ = sampling.apply(model, fusion, encoding.states(seen, source), fused, pose, ApplyConfig())
    assert positive[0][0].shape == (1, 65, 128) and positive[0][0].isfinite().all()


def test_stage_2_begins_with_the_shipped_weights_where_it_is_told_to(state):
    still = {"generator_width": 256, "generator_matrix_lr": 1e-12, "generator_lr": 1e-12, "combiner_width": 256}
    config = fusion_pairs.Config(**{**TINY, **still}, warm_start=1)
    data = fusion_pairs.rendered(state, config)
    assert fusion_vision.train(state, data, config, NEVER)
    assert fusion_stages.train_combiner(state, data, config, NEVER)
    assert fusion_stages.train_generator(state, data, config, NEVER)
    shipped = files.unpacked(*weights.read(fusion_stages.MODELS / fusion_stages.FUSION))
    learnt = fusion_stages.kept(state, "generator")
    for part in ("generator", "unet"):
        before, after = getattr(shipped, part), getattr(learnt, part)
        assert before.keys() == after.keys()
        assert all(torch.allclose(before[key].float(), after[key], atol=1e-6) for key in before)


@pytest.mark.skipif(not vision.FILE.exists(), reason="the theatre's image encoder is not trained yet")
def test_the_shipped_encoder_tells_puppets_and_poses_apart():
    from pack.nodes.puppets import nodes, render

    loaded = nodes.UnderstudyLoadPuppetVision.execute().result[0]
    source, target = (render.render(take) for take in fusion_pairs.takes(100_001, 7))
    other = render.render(world.sample_take(100_002, "train"))
    pictures = torch.from_numpy(np.stack([source.image, target.image, other.image])).float() / 255
    one, two, three = torch.nn.functional.normalize(encoding.embeddings(loaded, pictures), dim=-1)
    assert one @ two > one @ three and one @ two < 0.9999
