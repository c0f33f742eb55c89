"""Nodes of the action identifier (ADI): load one, encode prompts with it, let a model read them."""

from comfy_api.latest import io

from ..consent import gate
from ..inputs import widgets
from ..inputs.checked import CheckedNode
from . import encoding, files, sampling
from .config import HIGHEST_STRENGTH

CATEGORY = "Understudy/Action identifier"
ACTION = io.Custom("UNDERSTUDY_ACTION")
_MOST_ACTIONS = 100  # as many as ComfyUI allows


class UnderstudyLoadActionIdentifier(widgets.LoadNode):
    """An identifier from a file, or an embedding as one."""

    FOLDER, FILE = files.FOLDER, "action_name"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyLoadActionIdentifier", display_name="Load Action Identifier (ADI)",
            category=CATEGORY,
            description="Loads a trained action. An ordinary textual-inversion embedding is loaded as one that is "
            "equal in all layers; its placeholder is its file's name in angle brackets.",
            search_aliases=[
                "ADI", "load action", "load embedding", "textual inversion", "import", "motion", "動作",
                "动作",
            ],
            inputs=[
                cls.file("A file in models/action_identifiers or output/action_identifiers, or an embedding."),
                io.String.Input(
                    "placeholder", default="", optional=True, advanced=True,
                    tooltip="Another word for the action in prompts, for example where two actions share one. Empty "
                    "leaves it as it is.",
                ),
                cls.purpose(),
            ],
            outputs=[ACTION.Output(display_name="action", tooltip="Connect it to Encode Action.")],
        )

    @classmethod
    def execute(cls, action_name, placeholder="", purpose=gate.UNSPECIFIED) -> io.NodeOutput:
        action = files.load(action_name, placeholder.strip())
        gate.check_used("Load Action Identifier", action.consent, purpose)
        return io.NodeOutput(action)


class UnderstudyEncodeAction(CheckedNode):
    """A prompt in which placeholders stand for trained actions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyEncodeAction", display_name="Encode Action (ADI)",
            category=CATEGORY,
            description="Encodes a prompt with trained actions, as CLIP Text Encode does without them. The model "
            "that samples needs Apply Action Identifier.",
            search_aliases=[
                "ADI", "prompt", "text encode", "action", "textual inversion", "P+", "motion", "動作",
                "动作",
            ],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that the actions were trained with."),
                io.String.Input(
                    "text", multiline=True,
                    tooltip="The prompt, with each placeholder where its action belongs. Weights and embeddings "
                    "work. '{subject}' becomes the identity's words.",
                ),
                io.Autogrow.Input(
                    "actions", tooltip="The actions, from Load or Train Action Identifier; any number.",
                    template=io.Autogrow.TemplatePrefix(
                        ACTION.Input("action", tooltip="An action whose placeholder is in the text."),
                        prefix="action", min=1, max=_MOST_ACTIONS,
                    ),
                ),
                widgets.IDENTITY.Input(
                    "identity", optional=True,
                    tooltip="An identity prior. '{subject}' in the text stands for its token and class noun.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="Connect it to positive, or to nodes that combine prompts.")],
        )

    @classmethod
    def execute(cls, clip, text, actions, identity=None) -> io.NodeOutput:
        connected = [action for action in actions.values() if action is not None]
        expanded = encoding.expand_subject(text, identity)
        conditioning, contexts = encoding.encode(clip, expanded, connected)
        if expanded != text:
            conditioning = encoding.tag_subject(conditioning, clip, expanded, connected, identity)
        return io.NodeOutput(sampling.attach_contexts(conditioning, contexts, connected))


class UnderstudyApplyActionIdentifier(CheckedNode):
    """A model whose layers read trained actions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyApplyActionIdentifier", display_name="Apply Action Identifier (ADI)",
            category=CATEGORY,
            description="Lets a model read the actions in prompts from Encode Action, each of its layers with its "
            "own tokens. Plain prompts are read as before.",
            search_aliases=["ADI", "action", "apply embedding", "layer-wise", "P+", "motion", "動作", "动作"],
            inputs=[
                io.Model.Input("model", tooltip="An SD, SDXL or Wan model; it is not modified."),
                widgets.strength(
                    "How far to go from the initial word to the action: 0 is the word, 1 the action, 2 twice "
                    "as far. Applies to all actions in the prompts.", highest=HIGHEST_STRENGTH,
                ),
            ],
            outputs=[io.Model.Output(tooltip="Connect it to a sampler or a guider.")],
        )

    @classmethod
    def execute(cls, model, strength) -> io.NodeOutput:
        return io.NodeOutput(sampling.apply(model, strength))


NODES = [UnderstudyLoadActionIdentifier, UnderstudyEncodeAction, UnderstudyApplyActionIdentifier]
