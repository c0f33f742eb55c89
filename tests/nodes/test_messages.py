"""What a node says reaches the log and, where a host runs it, the browser."""

import asyncio
import json
import logging
import struct

import aiohttp
from comfy_execution.utils import CurrentNodeContext
from faults import prompts
from pack.nodes import messages

TEXT = 3  # the host's BinaryEventTypes.TEXT


def shown(server, prompt):
    """(node, text) of every text that the server sends to the browser that queued the prompt."""

    async def listen():
        found, client = [], "the browser"
        address = f"{server.url}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
            server.post("/prompt", {"prompt": prompt, "client_id": client})
            while True:
                message = await socket.receive(timeout=120)
                if message.type is aiohttp.WSMsgType.BINARY:
                    kind, length = struct.unpack_from(">II", message.data)
                    if kind == TEXT:
                        found.append((message.data[8 : 8 + length].decode(), message.data[8 + length :].decode()))
                    continue
                event = json.loads(message.data)
                assert event["type"] != "execution_error", event
                if event["type"] == "execution_success":
                    return found

    return asyncio.run(listen())


def test_a_running_node_shows_what_it_says(server):
    boxes = {"size": 64, "crop_factor": 1.5}
    prompt = {
        "load": prompts.node("LoadImage", image="example.png"),
        "who": prompts.node("UnderstudyPrepareReference", image=["load", 0], **boxes),
        "show": prompts.node("PreviewImage", images=["who", 0]),
    }
    ((node, text),) = shown(server, prompt)
    assert node == "who" and "whole picture" in text
    assert f"Understudy, Prepare Reference: {text}" in server.log.read_text(encoding="utf-8")


def test_lines_are_logged_each_and_shown_together(monkeypatch, caplog):
    import server

    sent = []
    monkeypatch.setattr(
        server.PromptServer, "instance", type("Browser", (), {"send_progress_text": lambda _s, *a: sent.append(a)})(),
        raising=False,
    )
    with CurrentNodeContext("prompt", "7"), caplog.at_level(logging.INFO):
        messages.tell("Load", ["one", "two"], logging.WARNING)
        messages.tell("Load", [])
    assert sent == [("one\ntwo", "7")]
    said = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert said == [(logging.WARNING, f"Understudy, Load: {line}") for line in ("one", "two")]


def test_without_a_host_that_runs_a_graph_it_is_logged_alone(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "server", None)
    with caplog.at_level(logging.INFO):
        messages.tell("Load", ["one"])
    assert caplog.messages == ["Understudy, Load: one"]
