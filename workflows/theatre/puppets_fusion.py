"""Trains the theatre's image encoder and its fusion embedding, and writes both into folders beside this file.

    python workflows/models/train_puppets_fusion.py                 # every stage to its end, resuming what is there
    python workflows/models/train_puppets_fusion.py --minutes 20    # stop (and save) after 20 minutes; call again
    python workflows/models/train_puppets_fusion.py --stage export  # write both files from what has been trained

Stages: `vision` (the image encoder), `combiner` and `generator` (both stages of the method, by the pack's own
training, beside `puppets_sd.safetensors`, which stays as it is), `export`. Seeded by step number, on the CPU. State
lies under `.cache/training/puppets_fusion`, or where --state says; delete what follows a stage that is trained again.
"""

import argparse
import dataclasses
import logging
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from host import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

from fusion_pairs import Config, rendered  # noqa: E402

MODELS = Path(__file__).parent
STAGES = ("vision", "combiner", "generator", "export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after so many minutes")
    parser.add_argument("--state", type=Path, default=ROOT / ".cache" / "training" / "puppets_fusion")
    parser.add_argument("--output", type=Path, default=MODELS, help="in whose folders export writes")
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = parser.parse_args()
    config = Config(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Config)})
    deadline = time.monotonic() + 60 * options.minutes
    options.state.mkdir(parents=True, exist_ok=True)
    scripts.add_comfy_path(options.state / "host")
    # All of these need the host, which reads its settings once.
    from comfy.cli_args import args as host_options

    host_options.use_pytorch_cross_attention = True
    import fusion_stages
    import fusion_vision

    # The pack's training tells its steps there.
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    data = rendered(options.state, config)
    train = {
        "vision": lambda: fusion_vision.train(options.state, data, config, deadline),
        "combiner": lambda: fusion_stages.train_combiner(options.state, data, config, deadline),
        "generator": lambda: fusion_stages.train_generator(options.state, data, config, deadline),
        "export": lambda: fusion_stages.export(options.state, data, config, options.output),
    }
    for name in STAGES:
        if options.stage in ("all", name) and not train[name]():
            print(f"stopped in stage {name}; call again to go on")
            return


if __name__ == "__main__":
    main()
