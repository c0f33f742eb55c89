"""All weights of a network, trained as fp32 copies in their place: nothing of the model is modified."""

import contextlib
from collections.abc import Iterator

import torch

from .loop import Parameters

# fp32 copy, gradient and AdamW's two moments
BYTES_PER_PARAMETER = 16
_TRAINABLE = (torch.float32, torch.bfloat16, torch.float16)


class WholeNetwork:
    """A trainable copy of every parameter of `network`, by the parameter's name.

    The copies are where the weights are, or `in_main_memory`, from where ComfyUI's layers fetch them in each call.
    Raises ValueError where a weight is quantised and so has no gradient; it names the weight, and `otherwise` says
    what else to do.
    """

    def __init__(
        self, network: torch.nn.Module, otherwise: str = "switch whole_unet off to train a LoRA",
        in_main_memory: bool = False,
    ):
        self.network = network
        self.originals: dict[str, torch.Tensor] = {}
        for name, weight in network.named_parameters():
            if type(weight) is not torch.nn.Parameter or weight.dtype not in _TRAINABLE:
                raise ValueError(
                    f"weight {name} is {weight.dtype}, and a whole network trains only from fp32, bf16 or fp16: "
                    f"load such a file of this model, or {otherwise}"
                )
            self.originals[name] = weight
        self.trained = {
            name: torch.nn.Parameter(
                weight.detach().to("cpu" if in_main_memory else weight.device, torch.float32, copy=True)
            )
            for name, weight in self.originals.items()
        }

    def parameters(self) -> Parameters:
        return self.trained

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """The network computes with the copies inside this block, and with its original weights after it."""
        try:
            self._assign(self.trained)
            yield
        finally:
            self._assign(self.originals)

    def _assign(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            module, _, leaf = name.rpartition(".")
            self.network.get_submodule(module)._parameters[leaf] = weight

    def differences(self) -> dict[str, torch.Tensor]:
        """Trained minus original weight, by name, fp32 on the CPU."""
        return {
            name: (trained.detach() - self.originals[name].detach().float()).cpu()
            for name, trained in self.trained.items()
        }
