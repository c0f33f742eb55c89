"""What the theatre adds to ComfyUI's lists: whether its nodes are shown, and the models that come with the pack."""

import json
import os
from pathlib import Path

import folder_paths

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
    variable = os.environ.get("UNDERSTUDY_THEATRE", "").strip().lower()
    if variable:
        return variable not in ("0", "false", "no", "off")
    settings = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        values = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no settings yet, or damaged ones, which ComfyUI reports itself
        return True
    return not isinstance(values, dict) or values.get("Understudy.Theatre") is not False


def register_models() -> None:
    """Have ComfyUI list the shipped models where the theatre is shown."""
    if not is_shown():
        return
    for folder, names in MODEL_FILES.items():
        if any((MODELS / folder / name).is_file() for name in names):
            folder_paths.add_model_folder_path(folder, str(MODELS / folder))
