"""A tiny model with random weights of the image and video families that ComfyUI 0.30 detects by itself.

Each is ComfyUI's own class with few and narrow layers; family_models.py builds them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

TOKENS = 5


@dataclasses.dataclass(frozen=True)
class Family:
    """A family as people name it, ComfyUI's class for it, and its tiny configuration.

    latent: [C, (T,) H, W]; audio: the shape of the sound beside it, if any; text: width of its prompt's tokens;
    options: shapes of what else its prompts carry, and numbers as they are; references: whether pictures enter
    as tokens that `reference_image_num_tokens` counts.
    """

    name: str
    host_class: str
    config: Mapping[str, Any]
    latent: tuple[int, ...]
    text: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    audio: tuple[int, ...] = ()
    references: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a batch of one latent."""
        return (1, *self.latent)


_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1, "num_head_channels": 16, "num_heads": -1, "use_spatial_transformer": True,
    "context_dim": 16, "legacy": False, "use_checkpoint": False,
}
_XL = {
    **_UNET, "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2], "transformer_depth_middle": 2,
    "num_classes": "sequential",
}
_VIDEO_UNET = {
    **_UNET, "in_channels": 8, "extra_ff_mix_layer": True, "use_spatial_context": True,
    "merge_strategy": "learned_with_images", "merge_factor": 0.0, "video_kernel_size": [3, 1, 1],
    "use_temporal_resblock": True, "use_temporal_attention": True, "disable_temporal_crossattention": False,
    "num_classes": "sequential", "adm_in_channels": 768,
}
_FLUX = {
    "image_model": "flux", "axes_dim": [4, 6, 6], "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2.0,
    "theta": 10000, "out_channels": 16, "in_channels": 16, "qkv_bias": True, "txt_ids_dims": [], "patch_size": 2,
    "context_in_dim": 24, "vec_in_dim": 12, "depth": 1, "depth_single_blocks": 1, "guidance_embed": True,
    "yak_mlp": False, "txt_norm": False,
}
_CHROMA = {
    **{key: value for key, value in _FLUX.items() if key not in ("guidance_embed", "yak_mlp", "txt_norm")},
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 32, "hidden_dim": 48,
    "n_layers": 1, "vec_in_dim": None,
}
_HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2],
    "axes_dim": [4, 6, 6], "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2.0, "theta": 256, "qkv_bias": True,
    "context_in_dim": 24, "vec_in_dim": 768, "depth": 1, "depth_single_blocks": 1, "guidance_embed": True,
    "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}
_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2,
    "in_dim": 16, "out_dim": 16, "freq_dim": 32, "text_dim": 16, "text_len": 8, "patch_size": (1, 2, 2),
    "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}
_COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "model_channels": 48, "num_blocks": 2, "num_heads": 2,
    "concat_padding_mask": True, "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d",
    "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 16,
    "extra_per_block_abs_pos_emb": False,
}
_COSMOS_1 = {
    **_COSMOS, "image_model": "cosmos", "block_config": "FA-CA-MLP", "pos_emb_learnable": False,
    "block_x_format": "THWBD", "affline_emb_norm": True, "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
_COSMOS_2 = {
    **_COSMOS, "image_model": "cosmos_predict2", "pos_emb_learnable": True, "min_fps": 1, "max_fps": 30,
    "rope_enable_fps_modulation": False,
}
_LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 48, "cap_feat_dim": 24, "n_layers": 2,
    "n_refiner_layers": 1, "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 8, 8],
    "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 1.0, "multiple_of": 16,
}
_Z = {
    **_LUMINA, "dim": 256, "axes_dims": [32, 48, 48], "rope_theta": 256.0, "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_LTX = {
    "image_model": "ltxv", "num_layers": 1, "attention_head_dim": 24, "num_attention_heads": 2,
    "cross_attention_dim": 48, "caption_channels": 32, "in_channels": 128,
}
_COG = {
    "image_model": "cogvideox", "num_attention_heads": 1, "attention_head_dim": 64, "time_embed_dim": 32,
    "num_layers": 1, "in_channels": 16, "patch_size": 2, "text_embed_dim": 24,
    "use_learned_positional_embeddings": False, "use_rotary_positional_embeddings": True,
}
_KANDINSKY = {
    "image_model": "kandinsky5", "model_dim": 48, "time_dim": 32, "ff_dim": 64, "visual_embed_dim": 132,
    "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (8, 8, 8), "in_text_dim": 24, "in_text_dim2": 12,
}
_QWEN = {
    "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 16, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
}
_PIXART = {
    "num_heads": 2, "patch_size": 2, "hidden_size": 48, "in_channels": 4, "depth": 1, "model_max_length": 8,
    "input_size": 64, "pe_interpolation": 1, "caption_channels": 24,
}
_POOLED = {"pooled_output": (1, 12)}
_IMAGE, _SDXL, _WAN_LATENT = (16, 8, 8), (4, 8, 8), (16, 3, 8, 6)


