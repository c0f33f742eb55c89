"""Parameters that the pack trains by its own objectives, as a module that the theatre's loop takes."""

from collections.abc import Callable, Mapping

import torch


class Learned(torch.nn.Module):
    """Parameters under the names that the pack gives them; a call is `loss(step)` of a step number, int64 [1].

    A copy, such as an average, has the values and no loss.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], loss: Callable[[int], torch.Tensor] | None = None
    ):
        super().__init__()
        self.names = {name.replace(".", "/"): name for name in parameters}
        self.loss = loss
        for key, name in self.names.items():
            self.register_parameter(key, parameters[name])

    def __deepcopy__(self, _memo) -> "Learned":
        return Learned({name: torch.nn.Parameter(tensor, False) for name, tensor in self.part().items()})

    def forward(self, step: torch.Tensor) -> torch.Tensor:
        return self.loss(int(step))

    def part(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Copies of the parameters under a prefix, without it."""
        return {
            name.removeprefix(prefix): self.get_parameter(key).detach().clone()
            for key, name in self.names.items() if name.startswith(prefix)
        }


def draw_step(_rng, step: int) -> tuple[torch.Tensor]:
    """The step's number as its batch: the pack's objectives draw their own, seeded by it."""
    return (torch.tensor([step]),)
