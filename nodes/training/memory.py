"""How much of a device's memory a training will need, by arithmetic before its first step, and what lowers it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ..messages import tell
from .config import TrainingConfig
from .parallel import largest_share

# Ours, from the table of workflows/TRAINING.md: how many times ComfyUI's estimate for sampling a backward pass keeps
# of a sample with gradient_checkpointing, without it of a UNet, and of a transformer.
_CHECKPOINTED, _UNET, _TRANSFORMER = 3, 20, 40
# Bytes that a layer of an encoder keeps of each value of its input, in fp32, and those of the input itself
# (Korthikanti et al., arXiv 2205.05198: 34 in 16 bits, where attention keeps no matrix).
_OF_A_LAYER, _OF_ITS_INPUT = 68, 4


@dataclass(frozen=True)
class Needs:
    """Bytes on the device: weights that stay as they are, what a backward pass keeps, and what is trained."""

    weights: float
    activations: float
    trained: float

    @property
    def beside_weights(self) -> float:
        return self.activations + self.trained

    def __str__(self) -> str:
        parts = {"weights": self.weights, "activations": self.activations, "what is trained": self.trained}
        told = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        return f"needs about {sum(parts.values()) / 2**30:.2f} GiB by estimate: {told}"


def of_session(
    patcher: Any, others: Sequence[Any], shape: Sequence[int], trained: int, config: TrainingConfig
) -> Needs:
    """Those of a process that trains through a model, on its share of batches of `shape`.

    `others` are models loaded with it, `trained` the bytes of what is trained.
    """
    weights = 0 if config.offload else sum(each.model_size() for each in (patcher, *others))
    kept = _UNET if isinstance(patcher.model.diffusion_model, UNetModel) else _TRANSFORMER
    kept = _CHECKPOINTED if config.gradient_checkpointing else kept
    return Needs(weights, kept * patcher.memory_required([largest_share(shape[0]), *shape[1:]]), trained)


def of_encoder(pictures: int, shape: dict[str, int], checkpointing: bool) -> int:
    """Bytes that the backward pass of a vision transformer keeps; `shape` is its config, as in its config.json."""
    tokens = (shape.get("image_size", 224) // shape.get("patch_size", 16)) ** 2 + 1
    values, layers = pictures * tokens * shape["hidden_size"], shape["num_hidden_layers"]
    return values * (_OF_A_LAYER + layers * _OF_ITS_INPUT if checkpointing else layers * _OF_A_LAYER)


def tell_needs(needs: Needs, patcher: Any, config: TrainingConfig, fp8: bool) -> None:
    """Say it before the first step. `fp8` is whether a model in fp8 can be trained this way."""
    cures = {
        "offload": not config.offload, "gradient_checkpointing": not config.gradient_checkpointing,
        "a smaller batch_size": largest_share(config.batch_size) > 1,
        "a model in fp8": fp8 and needs.weights and getattr(patcher.model_dtype(), "itemsize", 1) > 1,
    }
    lower = ", ".join(name for name, helps in cures.items() if helps)
    tell("training", [f"{needs}; {lower} would lower it" if lower else f"{needs}"])
