"""The node that shows why a result is as it is: what a method recorded of the run that made it."""

from comfy_api.latest import io

from ..explanations import NODE
from ..inputs.checked import CheckedNode
from ..messages import pictures, tell
from ..patching import models
from . import drawing


class UnderstudyExplain(CheckedNode):
    """One labelled picture of what happened in a sampling run, and the same in words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE, display_name="Explain Result",
            category="Understudy/Checks",
            description="Shows why a result looks as it does: how much each frame attended to the reference, by "
            "block and step, or which masks an edit used over time. Nothing is recorded unless it is connected.",
            search_aliases=[
                "why", "attention map", "debug", "interpretability", "explainability", "show mask", "heat map",
                "説明", "注意マップ", "解释", "注意力",
            ],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The output of Apply Video Identity or Identity Mask Blend that the sampler uses.",
                ),
                io.Latent.Input("samples", tooltip="The sampler's output, as it is."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="One picture with labels, for Save Image."),
                io.String.Output(display_name="text", tooltip="The same in words, with what the recording cost."),
            ],
        )

    @classmethod
    def execute(cls, model, samples) -> io.NodeOutput:
        explainers = [attached for attached in models.attachments(model) if hasattr(attached, "explain")]
        if not explainers:
            raise ValueError(
                "model has nothing to explain: connect the output of Apply Video Identity or Identity Mask Blend, "
                "the same one as the sampler's"
            )
        explanations = [attached.explain(samples["samples"]) for attached in explainers]
        image = drawing.draw(explanations)
        text = "\n".join(line for explanation in explanations for line in (explanation.title, *explanation.lines))
        tell("Explain Result", [line for explanation in explanations for line in explanation.lines])
        preview = pictures("Explain Result", image, cls)
        return io.NodeOutput(image, text, ui=preview and preview.as_dict())


NODES = [UnderstudyExplain]
