"""A casting sheet in a real server: repeated runs finish it, a killed one goes on, the end blocks what follows."""

import math
import time

import pytest
from faults import prompts
from faults.prompts import sheet
from launcher.server import Server
from PIL import Image


def saved(server: Server) -> list:
    return sorted((server.base / "output" / "casting").glob("theatre_*.png"))


def run(server: Server, prompt: dict) -> tuple[int, str]:
    """How many pictures a run saved, and what sheet and check said of it, "" where they had nothing to do."""
    return result(server.queue(prompt))


def result(entry: dict) -> tuple[int, str]:
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    outputs = entry["outputs"]
    told = "\n".join(outputs.get(name, {}).get("text", [""])[0] for name in ("sheet", "check"))
    return len(outputs.get(prompts.RESULT, {}).get("images", ())), told


def grey_cells(server: Server, columns: int = 2, rows: int = 2) -> int:
    """How many items the contact sheet shows as not there."""
    with Image.open(server.base / "output" / "casting" / "theatre_contact_sheet.jpg") as contact:
        assert contact.size == (220 + columns * 96, 16 + rows * 96)
        cells = [contact.crop((220 + 96 * i + 8, 16 + 96 * j + 8, 220 + 96 * i + 88, 16 + 96 * j + 88))
                 for i in range(columns) for j in range(rows)]
    return sum(max(high - low for low, high in cell.getextrema()) < 8 for cell in cells)


def test_repeated_runs_finish_a_sheet_and_a_torn_file_is_made_again(fault_server):
    """After each run, and not one later, the contact sheet shows what is there."""
    prompt = sheet(fault_server, ["red robot", "blue cat"], ["waving", "sitting"], ["on a beach"], 3)
    count, told = run(fault_server, prompt)
    assert count == 3 and "0 of 4 are there, 3 are made now" in told
    assert grey_cells(fault_server) == 1
    torn = saved(fault_server)[0]
    torn.write_bytes(torn.read_bytes()[:-20])
    count, told = run(fault_server, prompt)
    assert count == 2 and "2 of 4 are there, 2 are made now" in told and "1 files in the folder are damaged" in told
    assert grey_cells(fault_server) == 0
    count, told = run(fault_server, prompt)
    assert count == 0 and "all 4 are there" in told and "what follows does not run" in told
    assert run(fault_server, prompt)[0] == 0
    stems = {path.name[: -len("_00001_.png")] for path in saved(fault_server)}
    assert len(stems) == 4 and len(saved(fault_server)) == 5
    assert grey_cells(fault_server) == 0


def test_the_sheet_drawn_after_is_shown_on_the_node_and_makes_nothing_run(fault_server):
    prompt = sheet(fault_server, ["green fox"], ["waving", "sitting"], ["at night"], 2)
    prompt["sheet"]["inputs"]["filename_prefix"] = "casting/alone"
    body = {"prompt": prompt, "partial_execution_targets": ["sheet"]}
    entry = fault_server.wait(fault_server.post("/prompt", body)["prompt_id"])
    assert set(entry["outputs"]) == {"sheet"}, "a sheet that is run alone does not sample"
    entry = fault_server.queue(prompt)
    (after,) = set(entry["outputs"]) - {"sheet", prompts.RESULT}
    assert entry["meta"][after]["display_node"] == "sheet"
    assert entry["outputs"][after]["text"] == ["2 of 2 are there"]
    assert entry["outputs"][after]["images"][0]["filename"] == "alone_contact_sheet.jpg"


def test_a_file_of_the_sheet_goes_into_its_loader(fault_server):
    """The identity's output is a COMBO, which the Load node's list takes; {subject} is filled in from the file."""
    (prior,) = [name for name in fault_server.model_names("loras") if name.startswith("puppets_sd_identity")]
    prompt = sheet(fault_server, [prior], ["waving"], ["on a beach"], 2)
    prompt["sheet"]["inputs"]["filename_prefix"] = "casting/prior"
    prompt["prior"] = prompts.node(
        "UnderstudyLoadIdentityPrior", model=[prompts.LOADER, 0], lora_name=["sheet", 0], strength=1.0,
        **{name: value for name, value in prompts.defaults(fault_server, "UnderstudyLoadIdentityPrior").items()
           if name not in ("model", "lora_name", "strength")},
    )
    prompt["positive"] = prompts.node(
        "UnderstudyEncodeIdentity", clip=[prompts.LOADER, 1], identity=["prior", 1], text=["sheet", 1]
    )
    prompt[prompts.SAMPLER]["inputs"]["model"] = ["prior", 0]
    assert run(fault_server, prompt)[0] == 1
    assert "all 1 are there" in run(fault_server, prompt)[1]


