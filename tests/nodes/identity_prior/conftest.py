"""Puppets with captions, and a place for the files of priors."""

import folder_paths
import pytest
from pack.nodes.identity_prior import files
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
def puppets():
    images, _, _, captions, subjects = UnderstudyPuppetSet.execute(
        "red striped robot", "standing\nwaving", "beach", 3, 1, SIZE
    ).result
    texts = [text.replace(subject, "{subject}") for text, subject in zip(captions, subjects, strict=True)]
    return images, [text if "{subject}" in text else "a {subject} waving" for text in texts]
