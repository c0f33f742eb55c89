"""The tiny models of the puppet theatre, registered with ComfyUI's own loaders.

`PuppetsSD`, for Load Checkpoint: a subclass of ComfyUI's SD15 with 64 channels, a two-layer text encoder of width 128
and a TAESD-shaped VAE (16 latent channels, factor 8). `PuppetsWan`, for Load Diffusion Model: ComfyUI's Wan 2.1 with
eight blocks of width 256, which reads the text encoder of `PuppetsSD`; its VAE is ComfyUI's, of width 16. ComfyUI
recognises each by its marker, a tensor that no other model has.
"""

import comfy.clip_model
import comfy.latent_formats
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch

from . import tokenizer

MARKER = "understudy_puppets_sd"
LATENT_CHANNELS = 16
TEXT_WIDTH = 128
UNET_CONFIG = {
    "model_channels": 64,
    "context_dim": TEXT_WIDTH,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}
TEXT_CONFIG = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": TEXT_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": tokenizer.MAX_TOKENS,
    "vocab_size": len(tokenizer.WORDS),
    "eos_token_id": tokenizer.WORDS.index(tokenizer.END),
    "projection_dim": TEXT_WIDTH,
}
WAN_MARKER = "understudy_puppets_wan"
WAN_CONFIG = {"dim": 256, "ffn_dim": 768, "num_heads": 2, "num_layers": 8}
WAN_SHIFT = 3.0  # of the flow schedule, in training and as the sampler's default; ComfyUI's 8 is for larger clips
SPECIAL_TOKENS = {
    "start": tokenizer.WORDS.index(tokenizer.START),
    "end": tokenizer.WORDS.index(tokenizer.END),
    "pad": tokenizer.WORDS.index(tokenizer.PAD),
}


class PuppetsLatentFormat(comfy.latent_formats.LatentFormat):
    """Latents [B, 16, H/8, W/8] of about zero mean and unit deviation a channel, as the VAE was trained to give."""

    scale_factor = 1.0
    latent_channels = LATENT_CHANNELS

    def __init__(self):
        self.latent_rgb_factors = LATENT_RGB_FACTORS
        self.latent_rgb_factors_bias = LATENT_RGB_BIAS


class _WordTokenizerLoader:
    """ComfyUI asks a tokenizer class for `from_pretrained`; ours is built from the vocabulary, not read."""

    @staticmethod
    def from_pretrained(_path, **_options):
        return tokenizer.build()


class PuppetsClipTokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(
            tokenizer_path="", max_length=tokenizer.MAX_TOKENS, pad_with_end=False,
            pad_token=SPECIAL_TOKENS["pad"], embedding_directory=embedding_directory, embedding_size=TEXT_WIDTH,
            tokenizer_class=_WordTokenizerLoader, tokenizer_data=tokenizer_data or {},
        )


class PuppetsTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=PuppetsClipTokenizer)


class PuppetsTextModel(comfy.clip_model.CLIPTextModel):
    def __init__(self, config_dict, dtype, device, operations):
        super().__init__(config_dict, dtype, device, operations)
        # ComfyUI's class always has CLIP's 49,408 rows: six megabytes of words that the theatre does not know.
        self.text_model.embeddings.token_embedding = operations.Embedding(
            config_dict["vocab_size"], config_dict["hidden_size"], dtype=dtype, device=device
        )


class PuppetsClip(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device, model_class=PuppetsTextModel, max_length=tokenizer.MAX_TOKENS,
            textmodel_json_config=dict(TEXT_CONFIG), dtype=dtype,
            special_tokens=SPECIAL_TOKENS, return_projected_pooled=False, model_options=model_options or {},
        )


class PuppetsClipModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device, dtype, model_options or {}, clip_model=PuppetsClip)


