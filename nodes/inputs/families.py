"""What people call the family of a MODEL, and what serves a family that a method cannot: for messages alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# ComfyUI's classes in comfy.supported_models whose names people would not know.
_NAMES = {
    "SD15": "SD 1.5", "SD20": "SD 2.1", "SD3": "SD 3.5", "Flux": "Flux.1", "FluxInpaint": "Flux.1 Fill",
    "FluxSchnell": "Flux.1 schnell", "Flux2": "Flux.2", "LTXV": "LTX-Video", "LTXAV": "LTX 2", "ZImage": "Z-Image",
    "ZImagePixelSpace": "Z-Image", "Lumina2": "Lumina 2", "QwenImage": "Qwen-Image", "HiDream": "HiDream I1",
    "HunyuanVideo": "Hunyuan Video", "HunyuanVideo15": "Hunyuan Video 1.5", "HunyuanImage21": "Hunyuan Image 2.1",
    "Kandinsky5": "Kandinsky 5", "Kandinsky5Image": "Kandinsky 5", "Krea2": "Krea 2", "GenmoMochi": "Mochi",
    "CosmosT2V": "Cosmos 1", "CosmosT2IPredict2": "Cosmos-Predict2", "CosmosI2VPredict2": "Cosmos-Predict2",
    "WAN21_T2V": "Wan 2.1", "WAN21_I2V": "Wan 2.1 I2V", "WAN22_T2V": "Wan 2.2 5B", "WAN22_S2V": "Wan S2V",
    "MiniMaxH3": "MiniMax H3", "CogVideoX_T2V": "CogVideoX", "CogVideoX_I2V": "CogVideoX",
    "Stable_Cascade_C": "Stable Cascade", "SVD_img2vid": "Stable Video Diffusion", "ErnieImage": "ERNIE-Image",
    "MageFlow": "Mage-Flow", "LongCatImage": "LongCat-Image", "Omnigen2": "OmniGen 2", "Boogu": "Boogu-Image",
    "ChromaRadiance": "Chroma Radiance", "PixelDiTT2I": "PixelDiT", "Ideogram4": "Ideogram 4",
    "WAN21_Vace": "Wan VACE", "WAN21_FunControl2V": "Wan Fun Control", "WAN21_Camera": "Wan Camera",
    "WAN22_Animate": "Wan Animate", "WAN21_HuMo": "Wan HuMo", "WAN21_SCAIL": "Wan SCAIL",
    "WAN21_SCAIL2": "Wan SCAIL 2", "WAN22_WanDancer": "WanDancer", "HunyuanVideoI2V": "Hunyuan Video I2V",
    "SDXLRefiner": "SDXL Refiner", "SD15_instructpix2pix": "InstructPix2Pix",
    "SDXL_instructpix2pix": "SDXL InstructPix2Pix", "CosmosI2V": "Cosmos 1", "CogVideoX_Inpaint": "CogVideoX",
    "HunyuanVideoSkyreelsI2V": "SkyReels I2V", "WAN22_Camera": "Wan Camera", "WAN21_FlowRVS": "Wan FlowRVS",
    "WAN21_CausalAR_T2V": "Wan Causal Forcing", "HiDreamO1": "HiDream O1", "SD_X4Upscaler": "SD x4 Upscaler",
    "LotusD": "Lotus", "Stable_Zero123": "Zero123", "SV3D_u": "SV3D", "SV3D_p": "SV3D",
    "Stable_Cascade_B": "Stable Cascade", "HunyuanVideo15_SR_Distilled": "Hunyuan Video 1.5 SR",
    "HunyuanImage21Refiner": "Hunyuan Image 2.1 Refiner",
}
# Those in which pictures can enter as tokens beside the sampled one; Reference Weight knows the rows of the first.
_WEIGHABLE = ("Flux", "FluxSchnell", "Flux2", "LongCatImage", "QwenImage", "Krea2", "MageFlow")
_SHOWN = ("Omnigen2", "Boogu", "JoyImage")
# What names of files that need few steps hold; Flux.2 klein is one where it is not called base.
_FEW_STEPS = re.compile(
    r"turbo|lightning|schnell|distil|lightx2v|(?<![a-z])(?:lcm|dmd2?|hyper|fast|klein(?!.*base))(?![a-z])"
    r"|(?<![a-z0-9])\d\d?[-_ ]?steps?(?![a-z])", re.IGNORECASE,
)


def family(model: Any) -> str:
    """The family of a MODEL as people name it, or ComfyUI's name of its class."""
    return family_of_class(model.model.model_config)


def family_of_class(model_config: Any) -> str:
    """As `family`, where a run has only the model's configuration."""
    name = type(model_config).__name__
    return _NAMES.get(name, name)


def identity_instead(model: Any) -> str:
    """What keeps a person in this family, where our own way does not exist."""
    name = _class_name(model)
    if name.startswith("LTX"):
        return "for its faces and voices use ComfyUI's LTXVAddGuide and LTXVReferenceAudio"
    if name == "MiniMaxH3":
        return "for its faces and voices use ComfyUI's MiniMax H3 Reference to Video"
    if name in _WEIGHABLE:
        return "show it pictures with ComfyUI's Reference Latent, and set their weight with Reference Weight"
    if name in _SHOWN:
        return "show it pictures with ComfyUI's Reference Latent"
    return "train a LoRA of the person with Train Identity Prior"


def check_one_latent(model: Any, what: str) -> None:
    """Raises ValueError, naming the family and what to use instead, where a MODEL samples video and sound in one."""
    if _class_name(model) in ("LTXAV", "MiniMaxH3"):
        raise ValueError(
            f"model is {family(model)}, whose latents are video and sound in one, and {what} is for pictures or "
            f"videos alone: {identity_instead(model)}"
        )


def check_makes_pictures(model_config: Any, what: str) -> None:
    """Raises ValueError, naming the family and what to use instead, where a video goes in and its mask comes out."""
    if type(model_config).__name__ == "WAN21_FlowRVS":
        raise ValueError(
            f"model is {family_of_class(model_config)}, which turns a video into a mask, and {what} is for pictures "
            "and videos: use one that makes them, such as Wan 2.1"
        )


def sign_of_few_steps(model: Any) -> str:
    """What says that a MODEL is distilled to sample in a few steps, as words after "since"; empty where nothing does.

    The weights themselves do not tell: what counts is the family, and the name of the file as ComfyUI loaded it.
    """
    if _class_name(model) in ("FluxSchnell", "HunyuanVideo15_SR_Distilled"):
        return f"{family(model)} needs few steps"
    if model.model.model_config.unet_config.get("meanflow"):
        return "it has a layer that tells it how far a step goes"
    _load, arguments, *_index = model.cached_patcher_init or (None, ())
    name = Path(arguments[0]).name if arguments and isinstance(arguments[0], str) else ""
    return f"its file is called {name}" if _FEW_STEPS.search(name) else ""


def _class_name(model: Any) -> str:
    return type(model.model.model_config).__name__
