"""A loaded theatre model, puppets with captions, and a place for the files of priors."""

import comfy.sd
import folder_paths
import pytest
import torch
from pack.nodes.identity_prior import files
from pack.nodes.puppets import theatre
from pack.nodes.puppets.nodes import UnderstudyPuppetSet
from pack.nodes.training import checkpoints
from support.identity_trainings import SIZE


@pytest.fixture
def output(output):
    """ComfyUI's output folder, whose LoRAs and checkpoints of training it lists."""
    folder_paths.add_model_folder_path(files.FOLDER.name, str(output / files.FOLDER.name))
    checkpoints.FOLDER.register()
    return output


@pytest.fixture(scope="module")
def loaded(pack_root):
    theatre.register()
    with torch.inference_mode():
        path = pack_root / "workflows" / "models" / "checkpoints" / "puppets_sd.safetensors"
        return comfy.sd.load_checkpoint_guess_config(str(path), embedding_directory=None)[:3]


@pytest.fixture(scope="module")
def puppets():
    images, _, _, captions, subjects = UnderstudyPuppetSet.execute(
        "red striped robot", "standing\nwaving", "beach", 3, 1, SIZE
    ).result
    texts = [text.replace(subject, "{subject}") for text, subject in zip(captions, subjects, strict=True)]
    return images, [text if "{subject}" in text else "a {subject} waving" for text in texts]
