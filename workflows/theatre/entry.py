"""How a training script of the theatre begins: the project's environment, the pack and ComfyUI in one process."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "workflows" / "models"


def enter(name: str) -> None:
    """Go on inside the project's environment, with `pack` and `comfy` importable. Call before importing either."""
    sys.path.insert(0, str(ROOT / "workflows"))
    from launcher import environment, scripts

    environment.enter(ROOT)
    scripts.alias_pack()
    import torch

    scripts.add_comfy_path(state(name) / "host", cpu=not torch.cuda.is_available())
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True


def state(name: str) -> Path:
    """The git-ignored folder in which a script keeps what it renders and trains."""
    folder = ROOT / ".cache" / "training" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """An option for each field of a dataclass, with the field's default."""
    for field in dataclasses.fields(config_class):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)


def chosen(options: argparse.Namespace, config_class: type) -> Any:
    """The dataclass with the values of those options."""
    return config_class(**{field.name: getattr(options, field.name) for field in dataclasses.fields(config_class)})
