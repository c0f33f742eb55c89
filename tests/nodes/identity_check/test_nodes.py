"""Identity Check as ComfyUI calls it, in its own mapping of lists, and in a server where an empty route blocks."""

import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from faults import prompts
from pack.nodes.identity_check.nodes import UnderstudyIdentityCheck
from pack.nodes.puppets import vision
from support import fusions

ENCODER = fusions.vision()
PICTURES = fusions.pictures(4)


def check(
    images=(PICTURES,), references=(PICTURES[:2],), pass_above=0.85, reject_below=0.7, encoder=ENCODER, **lists
):
    with torch.inference_mode():
        return UnderstudyIdentityCheck.execute(
            references=list(references), images=list(images), clip_vision=[encoder], pass_above=[pass_above],
            reject_below=[reject_below], **lists,
        ).result


def cosines(images, references):
    """By the definition, one pair at a time."""
    embedded = [[ENCODER.encode_image(p[None], crop=False).image_embeds[0].double() for p in part]
                for part in (images, references)]
    return [
        sum(float(torch.dot(a, b) / a.norm() / b.norm()) for b in embedded[1]) / len(references) for a in embedded[0]
    ]


def test_scores_are_the_encoder_s_and_each_picture_takes_one_way():
    expected = cosines(PICTURES, PICTURES[:2])
    middle = sum(sorted(expected)[1:3]) / 2
    passed, rest, scores, report, names, other_names = check(
        images=[PICTURES[:1], PICTURES[1:]], pass_above=middle, reject_below=middle - 1e-6, names=list("abcd")
    )
    assert scores == pytest.approx(expected, abs=1e-5)
    assert [name for name, score in zip("abcd", expected, strict=True) if score >= middle] == names
    assert sorted(names + other_names) == list("abcd") and len(names) == 2
    assert [picture.shape for picture in passed] == [(1, 64, 64, 3)] * 2
    assert torch.equal(rest[0][0], PICTURES["abcd".index(other_names[0])])
    assert f"{other_names[0]}: {scores['abcd'.index(other_names[0])]:.3f}" in report and "2 of 4 passed" in report


def test_an_empty_route_blocks_and_says_so(caplog):
    passed, rest, scores, report, names, other_names = check(pass_above=1.0, reject_below=1.0)
    for route in (passed, names):
        assert len(route) == 1 and isinstance(route[0], ExecutionBlocker) and route[0].message is None
    assert len(rest) == len(other_names) == len(scores) == 4
    assert "none of the 4 pictures is in passed: what follows it does not run" in report
    assert "pictures is in rest" in check(pass_above=-1.0, reject_below=-1.0)[3]


def test_typed_thresholds_are_doubted_and_calibrated_ones_are_not():
    assert "they are not calibrated" in check()[3]
    same, other = PICTURES[2:3].repeat(10, 1, 1, 1), torch.zeros(10, 64, 64, 3)
    report = check(same=[same], other=[other])[3]
    assert "not calibrated" not in report and "from same and other: 100% of same pass" in report
    a, b = cosines(same[:1], PICTURES[:2])[0], cosines(other[:1], PICTURES[:2])[0]
    assert f"passes from {(a + b) / 2:.3f}" in report
    assert "same holds a picture of references" in check(same=[PICTURES[:1]])[3]


def test_several_people_are_compared_each_with_their_own_reference_and_grouped(caplog):
    caplog.set_level("INFO")
    moved = PICTURES.roll(1, 0)
    scores, report = check(
        images=[PICTURES], references=[moved[:2], moved[2:]], paired=[True], groups=["a, x", "b, x", "a, y", "b, y"]
    )[2:4]
    expected = [cosines(PICTURES[i : i + 1], moved[i : i + 1])[0] for i in range(4)]
    assert scores == pytest.approx(expected, abs=1e-5)
    means = {name: sum(expected[i] for i in which) / 2
             for name, which in {"a": (0, 2), "b": (1, 3), "x": (0, 1), "y": (2, 3)}.items()}
    first, *lines = report.splitlines()[:5]
    assert first == "groups, the worst first:"
    assert [line.split(":")[0] for line in lines] == sorted(means, key=means.get)
    assert f"the worst group is {lines[0]}" in caplog.text


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match="groups has 2 texts for 4 pictures"):
        check(groups=["a", "b"])
    with pytest.raises(ValueError, match="same has 1 pictures for 4 in references: give one for each, or switch"):
        check(references=[PICTURES], same=[PICTURES[:1]], paired=[True])
    with pytest.raises(ValueError, match="names has 3 texts for 4 pictures"):
        check(names=list("abc"))
    with pytest.raises(ValueError, match="reject_below is 0.9 and pass_above 0.8"):
        check(pass_above=0.8, reject_below=0.9)
    with pytest.raises(ValueError, match="references holds no picture|references has shape"):
        check(references=[torch.zeros(0, 8, 8, 3)])


def graph(server, pass_above):
    """A Puppet Set, checked against a puppet, and each route saved under its own names."""
    def puppets(identities, count):
        widgets = prompts.defaults(server, "UnderstudyPuppetSet")
        return prompts.node("UnderstudyPuppetSet", **widgets | {"identities": identities, "count": count, "size": 64})

    values = {"pass_above": pass_above, "reject_below": -1.0}
    links = {"clip_vision": ["vision", 0], "references": ["known", 0], "images": ["made", 0], "names": ["made", 4]}
    return {
        "vision": prompts.node("UnderstudyLoadPuppetVision"),
        "known": puppets("test 0", 2), "made": puppets("test 0\ntest 1", 4),
        "check": prompts.node("UnderstudyIdentityCheck", **values, **links),
        "passed": prompts.node("SaveImage", images=["check", 0], filename_prefix=["check", 4]),
        "rest": prompts.node("SaveImage", images=["check", 1], filename_prefix=["check", 5]),
    }


@pytest.mark.parametrize(("pass_above", "passed"), [(1.0, 0), (-1.0, 4)])
def test_comfyui_skips_what_follows_an_empty_route(server, pass_above, passed):
    outputs = server.queue(graph(server, pass_above))
    assert outputs["status"]["status_str"] == "success", outputs["status"]["messages"]
    outputs = outputs["outputs"]
    saved = {name: len(outputs.get(name, {}).get("images", ())) for name in ("passed", "rest")}
    assert saved == {"passed": passed, "rest": 4 - passed}
    assert "what follows it does not run" in outputs["check"]["text"][0]


def test_the_theatre_s_encoder_is_one():
    assert check(encoder=vision.shipped(), references=[PICTURES], images=[PICTURES])[2]
