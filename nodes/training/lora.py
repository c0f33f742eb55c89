"""What is trained of a network, a LoRA or all of it, and the LORA_MODEL that comes of it.

A LoRA's low-rank updates of linear layers are forward hooks: no weight is merged, copied or replaced.
"""

import contextlib
import re
from collections.abc import Iterator

import comfy.utils
import torch

from .config import LoraConfig
from .loop import Parameters
from .seeds import seed_for
from .whole_network import WholeNetwork

PREFIX = "diffusion_model."
# Tells SDXL by its transformers: kohya's tools name its layers by the original blocks.
_SDXL_DEPTH = [0, 0, 2, 2, 10, 10]


class LoraLayer(torch.nn.Module):
    """up(down(x)) * scale in the dtype of x; the matrices stay fp32. down: [rank, in], up: [out, rank]."""

    def __init__(self, in_features: int, out_features: int, config: LoraConfig, generator: torch.Generator):
        super().__init__()
        # Uniform, with the deviation of a linear layer's initial weights, as in the published implementation.
        bound = in_features**-0.5
        down = torch.empty(config.rank, in_features).uniform_(-bound, bound, generator=generator)
        self.down = torch.nn.Parameter(down)
        self.up = torch.nn.Parameter(torch.zeros(out_features, config.rank))
        self.scale = config.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.linear(x, self.down.to(x.dtype))
        return torch.nn.functional.linear(hidden, self.up.to(x.dtype)) * self.scale


def chosen_layers(network: torch.nn.Module, config: LoraConfig) -> dict[str, torch.nn.Module]:
    """The linear layers of a network that a LoRA changes, by name."""
    pattern = re.compile(config.layers)
    return {
        name: module
        for name, module in network.named_modules()
        if pattern.search(name) and hasattr(module, "in_features") and hasattr(module, "out_features")
    }


def parameter_count(network: torch.nn.Module, config: LoraConfig | None) -> int:
    """How many parameters a LoRA of the network has; 0 where `config` is None."""
    if config is None:
        return 0
    layers = chosen_layers(network, config).values()
    return sum(config.rank * (layer.in_features + layer.out_features) for layer in layers)


class LoraLayers:
    """One LoraLayer for each chosen linear layer of `network`, by the layer's name.

    Works with every module that has `in_features` and `out_features`, quantised ones included, since only their
    input and output are used. Raises ValueError where no layer matches.
    """

    def __init__(self, network: torch.nn.Module, config: LoraConfig, seed: int, device: torch.device):
        self.config = config
        self.layers = chosen_layers(network, config)
        if not self.layers:
            raise ValueError(
                f"no linear layer of {type(network).__name__} matches {config.layers!r}: training of this "
                "kind of model is not supported; use SD, SDXL, Flux, Qwen-Image, Z-Image or Wan"
            )
        self.modules = {
            name: LoraLayer(
                layer.in_features, layer.out_features, config,
                torch.Generator().manual_seed(seed_for(seed, "lora", i)),
            ).to(device)
            for i, (name, layer) in enumerate(self.layers.items())
        }

    def parameters(self) -> Parameters:
        return {
            f"{name}.{part}": getattr(module, part)
            for name, module in self.modules.items() for part in ("down", "up")
        }

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """The network computes with the layers inside this block, and exactly as before after it."""
        handles = []
        try:
            for name, layer in self.layers.items():
                handles.append(layer.register_forward_hook(_adding(self.modules[name])))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _adding(adapter: LoraLayer):
    def add(_layer, inputs, output):
        return output + adapter(inputs[0]).to(output.dtype)

    return add


def trainable(
    network: torch.nn.Module, lora: LoraConfig | None, seed: int, device: torch.device
) -> LoraLayers | WholeNetwork:
    """A LoRA of the network, or all of it where `lora` is None. Raises ValueError as both do."""
    return WholeNetwork(network) if lora is None else LoraLayers(network, lora, seed, device)


def lora_model(trained: LoraLayers | WholeNetwork, unet_config: dict) -> dict[str, torch.Tensor]:
    """Weights by key, fp32 on the CPU.

    A LoRA: `…lora_down.weight` [rank, in], `…lora_up.weight` [out, rank] and `…alpha` (a scalar), under kohya's
    names for UNets (diffusers' layers, or SDXL's original ones) and Flux.2, and ComfyUI's for every other model:
    those that both ComfyUI's loader and diffusers read. A whole network: differences from the original weights,
    `….diff` and for a bias `….diff_b`, under ComfyUI's names.
    """
    if isinstance(trained, WholeNetwork):
        return {_difference_key(name): difference for name, difference in trained.differences().items()}
    diffusers = {name: theirs for theirs, name in comfy.utils.unet_to_diffusers(unet_config).items()}
    sdxl = list(unet_config.get("transformer_depth", ())) == _SDXL_DEPTH
    kind = unet_config.get("image_model")
    weights = {}
    for name, adapter in trained.modules.items():
        theirs = diffusers.get(f"{name}.weight")
        parts = {f"{PREFIX}{name}": adapter.up}
        if theirs is not None or kind == "flux2":
            layer = name if theirs is None or sdxl else theirs.removesuffix(".weight")
            parts = {"lora_unet_" + layer.replace(".", "_"): adapter.up}
        elif kind == "lumina2" and name.endswith(".qkv") and len(adapter.up) == 3 * adapter.down.shape[1]:
            # diffusers' Z-Image has three layers here, and takes no file with one; ComfyUI reads both.
            stem = PREFIX + name.removesuffix("qkv")
            parts = {f"{stem}to_{letter}": up for letter, up in zip("qkv", adapter.up.chunk(3), strict=True)}
        for key, up in parts.items():
            weights[f"{key}.lora_down.weight"] = adapter.down.detach().cpu().clone()
            weights[f"{key}.lora_up.weight"] = up.detach().cpu().clone()
            weights[f"{key}.alpha"] = torch.tensor(float(adapter.scale * trained.config.rank))
    return weights


def _difference_key(name: str) -> str:
    if name.endswith(".bias"):
        return f"{PREFIX}{name.removesuffix('.bias')}.diff_b"
    return f"{PREFIX}{name.removesuffix('.weight')}.diff"
