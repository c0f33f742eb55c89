"""What the theatre adds to ComfyUI's lists: whether its nodes are shown, and the models that come with the pack."""

from pathlib import Path

import folder_paths

from .. import settings

MODELS = Path(__file__).resolve().parents[2] / "workflows" / "models"
# The shipped files, by the name of ComfyUI's list that shows them and of their folder in MODELS.
MODEL_FILES = {
    "checkpoints": ("puppets_sd.safetensors",),
    "diffusion_models": ("puppets_wan.safetensors",),
    "vae": ("puppets_wan_vae.safetensors",),
    "loras": ("puppets_sd_identity.safetensors", "puppets_wan_identity.safetensors"),
    "fusion_embeddings": ("puppets_fusion.safetensors",),
    "action_identifiers": ("puppets_flexing.safetensors",),
}


def is_shown() -> bool:
    """Whether the theatre is in the menus: `UNDERSTUDY_THEATRE`, else the setting `Understudy.Theatre`."""
    return settings.is_on("UNDERSTUDY_THEATRE", "Understudy.Theatre", default=True)


def register_models() -> None:
    """Have ComfyUI list the shipped models where the theatre is shown."""
    if not is_shown():
        return
    for folder, names in MODEL_FILES.items():
        if any((MODELS / folder / name).is_file() for name in names):
            folder_paths.add_model_folder_path(folder, str(MODELS / folder))
