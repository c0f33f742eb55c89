"""LoRA training: samples per second of the pack's loop, ComfyUI's TrainLoraNode and a plain PEFT loop.

`python tests/benchmarks/training.py [--rounds 10] [--steps 8] [--model theatre|sd15]`, on a GPU where there is
one. All three train on the same latents with equal rank, batch and numeric type, in interleaved rounds. `sd15`
has SD 1.5's dimensions and random weights. TrainLoraNode always trains every layer, hence the row "all linear
layers" of ours beside the row "attention", which PEFT is compared with. Every loss is checked to be finite, and
ours and PEFT's to start from the same value, before anything is timed. Only steps are timed, not what a run sets
up before its first one (TrainLoraNode reads the checkpoint again).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

from host import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import torch  # noqa: E402

_BASE = tempfile.TemporaryDirectory(prefix="understudy-benchmark-")
scripts.add_comfy_path(Path(_BASE.name), cpu=not torch.cuda.is_available())

import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
import peft  # noqa: E402
from comfy_extras.nodes_train import TrainLoraNode  # noqa: E402
from pack.nodes.puppets import theatre  # noqa: E402
from pack.nodes.training import loop, objective  # noqa: E402
from pack.nodes.training.config import LoraConfig, TrainingConfig  # noqa: E402
from pack.nodes.training.lora import Adapters  # noqa: E402
from pack.nodes.training.session import session  # noqa: E402

CHECKPOINT = ROOT / "workflows" / "models" / "puppets_sd.safetensors"
RANK, RATE, PICTURES, BATCHES = 8, 1e-4, 8, (1, 4)
ATTENTION = LoraConfig().layers
comfy.utils.PROGRESS_BAR_ENABLED = False

# run(steps, clock) -> every step's loss
Run = Callable[[int, "Clock"], list[float]]


class Clock:
    """A monitor, and a progress hook of the host, that notes the time after every step."""

    def __init__(self):
        self.times: list[float] = []

    def check(self) -> None:
        pass

    def progress(self, *_state) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def checkpoint(self, _state) -> None:
        pass

    def seconds(self) -> float:
        """Of one step, the first one left out: it warms up."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def theatre_model():
    """The shipped model; latents [1, 8, 16, 16], prompts [1, 40, 128]."""
    theatre.register()
    model = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT), output_vae=False, output_clip=False)[0]
    return model, (1, theatre.LATENT_CHANNELS, 16, 16), (1, 40, theatre.TEXT_WIDTH)


def sd15_model():
    """SD 1.5's dimensions with random weights; latents [1, 4, 64, 64], prompts [1, 77, 768]."""
    settings = {
        **comfy.supported_models.SD15.unet_config, **comfy.supported_models.SD15.unet_extra_config,
        "image_size": 32, "in_channels": 4, "out_channels": 4, "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
        "use_spatial_transformer": True, "legacy": False,
    }
    config = comfy.supported_models.SD15(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config.set_inference_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32, None)
    model = config.get_model({}, device=device).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
        parameter.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, device, device), (1, 4, 64, 64), (1, 77, 768)


def ours(model, latents, prompts, batch: int, layers: str) -> Run:
    def run(steps: int, clock: Clock) -> list[float]:
        config = TrainingConfig(steps=steps, learning_rate=RATE, batch_size=batch, checkpoint_every=0)
        with session(model, (batch, *latents[0].shape[1:]), config) as denoiser:
            samples = [
                objective.Sample(x.to(denoiser.device), denoiser.prepare(c, x)) for x, c in zip(latents, prompts)
            ]
            adapters = Adapters(denoiser.network, LoraConfig(RANK, layers=layers), 0, denoiser.device)
            goal = objective.DenoisingObjective(denoiser, samples, config)
            with adapters.attached():
                return loop.train(goal, adapters.parameters(), config, clock)

    return run


