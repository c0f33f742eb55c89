"""Where and how strongly a reference acts, and when it is exactly off: strength, masks, windows, steps, blocks."""

import logging

import comfy.model_patcher
import pytest
import torch
from comfy.context_windows import IndexListContextWindow
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode, WanContextWindowsManualNode
from pack.nodes.patching import models
from pack.nodes.video_identity import method, sampling
from support import tiny_model
from support.video_identities import (
    MODEL,
    SHAPE,
    call,
    draw,
    person,
    relative,
    sample,
    shown,
    weighed,
    window,
)


def test_applying_changes_no_input_and_twice_is_two_references():
    before = dict(MODEL.wrappers), dict(MODEL.callbacks), dict(MODEL.attachments)
    options = comfy.model_patcher.create_model_options_clone(MODEL.model_options)
    first = shown()
    held = [len(group) for kind in (first.wrappers, first.callbacks) for group in kind.values()]
    second = sampling.apply(first, person(seed=2))
    assert (dict(MODEL.wrappers), dict(MODEL.callbacks), dict(MODEL.attachments)) == before
    assert MODEL.model_options == options
    assert [len(group) for kind in (first.wrappers, first.callbacks) for group in kind.values()] == held
    assert [len(models.attachment(model, sampling.KEY).references) for model in (first, second)] == [1, 2]
    groups = [group for kind in (second.wrappers, second.callbacks) for group in kind.values()]
    counts = [len(group[sampling.KEY]) for group in groups if sampling.KEY in group]
    assert counts == [1, 1, 1, 1]


def test_zero_is_bit_identical_to_the_plain_model():
    plain = sample(MODEL)
    for settings in ({"strength": 0.0}, {"mask": torch.zeros(1, 16, 12)}, {"mask": torch.zeros(9, 4, 4)}):
        assert shown(MODEL, person(**settings)) is MODEL
    # Patched all the same: no step of this schedule lies in the range.
    idle = shown(MODEL, person(start_percent=0.0001, end_percent=0.0002))
    assert idle is not MODEL and torch.equal(sample(idle), plain)
    # Zero in every latent frame of a window, though not in the mask.
    mask = torch.zeros(9, 16, 12)
    mask[8] = 1
    part = window([0, 1], 3)
    x = draw(2, 1, 16, 2, 8, 6)
    masked = shown(MODEL, person(mask=mask))
    assert torch.equal(call(masked, x, options={"context_window": part}), call(MODEL, x))


def test_an_empty_mask_is_logged_and_strength_zero_is_not(caplog):
    with caplog.at_level(logging.WARNING):
        shown(MODEL, person(strength=0.0, mask=torch.zeros(1, 64, 64)))
        assert not caplog.text
        shown(MODEL, person(mask=torch.zeros(1, 64, 64)))
    assert "the mask is 0 everywhere" in caplog.text


def test_an_all_one_mask_is_the_unmasked_model():
    expected = sample(shown())
    for mask in (torch.ones(1, 3, 5), torch.ones(9, 16, 12), torch.ones(3, 2, 2)):
        assert torch.equal(sample(shown(MODEL, person(mask=mask))), expected)


def test_strength_is_an_exact_weight():
    x = draw(2, *SHAPE)
    for strength in (0.3, 2.0):
        weights = [torch.full((36,), strength)]
        assert relative(call(shown(strength=strength), x), weighed(x, weights, [person()])) < 1e-5
    distances = [relative(call(shown(strength=s), x), call(MODEL, x)) for s in (1e-9, 0.1, 0.5, 1.0, 1.5, 2.0)]
    assert distances[0] < 1e-5 and distances == sorted(distances)
    near = call(shown(strength=1 - 1e-6), x)
    assert relative(near, call(shown(), x)) < 1e-5


def test_two_references_without_regions_share_one_softmax():
    x = draw(2, *SHAPE)
    pair = [person(), person(seed=5)]
    whole = [torch.ones(36)] * 2
    assert relative(call(shown(MODEL, *pair), x), weighed(x, whole, pair)) < 1e-5
    assert relative(call(shown(MODEL, *pair[::-1]), x), call(shown(MODEL, *pair), x)) < 1e-5


def test_two_references_with_regions_act_in_them_alone():
    """Left and right halves, token for token; 12 pixels a token column, so the middle column is half and half."""
    x = draw(2, *SHAPE)
    left = torch.zeros(1, 32, 36)
    left[..., :18] = 1
    pair = [person(mask=left), person(seed=5, mask=1 - left, strength=0.6)]
    weight = torch.tensor([1.0, 0.5, 0.0]).repeat(12)
    expected = weighed(x, [weight, 0.6 * (1 - weight)], [person(), person(seed=5)])
    assert relative(call(shown(MODEL, *pair), x), expected) < 1e-5