@pytest.mark.parametrize(("pass_above", "kept"), [(-1.0, 2), (1.0, 0)])
def test_an_identity_check_keeps_what_passes_and_the_rest_is_tried_twice(fault_server, pass_above, kept):
    """The picture that passes has the name that the sheet looks for; one that does not is not tried for ever."""
    values = prompts.defaults(fault_server, "UnderstudyCastingSheet")
    lines = {"identities": "test 1 = one\ntest 2 = two", "actions": "waving", "scenes": "beach", "seeds": "5"}
    values |= {**lines, "filename_prefix": f"casting/check{kept}"}
    prompt = {
        "sheet": prompts.node("UnderstudyCastingSheet", **values, prompt="{identity}, {action}"),
        "vision": prompts.node("UnderstudyLoadPuppetVision"),
        "known": prompts.node("EmptyImage", width=64, height=64, batch_size=1, color=0),
    }
    puppet = prompts.defaults(fault_server, "UnderstudyPuppet")
    # The words of an identity, an action and a scene go into a text, and into lists.
    puppet |= {"identity": ["sheet", 0], "action": ["sheet", 2], "scene": ["sheet", 3], "seed": ["sheet", 4]}
    prompt["puppet"] = prompts.node("UnderstudyPuppet", **puppet)
    links = {"clip_vision": ["vision", 0], "references": ["known", 0], "images": ["puppet", 0], "names": ["sheet", 5]}
    links["groups"] = ["sheet", 1]
    prompt["check"] = prompts.node("UnderstudyIdentityCheck", pass_above=pass_above, reject_below=-1.0, **links)
    prompt[prompts.RESULT] = prompts.node("SaveImage", images=["check", 0], filename_prefix=["check", 4])
    prompt["others"] = prompts.node("PreviewImage", images=["check", 1])
    entry = fault_server.queue(prompt)
    (drawn,) = [outputs for name, outputs in entry["outputs"].items() if name.startswith("sheet.")]
    assert drawn["text"] == [f"{kept} of 2 are there"], "though one of the two routes is empty"
    runs = [result(entry), *(run(fault_server, prompt) for _ in range(3))]
    assert [count for count, _ in runs] == [kept, 0, 0, 0]
    assert "groups, the worst first:" in runs[0][1] and f"{kept} of 2 passed" in runs[0][1]
    if kept:
        assert "all 2 are there" in runs[1][1]
    else:
        assert "2 were sent on before and are not there" in runs[1][1] and "2 are made now" in runs[1][1]
        assert "nothing is sent on" in runs[2][1] and "change at_once or an entry" in runs[2][1]


IDENTITIES = [f"{colour} {who}" for who in ("robot", "cat", "bear", "fox") for colour in ("red", "blue", "green")]
ACTIONS = [f"{action} {manner}" for action in ("waving", "sitting", "jumping", "walking", "bowing")
           for manner in ("left", "right", "fast", "slowly")]
SCENES = ["on a beach", "in a forest", "at night"]


@pytest.mark.parametrize(("counts", "at_once", "deaths"), [
    ((2, 2, 1), 2, [2]), pytest.param((12, 20, 3), 48, [4, 9], marks=pytest.mark.soak)
])
def test_a_sheet_is_finished_though_the_server_is_killed(comfy_path, tmp_path, counts, at_once, deaths):
    """Killed in the middle of these runs, and started again."""
    lines = [every[:count] for every, count in zip((IDENTITIES, ACTIONS, SCENES), counts, strict=True)]
    total, runs, killed = math.prod(counts), 0, True
    while killed:
        killed = False
        with Server(comfy_path, tmp_path, cpu=True) as server:
            prompt = sheet(server, *lines, at_once)
            while not killed:
                runs += 1
                assert runs < 3 + len(deaths) + 2 * total / at_once
                if runs in deaths:
                    before = len(saved(server))
                    server.submit(prompt)
                    while len(saved(server)) == before and server.alive():
                        time.sleep(0.01)
                    server.process.kill()
                    server.process.wait()
                    killed = True
                elif not run(server, prompt)[0]:
                    break
    whole = [path.name.rsplit("_", 2)[0] for path in saved(server) if prompts.is_whole(path)]
    assert len(set(whole)) == total, "none is lost, a killed writer's among them"
    assert len(whole) == total and runs > max(deaths), "none is made twice"
