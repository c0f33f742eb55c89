"""Inputs that several rooms share are the same in every node that has them, and their words can be read."""

import pytest
from comfy_api.latest import io
from pack.nodes.extension import METHOD_NODES
from pack.nodes.identity_prior.config import AUTO
from pack.nodes.inputs import ranges, widgets

INPUTS = [(node.__name__, given) for node in METHOD_NODES for given in node.GET_SCHEMA().inputs]


def named(*endings):
    return [pytest.param(given, id=f"{node} {given.id}") for node, given in INPUTS if given.id.endswith(endings)]


@pytest.mark.parametrize("given", named("_percent"))
def test_percents_are_thousandths_of_the_schedule(given):
    assert isinstance(given, io.Float.Input)
    assert (given.min, given.max, given.step, given.round) == (0.0, 1.0, 0.001, False)
    assert "fraction of the schedule" in given.tooltip.lower()


@pytest.mark.parametrize("given", named("strength"))
def test_strengths_reach_from_off_to_as_trained(given):
    assert given.min <= 0.0 < given.default == 1.0 <= given.max
    assert given.step == 0.01 and ("0 is" in given.tooltip or "0 gives" in given.tooltip)


def test_both_limits_of_a_range_stand_side_by_side():
    for node in METHOD_NODES:
        names = [given.id for given in node.GET_SCHEMA().inputs]
        if "start_percent" in names:
            start = names.index("start_percent")
            assert names[start + 1] == "end_percent"
            low, high = node.GET_SCHEMA().inputs[start : start + 2]
            ranges.check_range("the default", start=low.default, end=high.default)


@pytest.mark.parametrize("given", named("blocks", "layers"))
def test_the_example_and_the_words_of_a_tooltip_are_read(given):
    words = ranges.parse_numbers(given.id, given.default, (AUTO, ranges.ALL))
    assert words is None and f"'{given.default}'" in given.tooltip
    example = given.tooltip.split("such as ")[1].rstrip(".")
    assert ranges.parse_numbers(given.id, example)


def test_rooms_hand_on_subjects_by_one_type():
    types = {given.io_type for _, given in INPUTS if given.id == "identity"}
    assert types == {widgets.IDENTITY.io_type} == {"UNDERSTUDY_IDENTITY"}
