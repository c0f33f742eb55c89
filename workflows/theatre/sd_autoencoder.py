"""The autoencoder as it is trained: TAESD, narrower where the picture is large."""

import torch
from comfy.taesd import taesd
from pack.nodes.puppets import theatre


class NarrowTAESD(torch.nn.Module):
    """TAESD with 32 channels where the picture is large (full and half size) and 64 below: a third of the work.

    `widened` fills the other channels with zeros, which gives the host's TAESD with exactly the same outputs.
    """

    def __init__(self, narrow: int = 32, wide: int = 64):
        super().__init__()
        block, conv, up = taesd.Block, taesd.conv, torch.nn.Upsample
        self.taesd_encoder = torch.nn.Sequential(
            conv(3, narrow), block(narrow, narrow),
            conv(narrow, narrow, stride=2, bias=False), *(block(narrow, narrow) for _ in range(3)),
            conv(narrow, wide, stride=2, bias=False), *(block(wide, wide) for _ in range(3)),
            conv(wide, wide, stride=2, bias=False), *(block(wide, wide) for _ in range(3)),
            conv(wide, theatre.LATENT_CHANNELS),
        )
        # Keeps colour linear in the latents, which is easier to denoise and to preview; dropped in the end.
        self.colour = torch.nn.Conv2d(theatre.LATENT_CHANNELS, 3, 1)
        self.taesd_decoder = torch.nn.Sequential(
            taesd.Clamp(), conv(theatre.LATENT_CHANNELS, wide), torch.nn.ReLU(),
            *(block(wide, wide) for _ in range(3)), up(scale_factor=2), conv(wide, wide, bias=False),
            *(block(wide, wide) for _ in range(3)), up(scale_factor=2), conv(wide, narrow, bias=False),
            *(block(narrow, narrow) for _ in range(3)), up(scale_factor=2), conv(narrow, narrow, bias=False),
            block(narrow, narrow), conv(narrow, 3),
        )

    def widened(self) -> taesd.TAESD:
        full = taesd.TAESD(latent_channels=theatre.LATENT_CHANNELS)
        state = {key: torch.zeros_like(value) for key, value in full.state_dict().items()}
        state["vae_scale"] = torch.ones(())
        for key, value in self.state_dict().items():
            if key.startswith("colour."):
                continue
            state[key][tuple(slice(size) for size in value.shape)] = value
        full.load_state_dict(state)
        return full
