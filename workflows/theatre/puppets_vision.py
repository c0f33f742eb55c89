"""Trains the theatre's image encoder; writes `workflows/models/clip_vision/puppets_vision.safetensors`.

    python workflows/theatre/puppets_vision.py train --minutes 30   # call again to go on
    python workflows/theatre/puppets_vision.py export

It sees full figures, close-ups and pose drawings, none of a test puppet. Figures, losses and pictures that it read
wrongly lie beside the state in `.cache/training/puppets_vision`.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path

if __name__ == "__main__":
    import entry

    entry.enter("puppets_vision")

import entry
import fusion_pairs
import half_files
import runner
import torch
import vision_reader
from pack.nodes.puppets import vision


@dataclasses.dataclass(frozen=True)
class Config:
    pairs: int = 12_000
    kept_back: int = 256  # of them, the last ones, for the figures
    size: int = 128  # pixels
    seed: int = 7
    steps: int = 4_000
    cool_down: int = 2_000
    batch: int = 24  # pairs, three pictures each
    matrix_lr: float = 0.01  # Muon's
    lr: float = 1e-3
    ema: float = 0.998


def train(folder: Path, config: Config, minutes: float, sheet_minutes: float = 5.0) -> bool:
    """True after the last step."""
    torch.manual_seed(config.seed)
    data = fusion_pairs.rendered(folder, config.pairs, config.size, config.seed, close_ups=True)
    learned = config.pairs - config.kept_back
    stage = runner.Stage(
        "vision", vision_reader.Reader(), vision_reader.drawer(data, learned, config.batch, config.seed),
        runner.Schedule(config.steps, config.cool_down), config.matrix_lr, config.lr, config.ema, config.seed,
        inspect=vision_reader.inspector(data, range(learned, config.pairs), config.seed),
        settings=dataclasses.asdict(config),
    )
    return runner.run(stage, folder, minutes, sheet_minutes)


def export(folder: Path, config: Config, path: Path) -> None:
    """Writes the averaged encoder."""
    reader = vision_reader.Reader()
    if not runner.trained(reader, folder, "vision"):
        raise SystemExit(f"{folder} holds no trained encoder: run `train` first")
    training = runner.record(folder, ("vision",))
    half_files.save_half(path, reader.weights(), {"config": json.dumps({"training": training})})
    print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB, sha256 {half_files.sha256(path)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "export"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after so many minutes")
    entry.add_options(parser, Config)
    options = parser.parse_args()
    config, folder = entry.chosen(options, Config), entry.state("puppets_vision")
    if options.stage == "export":
        export(folder, config, vision.FILE)
    elif not train(folder, config, options.minutes):
        print("stopped; call again to go on")


if __name__ == "__main__":
    main()
