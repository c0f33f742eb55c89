"""The short form of tests/capabilities.py: a few families through every node, and what its table must cover."""

import capabilities
import comfy.supported_models
import pytest
from launcher import source
from launcher.scripts import ROOT
from pack.nodes.extension import METHOD_NODES
from support import capability_checks, family_models, family_relatives

# One that reads pictures as tokens, one that makes sound beside its video, one of each kind of cross-attention.
FEW = {"Qwen-Image", "LTX 2", "SD 1.5", "Wan 2.1, 2.2 14B"}
CASES = {
    family.name: capability_checks.Case(family, family_models.build(family))
    for family in family_relatives.EVERY if family.name in FEW
}


@pytest.mark.parametrize("column", capability_checks.CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_a_node_works_on_a_family_or_refuses_it_in_words(name, column):
    """And as the table says."""
    outcome, _ = capability_checks.outcome(CASES[name], column)
    assert _cells()[name][column] == {"works": "+", "refuses": "–"}[outcome]


@pytest.mark.parametrize("column", ["Frequency guidance", "its training"])
def test_a_model_that_turns_a_video_into_a_mask_is_refused(column):
    (family,) = (family for family in family_relatives.EVERY if family.host_class == "WAN21_FlowRVS")
    case = capability_checks.Case(family, family_models.build(family))
    assert capability_checks.outcome(case, column)[0] == capability_checks.REFUSES


def test_a_late_or_nameless_refusal_is_no_refusal(monkeypatch):
    case = CASES["SD 1.5"]

    def late(case):
        case.sample()
        raise ValueError("SD 1.5 cannot")

    def nameless(_case):
        raise ValueError("this model cannot")

    for check, message in ((late, "after sampling had begun"), (nameless, "without its name")):
        monkeypatch.setitem(capability_checks.CHECKS, "Fusion", ((), check))
        with pytest.raises(capability_checks.Refused, match=message):
            capability_checks.outcome(case, "Fusion")


def test_every_node_that_takes_a_model_is_in_the_table():
    takes = {
        node.GET_SCHEMA().node_id for node in METHOD_NODES
        if any(widget.io_type == "MODEL" for widget in node.GET_SCHEMA().inputs)
    }
    tried = {node for nodes, _ in capability_checks.CHECKS.values() for node in nodes}
    assert takes - set(capability_checks.ELSEWHERE) <= tried
    assert tried <= takes | {"UnderstudyFrequencyGuidanceSampler"}


def test_the_table_has_every_family_and_column():
    cells = _cells()
    assert list(cells) == [family.name for family in family_relatives.EVERY]
    assert all(list(row)[1:] == list(capability_checks.CHECKS) for row in cells.values())


def test_every_class_that_comfyui_detects_is_in_the_table_or_named_beside_it(comfy_path):
    """A newer ComfyUI may detect more; the table is of 0.30.0."""
    kinds = comfy.supported_models.models
    detected = {kind.__name__ for kind in kinds if kind.__module__ == "comfy.supported_models"}
    named = [family.host_class for family in family_relatives.EVERY]
    others = [name for names in family_relatives.NOT_TRIED.values() for name in names]
    assert set(named) | set(others) <= detected and not set(named) & set(others)
    if source.version_of(comfy_path) == "0.30.0":
        assert detected <= set(named) | set(others)
    for name in family_relatives.NOT_TRIED["a family of the table in another size"]:
        host_class = getattr(comfy.supported_models, name)
        assert host_class.__base__.__name__ in named and "get_model" not in vars(host_class)


def test_the_first_page_counts_what_the_table_does():
    cells = [cell for row in _cells().values() for cell in list(row.values())[1:]]
    works, count = cells.count("+"), len(cells)
    front, table = (path.read_text(encoding="utf-8") for path in (capabilities.FRONT, capabilities.README))
    (found,) = capabilities.SENTENCE.findall(front)
    assert found == capabilities.sentence(table) and f"of {count} cells {works} work" in found
    assert works + cells.count("–") == count


def _cells() -> dict[str, dict[str, str]]:
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8").partition(capabilities.HEADING)[2]
    lines = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
