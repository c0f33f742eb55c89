"""What a node tells: lines in the log, and a text on it where a graph runs."""

import logging
import sys
import types

import pytest
from comfy_execution.utils import CurrentNodeContext
from pack.nodes.messages import tell


@pytest.fixture
def shown(monkeypatch):
    """What the host was asked to show, as (text, node id)."""
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
            tell("Train", ["a doubt"])
            tell("Train", [])
            tell("training", ["peak memory"])
    assert shown == [
        (text, node) for node in ("1", "2", "2") for text in ("a doubt", "a doubt\npeak memory")
    ]


def test_what_is_said_of_every_item_of_a_list_is_shown_once(shown):
    for index in range(3):
        with CurrentNodeContext("c", "1", index):
            tell("Prepare Reference", ["no face was found"])
    assert {text for text, _ in shown} == {"no face was found"}
