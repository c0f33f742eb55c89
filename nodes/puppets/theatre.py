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
    [-0.4276, 0.2538, -0.8445], [0.047, 0.2562, -0.3902], [0.8635, 0.6173, -0.5886],
    [-0.4941, -0.7092, -0.4994], [0.4334, -0.2561, -0.3198], [0.6128, 0.748, 1.1661],
    [-0.1238, 0.2713, 0.585], [-0.5424, 0.042, -0.5806], [0.3462, -0.4298, -0.496],
    [-1.2089, -1.282, -0.2357], [-0.1555, 1.8044, 0.8177], [1.2525, 0.6359, -0.3949],
    [0.4729, 0.2574, 0.8859], [-0.2947, -1.1474, -0.768], [1.6287, -0.3227, -0.1481],
    [-1.6226, 0.264, 0.0901],
]
LATENT_RGB_BIAS = [-0.2112, -0.2797, -0.216]
# The same for the video model, in the model's own space.
WAN_LATENT_RGB_FACTORS = [
    [0.0474, 0.1152, 0.1351], [-0.1599, -0.1664, -0.0583], [0.1939, 0.3111, 0.218], [0.0588, -0.0872, 0.173],
    [-0.0769, 0.1359, 0.0116], [0.0672, -0.0634, -0.1264], [-0.1733, 0.0486, 0.0169], [0.0913, 0.0647, -0.0665],
    [-0.1087, 0.0368, 0.0486], [0.2102, 0.048, -0.0575], [0.2367, 0.2072, -0.0536], [0.0385, 0.1251, 0.2429],
    [-0.0823, 0.2175, 0.2553], [-0.2327, -0.1906, -0.0699], [-0.0158, 0.1163, -0.0251], [-0.0664, 0.0088, -0.0232],
]
WAN_LATENT_RGB_BIAS = [0.2195, 0.2092, 0.1863]