def test_a_mask_per_frame_follows_the_4n_plus_1_rule_and_context_windows():
    mask = torch.zeros(9, 32, 24)
    mask[1:3] = 1  # half of the second latent frame, which is the frames 1 to 4
    mask[5:] = 0.25
    masked, x = shown(MODEL, person(mask=mask)), draw(2, *SHAPE)
    weights = torch.tensor([0.0, 0.5, 0.25]).repeat_interleave(12)
    assert relative(call(masked, x), weighed(x, [weights], [person()])) < 1e-5
    options = {"context_window": window([1, 2], 3)}
    part = draw(2, 1, 16, 2, 8, 6)
    expected = weighed(part, [weights[12:]], [person()])
    assert relative(call(masked, part, options=options), expected) < 1e-5
    across = IndexListContextWindow([0, 1], dim=3, total_frames=8)
    with pytest.raises(ValueError, match="cannot follow context windows over height"):
        call(masked, x, options={"context_window": across})
    with pytest.raises(ValueError, match=r"mask has 9 frames and the video has 17 \(5 in the latent\)"):
        call(masked, draw(2, 1, 16, 5, 8, 6))


def test_vace_s_reference_picture_is_no_frame_of_the_user_s_video():
    """WanVaceToVideo puts it before the video, in the latent and in VACE's context; it gets the mask's mean."""
    model = tiny_model.wan("vace")
    adapter = method.adapter_from(tiny_model.video_adapter(model))
    context = draw(5, 1, 1, 96, 3, 8, 6)
    context[:, :, 16:, 0] = 1e-6  # what process_in leaves of nothing
    conditions = {"vace_context": context, "vace_strength": [1.0]}
    mask = torch.zeros(5, 32, 24)
    mask[1:3] = 1  # half of the second of the video's two latent frames
    x, one = draw(2, *SHAPE), person(adapter=adapter)

    def result(mask, **options):
        return call(shown(model, person(adapter=adapter, mask=mask)), x, **conditions, **options)

    def weights(mask, leading):
        return method.token_weights(mask, 3, 8, 6, (2, 2), leading)[:, 0, 0].tolist()

    assert weights(mask, 1) == [0.25, 0.0, 0.5]
    whole = torch.cat([torch.full((1, 32, 24), 0.25), torch.zeros(4, 32, 24), torch.full((4, 32, 24), 0.5)])
    assert weights(whole, 1) == weights(whole, 0) == [0.25, 0.0, 0.5]  # a mask of all frames still fits
    assert relative(result(mask), result(whole)) < 1e-6
    assert torch.equal(result(torch.ones(5, 32, 24)), call(shown(model, one), x, **conditions))
    assert torch.equal(result(torch.zeros(5, 32, 24)), call(model, x, **conditions))
    with pytest.raises(ValueError, match=r"mask has 6 frames and the video has 5 \(2 in the latent\)"):
        result(torch.ones(6, 32, 24))
    part = {"context_window": window([0, 2], 3)}
    windowed = call(shown(model, person(adapter=adapter, mask=mask)), x[:, :, [0, 2]], options=part,
                    vace_context=context[:, :, :, [0, 2]], vace_strength=[1.0])
    assert torch.isfinite(windowed).all()
    plain = {**conditions, "vace_context": draw(5, 1, 1, 96, 3, 8, 6)}
    with pytest.raises(ValueError, match=r"mask has 5 frames and the video has 9 \(3 in the latent\)"):
        call(shown(model, person(adapter=adapter, mask=mask)), x, **plain)


def test_a_mask_beside_an_area_is_refused_and_everything_else_beside_it_is_not():
    """The model receives only the area, and nothing says which part of the mask that is."""

    def part(*area):
        return [[draw(9, 1, 4, tiny_model.CONTEXT), {"area": area, "set_area_to_bounds": False, "strength": 1.0}]]

    half, first = part(8, 4, 0, 2), part(2, 8, 6, 0, 0, 0)
    mask = torch.ones(1, 8, 6)
    mask[..., :3] = 0
    masked = shown(mask=mask)
    whole = sample(masked)
    with pytest.raises(ValueError, match="Set Mask"):
        sample(masked, positive=half)
    with pytest.raises(ValueError, match="Set Mask"):
        sample(shown(mask=mask.repeat(9, 1, 1)), positive=first)
    assert not torch.equal(sample(masked, positive=first), sample(MODEL, positive=first))  # one mask for all frames
    assert torch.equal(sample(masked), whole)
    assert not torch.equal(sample(shown(), positive=half), sample(MODEL, positive=half))


