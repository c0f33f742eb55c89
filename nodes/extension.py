"""The one list of node classes, and what the pack registers with the host before they load."""

from comfy_api.latest import ComfyExtension, io

from . import files
from .action_identifier.nodes import (
    UnderstudyApplyActionIdentifier,
    UnderstudyEncodeAction,
    UnderstudyLoadActionIdentifier,
    UnderstudySaveActionIdentifier,
)
from .action_identifier.training_nodes import UnderstudyTrainActionIdentifier
from .frequency_guidance.nodes import UnderstudyFrequencyGuidanceSampler, UnderstudyStepwisePrompt
from .frequency_guidance.training_nodes import UnderstudyTrainSourceDrivingPair
from .fusion_embedding.nodes import (
    UnderstudyApplyFusion,
    UnderstudyCombineFusion,
    UnderstudyLoadFusion,
    UnderstudyRetargetPose,
    UnderstudySaveFusion,
)
from .fusion_embedding.training_nodes import UnderstudyTrainFusionCombiner, UnderstudyTrainFusionGenerator
from .identity_prior.nodes import (
    UnderstudyEditMasks,
    UnderstudyEncodeIdentity,
    UnderstudyIdentityMaskBlend,
    UnderstudyInvertImage,
    UnderstudyLoadIdentityPrior,
    UnderstudySaveIdentityPrior,
)
from .identity_prior.training_nodes import UnderstudyTrainIdentityPrior
from .puppets import theatre
from .puppets.nodes import UnderstudyLoadPuppetVision, UnderstudyPuppet, UnderstudyPuppetSet
from .video_identity.nodes import (
    UnderstudyApplyVideoIdentity,
    UnderstudyLoadVideoIdentityAdapter,
    UnderstudyPrepareReference,
    UnderstudySaveVideoIdentityAdapter,
)
from .video_identity.training_nodes import UnderstudyTrainVideoIdentityAdapter

METHOD_NODES: list[type[io.ComfyNode]] = [
    UnderstudyFrequencyGuidanceSampler,
    UnderstudyStepwisePrompt,
    UnderstudyTrainSourceDrivingPair,
    UnderstudyTrainIdentityPrior,
    UnderstudySaveIdentityPrior,
    UnderstudyLoadIdentityPrior,
    UnderstudyEncodeIdentity,
    UnderstudyInvertImage,
    UnderstudyIdentityMaskBlend,
    UnderstudyEditMasks,
    UnderstudyTrainFusionCombiner,
    UnderstudyTrainFusionGenerator,
    UnderstudySaveFusion,
    UnderstudyLoadFusion,
    UnderstudyCombineFusion,
    UnderstudyApplyFusion,
    UnderstudyRetargetPose,
    UnderstudyPrepareReference,
    UnderstudyLoadVideoIdentityAdapter,
    UnderstudyApplyVideoIdentity,
    UnderstudyTrainVideoIdentityAdapter,
    UnderstudySaveVideoIdentityAdapter,
    UnderstudyTrainActionIdentifier,
    UnderstudySaveActionIdentifier,
    UnderstudyLoadActionIdentifier,
    UnderstudyEncodeAction,
    UnderstudyApplyActionIdentifier,
]

THEATRE_NODES: list[type[io.ComfyNode]] = [
    UnderstudyPuppet,
    UnderstudyPuppetSet,
    UnderstudyLoadPuppetVision,
]


class UnderstudyExtension(ComfyExtension):
    async def on_load(self) -> None:
        files.register_folders()
        theatre.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return METHOD_NODES + (THEATRE_NODES if files.theatre_enabled() else [])
