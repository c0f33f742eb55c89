"""The shipped fusion and video adapter, from the trainings of the experiments, in fp16.

    python tests/experiments/shipped_files.py fusion
    python tests/experiments/shipped_files.py adapter

Trainings that are not kept in .cache/experiments are made first. `--trial FILE` writes elsewhere, to look at.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows"), str(ROOT / "workflows" / "theatre")]
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
    import torch

    scripts.alias_pack()
    scripts.add_comfy_path(ROOT / ".cache" / "experiments" / "host", cpu=not torch.cuda.is_available())

from dataclasses import replace  # noqa: E402

from experiments import fusion_arms, fusion_embedding, runs, sampling, video_arms, video_identity  # noqa: E402
from half_files import NOBODY, save_half, sha256  # noqa: E402
from pack.nodes.consent import record  # noqa: E402
from pack.nodes.fusion_embedding import files  # noqa: E402

MODELS = ROOT / "workflows" / "models"
# What the experiment found best, then on pairs in one scene: with sources elsewhere a scene would be invented.
FUSION = fusion_arms.InOneScene(rate=1, steps=4_000, seed=2, after=fusion_embedding.LONGER)


def bench(experiment):
    """What an experiment trains with."""
    options = SimpleNamespace(development=False, checkpoint=sampling.CHECKPOINT)
    return experiment.Bench(options, runs.STATE / experiment.NAME / "test")


def fusion() -> tuple[dict, dict[str, str]]:
    """Tensors and metadata."""
    stage = bench(fusion_embedding)
    trained, _ = fusion_arms.learned(stage.theatre, stage.folder, FUSION)
    tensors, metadata = files.packed(replace(trained, consent=NOBODY))
    return tensors, metadata | {"training": repr(FUSION), "checkpoint": sampling.sha256(sampling.CHECKPOINT)}


def adapter() -> tuple[dict, dict[str, str]]:
    """Tensors and metadata."""
    stage, training = bench(video_identity), video_identity.TRAININGS[video_arms.RESTRICTED]
    trained, _ = video_arms.learned(stage.theatre, stage.folder, training)
    return trained.tensors(), record.to_metadata(NOBODY) | {"training": repr(training)}


FILES: dict[str, tuple[Path, Callable]] = {
    "fusion": (fusion_arms.SHIPPED, fusion),
    "adapter": (MODELS / "loras" / "puppets_wan_identity.safetensors", adapter),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", choices=FILES)
    parser.add_argument("--trial", type=Path, help="where to write instead of the shipped file's place")
    options = parser.parse_args()
    path, made = FILES[options.file]
    path = options.trial or path
    save_half(path, *made())
    print(f"{path.name}: {path.stat().st_size} bytes, sha256 {sha256(path)}")


if __name__ == "__main__":
    main()