def with_peft(model, latents, prompts, batch: int) -> Run:
    """The same objective and optimiser, with PEFT's own layers in the network."""

    def run(steps: int, clock: Clock) -> list[float]:
        config = TrainingConfig(steps=steps, learning_rate=RATE, batch_size=batch, checkpoint_every=0)
        with session(model, (batch, *latents[0].shape[1:]), config) as denoiser:
            names = list(Adapters(denoiser.network, LoraConfig(RANK), 0, denoiser.device).layers)
            settings = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)
            peft.inject_adapter_in_model(settings, denoiser.network)
            try:
                weights = [p for name, p in denoiser.network.named_parameters() if "lora_" in name]
                for weight in weights:
                    weight.data = weight.data.float()
                optimiser = torch.optim.AdamW(weights, lr=RATE, weight_decay=config.weight_decay)
                samples = [
                    objective.Sample(x.to(denoiser.device), denoiser.prepare(c, x)) for x, c in zip(latents, prompts)
                ]
                goal, losses = objective.DenoisingObjective(denoiser, samples, config), []
                for step in range(steps):
                    optimiser.zero_grad(set_to_none=True)
                    seed = loop.step_seed(config.seed, step)
                    loss = goal(step, torch.Generator().manual_seed(seed))
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(weights, config.max_gradient_norm)
                    optimiser.step()
                    losses.append(float(loss.detach()))
                    clock.progress()
                return losses
            finally:
                for name, module in list(denoiser.network.named_modules()):
                    if isinstance(module, peft.tuners.lora.LoraLayer):
                        parent, _, child = name.rpartition(".")
                        setattr(denoiser.network.get_submodule(parent), child, module.get_base_layer())

    return run


def native(model, latents, prompts, batch: int, dtype: str) -> Run:
    """ComfyUI's node in its faster mode, bypass."""

    def run(steps: int, clock: Clock) -> list[float]:
        settings = {
            "batch_size": batch, "grad_accumulation_steps": 1, "steps": steps, "learning_rate": RATE, "rank": RANK,
            "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": dtype, "lora_dtype": "fp32",
            "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": False,
            "checkpoint_depth": 1, "offloading": False, "existing_lora": "[None]", "bucket_mode": False,
            "bypass_mode": True,
        }
        comfy.utils.set_progress_bar_global_hook(clock.progress)
        try:
            result = TrainLoraNode.execute(
                model=[model], latents=[{"samples": x} for x in latents], positive=list(prompts),
                **{name: [value] for name, value in settings.items()},
            )
        finally:
            comfy.utils.set_progress_bar_global_hook(None)
        return result.args[1]["loss"]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8, help="a round")
    parser.add_argument("--model", choices=("theatre", "sd15"), default="theatre")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, {arguments.model}, rank {RANK}, {arguments.rounds} rounds")
    model, shape, text = theatre_model() if arguments.model == "theatre" else sd15_model()
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(shape, generator=generator) for _ in range(PICTURES)]
    prompts = [[[torch.randn(text, generator=generator), {}]] for _ in range(PICTURES)]
    for batch in BATCHES:
        runs = {
            "ours, attention": ours(model, latents, prompts, batch, ATTENTION),
            "PEFT, attention": with_peft(model, latents, prompts, batch),
            "ours, all linear layers": ours(model, latents, prompts, batch, "."),
            "TrainLoraNode": native(model, latents, prompts, batch, "bf16" if cuda else "fp32"),
        }
        first = {}
        for title, run in runs.items():
            first[title] = run(2, Clock())
            assert all(map(torch.isfinite, torch.tensor(first[title]))), title
        assert abs(first["ours, attention"][0] - first["PEFT, attention"][0]) < 1e-3 * first["PEFT, attention"][0]
        times: dict[str, list[float]] = {title: [] for title in runs}
        for _ in range(arguments.rounds):
            for title, run in runs.items():
                clock = Clock()
                run(arguments.steps + 1, clock)
                times[title].append(clock.seconds())
        for title, seconds in times.items():
            rate = [batch / value for value in seconds]
            against = {"ours, attention": "PEFT, attention", "ours, all linear layers": "TrainLoraNode"}.get(title)
            ratio = ""
            if against:
                ratios = [b / a for a, b in zip(seconds, times[against], strict=True)]
                ratio = f"  {statistics.median(ratios):.3f} of {against}'s"
            print(f"batch {batch}  {title:<24}{statistics.median(rate):>8.2f} samples/s "
                  f"({min(rate):.2f} to {max(rate):.2f}){ratio}")


if __name__ == "__main__":
    main()
