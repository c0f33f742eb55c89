"""Trains the theatre's identity prior by the pack's own node; writes loras/puppets_sd_identity.safetensors.

    python workflows/models/train_puppets_identity.py

A test puppet, which `puppets_sd.safetensors` has never seen, is learnt from four pictures. Seeded; a few minutes on a
CPU. The settings go into the file's metadata, its figures and sha256 into SOURCES.md.
"""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".cache" / "training" / "puppets_identity"
sys.path.insert(0, str(ROOT / "tests"))
from host import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import torch  # noqa: E402

scripts.add_comfy_path(STATE / "host", cpu=not torch.cuda.is_available())
import comfy.sd  # noqa: E402
import safetensors.torch  # noqa: E402
from pack.nodes import files  # noqa: E402
from pack.nodes.identity_prior import prior_files  # noqa: E402
from pack.nodes.identity_prior.training_nodes import UnderstudyTrainIdentityPrior  # noqa: E402
from pack.nodes.puppets import theatre  # noqa: E402
from pack.nodes.puppets.nodes import UnderstudyPuppetSet  # noqa: E402

MODELS = Path(__file__).parent
CHECKPOINT = MODELS / "checkpoints" / "puppets_sd.safetensors"
PRIOR = MODELS / "loras" / "puppets_sd_identity.safetensors"
# A bear with a star on its shirt, which no word of the theatre names.
IDENTITY, SPECIES, PICTURES = "test 11", "bear", 4
ACTIONS, SCENES, PUPPET_SEED = "standing\njumping\nkicking\npointing", "beach\nforest\nstage\nnight", 3
SETTINGS = {
    "identity_token": "sks", "class_noun": SPECIES, "steps": 300, "learning_rate": 3e-3, "rank": 8, "batch_size": 1,
    "seed": 0, "prior_weight": 0.3, "min_snr_gamma": 5.0, "augment": "none", "resume_from": "none",
    "checkpoint_every": 0,
}


def train() -> tuple[dict[str, torch.Tensor], object]:
    """The LoRA, and whom it knows."""
    theatre.register()
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT))[:3]
    images, _, _, captions, subjects = UnderstudyPuppetSet.execute(
        IDENTITY, ACTIONS, SCENES, PICTURES, PUPPET_SEED
    ).result
    captions = [text.replace(who, "a {subject}") for text, who in zip(captions, subjects, strict=True)]
    given = {"model": model, "clip": clip, "vae": vae, **SETTINGS}
    with torch.inference_mode():
        lora, identity, losses = UnderstudyTrainIdentityPrior.execute(
            images=images, captions=captions, **{name: [value] for name, value in given.items()}
        ).result
    tenth = losses["loss"][-max(1, len(losses["loss"]) // 10) :]
    print(f"loss of the last tenth {sum(tenth) / len(tenth):.4f}; learnt {', '.join(identity.captions)}")
    return lora, identity


def main() -> None:
    lora, identity = train()
    path = prior_files.save(lora, identity, "puppets_sd_identity")
    tensors, metadata = files.read(path)
    metadata["config"] = json.dumps({"training": {**SETTINGS, "identity": IDENTITY}})
    PRIOR.parent.mkdir(exist_ok=True)
    PRIOR.write_bytes(safetensors.torch.save(tensors, metadata))
    path.unlink()
    print(f"{PRIOR.name}: {PRIOR.stat().st_size} bytes, sha256 {hashlib.sha256(PRIOR.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
