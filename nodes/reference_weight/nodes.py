"""The node of Reference Weight: how much a reference picture counts, and where."""

from comfy_api.latest import io

from ..inputs import widgets
from ..inputs.checked import CheckedNode
from . import method, sampling
from .config import HIGHEST_STRENGTH, ReferenceWeightConfig

CATEGORY = "Understudy/Reference weight"
_DEFAULT = ReferenceWeightConfig()


class UnderstudyReferenceWeight(CheckedNode):
    """A model in which one reference picture, or all of them, count more, less, or only in a place."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyReferenceWeight", display_name="Reference Weight",
            category=CATEGORY,
            description="Sets how much a reference picture of an editing model counts, and where: Flux Kontext, "
            "Flux.2, Qwen-Image-Edit, Krea 2 and Mage-Flow. Nothing is trained. Chain it for several references.",
            search_aliases=[
                "reference strength", "reference latent", "Kontext", "Flux.2", "Qwen-Image-Edit", "Krea",
                "image weight", "mask", "参照画像", "参照の強さ", "参考图", "参考强度",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A model that takes reference pictures; it is not modified."),
                io.Int.Input(
                    "reference", default=_DEFAULT.reference, min=0, max=100,
                    tooltip="Which reference of the prompt, counted from 1 in the order of the Reference Latent "
                    "nodes. 0 is all of them.",
                ),
                widgets.strength(
                    "Weight of the reference in attention: 0 is as if it were not there, 1 the plain model bit for "
                    "bit, above 1 stronger.", _DEFAULT.strength, highest=HIGHEST_STRENGTH,
                ),
                *widgets.percent_range(_DEFAULT, "the weight"),
                widgets.numbers("blocks", _DEFAULT.blocks, "Transformer blocks in which the weight acts: 'all'"),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Where in the picture the reference is seen, 0 to 1; of any size. One for all, or one "
                    "per picture of the batch. Without it: everywhere.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="Connect it to a sampler, or to another Reference Weight.")],
        )

    @classmethod
    def execute(cls, model, reference, strength, start_percent, end_percent, blocks, mask=None) -> io.NodeOutput:
        config = ReferenceWeightConfig(reference, strength, start_percent, end_percent, blocks)
        return io.NodeOutput(sampling.apply(model, method.weighing(config, mask)))


NODES = [UnderstudyReferenceWeight]
