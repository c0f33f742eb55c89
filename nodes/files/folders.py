"""Folders of weight files, which the rooms declare, and the files that ComfyUI lists in them."""

import dataclasses
import os
from pathlib import Path

import folder_paths

from .names import refused


@dataclasses.dataclass(frozen=True)
class WeightFolder:
    """A list of models in ComfyUI, of the files in `models/<name>` and `output/<name>` with these extensions.

    The lists that ComfyUI has by itself, such as `loras`, need no extensions and are not registered.
    """

    name: str
    extensions: tuple[str, ...] = ()

    def register(self) -> None:
        """Add the list to ComfyUI; calling it again changes nothing."""
        for parent in (folder_paths.models_dir, folder_paths.get_output_directory()):
            folder_paths.add_model_folder_path(self.name, os.path.join(parent, self.name))
        paths, _ = folder_paths.folder_names_and_paths[self.name]
        folder_paths.folder_names_and_paths[self.name] = (paths, set(self.extensions))

    def choices(self) -> list[str]:
        """The listed files by relative name; none if ComfyUI does not have the list."""
        return folder_paths.get_filename_list(self.name) if self.name in folder_paths.folder_names_and_paths else []

    def find(self, name: str) -> Path:
        """The path of a listed file. Raises WeightFileError if it is gone."""
        path = folder_paths.get_full_path(self.name, name)
        if path is None:
            folders = " or ".join(folder_paths.get_folder_paths(self.name))
            raise refused(name, "was not found", f"Put it into {folders} and reload the node list")
        return Path(path)

    def fingerprint(self, name: str) -> int:
        """What `fingerprint_inputs` of a Load node returns: a number that changes when the file is written again."""
        return self.find(name).stat().st_mtime_ns


LORAS = WeightFolder("loras")