class PuppetsSD(comfy.supported_models.SD15):
    """ε-prediction, SD 1.5's noise schedule; matched before ComfyUI's own models, by `MARKER` only."""

    unet_config = UNET_CONFIG
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}
    required_keys = {"{}" + MARKER}
    latent_format = PuppetsLatentFormat

    def inpaint_model(self):
        return False  # ComfyUI takes more than four input channels for an inpainting model

    def process_unet_state_dict(self, state_dict):
        state_dict.pop(MARKER, None)
        return state_dict

    def process_unet_state_dict_for_saving(self, state_dict):
        return super().process_unet_state_dict_for_saving({**state_dict, MARKER: torch.ones(1)})

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(PuppetsTokenizer, PuppetsClipModel)


class PuppetsWanLatentFormat(comfy.latent_formats.Wan21):
    """Latents [B, 16, 1 + T/4, H/8, W/8] with Wan's own constants, which the VAE's weights were made to fit."""

    def __init__(self):
        super().__init__()
        self.latent_rgb_factors = WAN_LATENT_RGB_FACTORS
        self.latent_rgb_factors_bias = WAN_LATENT_RGB_BIAS
        self.taesd_decoder_name = None  # the preview decoder of the real Wan would show noise


class PuppetsWan(comfy.supported_models.WAN21_T2V):
    """Wan 2.1 text to video of the theatre's size; matched before ComfyUI's own, by size and `WAN_MARKER`."""

    unet_config = {**comfy.supported_models.WAN21_T2V.unet_config, **WAN_CONFIG}
    unet_extra_config = {"text_dim": TEXT_WIDTH}
    required_keys = {"{}" + WAN_MARKER}
    sampling_settings = {"shift": WAN_SHIFT}
    latent_format = PuppetsWanLatentFormat

    def process_unet_state_dict(self, state_dict):
        state_dict.pop(WAN_MARKER, None)
        return state_dict

    def process_unet_state_dict_for_saving(self, state_dict):
        return super().process_unet_state_dict_for_saving({**state_dict, WAN_MARKER: torch.ones(1)})

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(PuppetsTokenizer, PuppetsClipModel)


def register() -> None:
    """Put the theatre's architectures in front of ComfyUI's list, once."""
    for architecture in (PuppetsSD, PuppetsWan):
        if architecture not in comfy.supported_models.models:
            comfy.supported_models.models.insert(0, architecture)


# Least-squares map from latents to RGB in [-1, 1], fitted by the training script, for live previews.
LATENT_RGB_FACTORS = [
    [-0.1962, -0.0672, -0.1358], [0.061, 0.0459, -0.0158], [0.6207, 0.1148, -0.1173], [-0.3427, -0.4154, -0.3208],
    [0.3198, -0.1713, -0.2267], [0.3523, 0.6471, 0.4871], [-0.0497, 0.22, 0.2457], [-0.2849, -0.0966, -0.1446],
    [0.2166, -0.3551, -0.2915], [-0.7964, -0.6824, -0.3054], [-0.0712, 1.0534, 0.6761], [0.9134, 0.2836, -0.0478],
    [0.2552, 0.2797, 0.2397], [-0.2184, -0.7065, -0.5174], [1.1661, -0.0525, -0.1915], [-1.0023, 0.0411, 0.1875],
]
LATENT_RGB_BIAS = [0.0899, 0.0271, -0.0171]
# The same for the video model, in the model's own space.
WAN_LATENT_RGB_FACTORS = [
    [0.1823, 0.0591, -0.0376], [0.0674, -0.1201, -0.1345], [-0.0706, 0.0321, -0.0618], [-0.0783, -0.1186, -0.1192],
    [-0.1955, -0.1589, -0.1839], [0.0245, 0.0695, -0.055], [0.0573, 0.1282, 0.1927], [-0.0347, 0.1423, -0.0823],
    [0.0089, -0.1481, -0.1549], [0.0705, 0.0296, -0.1185], [-0.0001, 0.04, -0.0953], [-0.1848, -0.0207, -0.0071],
    [0.0884, -0.031, 0.0289], [-0.0389, -0.0561, 0.0122], [-0.0389, -0.0133, 0.0453], [-0.2191, -0.1543, 0.0614],
]
WAN_LATENT_RGB_BIAS = [0.1389, 0.0707, 0.0469]
