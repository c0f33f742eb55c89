"""Learned files of every kind in folders of their own, and what else may be there."""

import folder_paths
import pytest
import torch
from pack.nodes.action_identifier import files as actions
from pack.nodes.action_identifier.method import ANY_ENCODER, ActionIdentifier
from pack.nodes.files import weights
from pack.nodes.fusion_embedding import files as fusion_files
from pack.nodes.fusion_embedding.method import Fusion
from pack.nodes.identity_prior import files as priors
from pack.nodes.library import index
from pack.nodes.subject_tokens import Subject
from pack.nodes.video_identity import files as adapters
from pack.nodes.video_identity import method
from support import fusions


@pytest.fixture
def output(output, monkeypatch):
    """ComfyUI's output folder, whose learned files it lists; times count as settled at once."""
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {
        name: value for name, value in folder_paths.folder_names_and_paths.items() if name != "loras"
    } | {"loras": ([str(output / "loras")], {".safetensors", ".ckpt"})})
    (output / "loras").mkdir()
    for folder in (actions.FOLDER, fusion_files.FOLDER):
        folder.register()
    monkeypatch.setattr(index, "_SETTLED", 0)
    return output


class Saving:
    """Saves small files of each kind, and empties ComfyUI's list of names, as its R key does."""

    LORA = {"lora_unet_x.lora_up.weight": torch.ones(2, 1), "lora_unet_x.lora_down.weight": torch.ones(1, 2)}

    def identity(self, prefix="anna", consent=None, base="0123456789abcdef", token="sks"):
        return self._listed(priors.save(self.LORA, Subject(token, "robot", (), base, consent), prefix))

    def action(self, prefix="flex", consent=None):
        tokens = {ANY_ENCODER: torch.ones(1, 1, 8)}
        return self._listed(actions.save(ActionIdentifier("<a>", "dancing", tokens, (), "", consent), prefix))

    def fusion(self, prefix="posed", consent=None):
        return self._listed(fusion_files.save(Fusion(fusions.combiner(), consent=consent), prefix))

    def adapter(self, prefix="face"):
        return self._listed(adapters.save(method.new_adapter(8, 2, 2, int), prefix))

    def other(self, prefix="style", folder="loras", **metadata):
        return self._listed(weights.save(self.LORA, metadata, folder, prefix))

    def _listed(self, path):
        folder_paths.filename_list_cache.clear()
        return path


@pytest.fixture
def saving(output):
    return Saving()
