"""Train a job that Export Training Job wrote, on one GPU or many, here or on other machines.

    python workflows/train.py JOB/job.toml
    accelerate launch --multi_gpu --num_processes 8 workflows/train.py JOB/job.toml
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 workflows/train.py JOB/job.toml

The job's batch_size is that of all processes together: at least their number times --gradient-accumulation. The
third line starts two on CPUs; --cpu would start one.
Started again, it goes on from the last checkpoint. Results are in JOB/output, losses for TensorBoard in JOB/runs,
encodings in JOB/cache. Models are those of COMFYUI_PATH, or of --models. A Python without accelerate makes an
environment at the first start, in .cache; that of accelerate launch must hold what three files list:
workflows/launcher/requirements.txt, requirements.txt, and ComfyUI's own requirements.txt.
Exit code: 0 if the training is done, 1 if it cannot be or failed, 130 if it was stopped and can go on.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import os
import sys
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parent.parent
sys.path.append(str(ROOT / "workflows"))

from launcher import environment, scripts, source  # noqa: E402


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="the job")
    parser.add_argument("--models", type=Path, metavar="DIR", help="ComfyUI's folder of models")
    parser.add_argument(
        "--gradient-accumulation", type=int, metavar="N",
        help="shares of a step that each process computes in turn (default: accelerate's configuration, or 1)",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Train the job in this process, one of those that accelerate started; returns the exit code."""
    scripts.alias_pack()
    from trainer import engine, job

    folder = options.config.resolve().parent
    try:
        described = job.read(options.config)
        accelerator = engine.accelerator(folder, options.gradient_accumulation)
    except (job.JobError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.WARNING, format="%(message)s")
    if accelerator.is_main_process:
        print(*engine.started(accelerator), sep="\n", file=sys.stderr)
    comfyui = scripts.add_comfy_path(folder, cpu=accelerator.device.type == "cpu")
    _use_models(options.models, comfyui)
    from pack.nodes import extension
    from pack.nodes.training import checkpoints, parallel
    from pack.nodes.training.loop import TrainingDiverged

    asyncio.run(extension.UnderstudyExtension().on_load())  # lists the pack's own models, too
    driver = engine.Parallel(accelerator, folder / "cache", described["name"])
    engine.stopping_on_signals(driver)
    accelerator.init_trackers("runs")
    saved = checkpoints.FOLDER.choices()
    resume_from = driver.agreed(saved[-1] if saved else checkpoints.NONE)
    try:
        with parallel.driven_by(driver):
            save, name = job.train(described, folder, resume_from)
    except engine.Stopped:
        print("Stopped; the same command goes on from the checkpoint.", file=sys.stderr)
        return 130
    except (job.JobError, TrainingDiverged, ValueError) as error:
        raise SystemExit(f"{error}") from error  # with the message, which a torchrun of other machines shows
    if accelerator.is_main_process:
        save()
        print(f"{name} is done: {folder / 'output'}")
    accelerator.end_training()
    return 0


def _use_models(chosen: Path | None, comfyui: Path) -> None:
    from comfy.cli_args import args

    models = chosen or (comfyui / "models" if comfyui != source.cached(ROOT) else ROOT / ".cache" / "models")
    models.mkdir(parents=True, exist_ok=True)
    args.models_directory = str(models)


if __name__ == "__main__":
    parsed = parse(sys.argv[1:])
    if importlib.util.find_spec("accelerate") is None:
        environment.enter(ROOT)
    sys.exit(run(parsed))