def _wan(name: str, host_class: str, latent: tuple[int, ...] = _WAN_LATENT, **config: Any) -> Family:
    return Family(name, host_class, {**_WAN, **config}, latent, 16)


FAMILIES = (
    Family("SD 1.5", "SD15", _UNET, _SDXL, 16),
    Family("SD 2.1", "SD20", {**_UNET, "use_linear_in_transformer": True}, _SDXL, 16),
    Family("SDXL", "SDXL", {**_XL, "adm_in_channels": 24 + 6 * 256}, _SDXL, 16, {"pooled_output": (1, 24)}),
    Family(
        "SDXL Refiner", "SDXLRefiner", {**_XL, "adm_in_channels": 24 + 5 * 256}, _SDXL, 16,
        {"pooled_output": (1, 24)},
    ),
    Family("InstructPix2Pix", "SD15_instructpix2pix", {**_UNET, "in_channels": 8}, _SDXL, 16),
    Family("Stable Video Diffusion", "SVD_img2vid", _VIDEO_UNET, (4, 8, 8), 16),
    Family(
        "SD 3.5", "SD3",
        {
            "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 1, "input_size": None,
            "adm_in_channels": 12, "num_patches": 64, "pos_embed_max_size": 8, "qk_norm": "rms",
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 64}
            },
            "pos_embed_scaling_factor": None,
        },
        _IMAGE, 24, _POOLED,
    ),
    Family(
        "Stable Cascade", "Stable_Cascade_C",
        {
            "stable_cascade_stage": "c", "c_cond": 32, "c_hidden": [32, 32], "nhead": [2, 2],
            "blocks": [[1, 1], [1, 1]], "c_clip_text": 16, "c_clip_text_pooled": 12,
        },
        (16, 8, 8), 16, _POOLED,
    ),
    Family(
        "AuraFlow", "AuraFlow",
        {
            "max_seq": 64, "cond_seq_dim": 24, "n_double_layers": 1, "n_layers": 2, "dim": 64, "n_heads": 2,
            "global_conddim": 64,
        },
        _SDXL, 24,
    ),
    Family(
        "PixArt-α", "PixArtAlpha", {**_PIXART, "image_model": "pixart_alpha", "micro_condition": True}, (4, 40, 40),
        24, {"width": 320, "height": 320},
    ),
    Family(
        "PixArt-Σ", "PixArtSigma", {**_PIXART, "image_model": "pixart_sigma", "micro_condition": False},
        (4, 40, 40), 24,
    ),
    Family(
        "HunyuanDiT", "HunyuanDiT",
        {
            "image_model": "hydit", "depth": 2, "hidden_size": 64, "num_heads": 2, "text_states_dim": 24,
            "text_states_dim_t5": 24, "text_len": TOKENS, "text_len_t5": TOKENS, "size_cond": False,
            "use_style_cond": False,
        },
        _SDXL, 24, {
            "attention_mask": "ones", "attention_mask_mt5xl": "ones", "conditioning_mt5xl": (1, TOKENS, 24),
        },
    ),
    Family("Flux.1", "Flux", _FLUX, _IMAGE, 24, _POOLED, references=True),
    Family("Flux.1 Fill", "FluxInpaint", {**_FLUX, "in_channels": 96}, _IMAGE, 24, _POOLED),
    Family(
        "Flux.1 schnell", "FluxSchnell", {**_FLUX, "guidance_embed": False}, _IMAGE, 24, _POOLED, references=True,
    ),
    Family(
        "Flux.2", "Flux2",
        {
            **_FLUX, "image_model": "flux2", "axes_dim": [4, 4, 4, 4], "theta": 2000, "out_channels": 128,
            "in_channels": 128, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False,
            "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3],
            "patch_size": 1, "vec_in_dim": None,
        },
        (128, 4, 4), 24, references=True,
    ),
    Family(
        "LongCat-Image", "LongCatImage",
        {**_FLUX, "guidance_embed": False, "vec_in_dim": None, "context_in_dim": 3584, "txt_ids_dims": [1, 2]},
        _IMAGE, 3584, references=True,
    ),
    Family("Chroma", "Chroma", _CHROMA, _IMAGE, 24),
    Family(
        "Chroma Radiance", "ChromaRadiance",
        {
            **_CHROMA, "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 16,
            "nerf_hidden_size": 8, "nerf_mlp_ratio": 1, "nerf_depth": 1, "nerf_max_freqs": 2, "nerf_tile_size": 512,
            "nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32, "use_x0": False,
            "use_sequential_txt_ids": False,
        },
        (3, 32, 32), 24,
    ),
    Family(
        "Mochi", "GenmoMochi",
        {
            "image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 48,
            "hidden_size_y": 24, "mlp_ratio_x": 256.0, "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12,
            "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True,
            "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False,
            "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 24, "t5_token_length": TOKENS,
            "rope_theta": 10000.0,
        },
        (12, 2, 8, 8), 24, {"attention_mask": "ones"},
    ),
    Family("LTX-Video", "LTXV", _LTX, (128, 2, 4, 4), 32, {"attention_mask": "ones"}),
    Family(
        "LTX 2", "LTXAV",
        {
            **_LTX, "image_model": "ltxav", "audio_in_channels": 128, "audio_cross_attention_dim": 24,
            "audio_attention_head_dim": 12, "audio_num_attention_heads": 2, "connector_attention_head_dim": 16,
            "connector_num_attention_heads": 2, "connector_num_layers": 1,
        },
        (128, 2, 4, 4), 64, {"attention_mask": "ones"}, audio=(8, 3, 16),
    ),
    Family(
        "MiniMax H3", "MiniMaxH3",
        {
            "image_model": "minimax_h3", "hidden_size": 64, "num_layers": 1, "token_refiner_num_layers": 1,
            "num_attention_heads": 1, "attention_head_dim": 96, "ffn_hidden_size": 32, "latents_dim": 24,
            "audio_latents_dim": 32, "text_dim": 24, "timestep_input_dim": 32, "time_embed_hidden_size": 32,
            "time_embed_dim": 16, "rope_inv_freq_len": 16,
        },
        (24, 2, 4, 4), 24, audio=(32, 2, 3),
    ),
    Family("Hunyuan Video", "HunyuanVideo", _HUNYUAN, (16, 2, 4, 4), 24, {"pooled_output": (1, 768)}),
    Family(
        "Hunyuan Video I2V", "HunyuanVideoI2V", {**_HUNYUAN, "in_channels": 33}, (16, 2, 4, 4), 24,
        {"pooled_output": (1, 768)},
    ),
    Family(
        "Hunyuan Video 1.5", "HunyuanVideo15",
        {
            **_HUNYUAN, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None,
            "vision_in_dim": 1152, "meanflow_sum": True, "use_cond_type_embedding": True, "guidance_embed": False,
        },
        (32, 2, 4, 4), 24, {"pooled_output": (1, 768)},
    ),
    Family(
        "Hunyuan Image 2.1", "HunyuanImage21",
        {
            **_HUNYUAN, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "axes_dim": [8, 8],
            "vec_in_dim": None, "guidance_embed": False,
        },
        (64, 4, 4), 24,
    ),
    Family("Cosmos 1", "CosmosT2V", _COSMOS_1, (16, 2, 4, 4), 1024),
    Family("Cosmos-Predict2", "CosmosT2IPredict2", _COSMOS_2, (16, 1, 4, 4), 1024),
    Family("Cosmos-Predict2 I2V", "CosmosI2VPredict2", {**_COSMOS_2, "in_channels": 17}, (16, 2, 4, 4), 1024),
    Family("Anima", "Anima", {**_COSMOS_2, "image_model": "anima"}, (16, 1, 4, 4), 1024),
    Family("Lumina 2", "Lumina2", _LUMINA, _IMAGE, 24),
    Family("Z-Image", "ZImage", _Z, _IMAGE, 24),
    Family(
        "Z-Image pixel", "ZImagePixelSpace",
        {
            **_Z, "image_model": "zimage_pixel", "patch_size": 4, "in_channels": 3, "decoder_in_channels": 48,
            "decoder_hidden_size": 16, "decoder_num_res_blocks": 1, "decoder_max_freqs": 2,
        },
        (3, 32, 32), 24,
    ),
    Family(
        "PixelDiT", "PixelDiTT2I",
        {
            "image_model": "pixeldit_t2i", "num_groups": 2, "hidden_size": 64, "pixel_hidden_size": 4,
            "pixel_attn_hidden_size": 64, "pixel_num_groups": 2, "patch_depth": 1, "pixel_depth": 1,
            "txt_embed_dim": 24, "txt_max_length": 8,
        },
        (3, 32, 32), 24,
    ),
    _wan("Wan 2.1, 2.2 14B", "WAN21_T2V"),
    _wan("Wan 2.1, 2.2 I2V", "WAN21_I2V", model_type="i2v", in_dim=36),
    _wan("Wan 2.2 5B", "WAN22_T2V", (48, 3, 8, 6), in_dim=48, out_dim=48),
    _wan("Wan VACE", "WAN21_Vace", model_type="vace", vace_layers=1, vace_in_dim=96),
    _wan("Wan Fun Control", "WAN21_FunControl2V", model_type="i2v", in_dim=48),
    _wan("Wan Camera", "WAN21_Camera", model_type="camera", in_dim=32),
    _wan("Wan Animate", "WAN22_Animate", model_type="animate", in_dim=36, num_layers=5),
    _wan("Wan HuMo", "WAN21_HuMo", model_type="humo", audio_token_num=16),
    _wan("Wan SCAIL", "WAN21_SCAIL", model_type="scail", in_dim=20),
    _wan("Wan SCAIL 2", "WAN21_SCAIL2", model_type="scail2", in_dim=20),
    _wan("Wan S2V", "WAN22_S2V", model_type="s2v", audio_inject_layers=[0]),
    _wan("WanDancer", "WAN22_WanDancer", model_type="wandancer", in_dim=36, audio_inject_layers=[0]),
    Family(
        "HiDream I1", "HiDream",
        {
            "image_model": "hidream", "attention_head_dim": 16, "axes_dims_rope": [8, 4, 4],
            "caption_channels": [20, 24], "max_resolution": [128, 128], "in_channels": 16, "llama_layers": [0, 1],
            "num_attention_heads": 2, "num_routed_experts": 2, "num_activated_experts": 1, "num_layers": 1,
            "num_single_layers": 1, "out_channels": 16, "patch_size": 2, "text_emb_dim": 12,
        },
        _IMAGE, 20, {**_POOLED, "conditioning_llama3": (1, 2, TOKENS, 24)},
    ),
    Family(
        "OmniGen 2", "Omnigen2",
        {
            "image_model": "omnigen2", "axes_dim_rope": [8, 8, 8], "axes_lens": [1024, 1664, 1664],
            "ffn_dim_multiplier": None, "hidden_size": 48, "in_channels": 16, "multiple_of": 16, "norm_eps": 1e-5,
            "num_attention_heads": 2, "num_kv_heads": 1, "num_layers": 2, "num_refiner_layers": 1,
            "out_channels": None, "patch_size": 2, "text_feat_dim": 24, "timestep_scale": 1000.0,
        },
        _IMAGE, 24, {"attention_mask": "ones"},
    ),
    Family(
        "Boogu-Image", "Boogu",
        {
            "image_model": "boogu", "hidden_size": 48, "num_layers": 2, "num_double_stream_layers": 1,
            "num_refiner_layers": 1, "instruction_feat_dim": 24, "num_attention_heads": 2, "num_kv_heads": 1,
            "axes_dim_rope": (8, 8, 8), "multiple_of": 16,
        },
        _IMAGE, 24, {"attention_mask": "ones"},
    ),
    Family("Qwen-Image", "QwenImage", _QWEN, (16, 1, 8, 8), 24, references=True),
    Family(
        "Qwen-Image-Edit 2511", "QwenImage", {**_QWEN, "default_ref_method": "index_timestep_zero"}, (16, 1, 8, 8),
        24, references=True,
    ),
    Family(
        "Mage-Flow", "MageFlow",
        {
            "image_model": "mage_flow", "in_channels": 128, "num_layers": 2, "num_attention_heads": 2,
            "attention_head_dim": 16, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
        },
        (128, 4, 4), 24, references=True,
    ),
    Family(
        "JoyImage", "JoyImage",
        {
            "image_model": "joyimage", "in_channels": 16, "hidden_size": 32, "patch_size": [1, 2, 2],
            "num_layers": 1, "num_attention_heads": 2, "text_dim": 24, "rope_dim_list": [4, 6, 6],
        },
        (16, 1, 8, 8), 24,
    ),
    Family(
        "Ideogram 4", "Ideogram4",
        {
            "image_model": "ideogram4", "in_channels": 128, "num_layers": 1, "num_attention_heads": 2,
            "attention_head_dim": 32, "intermediate_size": 48, "adaln_dim": 16, "llm_features_dim": 24,
            "mrope_section": (6, 5, 5),
        },
        (128, 4, 4), 24,
    ),
    Family(
        "Krea 2", "Krea2",
        {
            "image_model": "krea2", "features": 32, "tdim": 32, "txtdim": 24, "heads": 2, "kvheads": 1,
            "multiplier": 2, "layers": 2, "txtlayers": 2, "txtheads": 2, "txtkvheads": 2,
        },
        (16, 1, 8, 8), 48, {"reference_latents_method": "index"}, references=True,
    ),
    Family(
        "Lens", "Lens",
        {
            "image_model": "lens", "in_channels": 128, "out_channels": 32, "num_layers": 1,
            "num_attention_heads": 2, "attention_head_dim": 16, "enc_hidden_dim": 12, "axes_dims_rope": (4, 6, 6),
            "multi_layer_encoder_feature": True, "selected_layer_index": (0, 1),
        },
        (128, 4, 4), 24,
    ),
    Family("Kandinsky 5", "Kandinsky5", _KANDINSKY, (16, 2, 4, 4), 24, _POOLED),
    Family(
        "Kandinsky 5 Image", "Kandinsky5Image", {**_KANDINSKY, "visual_embed_dim": 64}, (16, 4, 4), 24, _POOLED,
    ),
    Family(
        "ERNIE-Image", "ErnieImage",
        {
            "image_model": "ernie", "hidden_size": 48, "num_attention_heads": 2, "num_layers": 1,
            "ffn_hidden_size": 64, "text_in_dim": 24, "rope_axes_dim": (8, 8, 8),
        },
        (128, 4, 4), 24,
    ),
    Family("CogVideoX", "CogVideoX_T2V", _COG, (16, 2, 4, 4), 24),
    Family("CogVideoX I2V", "CogVideoX_I2V", {**_COG, "in_channels": 32}, (16, 2, 4, 4), 24),
)
