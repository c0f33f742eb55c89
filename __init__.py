"""Understudy: keep who someone is, change what they do. ComfyUI loads the pack through `comfy_entrypoint`."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes.extension import UnderstudyExtension

    return UnderstudyExtension()
