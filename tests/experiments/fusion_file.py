"""The shipped fusion, from the trainings of fusion_embedding.py and one more, in fp16.

    python tests/experiments/fusion_file.py

Trainings that are not kept in .cache/experiments are made first. `--to FILE` writes elsewhere, to look at.
"""

import argparse
import sys
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

from experiments import fusion_arms, fusion_embedding, runs, sampling  # noqa: E402
from half_files import NOBODY, save_half, sha256  # noqa: E402
from pack.nodes.fusion_embedding import files  # noqa: E402

# What the experiment found best, then on pairs in one scene: with sources elsewhere a scene would be invented.
TRAINING = fusion_arms.InOneScene(rate=1, steps=4_000, seed=2, after=fusion_embedding.LONGER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=fusion_arms.SHIPPED)
    path = parser.parse_args().to
    options = SimpleNamespace(development=False, checkpoint=sampling.CHECKPOINT)
    bench = fusion_embedding.Bench(options, runs.STATE / fusion_embedding.NAME / "test")
    fusion, _ = fusion_arms.learned(bench.theatre, bench.folder, TRAINING)
    tensors, metadata = files.packed(replace(fusion, consent=NOBODY))
    made_by = {"training": repr(TRAINING), "checkpoint": sampling.sha256(sampling.CHECKPOINT)}
    save_half(path, tensors, metadata | made_by)
    print(f"{path.name}: {path.stat().st_size} bytes, sha256 {sha256(path)}")


if __name__ == "__main__":
    main()
