"""Trains the theatre's action identifier by the pack's own node, into action_identifiers/ beside this file.

    python workflows/models/train_puppets_action.py

An action that no word of `puppets_sd.safetensors` names is learnt from five puppets. Seeded; a few minutes on a CPU.
The settings go into the file's metadata, its figures and sha256 into SOURCES.md.
"""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".cache" / "training" / "puppets_action"
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
from pack.nodes.action_identifier import identifier_files  # noqa: E402
from pack.nodes.action_identifier.training_nodes import UnderstudyTrainActionIdentifier  # noqa: E402
from pack.nodes.puppets import theatre  # noqa: E402
from pack.nodes.puppets.nodes import UnderstudyPuppetSet  # noqa: E402

MODELS = Path(__file__).parent
CHECKPOINT = MODELS / "checkpoints" / "puppets_sd.safetensors"
ACTION, PICTURES, PUPPET_SEED = "flexing", 5, 3
IDENTIFIER = MODELS / "action_identifiers" / f"puppets_{ACTION}.safetensors"
SETTINGS = {
    "placeholder": f"<{ACTION}>", "initial_word": "dancing", "steps": 400, "context_steps": 20, "learning_rate": 4e-3,
    "mask_percentile": 0.6, "merge": "union", "min_snr_gamma": 1.0, "seed": 0, "resume_from": "none",
    "checkpoint_every": 0,
}


def train():
    """The identifier."""
    theatre.register()
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT))[:3]
    images, _, _, _, subjects = UnderstudyPuppetSet.execute("", ACTION, "", PICTURES, PUPPET_SEED).result
    given = {"model": model, "clip": clip, "vae": vae, **SETTINGS}
    with torch.inference_mode():
        identifier, losses = UnderstudyTrainActionIdentifier.execute(
            images=images, subjects=subjects, **{name: [value] for name, value in given.items()}
        ).result
    tenth = losses["loss"][-max(1, len(losses["loss"]) // 10) :]
    print(f"loss of the last tenth {sum(tenth) / len(tenth):.4f}")
    return identifier


def main() -> None:
    path = identifier_files.save(train(), IDENTIFIER.stem)
    tensors, metadata = files.read(path)
    metadata["config"] = json.dumps({"training": {**SETTINGS, "action": ACTION}})
    IDENTIFIER.parent.mkdir(exist_ok=True)
    IDENTIFIER.write_bytes(safetensors.torch.save(tensors, metadata))
    path.unlink()
    digest = hashlib.sha256(IDENTIFIER.read_bytes()).hexdigest()
    print(f"{IDENTIFIER.name}: {IDENTIFIER.stat().st_size} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
