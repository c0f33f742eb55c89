"""The shipped fusion: the experiment's full method, trained further at a third of the rate, as a file in fp16.

    python tests/experiments/fusion_file.py

Writes `workflows/models/fusion_embeddings/puppets_fusion.safetensors`. Trainings are those of fusion_embedding.py,
and are made where they are not kept.
"""

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows"), str(ROOT / "workflows" / "theatre")]
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
    import torch

    scripts.alias_pack()
    scripts.add_comfy_path(ROOT / ".cache" / "experiments" / "host", cpu=not torch.cuda.is_available())

from experiments import fusion_arms, fusion_embedding, runs, sampling  # noqa: E402
from half_files import NOBODY, save_half  # noqa: E402
from pack.nodes.fusion_embedding import files  # noqa: E402


def main() -> None:
    folder = fusion_embedding.trained_in(runs.STATE / fusion_embedding.NAME, sampling.CHECKPOINT)
    theatre = sampling.Theatre(sampling.CHECKPOINT, runs.STATE)
    fusion, _ = fusion_arms.learned(theatre, folder, fusion_embedding.SHIPPED)
    tensors, metadata = files.packed(dataclasses.replace(fusion, consent=NOBODY))
    described = {"training": repr(fusion_embedding.SHIPPED), "checkpoint": sampling.sha256(sampling.CHECKPOINT)}
    save_half(fusion_arms.SHIPPED, tensors, {**metadata, **described})
    print(f"{fusion_arms.SHIPPED.name}: {fusion_arms.SHIPPED.stat().st_size} bytes, sha256 "
          f"{sampling.sha256(fusion_arms.SHIPPED)}")


if __name__ == "__main__":
    main()
