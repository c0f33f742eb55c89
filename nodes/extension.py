"""Gathers what the rooms declare: the nodes, in menu order, and the weight folders that ComfyUI lists."""

from comfy_api.latest import ComfyExtension, io

from .action_identifier.files import FOLDER as ACTION_IDENTIFIERS
from .action_identifier.nodes import NODES as ACTION_NODES
from .action_identifier.training_nodes import NODES as ACTION_TRAINING
from .casting.nodes import ADDED as CASTING_ADDED
from .casting.nodes import NODES as CASTING_NODES
from .consent.nodes import NODES as CONSENT_NODES
from .drift_alignment.nodes import NODES as DRIFT_NODES
from .explain.nodes import NODES as EXPLAIN_NODES
from .frequency_guidance.nodes import NODES as FREQUENCY_NODES
from .frequency_guidance.training_nodes import NODES as FREQUENCY_TRAINING
from .fusion_embedding.files import FOLDER as FUSION_EMBEDDINGS
from .fusion_embedding.nodes import NODES as FUSION_NODES
from .fusion_embedding.training_nodes import NODES as FUSION_TRAINING
from .identity_check.nodes import NODES as CHECK_NODES
from .identity_prior.nodes import NODES as IDENTITY_NODES
from .identity_prior.training_nodes import NODES as IDENTITY_TRAINING
from .library.nodes import NODES as LIBRARY_NODES
from .provenance.nodes import NODES as PROVENANCE_NODES
from .puppets import menus, theatre
from .puppets.nodes import NODES as THEATRE_NODES
from .reference_weight.nodes import NODES as REFERENCE_NODES
from .training.checkpoints import FOLDER as TRAINING_CHECKPOINTS
from .training_doctor.nodes import NODES as DOCTOR_NODES
from .training_jobs.nodes import NODES as JOB_NODES
from .video_identity.nodes import NODES as VIDEO_NODES
from .video_identity.training_nodes import NODES as VIDEO_TRAINING

METHOD_NODES: list[type[io.ComfyNode]] = [
    *FREQUENCY_NODES, *FREQUENCY_TRAINING,
    *IDENTITY_TRAINING, *IDENTITY_NODES,
    *FUSION_TRAINING, *FUSION_NODES,
    *VIDEO_NODES, *VIDEO_TRAINING,
    *ACTION_TRAINING, *ACTION_NODES,
    *DRIFT_NODES,
    *CONSENT_NODES, *LIBRARY_NODES,
    *DOCTOR_NODES, *CASTING_NODES, *CHECK_NODES, *EXPLAIN_NODES,
    *PROVENANCE_NODES, *JOB_NODES,
    *REFERENCE_NODES,
]
ADDED_NODES: list[type[io.ComfyNode]] = [*CASTING_ADDED]  # to a run, by other nodes; in no menu
FOLDERS = [ACTION_IDENTIFIERS, FUSION_EMBEDDINGS, TRAINING_CHECKPOINTS]


def register_folders() -> None:
    """Make ComfyUI list the rooms' weight folders and, if the theatre is shown, its models."""
    for folder in FOLDERS:
        folder.register()
    menus.register_models()


class UnderstudyExtension(ComfyExtension):
    async def on_load(self) -> None:
        register_folders()
        theatre.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return METHOD_NODES + ADDED_NODES + (THEATRE_NODES if menus.is_shown() else [])
