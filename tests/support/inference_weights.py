"""Weights as ComfyUI's loaders leave them."""

import torch


def freeze(module: torch.nn.Module) -> None:
    """Its weights become inference tensors, in place."""
    with torch.inference_mode():
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = torch.nn.Parameter(parameter.clone(), requires_grad=False)
