"""A node's messages: lines in the log, and a text on the node while a graph runs."""

import ast
import asyncio
import json
import logging
import struct
import sys
import types

import aiohttp
import pytest
from comfy_execution.utils import CurrentNodeContext
from faults import prompts
from launcher import scripts
from pack.nodes import messages
from pack.nodes.messages import tell

TEXT = 3  # ComfyUI's BinaryEventTypes.TEXT


@pytest.fixture
def shown(monkeypatch):
    """What ComfyUI was asked to show, as (text, node id)."""
    sent = []
    server = types.SimpleNamespace(send_progress_text=lambda text, node_id: sent.append((text, node_id)))
    module = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", module)
    return sent


def test_outside_a_graph_it_is_a_line_in_the_log(shown, caplog):
    tell("Train", ["one", "two"], logging.WARNING)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "[Understudy] Train: one"), ("WARNING", "[Understudy] Train: two")
    ]
    assert shown == []


def test_a_later_message_leaves_the_earlier_one_on_the_node(shown):
    for prompt, node in (("a", "1"), ("a", "2"), ("b", "2")):
        with CurrentNodeContext(prompt, node):
            tell("Train", ["a warning"])
            tell("Train", [])
            tell("training", ["peak memory"])
    assert shown == [
        (text, node) for node in ("1", "2", "2") for text in ("a warning", "a warning\npeak memory")
    ]


def test_what_is_said_of_every_item_of_a_list_is_shown_once(shown):
    for index in range(3):
        with CurrentNodeContext("c", "1", index):
            tell("Prepare Reference", ["no face was found"])
    assert {text for text, _ in shown} == {"no face was found"}


def test_without_a_host_that_runs_a_graph_it_is_logged_alone(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "server", None)
    with caplog.at_level(logging.INFO):
        tell("Load", ["one"])
    assert caplog.messages == ["[Understudy] Load: one"]


@pytest.mark.parametrize("path", sorted((scripts.ROOT / "nodes").rglob("*.py")), ids=lambda path: path.stem)
def test_no_warning_is_in_the_log_alone(path):
    """Who looks at the browser does not see the log: `tell` shows a warning on the node, too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {
        call.attr for call in calls
        if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name) and call.value.id == "logging"
    }
    assert not names & {"warning", "warn", "error", "exception", "critical"}


def texts_shown(server, prompt):
    """(node, text) of every text that the server sends to the browser that queued the prompt."""

    async def listen():
        received, client = [], "the browser"
        address = f"{server.url}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
            server.post("/prompt", {"prompt": prompt, "client_id": client})
            while True:
                message = await socket.receive(timeout=120)
                if message.type is aiohttp.WSMsgType.BINARY:
                    kind, length = struct.unpack_from(">II", message.data)
                    if kind == TEXT:
                        received.append((message.data[8 : 8 + length].decode(), message.data[8 + length :].decode()))
                    continue
                event = json.loads(message.data)
                assert event["type"] != "execution_error", event
                if event["type"] == "execution_success":
                    return received

    return asyncio.run(listen())


def test_a_running_node_shows_what_it_says(server):
    boxes = {"size": 64, "crop_factor": 1.5}
    prompt = {
        "load": prompts.node("LoadImage", image="example.png"),
        "who": prompts.node("UnderstudyPrepareReference", image=["load", 0], **boxes),
        "show": prompts.node("PreviewImage", images=["who", 0]),
    }
    ((node, text),) = texts_shown(server, prompt)
    assert node == "who" and "whole picture" in text
    assert f"[Understudy] Prepare Reference: {text}" in server.log.read_text(encoding="utf-8")


def test_a_picture_that_cannot_be_written_is_no_error(monkeypatch, caplog):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(messages.ui, "PreviewImage", full)
    assert messages.pictures("Puppet", None, None) is None
    assert "Puppet: its pictures cannot be shown here" in caplog.text and "No space left" in caplog.text
