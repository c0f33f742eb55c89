"""Stage 1, the combiner, on a tiny image encoder of ComfyUI: training, resuming, seeds, and the published loss."""

import comfy.model_management
import pytest
import torch
from pack.kernels.fusion_embedding import retrieval_ranks
from pack.nodes.fusion_embedding import encoding
from pack.nodes.fusion_embedding.method import FusionError
from pack.nodes.training.checkpoints import Checkpoints
from support import fusions
from support.fusion_trainings import VISION, combined, data, same


@pytest.mark.parametrize("train_encoder", [False, True])
def test_the_combiner_trains_to_retrieve_targets_and_does_not_modify_the_encoder(train_encoder):
    before = {key: value.clone() for key, value in VISION.get_sd().items()}
    objects = list(VISION.model.parameters())
    fusion, loss_map = combined(steps=60, train_encoder=train_encoder, learning_rate=3e-3)
    losses = torch.tensor(loss_map["loss"])
    assert losses[-15:].mean() < 0.9 * losses[:15].mean()
    assert same(VISION.get_sd(), before)
    assert all(a is b for a, b in zip(objects, VISION.model.parameters(), strict=True))
    assert comfy.model_management.in_training is False
    assert (fusion.encoder is not None) == train_encoder and fusion.generator is None
    encoder = encoding.encoder_for(fusion, VISION)
    pairs = data()
    with torch.no_grad():
        vectors, target = embedded(fusion.combiner, encoder, pairs)
    assert (retrieval_ranks(vectors, target) == 0).float().mean() >= 0.75


def embedded(combiner, encoder, pairs):
    """e_f and e_t of every pair."""
    vectors = [encoding.fused(combiner, encoder, pairs[i].source, pairs[i].pose) for i in range(len(pairs))]
    return torch.cat(vectors), torch.cat([encoding.embeddings(encoder, pairs[i].target) for i in range(len(pairs))])


@pytest.mark.parametrize("train_encoder", [False, True])
def test_a_combiner_resumed_from_its_checkpoint_equals_the_whole_run(folder, train_encoder):
    options = {"train_encoder": train_encoder, "seed": 5}
    whole, losses = combined(steps=4, **options)
    saved = Checkpoints("stage1", {"a": 1})
    combined(steps=3, checkpoints=saved, checkpoint_every=2, **options)
    again = Checkpoints("stage1", {"a": 1})
    actual, resumed = combined(steps=4, checkpoints=again, resume_from=saved.path.name, **options)
    assert same(actual.combiner, whole.combiner) and resumed == losses
    if train_encoder:
        assert same(actual.encoder.get_sd(), whole.encoder.get_sd())
        assert not same(actual.encoder.get_sd(), VISION.get_sd())


def test_seeds_decide_and_the_global_generator_does_not():
    first, _ = combined(seed=1)
    torch.rand(7)
    assert same(combined(seed=1)[0].combiner, first.combiner)
    assert not same(combined(seed=2)[0].combiner, first.combiner)


def test_retrieval_is_reported_during_training(caplog):
    with caplog.at_level("INFO"):
        combined(steps=2)
    lines = [record.getMessage() for record in caplog.records if "step 2 of 2" in record.getMessage()]
    assert len(lines) == 1 and "top-1" in lines[0] and "top-5 100% of 4" in lines[0]


def test_an_encoder_that_cannot_be_trained_names_its_own_switch():
    vision = fusions.vision()
    vision.model.visual_projection.weight.data = vision.model.visual_projection.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="visual_projection.weight is torch.float8_e4m3fn.*train_encoder off"):
        combined(clip_vision=vision, train_encoder=True)


def test_one_pair_is_no_retrieval():
    with pytest.raises(FusionError, match="2 or more"):
        combined(data(1))
