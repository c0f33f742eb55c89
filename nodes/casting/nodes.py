"""The node that sends identities, actions, scenes and seeds on, a few at a time, until every file is there."""

import json
import logging
import threading
from collections import Counter, OrderedDict

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder
from comfy_execution.utils import get_executing_context

from ..inputs.checked import CheckedNode
from ..messages import tell
from ..training.inputs import single_values
from . import folder, method

CATEGORY = "Understudy/Casting"
_LISTS = ("identities", "actions", "scenes", "seeds")
_SETTINGS = ("filename_prefix", "skip_existing", "at_once")
_OUTPUTS, _STEM = 6, 5  # how many, and the number of file_stem
_MOST_LINKS = 64  # for which the drawing of a sheet waits
_REMEMBERED_SHEETS = 32
# For a list of a node as well as for its texts: ComfyUI lets neither type into the other.
_WORDS = io.Custom("COMBO,STRING")
# How often each stem of a sheet was sent on since ComfyUI started.
_sent: OrderedDict[tuple, Counter] = OrderedDict()
_lock = threading.Lock()


class _Sheet:
    """What a node's values ask for, and what of it is there."""

    def __init__(self, identities, actions, scenes, seeds, filename_prefix, skip_existing, at_once, prompt):
        self.folder, self.name = folder.split_prefix(filename_prefix)
        self.items = method.items(identities, actions, scenes, seeds, prompt, self.name)
        self.files, self.damaged = folder.present(self.folder)
        key = self.folder, skip_existing, at_once, tuple(item.stem for item in self.items)
        with _lock:
            self.sent = _sent.setdefault(key, Counter())
            _sent.move_to_end(key)
            while len(_sent) > _REMEMBERED_SHEETS:
                _sent.popitem(last=False)
        self.next, self.failed = method.upcoming(self.items, self.files, self.sent, at_once, skip_existing)

    @property
    def there(self) -> int:
        return sum(item.stem in self.files for item in self.items)

    @property
    def state(self) -> str:
        return f"{self.there} of {len(self.items)} are there"

    def words(self, skip_existing: bool) -> list[str]:
        """What to tell on the node."""
        if self.next:
            lines = [f"{self.state}, {len(self.next)} are made now"]
        elif self.there == len(self.items):
            lines = [f"all {len(self.items)} are there, so nothing is sent on: what follows does not run"]
        else:
            lines = [f"{self.state}, and nothing is sent on: what follows does not run"]
        if self.failed:
            lines.append(
                f"{len(self.failed)} were sent on before and are not there: an error or an Identity Check held them "
                f"back. Each is tried {method.TRIES} times; change at_once or an entry to try again"
            )
        elif not skip_existing and not self.next:
            lines.append("each was made again once: change at_once or an entry to begin again")
        if self.damaged:
            lines.append(
                f"{self.damaged} files in the folder are damaged, as by a stop in mid-write, and do not count"
            )
        return lines


