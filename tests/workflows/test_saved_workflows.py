"""Workflows saved before the order of a node's inputs changed, through comfy-cli's conversion.

The same in the frontend: test_browser.py.
"""

import json

from comfy_cli.workflow_to_api import convert_ui_to_api
from launcher import scripts

SAVED = scripts.ROOT / "tests" / "workflows" / "saved"


def test_a_prompt_switch_saved_with_driving_first_keeps_its_links(server):
    workflow = json.loads((SAVED / "prompt_switch_driving_first.json").read_text(encoding="utf-8"))
    (switch,) = (node for node in workflow["nodes"] if node["type"] == "UnderstudyStepwisePrompt")
    assert [slot["name"] for slot in switch["inputs"]] == ["driving", "target"]
    text_of = {node["id"]: node["widgets_values"] for node in workflow["nodes"] if node["type"] == "CLIPTextEncode"}
    inputs = convert_ui_to_api(workflow, server.object_info())[str(switch["id"])]["inputs"]
    assert text_of[int(inputs["driving"][0])] == text_of[7] and text_of[int(inputs["target"][0])] == text_of[8]
    assert inputs["switch_percent"] == switch["widgets_values"][0]
