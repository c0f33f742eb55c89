"""Inputs that several rooms share are the same in every node that has them, and their words can be read."""

import pytest
from comfy_api.latest import io
from pack.nodes.extension import METHOD_NODES
from pack.nodes.identity_prior.config import AUTO
from pack.nodes.inputs import ranges, widgets

INPUTS = [(node.__name__, widget) for node in METHOD_NODES for widget in node.GET_SCHEMA().inputs]


def named(*endings):
    return [pytest.param(widget, id=f"{node} {widget.id}") for node, widget in INPUTS if widget.id.endswith(endings)]


@pytest.mark.parametrize("widget", named("_percent"))
def test_percents_are_thousandths_of_the_schedule(widget):
    assert isinstance(widget, io.Float.Input)
    assert (widget.min, widget.max, widget.step, widget.round) == (0.0, 1.0, 0.001, False)
    assert "fraction of the schedule" in widget.tooltip.lower()


@pytest.mark.parametrize("widget", named("strength"))
def test_strengths_reach_from_off_to_as_trained(widget):
    assert widget.min <= 0.0 < widget.default == 1.0 <= widget.max
    assert widget.step == 0.01 and ("0 is" in widget.tooltip or "0 gives" in widget.tooltip)


def test_both_limits_of_a_range_are_side_by_side():
    for node in METHOD_NODES:
        names = [widget.id for widget in node.GET_SCHEMA().inputs]
        if "start_percent" in names:
            start = names.index("start_percent")
            assert names[start + 1] == "end_percent"
            low, high = node.GET_SCHEMA().inputs[start : start + 2]
            ranges.check_range("the default", start=low.default, end=high.default)


@pytest.mark.parametrize("widget", named("blocks", "layers"))
def test_the_example_and_the_words_of_a_tooltip_are_read(widget):
    words = ranges.parse_numbers(widget.id, widget.default, (AUTO, ranges.ALL))
    assert words is None and f"'{widget.default}'" in widget.tooltip
    example = widget.tooltip.split("such as ")[1].rstrip(".")
    assert ranges.parse_numbers(widget.id, example)


def test_rooms_hand_on_subjects_by_one_type():
    types = {widget.io_type for _, widget in INPUTS if widget.id == "identity"}
    assert types == {widgets.IDENTITY.io_type} == {"UNDERSTUDY_IDENTITY"}
