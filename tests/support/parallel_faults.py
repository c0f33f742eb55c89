"""A process that fits a small regression for 30 steps, with a checkpoint after each, alone or beside others.

    python tests/support/parallel_faults.py FOLDER [die | nan | wait]

`die` kills process 1 before its step 12, `nan` makes its loss NaN there, `wait` makes its steps slow. Another start
goes on from the checkpoint. The result goes to FOLDER/result.safetensors.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.remove(str(Path(__file__).parent))
sys.path += [str(ROOT / "tests"), str(ROOT / "workflows")]

from launcher import scripts  # noqa: E402

scripts.alias_pack()

from trainer import engine  # noqa: E402

STEPS, FAULT = 30, 11


def main(folder: Path, fault: str) -> int:
    accelerator = engine.accelerator(folder, None)
    scripts.add_comfy_path(folder)
    from pack.nodes.training import checkpoints, parallel, runs
    from pack.nodes.training.config import TrainingConfig

    checkpoints.FOLDER.register()
    weight = torch.nn.Parameter(torch.ones(4, 3))

    def objective(step, generator):
        x = torch.randn(6, 3, generator=generator)
        if fault == "wait":
            time.sleep(0.2)
        if step == FAULT and accelerator.process_index == 1 and fault == "die":
            (folder / "died.json").write_text(json.dumps(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        scale = float("nan") if step == FAULT and accelerator.process_index == 1 and fault == "nan" else 1.0
        return parallel.in_shares(6, lambda part: scale * ((x[part] @ weight.T).relu() - 1).square().mean(1)).mean()

    driver = engine.Parallel(accelerator, folder / "cache")
    engine.stopping_on_signals(driver)
    saved = checkpoints.Checkpoints("faults", {})
    choices = checkpoints.choices()
    resume = saved.resume(driver.agreed(choices[-1]))
    config = TrainingConfig(steps=STEPS, learning_rate=1e-2, seed=1, checkpoint_every=1)
    with parallel.driven_by(driver):
        try:
            losses = runs.run(
                objective, {"weight": weight}, config, torch.device("cpu"), checkpoints=saved, resume=resume
            )
        except engine.Stopped:
            return 130
    if accelerator.is_main_process:
        tensors = {"weight": weight.detach(), "losses": torch.tensor(losses["loss"], dtype=torch.float64)}
        safetensors.torch.save_file(tensors, folder / "result.safetensors")
    accelerator.end_training()  # as train.py ends, or a process may abort while it goes down
    return 0


sys.exit(main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""))
