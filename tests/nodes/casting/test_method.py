"""The items of a sheet, their names, and which come next."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.nodes.casting import method
from pack.nodes.files.names import MAX_PART, normalise_prefix

TEMPLATE = "a photo of {identity} {action} {scene}"


def items(identities=("anna\nbert",), actions=("waving\nsitting",), scenes=("on a beach",), seeds=("0",), **options):
    values = {"template": TEMPLATE, "prefix": "sheet", **options}
    return method.items(list(identities), list(actions), list(scenes), list(seeds), **values)


def test_every_combination_once_in_order():
    made = items(seeds=("3, 1-2",))
    expected = list(itertools.product(("anna", "bert"), ("waving", "sitting"), ("on a beach",), (3, 1, 2)))
    assert [(item.identity, item.action, item.scene, item.seed) for item in made] == expected
    assert made[0].prompt == "a photo of anna waving on a beach"
    assert len({item.stem for item in made}) == len(made)


def test_lists_and_lines_are_the_same_and_repeated_or_empty_lines_do_not_count():
    assert items(["anna", " bert "]) == items(["anna\n\nbert\nanna"])
    assert items(actions=[], scenes=["", "\n"])[0].prompt == "a photo of anna"


@pytest.mark.parametrize(("line", "identity", "prompt"), [
    ("a red robot, smiling", "a red robot, smiling", "a photo of a red robot, smiling waving on a beach"),
    ("anna_00001_.safetensors", "anna_00001_.safetensors", "a photo of {subject} waving on a beach"),
    ("team/anna.safetensors = sks woman", "team/anna.safetensors", "a photo of sks woman waving on a beach"),
])
def test_an_identity_is_words_or_a_file(line, identity, prompt):
    item = items([line])[0]
    assert (item.identity, item.prompt) == (identity, prompt)


def test_names_stay_when_the_sheet_grows_and_change_with_what_is_asked():
    small, large = items(["bert"]), items(["anna\nbert"], ["jumping\nwaving\nsitting"])
    assert {item.stem for item in small} <= {item.stem for item in large}
    assert small[0].stem == "sheet_bert_waving_on-a-beach_0-" + small[0].stem[-6:]
    drawn = items(["bert"], template="a drawing of {identity} {action} {scene}")
    assert not {item.stem for item in small} & {item.stem for item in drawn}


def test_lines_that_look_the_same_have_names_of_their_own():
    alike = ["a-b", "a b", "A B", "a_b", "a/b", "../a b", "x" * 100, "x" * 101, "é", "e\u0301"]
    stems = [item.stem for item in items(alike, ["waving"])]
    assert len(set(stems)) == len(alike) - 1, "both spellings of é are one line"
    assert all("/" not in stem and ".." not in stem for stem in stems)


@given(st.text(max_size=80), st.text(max_size=80), st.text(max_size=80), st.integers(0, 2**63 - 1))
def test_any_text_gives_a_name_that_every_platform_takes(identity, action, scene, seed):
    for item in items([f"x{identity}"], [action], [scene], [str(seed)], prefix="p" * method.LONGEST_PREFIX):
        assert normalise_prefix(item.stem) == item.stem and len(item.stem.encode()) <= MAX_PART
        for ending in ("_00001_.png", ".mp4", "_123456_.webp"):
            match = method.FILE_NAME.search(item.stem + ending)
            assert (item.stem + ending)[: match.end()] == item.stem


@pytest.mark.parametrize(("seeds", "expected"), [
    (["0"], [0]), (["7, 3-5", "5"], [7, 3, 4, 5]), ([""], [0]), ([f"{2**63 - 1}"], [2**63 - 1]),
    (["1、2；3"], [1, 2, 3]), (["３～４，7—8"], [3, 4, 7, 8]),
])
def test_seeds(seeds, expected):
    assert method.parse_seeds(seeds) == expected


@pytest.mark.parametrize("seeds", ["a", "-1", "5-3", f"{2**63}", "0-100000", "1.5"])
def test_seeds_that_are_none_are_refused_by_name(seeds):
    with pytest.raises(ValueError, match="seeds has"):
        method.parse_seeds([seeds])


def test_what_asks_for_nothing_or_too_much_is_refused_by_name():
    with pytest.raises(ValueError, match="identities is empty"):
        items([" \n"])
    with pytest.raises(ValueError, match="20,000 items"):
        items(seeds=["0-4999"])
    with pytest.raises(ValueError, match="prompt is 'a photo'"):
        items(template="a photo")


@pytest.mark.parametrize(("template", "prompt"), [
    ("{identity}, {action}, {scene}", "anna"), ("{scene} {identity}", "anna"),
    ("{identity} ({subject})", "anna ({subject})"), ("{action}, {identity}, {scene}, 8k", "anna, 8k"),
    ("{identity}，{action}，{scene}", "anna"), ("{action}、{identity}，{scene}，海滩", "anna，海滩"),
])
def test_empty_words_leave_no_gap(template, prompt):
    assert method.fill(template, identity="anna", action="", scene="") == prompt


def stems(chosen):
    return [item.stem for item in chosen]


def test_repeated_runs_finish_a_sheet_of_which_some_fail():
    """A loop as the queue repeats it: each run saves what it was sent, but for two that never pass."""
    every = items(seeds=("0-3",))
    failing, there, sent, runs = set(stems(every)[1:3]), set(), Counter(), 0
    while going := method.upcoming(every, there, sent, 3, True)[0]:
        assert len(going) <= 3 and not there & set(stems(going))
        sent.update(stems(going))
        there |= set(stems(going)) - failing
        runs += 1
        assert runs < 20
    assert there == set(stems(every)) - failing and max(sent.values()) == method.TRIES
    assert set(stems(method.upcoming(every, there, sent, 3, True)[1])) == failing


def test_what_never_ran_comes_before_what_failed():
    every = items()
    sent = Counter(stems(every)[:2])
    assert stems(method.upcoming(every, set(), sent, 3, True)[0]) == [*stems(every)[2:], every[0].stem]


def test_without_skipping_each_is_made_once_more():
    every, sent, made = items(), Counter(), []
    there = set(stems(every))
    while going := method.upcoming(every, there, sent, 3, False)[0]:
        made += stems(going)
        sent.update(stems(going))
    assert made == stems(every)


def test_what_reaches_the_savers_of_a_sheet_and_nothing_else():
    graph = {
        "sheet": {"inputs": {"seeds": "0"}},
        "pixels": {"inputs": {"text": ["sheet", 1], "list": ["pixels", "x"], "two": [[1], 2]}},
        "save": {"inputs": {"images": ["pixels", 0], "filename_prefix": ["sheet", 5]}},
        "check": {"inputs": {"images": ["pixels", 0], "names": ["sheet", 5]}},
        "passed": {"inputs": {"images": ["check", 0], "filename_prefix": ["check", 4]}},
        "other": {"inputs": {"images": ["pixels", 1], "filename_prefix": "x"}},
    }
    links = method.links_of_savers(graph, "sheet", 5, ["save", "sheet", "other"])
    assert sorted(links) == [["pixels", 0], ["sheet", 5]]
    links = method.links_of_savers(graph, "sheet", 5, ["passed", "other"])
    assert sorted(links) == [["check", 0], ["check", 4]]
    assert method.links_of_savers(graph, "sheet", 5, ["sheet", "other"]) == []
