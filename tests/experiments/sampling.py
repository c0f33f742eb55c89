"""The theatre's checkpoint in this process, by the host's own loader, encoders and samplers."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from launcher import scripts
from safetensors import safe_open

from . import report

CHECKPOINT = scripts.ROOT / "workflows" / "models" / "checkpoints" / "puppets_sd.safetensors"
CFG, STEPS, SCHEDULER = 4.5, 25, "normal"


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def training_pictures(path: Path) -> int:
    """How many renders the checkpoint was trained on, as its metadata says; 0 where they do not."""
    with safe_open(str(path), "pt") as file:
        training = json.loads((file.metadata() or {}).get("config", "{}")).get("training", {})
    stages = [training, *(stage for stage in training.values() if isinstance(stage, dict))]
    return max(stage.get("pictures", 0) for stage in stages)


def widgets(node, **given) -> dict:
    """What a node of the pack gets: `given`, and its defaults for the rest."""
    inputs = [each for each in node.define_schema().inputs if getattr(each, "default", None) is not None]
    return {each.id: each.default for each in inputs} | given


def as_lists(values: dict) -> dict:
    """Each value as a Train node takes it, in a list of one."""
    return {name: [value] for name, value in values.items()}


def learned(folder: Path, key: object, train: Callable[[], dict]) -> dict[str, torch.Tensor]:
    """Trained tensors, kept as a file under the fingerprint of `key`, which says all that decides them."""
    path = folder / f"{report.fingerprint(key)}.safetensors"
    if not path.exists():
        with torch.inference_mode():
            weights = train()
        report.replace(path, safetensors.torch.save({name: t.contiguous() for name, t in weights.items()}))
    return safetensors.torch.load_file(path)


def joined(entries: Sequence) -> list:
    """One CONDITIONING whose batch holds these entries, one a picture, with the options of the first."""
    options = dict(entries[0][1])
    if options.get("pooled_output") is not None:
        options["pooled_output"] = torch.cat([entry[1]["pooled_output"] for entry in entries])
    return [[torch.cat([entry[0] for entry in entries]), options]]


class Theatre:
    """MODEL, CLIP and VAE of a checkpoint. Pictures: uint8 [N, H, W, 3]; latents: [N, 16, H/8, W/8]."""

    scheduler = SCHEDULER

    def __init__(self, path: Path, state: Path, negative: str = ""):
        if not path.exists():
            raise SystemExit(f"{path} is missing: train it with workflows/theatre/puppets_sd.py")
        scripts.add_comfy_path(state / "host", cpu=not torch.cuda.is_available())
        import comfy.sample
        import comfy.samplers
        import comfy.sd
        from pack.nodes.puppets import theatre

        self._samplers, self._sample = comfy.samplers, comfy.sample
        theatre.register()
        self.model, self.clip, self.vae = comfy.sd.load_checkpoint_guess_config(str(path))[:3]
        self.negative = negative

    def prompts(self, texts: Sequence[str]) -> list:
        """One CONDITIONING whose batch holds one prompt a picture."""
        return joined([self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))[0] for text in texts])

    def encode(self, pictures: np.ndarray) -> torch.Tensor:
        """Latents as the VAE Encode node gives them."""
        return self.vae.encode(torch.from_numpy(np.ascontiguousarray(pictures)).float() / 255)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """uint8 [N, H, W, 3]."""
        return (self.vae.decode(latents).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()

    def round_trip(self, pictures: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Pictures `start` to `stop` - 1 through the autoencoder."""
        return self.decode(self.encode(pictures[start:stop]))

    def with_lora(self, weights: dict[str, torch.Tensor], strength: float = 1.0):
        """A clone of the MODEL with a LoRA."""
        import comfy.sd

        return comfy.sd.load_lora_for_models(self.model, None, weights, strength, 0)[0]

    def latent_shape(self, size: int) -> tuple[int, ...]:
        """Of one picture of `size` pixels square."""
        return self.model.get_model_object("latent_format").latent_channels, size // 8, size // 8

    def sampler(self, name: str):
        """A SAMPLER of the host."""
        return self._samplers.sampler_object(name)

    def sigmas(self, steps: int = STEPS, denoise: float = 1.0) -> torch.Tensor:
        """Those of `steps` steps, the last ones of a longer schedule where `denoise` < 1."""
        sampling = self.model.get_model_object("model_sampling")
        return self._samplers.calculate_sigmas(sampling, self.scheduler, round(steps / denoise))[-(steps + 1) :]

    def sample(
        self,
        sampler,
        positive: list,
        seeds: Sequence[int],
        latents: torch.Tensor | None = None,
        denoise: float = 1.0,
        steps: int = STEPS,
        cfg: float = CFG,
        size: int = 128,
        model=None,
        noise: torch.Tensor | None = None,
        noise_mask: torch.Tensor | None = None,
        sigmas: torch.Tensor | None = None,
        negative: list | None = None,
    ) -> torch.Tensor:
        """Latents from `seeds`, one a picture; img2img where `latents` are given and `denoise` < 1.

        `model` is a patched clone of the theatre's to use instead of it; `noise` is used instead of the seeds' own;
        `noise_mask` [N, 1, H, W], in latent cells, is 1 where the picture may change; `sigmas` instead of `steps`;
        `negative` is a CONDITIONING in place of the negative prompt.
        """
        if noise is None:
            # Every picture has the noise of its own seed, so that a case does not depend on its batch.
            shape = self.latent_shape(size)
            noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        start = torch.zeros_like(noise) if latents is None else latents
        if negative is None:
            negative = self.prompts([self.negative] * len(noise))
        return self._sample.sample_custom(
            self.model if model is None else model,
            noise,
            cfg,
            sampler,
            self.sigmas(steps, denoise) if sigmas is None else sigmas,
            positive,
            negative,
            start,
            noise_mask=noise_mask,
            disable_pbar=True,
            seed=int(seeds[0]),
        )


class VideoTheatre(Theatre):
    """The theatre's Wan by the native loaders. Clips: uint8 [N, T, H, W, 3]; latents: [N, 16, 1 + T/4, H/8, W/8]."""

    scheduler = "simple"

    def __init__(self, transformer: Path, autoencoder: Path, state: Path, frames: int):
        for path in (transformer, autoencoder):
            if not path.exists():
                raise SystemExit(f"{path} is missing: train it with workflows/theatre/puppets_wan.py")
        super().__init__(CHECKPOINT, state)
        import comfy.sd
        import comfy.utils

        self.frames = frames
        self.model = comfy.sd.load_diffusion_model(str(transformer))
        weights, metadata = comfy.utils.load_torch_file(str(autoencoder), return_metadata=True)
        self.vae = comfy.sd.VAE(sd=weights, metadata=metadata)

    def latent_shape(self, size: int) -> tuple[int, ...]:
        return 16, 1 + self.frames // 4, size // 8, size // 8

    def encode(self, pictures: np.ndarray) -> torch.Tensor:
        return torch.cat([super(VideoTheatre, self).encode(clip) for clip in pictures])
