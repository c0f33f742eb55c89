"""Folders of weight files: each room declares its own, and what ComfyUI lists in one is asked here."""

import dataclasses
import os
from pathlib import Path

import folder_paths

from .names import refused


@dataclasses.dataclass(frozen=True)
class WeightFolder:
    """A key of ComfyUI's lists of models, whose files are in `models/<name>` and `output/<name>`.

    `extensions` are the endings that it lists. ComfyUI's own folders, which it registers itself, leave them out.
    """

    name: str
    extensions: tuple[str, ...] = ()

    def register(self) -> None:
        """Have ComfyUI list the files of these extensions, in its models and its output folder."""
        for parent in (folder_paths.models_dir, folder_paths.get_output_directory()):
            folder_paths.add_model_folder_path(self.name, os.path.join(parent, self.name))
        paths, _ = folder_paths.folder_names_and_paths[self.name]
        folder_paths.folder_names_and_paths[self.name] = (paths, set(self.extensions))

    def choices(self) -> list[str]:
        """The files that ComfyUI lists, by relative name; none before it knows the folder."""
        return folder_paths.get_filename_list(self.name) if self.name in folder_paths.folder_names_and_paths else []

    def find(self, name: str) -> Path:
        """The path of a listed file. Raises WeightFileError when it is gone."""
        path = folder_paths.get_full_path(self.name, name)
        if path is None:
            folders = " or ".join(folder_paths.get_folder_paths(self.name))
            raise refused(name, "was not found", f"Put it into {folders} and reload the node list")
        return Path(path)

    def fingerprint(self, name: str) -> int:
        """What a loader's `fingerprint_inputs` returns: another number once the file is written again."""
        return self.find(name).stat().st_mtime_ns


LORAS = WeightFolder("loras")
