"""The pack's switches: environment variables, else settings in ComfyUI, which web/understudy.js registers."""

import json
import os
from pathlib import Path

import folder_paths

_OFF = ("0", "false", "no", "off")


def is_on(variable: str, setting: str, default: bool) -> bool:
    """Whether a switch is on: by its environment variable, else by its setting, else by default.

    Settings are read from the file of ComfyUI's default user, whom it has unless it was started with --multi-user.
    """
    typed = os.environ.get(variable, "").strip().lower()
    if typed:
        return typed not in _OFF
    path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none yet, or damaged ones, which ComfyUI reports itself
        return default
    value = values.get(setting) if isinstance(values, dict) else None
    return value if isinstance(value, bool) else default
