"""Small API-format prompts on the puppet theatre, and the exact numbers that they saved."""

from pathlib import Path

import safetensors.torch
import torch
from launcher.server import Server
from PIL import Image

CHECKPOINT = "puppets_sd.safetensors"
TRANSFORMER, AUTOENCODER = "puppets_wan.safetensors", "puppets_wan_vae.safetensors"
ADAPTER = "faults.safetensors"  # random weights, in output/loras
RESULT = "result"  # the node that saves the latent
SAMPLER = "sample"
LOADER = "load"


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def defaults(server: Server, class_type: str) -> dict:
    """The values that a new node shows in its required widgets."""
    values = {}
    for name, (kind, *options) in server.node_info(class_type)["input"]["required"].items():
        options = options[0] if options else {}
        if "default" in options:
            values[name] = options["default"]
        elif isinstance(kind, list) or kind == "COMBO":
            values[name] = (kind if isinstance(kind, list) else options["options"])[0]
    return values


def plain(seed: int = 1, steps: int = 3, name: str = "plain", batch: int = 1) -> dict:
    """Plain sampling: 128×128 pixels, Euler, its latent saved as output/NAME_….latent."""
    return {
        LOADER: node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "positive": node("CLIPTextEncode", clip=[LOADER, 1], text="a red striped robot waving on a beach"),
        "negative": node("CLIPTextEncode", clip=[LOADER, 1], text=""),
        "empty": node("EmptyLatentImage", width=128, height=128, batch_size=batch),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=[LOADER, 0], scheduler="normal", steps=steps, denoise=1.0),
        SAMPLER: node(
            "SamplerCustom", model=[LOADER, 0], add_noise=True, noise_seed=seed, cfg=4.0,
            positive=["positive", 0], negative=["negative", 0], sampler=["euler", 0], sigmas=["sigmas", 0],
            latent_image=["empty", 0],
        ),
        RESULT: node("SaveLatent", samples=[SAMPLER, 0], filename_prefix=name),
    }


def guided(server: Server, seed: int = 1, steps: int = 3, name: str = "guided", batch: int = 1) -> dict:
    """The same with frequency guidance between two puppets, and a prompt that switches during sampling."""
    prompt = plain(seed, steps, name, batch)
    for role, action in (("source", "standing"), ("driving", "waving")):
        puppet = defaults(server, "UnderstudyPuppet") | {"action": action, "seed": 5}
        prompt[f"{role} puppet"] = node("UnderstudyPuppet", **puppet)
        prompt[role] = node("VAEEncode", pixels=[f"{role} puppet", 0], vae=[LOADER, 2])
    widgets = defaults(server, "UnderstudyFrequencyGuidanceSampler")
    prompt["guidance"] = node(
        "UnderstudyFrequencyGuidanceSampler",
        **widgets | {"sampler": ["euler", 0], "source": ["source", 0], "driving": ["driving", 0]},
    )
    prompt["driving text"] = node("CLIPTextEncode", clip=[LOADER, 1], text="a blue cat waving on a beach")
    prompt["stepwise"] = node(
        "UnderstudyStepwisePrompt", driving=["driving text", 0], target=["positive", 0], switch_percent=0.4
    )
    prompt[SAMPLER]["inputs"] |= {"sampler": ["guidance", 0], "positive": ["stepwise", 0]}
    return prompt


def video(
    seed: int = 1, steps: int = 2, name: str = "video", size: int = 64, frames: int = 5, batch: int = 1
) -> dict:
    """A clip of the theatre's Wan, its latent saved as output/NAME_….latent."""
    return {
        LOADER: node("UNETLoader", unet_name=TRANSFORMER, weight_dtype="default"),
        "text encoder": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "positive": node("CLIPTextEncode", clip=["text encoder", 1], text="a cat waving on a beach"),
        "negative": node("CLIPTextEncode", clip=["text encoder", 1], text=""),
        "empty": node("EmptyHunyuanLatentVideo", width=size, height=size, length=frames, batch_size=batch),
        SAMPLER: node(
            "KSampler", model=[LOADER, 0], seed=seed, steps=steps, cfg=4.0, sampler_name="euler", scheduler="simple",
            denoise=1.0, positive=["positive", 0], negative=["negative", 0], latent_image=["empty", 0],
        ),
        RESULT: node("SaveLatent", samples=[SAMPLER, 0], filename_prefix=name),
    }


