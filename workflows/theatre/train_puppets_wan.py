"""Trains the theatre's tiny Wan and its video identity adapter; writes them into folders beside this file.

    python workflows/theatre/train_puppets_wan.py                 # every stage to its end, resuming what is there
    python workflows/theatre/train_puppets_wan.py --minutes 20    # stop (and save) after 20 minutes; call again
    python workflows/theatre/train_puppets_wan.py --stage export  # write both files from what has been trained

Stages: `vae` (Wan's autoencoder on single frames), `motion` (on short clips), `latents`, `dit` (the transformer on
single frames, then on clips of 17), `looks` (it learns to keep what a clean first frame shows), `shots` (and what
another picture of the same puppet shows), `aligned` (the same, aligned with `puppets_vision.safetensors`), `likeness`
(the same with new shots, looking at the puppet), `export` (both files), `adapter` (by the pack's own objective,
for the exported transformer; its file). Captions are read by the text encoder of `puppets_sd.safetensors`, which
stays as it is: one encoder serves both models. Seeded by step number, the same on a GPU and on a CPU. The length of
a stage is fixed when it begins, since learning rates fall to 0 at its end. State lies under
`.cache/training/puppets_wan`; delete what follows a stage that is trained again.
"""

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".cache" / "training" / "puppets_wan"
sys.path.insert(0, str(ROOT / "workflows"))
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import torch  # noqa: E402

scripts.add_comfy_path(STATE / "host", cpu=not torch.cuda.is_available())
from comfy.cli_args import args as host_options  # noqa: E402

host_options.use_pytorch_cross_attention = True
import wan_adapter  # noqa: E402
import wan_export  # noqa: E402
import wan_likeness  # noqa: E402
import wan_looks  # noqa: E402
import wan_stages as stages  # noqa: E402

MODELS = ROOT / "workflows" / "models"
ENCODER = MODELS / "checkpoints" / "puppets_sd.safetensors"
TRANSFORMER = MODELS / "diffusion_models" / "puppets_wan.safetensors"
AUTOENCODER = MODELS / "vae" / "puppets_wan_vae.safetensors"
ADAPTER = MODELS / "loras" / "puppets_wan_identity.safetensors"


def adapter(config: stages.Config, settings: wan_adapter.AdapterConfig, device, deadline: float) -> None:
    """Trains the adapter and writes its file."""
    found = wan_adapter.train(STATE, config, settings, device, TRANSFORMER, ENCODER, deadline=deadline)
    if found is None:
        print("stopped in stage adapter; call again to go on")
        return
    trained, losses = found
    wan_export.save_adapter(ADAPTER, trained.tensors(), dataclasses.asdict(settings))
    print(f"{ADAPTER.name}: {ADAPTER.stat().st_size / 2**20:.2f} MiB, sha256 {wan_export.sha256(ADAPTER)}")
    print("steps and losses:", [[step, round(loss, 4)] for step, loss in losses])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stage_names = ["all", "vae", "motion", "latents", "dit", "looks", "shots", "aligned", "likeness",
                   "export", "adapter"]
    parser.add_argument("--stage", choices=stage_names, default="all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after so many minutes")
    for field in (*dataclasses.fields(stages.Config), *dataclasses.fields(wan_adapter.AdapterConfig)):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    arguments = parser.parse_args()

    def chosen(kind):
        return kind(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)})

    config = chosen(stages.Config)
    STATE.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {
        "vae": lambda: stages.train_vae(STATE, config, device, deadline),
        "motion": lambda: stages.train_motion(STATE, config, device, deadline),
        "latents": lambda: stages.encode_all(STATE, config, device, deadline),
        "dit": lambda: stages.train_dit(STATE, config, device, deadline, ENCODER),
        "looks": lambda: wan_looks.train_looks(STATE, config, device, deadline, ENCODER),
        "shots": lambda: wan_looks.train_shots(STATE, config, device, deadline, ENCODER),
        "aligned": lambda: wan_looks.train_aligned(STATE, config, device, deadline, ENCODER),
        "likeness": lambda: wan_likeness.train(STATE, config, device, deadline, ENCODER),
    }
    for name, train in steps.items():
        if arguments.stage in ("all", name) and not train():
            print(f"stopped in stage {name}; call again to go on")
            return
    if arguments.stage in ("all", "export"):
        wan_export.export(STATE, config, device, TRANSFORMER, AUTOENCODER, ENCODER)
    if arguments.stage in ("all", "adapter"):
        adapter(config, chosen(wan_adapter.AdapterConfig), device, deadline)


if __name__ == "__main__":
    main()