def test_comfyui_s_context_windows_see_their_frames_of_the_mask():
    """Two windows of three of the five latent frames, patched before or after the reference."""
    mask = torch.zeros(17, 16, 12)
    mask[9:] = 1
    weights = method.token_weights(mask, 5, 8, 6, (2, 2))
    seen = []

    def windowed(model):
        settings = (9, 5, "standard_static", 1, False, "pyramid", False, False)
        return WanContextWindowsManualNode.execute(model, *settings).result[0]

    def look(run, x, t, a, b, c, options, **k):
        references = options.get(sampling.KEY, {}).get(0)
        part = options["context_window"]
        # ComfyUI puts the frame before a window in front of it, as an anchor, and drops its result.
        anchor = getattr(part, "causal_anchor_index", None)
        frames = ([] if anchor is None else [anchor]) + list(part.index_list)
        assert x.shape[2] == len(frames)
        seen.append((frames, None if references is None else references[0].weight))
        return run(x, t, a, b, c, options, **k)

    results = []
    for model in (windowed(shown(MODEL, person(mask=mask))), shown(windowed(MODEL), person(mask=mask))):
        model.add_wrapper(WrappersMP.APPLY_MODEL, look)
        results.append(sample(model, shape=(1, 16, 5, 8, 6)))
    assert torch.equal(*results) and {tuple(f) for f, _ in seen} == {(0, 1, 2), (1, 2, 3, 4)}
    for frames, weight in seen:
        expected = weights[frames].flatten()
        assert weight is None if not expected.any() else torch.equal(weight, expected)


def test_a_frame_that_windows_retain_keeps_its_weight():
    """ComfyUI puts latent frame 0 at the first place of every window."""
    mask = torch.zeros(17, 16, 12)
    mask[0] = 1
    settings = (3, 1, "standard_static", 1, False, "pyramid", 2, False, "", False, "0", False)
    model = ContextWindowsManualNode.execute(shown(MODEL, person(mask=mask)), *settings).result[0]
    seen = []

    def look(run, x, t, a, b, c, options, **k):
        seen.append((options["context_window"].index_list, options.get(sampling.KEY, {}).get(0)))
        return run(x, t, a, b, c, options, **k)

    model.add_wrapper(WrappersMP.APPLY_MODEL, look)
    sample(model, shape=(1, 16, 5, 8, 6))
    assert {tuple(frames) for frames, _ in seen} == {(0, 1, 2), (2, 3, 4)}
    for _, references in seen:
        assert references[0].weight.unflatten(0, (3, -1)).any(1).tolist() == [True, False, False]


def test_start_and_end_percent():
    """Steps of this schedule at sigma 1, ~0.94 and ~0.80."""
    seen = []
    model = shown(MODEL, person(start_percent=0.0, end_percent=0.5))
    inner = model.clone()
    inner.add_wrapper(
        WrappersMP.APPLY_MODEL,
        lambda run, x, t, a, b, c, options, **k: seen.append((float(t[0]), sampling.KEY in options))
        or run(x, t, a, b, c, options, **k),
    )
    sample(inner)
    limit = MODEL.model.model_sampling.percent_to_sigma(0.5)
    assert len(seen) == 3 and [acted for _, acted in seen] == [sigma > limit for sigma, _ in seen]
    assert {acted for _, acted in seen} == {True, False}
    late = sample(shown(MODEL, person(start_percent=0.5)))
    assert not torch.equal(late, sample(MODEL)) and not torch.equal(late, sample(model))


def test_blocks_choose_where_the_reference_is_seen():
    x = draw(2, *SHAPE)
    seen = []
    model = shown(MODEL, person(blocks="1"))
    for i in range(3):
        model.set_model_patch_replace(
            _recording(model, i, seen), "dit", "double_block", i
        )
    call(model, x)
    assert seen == [(0, False), (1, True), (2, False)]
    all_named = call(shown(MODEL, person(blocks="0-2")), x)
    assert torch.equal(all_named, call(shown(), x))
    with pytest.raises(ValueError, match="has 0 to 2"):
        shown(MODEL, person(blocks="0-3"))


def _recording(model, i, seen):
    ours = model.model_options["transformer_options"]["patches_replace"]["dit"][("double_block", i)]

    def patch(args, extra):
        def original(inner):
            seen.append((i, "optimized_attention_override" in inner["transformer_options"]))
            return extra["original_block"](inner)

        return ours(args, {"original_block": original})

    return patch
