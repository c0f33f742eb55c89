"""Parts of the schedule against the steps of ComfyUI's schedulers, and numbers in text."""

import comfy.model_sampling as sampling
import comfy.samplers
import pytest
import torch
from comfy_api.latest import io
from hypothesis import given
from hypothesis import strategies as st
from launcher import workflow_files
from launcher.scripts import ROOT
from pack.nodes.frequency_guidance.nodes import UnderstudyFrequencyGuidanceSampler
from pack.nodes.identity_prior.nodes import UnderstudyIdentityMaskBlend
from pack.nodes.inputs import ranges
from pack.nodes.video_identity.nodes import UnderstudyApplyVideoIdentity

PERCENTS = ("start_percent", "end_percent")
# The tolerance of each node before there was one for all.
BEFORE = {
    UnderstudyFrequencyGuidanceSampler: 1e-5, UnderstudyApplyVideoIdentity: 1e-5, UnderstudyIdentityMaskBlend: 1e-4,
}
SINCE = {(UnderstudyIdentityMaskBlend, 0.3, 1.0)}  # ranges that no workflow had then


def flow(base=sampling.ModelSamplingDiscreteFlow, **parameters):
    class Sampling(base, sampling.CONST):
        pass

    model_sampling = Sampling()
    model_sampling.set_parameters(**parameters)
    return model_sampling


class Noise(sampling.ModelSamplingDiscrete, sampling.EPS):
    pass


SAMPLINGS = {
    "SD": Noise(), "flow": flow(shift=1.0), "SD3": flow(shift=3.0), "Wan": flow(shift=8.0),
    "Flux": flow(sampling.ModelSamplingFlux, shift=1.15),
}
KINDS = pytest.mark.parametrize("model_sampling", SAMPLINGS.values(), ids=SAMPLINGS)


def shipped_ranges():
    """(node, start, end) of every node with a part of the schedule in our workflows."""
    classes = {node.GET_SCHEMA().node_id: node for node in BEFORE}
    combinations = set()
    for workflow in workflow_files.find(ROOT / "workflows", []):
        for node in workflow.nodes():
            if node["type"] in classes:
                inputs = classes[node["type"]].GET_SCHEMA().inputs
                widgets = [schema_input.id for schema_input in inputs if isinstance(schema_input, io.WidgetInput)]
                values = dict(zip(widgets, node["widgets_values"], strict=True))
                combinations.add((classes[node["type"]], *(values[name] for name in PERCENTS)))
    return combinations


@KINDS
def test_one_tolerance_leaves_the_steps_of_our_workflows_as_they_were(model_sampling):
    shipped = shipped_ranges() - SINCE
    assert {node for node, *_ in shipped} == BEFORE.keys()
    for node, *percents in shipped:
        part = ranges.sigma_range(model_sampling, *percents)
        start, end = (model_sampling.percent_to_sigma(percent) * (1 + BEFORE[node]) for percent in percents)
        for scheduler in comfy.samplers.SCHEDULER_NAMES:
            for steps in (*range(2, 41), 50, 100):
                grid = comfy.samplers.calculate_sigmas(model_sampling, scheduler, steps).tolist()
                now, before = ([sigma for sigma in grid if rule(sigma)] for rule in (
                    part.__contains__, lambda sigma, start=start, end=end: start >= sigma > end
                ))
                assert now == before, (node, scheduler, steps)


@KINDS
@pytest.mark.parametrize("steps", [4, 10, 20, 25, 40])
def test_a_step_on_a_limit_begins_the_second_part(model_sampling, steps):
    """`simple` steps through the model's own table, so that step k is at the share k / steps of the schedule."""
    grid = comfy.samplers.calculate_sigmas(model_sampling, "simple", steps).tolist()
    if model_sampling is SAMPLINGS["SD"]:  # percents run over 999 parts of its table, which has 1000 entries
        times = 999 * (1 - torch.arange(steps) / steps)
        grid = model_sampling.sigma(times).tolist()
    for k in range(1, steps):
        middle = k / steps
        limit = model_sampling.percent_to_sigma(middle)
        assert abs(grid[k] - limit) < ranges.SIGMA_TOLERANCE / 5 * limit
        first, second = (ranges.sigma_range(model_sampling, *part) for part in ((0.0, middle), (middle, 1.0)))
        assert [sigma in first for sigma in grid[:steps]] == [i < k for i in range(steps)]
        assert [sigma in second for sigma in grid[:steps]] == [i >= k for i in range(steps)]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=5), st.data())
def test_numbers_are_those_that_the_text_lists(pairs, data):
    pairs = [(min(pair), max(pair)) for pair in pairs]
    space = st.sampled_from(["", " ", "  "])
    text = ",".join(
        f"{data.draw(space)}{first}{data.draw(space)}" + (f"-{data.draw(space)}{last}" if first < last else "")
        for first, last in pairs
    )
    numbers = ranges.parse_numbers("blocks", text)
    assert numbers == {n for first, last in pairs for n in range(first, last + 1)}
    assert ranges.select_numbers("blocks", text, max(numbers) + 1) == numbers
    with pytest.raises(ValueError, match=f"blocks is .* has 0 to {max(numbers) - 1}: choose"):
        ranges.select_numbers("blocks", text, max(numbers))


@pytest.mark.parametrize("text", [
    "4-6, 9", "4–6，9", "4—6、9", "4 − 6 ; 9", "４－６，９", "4～6、9", "4〜6\n9", "4~6，9 ",
])
def test_commas_and_dashes_of_any_script_are_read(text):
    assert ranges.parse_numbers("blocks", text) == {4, 5, 6, 9}


def test_words_stand_for_no_numbers():
    for text in ("all", " All ", "AUTO"):
        assert ranges.parse_numbers("layers", text, ("auto", "all")) is None
    assert ranges.select_numbers("layers", " All ", 3) == {0, 1, 2}


@pytest.mark.parametrize("text", ["", "x", "3-1", "1,,2", "-1", "1-", "12345", "auto", "1.5"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="layers is .*: use 'all', or numbers and ranges such as"):
        ranges.parse_numbers("layers", text)


def test_an_empty_range_names_both_limits():
    ranges.check_range("the range of steps", start_percent=0.2, end_percent=0.3)
    for low, high in ((0.5, 0.5), (0.6, 0.5), (float("nan"), 0.5)):
        with pytest.raises(ValueError, match=r"of steps is empty: set start_percent .* below end_percent \(0.5\)"):
            ranges.check_range("the range of steps", start_percent=low, end_percent=high)
