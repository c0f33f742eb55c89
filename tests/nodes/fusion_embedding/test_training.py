"""What both stages share, on real tiny models of ComfyUI: cancelling, and peak memory."""

import comfy.model_management
import pytest
from pack.nodes.files import weights
from pack.nodes.fusion_embedding import pairs
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.monitor import NodeMonitor
from support import fusions
from support.fusion_trainings import MODEL, VISION, combined, generated


@pytest.mark.parametrize("stage", [combined, generated])
def test_a_cancelled_run_leaves_its_state(folder, stage, monkeypatch):
    checks = []

    def cancel(_monitor):
        checks.append(1)
        if len(checks) == 3:
            raise comfy.model_management.InterruptProcessingException

    saved = Checkpoints("cancelled", {})
    monkeypatch.setattr(NodeMonitor, "check", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stage(steps=10_000, checkpoints=saved)
    tensors, metadata = weights.read(saved.path)
    assert metadata["step"] == "2" and len(tensors["losses"]) == 2
    assert comfy.model_management.in_training is False
    for model in (MODEL.model, VISION.model):
        assert all(parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize("stage", [combined, generated])
def test_pairs_are_not_encoded_any_more_once_a_run_is_cancelled(stage, monkeypatch):
    """Both stages encode many pairs before a step is done."""
    read = []

    class Cancelling(pairs.ListedPairs):
        def __getitem__(self, index):
            read.append(index)
            if len(read) == 3:
                comfy.model_management.interrupt_current_processing()
            return super().__getitem__(index)

    lists = fusions.pair_lists(6)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stage(Cancelling(*([lists[role]] for role in pairs.ROLES)))
    assert len(read) == 3


def test_both_stages_say_their_peak_memory(caplog):
    for stage in (combined, generated):
        caplog.clear()
        with caplog.at_level("INFO"):
            stage(steps=1)
        assert sum("peak memory" in record.getMessage() for record in caplog.records) == 1
