"""Trains the theatre's identity prior or action identifier by the pack's own node, for `workflows/models`.

    python workflows/theatre/puppets_examples.py identity  # loras/puppets_sd_identity.safetensors
    python workflows/theatre/puppets_examples.py action    # action_identifiers/puppets_flexing.safetensors

`identity`: a test puppet, which `puppets_sd.safetensors` has never seen, is learned from four pictures. `action`: one
that no word of it names is learned from five puppets. Seeded; a few minutes on a CPU. The settings go into the file's
metadata, its figures and sha256 into SOURCES.md.
"""

import argparse
import json
from pathlib import Path

if __name__ == "__main__":
    import entry

    entry.enter("puppets_examples")

import comfy.sd
import entry
import half_files
import torch
from pack.nodes.action_identifier import files as identifier_files
from pack.nodes.action_identifier.config import EVERY
from pack.nodes.action_identifier.training_nodes import UnderstudyTrainActionIdentifier
from pack.nodes.files import weights
from pack.nodes.identity_prior import files as prior_files
from pack.nodes.identity_prior.training_nodes import UnderstudyTrainIdentityPrior
from pack.nodes.puppets import theatre
from pack.nodes.puppets.nodes import UnderstudyPuppetSet

CHECKPOINT = entry.MODELS / "checkpoints" / "puppets_sd.safetensors"
PUPPET_SEED = 3
PRIOR = entry.MODELS / "loras" / "puppets_sd_identity.safetensors"
# A bear with a star on its shirt, which no word of the theatre names.
IDENTITY, SPECIES = "test 11", "bear"
PRIOR_PUPPETS = IDENTITY, "standing\njumping\nkicking\npointing", "beach\nforest\nstage\nnight", 4, PUPPET_SEED
PRIOR_SETTINGS = {
    "identity_token": "sks", "class_noun": SPECIES, "steps": 800, "learning_rate": 3e-3, "rank": 8, "batch_size": 1,
    "seed": 0, "prior_weight": 0.0, "min_snr_gamma": 5.0, "augment": "none", "resume_from": "none",
    "checkpoint_every": 0,
}
ACTION = "flexing"
IDENTIFIER = entry.MODELS / "action_identifiers" / f"puppets_{ACTION}.safetensors"
ACTION_PUPPETS = "", ACTION, "", 5, PUPPET_SEED
ACTION_SETTINGS = {
    "placeholder": f"<{ACTION}>", "initial_word": "dancing", "steps": 600, "context_steps": 20,
    "learning_rate": 0.04, "mask_percentile": 0.6, "merge": EVERY, "min_snr_gamma": 1.0, "seed": 0,
    "behind_encoder": True, "lowest_noise": 0.45, "highest_noise": 0.9, "resume_from": "none", "checkpoint_every": 0,
}


def identity() -> None:
    """The LoRA, with whom it knows."""
    images, _, _, captions, subjects = UnderstudyPuppetSet.execute(*PRIOR_PUPPETS).result
    captions = [text.replace(who, "a {subject}") for text, who in zip(captions, subjects, strict=True)]
    lora, known = learned(UnderstudyTrainIdentityPrior, PRIOR_SETTINGS, images=images, captions=captions)
    print(f"learned {', '.join(known.captions)}")
    write(PRIOR, prior_files.save(lora, known, PRIOR.stem), {**PRIOR_SETTINGS, "identity": IDENTITY})


def action() -> None:
    """The identifier."""
    images, _, _, _, subjects = UnderstudyPuppetSet.execute(*ACTION_PUPPETS).result
    (identifier,) = learned(UnderstudyTrainActionIdentifier, ACTION_SETTINGS, images=images, subjects=subjects)
    write(IDENTIFIER, identifier_files.save(identifier, IDENTIFIER.stem), {**ACTION_SETTINGS, "action": ACTION})


def learned(node: type, settings: dict[str, object], **examples: list) -> list:
    """What a training node gives for the checkpoint and these examples, less its losses, which are told."""
    theatre.register()
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT))[:3]
    given = {"model": model, "clip": clip, "vae": vae, "consent": half_files.NOBODY, **settings}
    with torch.inference_mode():
        *found, losses = node.execute(**examples, **{name: [value] for name, value in given.items()}).result
    tenth = losses["loss"][-max(1, len(losses["loss"]) // 10) :]
    print(f"loss of the last tenth {sum(tenth) / len(tenth):.4f}")
    return found


def write(path: Path, saved: Path, settings: dict[str, object]) -> None:
    """Move what the pack saved to `path`, with the settings in its metadata."""
    tensors, metadata = weights.read(saved)
    metadata["config"] = json.dumps({"training": settings})
    half_files.save_half(path, tensors, metadata)
    saved.unlink()
    print(f"{path.name}: {path.stat().st_size} bytes, sha256 {half_files.sha256(path)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=("identity", "action"))
    {"identity": identity, "action": action}[parser.parse_args().example]()