class UnderstudyCastingSheet(CheckedNode):
    """The next items of a sheet that are not there yet, as lists."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def entries(id: str, default: str, tooltip: str) -> io.String.Input:
            return io.String.Input(id, multiline=True, default=default, tooltip=tooltip)

        return io.Schema(
            node_id="UnderstudyCastingSheet", display_name="Casting Sheet",
            category=CATEGORY,
            description="Makes every identity in every action and scene. Each run sends on the next few that have no "
            "file yet: repeat the queue until all are there. A stopped sheet goes on where it was.",
            search_aliases=[
                "batch", "grid", "XY plot", "contact sheet", "variants", "prompt list", "queue many", "combinations",
                "resume", "一覧", "組み合わせ", "批量", "组合",
            ],
            is_input_list=True, is_output_node=True, enable_expand=True,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                entries(
                    "identities", "", "One a line: words for someone, the name of a file for a Load node, or "
                    "file = words. A file alone is {subject} in the prompt, which Encode Identity fills in.",
                ),
                entries("actions", "", "One a line: what is done, in the prompt's words. Empty: no action."),
                entries("scenes", "", "One a line: where it is, in the prompt's words. Empty: no scene."),
                io.String.Input("seeds", default="0", tooltip="Numbers and ranges, such as 0-3, 7. One item each."),
                io.String.Input(
                    "filename_prefix", default="casting/sheet",
                    tooltip="Folder and beginning of the file names in output. Connect file_stem to the saving node.",
                ),
                io.Boolean.Input(
                    "skip_existing", default=True,
                    tooltip="Leaves out what has a complete file in the folder. When off, everything is made once "
                    "more, and files get the next number.",
                ),
                io.Int.Input(
                    "at_once", default=8, min=1, max=1000,
                    tooltip="Items per run. Nothing is saved before all of them are sampled: fewer lose less if the "
                    "run is stopped.",
                ),
                io.String.Input(
                    "prompt", multiline=True, default="a photo of {identity} {action} {scene}", optional=True,
                    tooltip="The prompt of each item, with {identity}, {action} and {scene} for its words.",
                ),
            ],
            outputs=[
                _WORDS.Output(
                    display_name="identity", is_output_list=True,
                    tooltip="The identity's file, for a Load node; its words where there is no file. Fits lists and "
                    "texts.",
                ),
                io.String.Output(
                    display_name="prompt", is_output_list=True,
                    tooltip="The whole prompt. Connect it to CLIP Text Encode or Encode Identity.",
                ),
                _WORDS.Output(
                    display_name="action", is_output_list=True,
                    tooltip="The action's words. Fits lists, such as a puppet's actions, and texts.",
                ),
                _WORDS.Output(
                    display_name="scene", is_output_list=True, tooltip="The scene's words. Fits lists and texts.",
                ),
                io.Int.Output(display_name="seed", is_output_list=True, tooltip="Connect it to the sampler's seed."),
                io.String.Output(
                    display_name="file_stem", is_output_list=True,
                    tooltip="Connect it to filename_prefix of the node that saves: the sheet looks for these files.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **lists) -> str | float:
        """What comes next: as long as something does, a repeated run runs."""
        if any(None in (lists.get(name) or (None,)) for name in (*_LISTS, *_SETTINGS)):
            return float("nan")  # what comes through a link is known only in the run
        sheet = _Sheet(**_values(lists))
        return str([(item.stem, sheet.sent[item.stem]) for item in sheet.next])

    @classmethod
    def execute(cls, **lists) -> io.NodeOutput:
        values = _values(lists)
        sheet = _Sheet(**values)
        lines = sheet.words(values["skip_existing"])
        tell("Casting Sheet", lines)
        shown = {"text": ("\n".join(lines),), **_contact_sheet(sheet)}
        sheet.sent.update(item.stem for item in sheet.next)
        if not sheet.next:
            return io.NodeOutput(*[[ExecutionBlocker(None)]] * _OUTPUTS, ui=shown)
        rows = [
            (item.identity, item.prompt, item.action, item.scene, item.seed, sheet.folder + item.stem)
            for item in sheet.next
        ]
        return io.NodeOutput(*map(list, zip(*rows, strict=True)), ui=shown, expand=_drawn_after(cls.hidden, values))


class UnderstudyCastingSheetAfter(CheckedNode):
    """Draws a contact sheet again in the same run, after what was saved; each Casting Sheet adds one to the run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyCastingSheetAfter", display_name="Casting Sheet, drawn again", category=CATEGORY,
            is_dev_only=True, is_output_node=True, is_input_list=True, outputs=[],
            inputs=[
                io.String.Input("sheet", tooltip="The values of the Casting Sheet, in JSON."),
                # Only waited for: a value might be the block of an empty route.
                *[io.AnyType.Input(f"saved_{i}", optional=True, raw_link=True) for i in range(_MOST_LINKS)],
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs) -> float:
        return float("nan")

    @classmethod
    def execute(cls, sheet, **_links) -> io.NodeOutput:
        drawn = _Sheet(**json.loads(sheet[0]))
        return io.NodeOutput(ui={"text": (drawn.state,), **_contact_sheet(drawn)})


def _contact_sheet(sheet: _Sheet) -> dict:
    """Draw the contact sheet, for the node to show; without one where it cannot be written, and the node says why."""
    try:
        name = folder.write_contact_sheet(sheet.folder, sheet.name, sheet.items, sheet.files)
    except OSError as error:  # the disk is full, say: the items are what counts
        tell("Casting Sheet", [f"the contact sheet could not be written: {error}"], logging.WARNING)
        return {}
    return ui.SavedImages([ui.SavedResult(name, sheet.folder.rstrip("/"), io.FolderType.output)]).as_dict()


def _drawn_after(hidden, values: dict) -> dict | None:
    """A node for this run that waits for what the saving nodes wait for; ComfyUI runs them first, being older."""
    from server import PromptServer  # exists only where ComfyUI runs a graph

    running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    run = get_executing_context().prompt_id
    outputs = next((entry[4] for entry in running if entry[1] == run), ())  # a part of the graph may be run alone
    links = method.links_of_savers(hidden.prompt, hidden.unique_id, _STEM, outputs)
    if not links:
        return None
    graph = GraphBuilder()
    saved = {f"saved_{i}": link for i, link in enumerate(links[:_MOST_LINKS])}
    graph.node("UnderstudyCastingSheetAfter", sheet=json.dumps(values), **saved)
    return graph.finalize()


def _values(lists: dict) -> dict:
    values = single_values({name: lists[name] for name in lists if name not in _LISTS})
    texts = {name: list(lists.get(name) or ()) for name in _LISTS}
    default = UnderstudyCastingSheet.define_schema().inputs[-1].default
    return {"prompt": default, **values, **texts}


NODES = [UnderstudyCastingSheet]
ADDED = [UnderstudyCastingSheetAfter]  # to runs, never by a user
