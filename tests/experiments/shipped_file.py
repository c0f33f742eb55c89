"""The shipped fusion and video identity adapter, by the pack's own training, in fp16.

    python tests/experiments/shipped_file.py fusion
    python tests/experiments/shipped_file.py adapter

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

from experiments import fusion_arms, fusion_embedding, runs, sampling, video_arms, video_identity  # noqa: E402
from half_files import NOBODY, save_half, sha256  # noqa: E402
from pack.nodes.consent import record  # noqa: E402
from pack.nodes.fingerprint import fingerprint  # noqa: E402
from pack.nodes.fusion_embedding import files  # noqa: E402

OPTIONS = SimpleNamespace(development=False, checkpoint=sampling.CHECKPOINT)
# What the experiment found best, then on pairs in one scene: with sources elsewhere a scene would be invented.
FUSION = fusion_arms.InOneScene(rate=1, steps=4_000, seed=2, after=fusion_embedding.LONGER)


def fusion() -> tuple[dict, dict[str, str]]:
    """Tensors, and metadata."""
    bench = fusion_embedding.Bench(OPTIONS, runs.STATE / fusion_embedding.NAME / "test")
    found, _ = fusion_arms.learned(bench.theatre, bench.folder, FUSION)
    tensors, metadata = files.packed(replace(found, consent=NOBODY))
    return tensors, metadata | {"training": repr(FUSION), "checkpoint": sampling.sha256(sampling.CHECKPOINT)}


def adapter() -> tuple[dict, dict[str, str]]:
    """Tensors, and metadata."""
    bench = video_identity.Bench(OPTIONS, runs.STATE / video_identity.NAME / "test")
    found, _ = video_arms.learned(bench.theatre, bench.folder, video_identity.SHIPPED_TRAINING)
    made_by = {"training": repr(video_identity.SHIPPED_TRAINING), "base": fingerprint(bench.theatre.model)}
    return found.tensors(), record.to_metadata(NOBODY) | made_by


SHIPPED = {"fusion": (fusion, fusion_arms.SHIPPED), "adapter": (adapter, video_identity.ADAPTER)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", choices=SHIPPED)
    parser.add_argument("--to", type=Path)
    options = parser.parse_args()
    make, usual = SHIPPED[options.file]
    path = options.to or usual
    save_half(path, *make())
    print(f"{path.name}: {path.stat().st_size} bytes, sha256 {sha256(path)}")


if __name__ == "__main__":
    main()