def adapter(width: int = 256, blocks: int = 8, rank: int = 2) -> dict[str, torch.Tensor]:
    """Random adapter weights under the published names, by default of the theatre's size."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"blocks.{i}.self_attn.{name}_loras.{part}.weight": torch.randn(shape, generator=generator) / 10
        for i in range(blocks) for name in "qkv" for part, shape in (("down", (rank, width)), ("up", (width, rank)))
    }


def save_adapter(server: Server) -> None:
    """Put ADAPTER where the server lists it."""
    folder = server.base / "output" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(adapter(), folder / ADAPTER)


def identified(server: Server, identity: str = "test 3", adapter: str = ADAPTER, **settings) -> dict:
    """The same clip with a puppet as its reference."""
    prompt = video(**settings)
    puppet = defaults(server, "UnderstudyPuppet") | {"identity": identity, "action": "standing", "seed": 5}
    picture = {"image": ["puppet", 0], "mask": ["puppet", 1]}
    prompt |= {
        "autoencoder": node("VAELoader", vae_name=AUTOENCODER),
        "puppet": node("UnderstudyPuppet", **puppet),
        "prepare": node("UnderstudyPrepareReference", size=64, crop_factor=1.1, **picture),
        "reference": node("VAEEncode", pixels=["prepare", 0], vae=["autoencoder", 0]),
        "adapter": node("UnderstudyLoadVideoIdentityAdapter", adapter_name=adapter),
    }
    widgets = defaults(server, "UnderstudyApplyVideoIdentity")
    links = {"model": [LOADER, 0], "adapter": ["adapter", 0], "reference": ["reference", 0]}
    prompt["apply"] = node("UnderstudyApplyVideoIdentity", **widgets | links)
    prompt[SAMPLER]["inputs"]["model"] = ["apply", 0]
    return prompt


def sheet(server: Server, identities: list[str], actions: list[str], scenes: list[str], at_once: int) -> dict:
    """Casting Sheet → sampling on the theatre → Save Image: output/casting/theatre_….png."""
    texts = {"identities": identities, "actions": actions, "scenes": scenes}
    values = {name: "\n".join(lines) for name, lines in texts.items()} | {"at_once": at_once}
    values = defaults(server, "UnderstudyCastingSheet") | values | {"filename_prefix": "casting/theatre"}
    prompt = plain(steps=1)
    prompt["sheet"] = node("UnderstudyCastingSheet", **values, prompt="a {identity} {action} {scene}")
    prompt["positive"]["inputs"]["text"] = ["sheet", 1]
    prompt["empty"]["inputs"] |= {"width": 64, "height": 64}
    prompt[SAMPLER]["inputs"]["noise_seed"] = ["sheet", 4]
    prompt["pixels"] = node("VAEDecode", samples=[SAMPLER, 0], vae=[LOADER, 2])
    prompt[RESULT] = node("SaveImage", images=["pixels", 0], filename_prefix=["sheet", 5])
    return prompt


def is_whole(picture: Path) -> bool:
    """Whether all of this file can be read."""
    try:
        with Image.open(picture) as opened:
            opened.load()
    except OSError:
        return False
    return True


def latent(server: Server, entry: dict) -> torch.Tensor:
    """The latent that a finished prompt saved, [B, 4, H/8, W/8]. Fails with the server's error if it failed."""
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    saved = entry["outputs"][RESULT]["latents"][0]
    path = server.base / "output" / saved["subfolder"] / saved["filename"]
    tensor = safetensors.torch.load_file(path)["latent_tensor"]
    path.unlink()
    return tensor


def run(server: Server, prompt: dict) -> torch.Tensor:
    return latent(server, server.queue(prompt))


def message(entry: dict, kind: str) -> dict:
    """The details of the first message of that kind in a history entry; {} if there is none."""
    return next((details for name, details in entry["status"]["messages"] if name == kind), {})
