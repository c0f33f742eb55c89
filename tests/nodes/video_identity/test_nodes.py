"""The nodes' schemas, the reference's crop against pixels counted by hand, and a graph from file to video."""

import json
import logging
import re

import comfy.samplers
import folder_paths
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.nodes import extension
from pack.nodes.video_identity import method, sampling
from pack.nodes.video_identity.config import ReferenceConfig, VideoIdentityConfig
from pack.nodes.video_identity.nodes import (
    UnderstudyApplyVideoIdentity,
    UnderstudyLoadVideoIdentityAdapter,
    UnderstudyPrepareReference,
)
from pack.nodes.video_identity.reference_picture import prepare
from pack.nodes.video_identity.training_nodes import UnderstudySaveVideoIdentityAdapter
from support import real_configurations, tiny_model

CONTRACT = {
    UnderstudyPrepareReference: (["image", "size", "crop_factor", "mask", "bboxes"], ["IMAGE"]),
    UnderstudyLoadVideoIdentityAdapter: (["adapter_name", "purpose"], ["UNDERSTUDY_VIDEO_ADAPTER"]),
    UnderstudyApplyVideoIdentity: (
        ["model", "adapter", "reference", "strength", "start_percent", "end_percent", "blocks", "mask",
         "reference_guidance"], ["MODEL"],
    ),
    UnderstudySaveVideoIdentityAdapter: (
        ["adapter", "filename_prefix", "consent", "preview", "tags", "author"], [],
    ),
}


@pytest.mark.parametrize("node", CONTRACT, ids=lambda node: node.__name__)
def test_schemas_keep_the_contract(node):
    node.GET_SCHEMA().validate()
    schema = node.define_schema()
    inputs, outputs = CONTRACT[node]
    assert schema.node_id == node.__name__ and node in extension.METHOD_NODES
    assert [widget.id for widget in schema.inputs] == inputs
    assert [output.io_type for output in schema.outputs] == outputs
    assert all(widget.tooltip for widget in schema.inputs) and len(schema.search_aliases) >= 3
    optional = "mask", "bboxes", "purpose", "consent", "preview", "tags", "author", "reference_guidance"
    assert [widget.id for widget in schema.inputs if widget.optional] == [name for name in inputs if name in optional]


def test_widgets_start_with_the_published_settings():
    widgets = {w.id: w for node in CONTRACT for w in node.define_schema().inputs}
    for config in (VideoIdentityConfig(), ReferenceConfig()):
        for name, value in vars(config).items():
            assert widgets[name].default == value
    assert widgets["blocks"].advanced


# Prepare Reference


def picture(height=60, width=100):
    """Each pixel says where it is: red is its column, green its row, in hundredths."""
    y, x = torch.meshgrid(torch.arange(height) / 100, torch.arange(width) / 100, indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)], -1)[None]


def box(x, y, width, height):
    return {"x": x, "y": y, "width": width, "height": height, "label": "face", "score": 0.9}


def at(image, row, column):
    return [round(float(v) * 100) for v in image[0, row, column, :2]]


def test_boxes_have_no_default_that_a_client_could_send():
    """ComfyUI's own is a box of 512 pixels, and comfy-cli fills in defaults: then no mask's extent would count."""
    boxes = next(i for i in UnderstudyPrepareReference.define_schema().inputs if i.id == "bboxes").as_dict()
    assert boxes["forceInput"] and boxes.get("default") is None


def test_the_crop_is_half_as_large_again_around_the_largest_face():
    """A box of 20 x 10 around (50, 30) becomes 30 x 30 pixels from (35, 15)."""
    boxes = [[box(0, 0, 5, 5), box(40, 25, 20, 10)]]
    cropped, messages = prepare(picture(), ReferenceConfig(size=480), None, boxes)
    assert cropped.shape == (1, 480, 480, 3) and messages == []
    assert at(cropped, 8, 8) == [35, 15] and at(cropped, 471, 471) == [64, 44] and at(cropped, 8, 471) == [64, 15]
    for alike in (boxes[0], boxes[0][1]):
        assert torch.equal(prepare(picture(), ReferenceConfig(size=480), None, alike)[0], cropped)
    assert torch.equal(prepare(picture(), ReferenceConfig(480, 1.0), None, box(35, 15, 30, 30))[0], cropped)
    corners = torch.tensor([[0.0, 0, 5, 5], [40, 25, 60, 35]])  # of pictures of 100 x 60 pixels
    for numbers in (corners, corners / torch.tensor([100, 60, 100, 60]), corners.tolist(), json.dumps(boxes[0])):
        assert torch.equal(prepare(picture(), ReferenceConfig(size=480), None, numbers)[0], cropped)


def test_a_crop_over_the_edge_is_padded_with_white():
    """Around (5, 30), 40 wide: 25 columns are in the picture, 15 are white, 7 left and 8 right."""
    cropped, _ = prepare(picture(), ReferenceConfig(640, 2.0), None, [[box(-5, 20, 20, 20)]])
    assert at(cropped, 320, 8) == [100, 100] and at(cropped, 320, 631) == [100, 100]
    assert at(cropped, 8, 7 * 16 + 8) == [0, 10] and at(cropped, 631, 32 * 16 - 9) == [24, 49]


@pytest.mark.parametrize(("bboxes", "mask", "words"), [
    (None, None, "neither a face nor a mask"), ([[]], None, "no face was found"), ([], None, "no face was found"),
    ([None], None, "no face was found"), ([[box(1, 1, 0, 5)]], None, "box is empty"),
    (None, torch.zeros(1, 60, 100), "the mask is empty.*whole picture"),
    ([[]], torch.zeros(1, 60, 100), "mask is empty.*no face"),
])
def test_without_a_face_the_whole_picture_is_padded_and_said(bboxes, mask, words, caplog, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    with caplog.at_level(logging.WARNING):
        result = UnderstudyPrepareReference.execute(picture(), 800, 1.5, mask, bboxes)
    (image,) = result.result
    assert image.shape == (1, 800, 800, 3)
    assert at(image, 8, 400) == [100, 100] and at(image, 792, 400) == [100, 100]  # 20 white rows above and below
    assert at(image, 20 * 8 + 4, 4) == [0, 0] and at(image, 80 * 8 - 5, 794) == [99, 59]
    assert re.search(words, result.ui["text"][0]) and re.search(words, caplog.text)


@given(
    st.floats(20, 60), st.floats(20, 30), st.floats(1, 20), st.floats(1, 20), st.sampled_from([1.0, 1.05, 1.5]),
)
def test_a_crop_inside_the_picture_is_square_and_has_no_white(x, y, width, height, factor):
    black, face = torch.zeros(1, 80, 100, 3), box(x, y, width, height)
    cropped, messages = prepare(black, ReferenceConfig(64, factor), None, face)
    assert not cropped.any() and messages == []


@pytest.mark.parametrize(("corners", "factor", "crop"), [
    ((10.7, 20.2, 31.9, 40.8), 1.5, (5, 15, 35, 45)),  # 21 x 20 around (20, 30), side 31, of which 15 on each side
    ((40.0, 20.0, 61.0, 41.0), 1.0, (40, 20, 60, 40)),  # an odd side loses its last pixel
    ((50.9, 20.9, 60.1, 29.1), 1.25, (49, 18, 61, 30)),
    ((-3.9, 20.0, 9.0, 31.0), 1.5, (0, 16, 12, 34)),  # cut at the picture's edge
])
def test_the_crop_is_rounded_as_in_the_official_code(corners, factor, crop):
    """Hand-computed: whole pixels, cut off; the middle rounded down; half the side on each side of it."""
    left, top, right, bottom = corners
    side = max(crop[2] - crop[0], crop[3] - crop[1])
    face = box(left, top, right - left, bottom - top)
    cropped, _ = prepare(picture(), ReferenceConfig(16 * side, factor), None, face)
    pad_x, pad_y = (side - (crop[2] - crop[0])) // 2, (side - (crop[3] - crop[1])) // 2
    first, last = at(cropped, 16 * pad_y + 8, 16 * pad_x + 8), at(cropped, -16 * pad_y - 9, -16 * pad_x - 9)
    assert first == [crop[0], crop[1]] and last == [crop[2] - 1, crop[3] - 1]


def test_a_batch_is_told_how_a_video_model_encodes_it(caplog, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    with caplog.at_level(logging.WARNING):
        result = UnderstudyPrepareReference.execute(picture().repeat(2, 1, 1, 1), 64, 1.5, None, box(40, 25, 20, 10))
    assert len(result.result[0]) == 2 and "Rebatch Images" in result.ui["text"][0] and "Rebatch" in caplog.text


def test_a_box_that_fills_the_picture_takes_it_whole():
    whole, messages = prepare(picture(), ReferenceConfig(), None, [[box(5, 5, 92, 52)]])
    assert torch.equal(whole, prepare(picture(), ReferenceConfig())[0]) and messages == []


def test_outside_the_mask_is_white_and_its_extent_is_the_box():
    mask = torch.zeros(1, 60, 100)
    mask[:, 20:40, 45:55] = 1
    image, messages = prepare(picture(), ReferenceConfig(480), mask)
    assert messages == [] and at(image, 240, 240) == [50, 30]  # 30 x 30 from (35, 15)
    assert at(image, 240, 100) == [100, 100] and at(image, 40, 240) == [100, 100]
    faced, _ = prepare(picture(), ReferenceConfig(480), mask, [[box(40, 25, 20, 10)]])
    torch.testing.assert_close(faced, image)
    half, messages = prepare(picture(), ReferenceConfig(480), mask[:, ::2, ::2], [[box(40, 25, 20, 10)]])
    assert messages[0].startswith("mask has 50 x 30 pixels and image 100 x 60, so it is scaled")
    assert at(half, 240, 240) == [50, 30] and at(half, 240, 100) == [100, 100]


def test_what_is_transparent_is_white_and_not_the_black_below_it():
    mask = torch.zeros(1, 60, 100)
    mask[:, 20:40, 45:55] = 1
    cut = torch.cat([picture() * mask[..., None], mask[..., None]], -1)
    expected, _ = prepare(picture(), ReferenceConfig(480), mask)
    image, messages = prepare(cut, ReferenceConfig(480))
    torch.testing.assert_close(image, expected)
    assert messages == []
    wide = torch.zeros(1, 60, 100)
    wide[:, 10:50, 40:60] = 1  # the mask and the transparency both count
    faced, _ = prepare(cut, ReferenceConfig(480), wide, [[box(40, 25, 20, 10)]])
    torch.testing.assert_close(faced, expected)
    half = torch.cat([picture(), torch.full((1, 60, 100, 1), 0.75)], -1)
    torch.testing.assert_close(prepare(half, ReferenceConfig())[0][0, 250, 256, :2],
                               0.75 * prepare(picture(), ReferenceConfig())[0][0, 250, 256, :2] + 0.25)
    clear, messages = prepare(torch.cat([picture(), mask.new_zeros(1, 60, 100, 1)], -1), ReferenceConfig(64))
    assert torch.equal(clear, prepare(picture(), ReferenceConfig(64))[0])
    assert messages[0].startswith("the picture is transparent everywhere, so the background stays")


def test_a_mask_around_the_person_is_told():
    """Load Image's mask is 1 where its picture is transparent: the person would be white, without a word."""
    mask = torch.zeros(1, 60, 100)
    mask[:, 15:, 30:70] = 1  # cut at the picture's lower edge, as portraits are
    for sound in (mask, torch.ones(1, 60, 100), 1 - torch.zeros(1, 60, 100)):
        assert prepare(picture(), ReferenceConfig(64), sound)[1] == []
    assert prepare(picture(), ReferenceConfig(64), mask, [[box(40, 25, 20, 10)]])[1] == []
    for faces in (None, [[box(40, 25, 20, 10)]], [[]]):
        _, messages = prepare(picture(), ReferenceConfig(64), 1 - mask, faces)
        assert re.match("the mask looks inverted.*Invert Mask", messages[0])


def test_the_face_s_box_decides_where_the_mask_s_edges_mislead():
    face = [[box(40, 25, 20, 10)]]
    wide = torch.ones(1, 60, 100)
    wide[:, 45:] = 0  # a close-up: the person is at all upper edges, so the inverted mask is not around anything
    assert prepare(picture(), ReferenceConfig(64), 1 - wide)[1] == []
    assert prepare(picture(), ReferenceConfig(64), wide, face)[1] == []
    _, (message,) = prepare(picture(), ReferenceConfig(64), 1 - wide, face)
    assert message.startswith("the mask looks inverted")
    holed = torch.ones(1, 60, 100)
    holed[:, 40:55, 10:35] = 0  # something in the person's hand
    _, (message,) = prepare(picture(), ReferenceConfig(64), holed)
    assert message.startswith("the mask looks inverted")
    assert prepare(picture(), ReferenceConfig(64), holed, face)[1] == []


def test_batches_alpha_grey_and_what_is_refused():
    images = torch.cat([picture(), picture().flip(2)])
    boxes = [[box(40, 25, 20, 10)], []]
    both, messages = prepare(images, ReferenceConfig(64), None, boxes)
    assert both.shape == (2, 64, 64, 3) and len(messages) == 1 and messages[0].startswith("picture 2: no face")
    assert torch.equal(both[:1], prepare(images[:1], ReferenceConfig(64), None, boxes[:1])[0])
    alpha = torch.cat([picture(), torch.ones(1, 60, 100, 1)], -1)
    assert torch.equal(prepare(alpha, ReferenceConfig(64))[0], prepare(picture(), ReferenceConfig(64))[0])
    grey = prepare(picture()[..., :1], ReferenceConfig(64))[0]
    assert torch.equal(grey[..., 0], grey[..., 2])
    for arguments, message in (
        ((torch.ones(0, 4, 4, 3), ReferenceConfig()), "image has shape"),
        ((torch.ones(1, 4, 4, 2), ReferenceConfig()), "image has shape"),
        ((picture(), ReferenceConfig(), torch.ones(3, 60, 100)), "mask has shape"),
        ((picture(), ReferenceConfig(), None, [[{"x": 1}]]), "no x, y, width and height"),
        ((picture(), ReferenceConfig(), None, [[box(1, 1, float("inf"), 5)]]), "bboxes hold NaN or infinite"),
        ((picture() * float("nan"), ReferenceConfig()), "image holds NaN"),
        ((images.repeat(2, 1, 1, 1), ReferenceConfig(), None, boxes), "bboxes belong to 2 pictures .* holds 4"),
        ((picture(), ReferenceConfig(), None, [[box(500, 500, 10, 10)]]), "outside the picture"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(*arguments)


# Load, apply, save


@pytest.fixture
def folder(tmp_path, monkeypatch):
    output = tmp_path / "output"
    listed = ([str(tmp_path / "loras"), str(output / "loras")], folder_paths.supported_pt_extensions)
    (tmp_path / "loras").mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", listed)
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(output))
    folder_paths.filename_list_cache.clear()
    yield tmp_path
    folder_paths.filename_list_cache.clear()


def apply(model, adapter, seed=1, mask=None, shape=(1, 16, 1, 4, 4), **settings):
    latent = {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}
    settings = {**vars(VideoIdentityConfig()), **settings}
    return UnderstudyApplyVideoIdentity.execute(model, adapter, latent, **settings, mask=mask).result[0]


def test_from_file_to_video_and_back(folder):
    model = tiny_model.wan()
    tensors = tiny_model.video_adapter(model)
    torch.save({"state_dict": tensors}, folder / "loras" / "official.ckpt")
    adapter = UnderstudyLoadVideoIdentityAdapter.execute("official.ckpt").result[0]
    UnderstudySaveVideoIdentityAdapter.execute(adapter, "mine")
    assert "mine_00001_.safetensors" in UnderstudyLoadVideoIdentityAdapter.define_schema().inputs[0].options
    again = UnderstudyLoadVideoIdentityAdapter.execute("mine_00001_.safetensors").result[0]
    first = UnderstudyLoadVideoIdentityAdapter.fingerprint_inputs(adapter_name="mine_00001_.safetensors")
    assert first == UnderstudyLoadVideoIdentityAdapter.fingerprint_inputs(adapter_name="mine_00001_.safetensors")
    shape = (1, 16, 2, 4, 4)
    euler = comfy.samplers.sampler_object("euler")
    results = [
        tiny_model.sample(patched, euler, shape=shape, steps=2)
        for patched in (model, apply(model, adapter), apply(model, again), apply(apply(model, again), adapter, 2))
    ]
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[3])
    assert apply(model, adapter, strength=0.0) is model
    assert apply(model, adapter, mask=torch.zeros(1, 8, 8)) is model


@pytest.mark.parametrize(("model", "settings", "message"), [
    (lambda: tiny_model.picture(), {}, "model is SD 1.5, a UNetModel.*needs a Wan"),
    (lambda: tiny_model.wan("causal"), {}, "CausalWanModel, which does not let"),
    (lambda: tiny_model.wan(dim=96), {}, r"q_loras\.down\.weight should be \(rank, 96\) and is \(4, 48\)"),
    (lambda: tiny_model.wan(num_layers=4), {}, r"blocks\.3\.self_attn\.q_loras\.down\.weight .* is nothing"),
    (lambda: tiny_model.wan("wan2.2 5B"), {}, "16 channels and the model's latents have 48.*VAE of this model"),
    (lambda: tiny_model.wan(), {"shape": (1, 16, 4, 4)}, "reference has shape .* another kind of model made it"),
    (lambda: tiny_model.wan(), {"blocks": "3"}, "has 0 to 2"),
    (lambda: tiny_model.wan(), {"start_percent": 1.0}, "range of steps is empty"),
    (lambda: tiny_model.wan(), {"mask": torch.ones(1, 1, 8, 8)}, "mask has shape"),
])
def test_what_does_not_fit_is_refused_before_sampling_even_at_strength_zero(model, settings, message):
    patcher = model()
    adapter = method.adapter_from(tiny_model.video_adapter(tiny_model.wan()))
    before = dict(patcher.model_options["transformer_options"]), dict(patcher.wrappers)
    for strength in (0.0, 1.0):
        with pytest.raises(ValueError, match=message):
            apply(patcher, adapter, **settings, strength=strength)
    assert (dict(patcher.model_options["transformer_options"]), dict(patcher.wrappers)) == before


def test_real_configurations_take_the_published_adapter():
    """On the meta device: the blocks, width and keys of Wan 2.1 14B, as the official file has them."""
    for name, blocks, width in (("Wan 2.1 1.3B", 30, 1536), ("Wan 2.1 14B", 40, 5120)):
        base = real_configurations.build(name)
        network = base.diffusion_model
        tensors = {
            method.weight_key(i, p, part): torch.empty(shape, device="meta", dtype=torch.float16)
            for i in range(blocks) for p in "qkv" for part, shape in (("down", (128, width)), ("up", (width, 128)))
        }
        parts = [
            method.BlockUpdates(**{
                p: method.ProjectionUpdate(*(tensors[method.weight_key(i, p, part)] for part in ("down", "up")))
                for p in "qkv"
            })
            for i in range(blocks)
        ]
        adapter = method.VideoAdapter(tuple(parts))
        adapter.check(network.dim, len(network.blocks))
        if blocks == 40:
            assert sum(tensor.numel() for tensor in adapter.tensors().values()) == 157_286_400
            # A 512 x 512 reference: 40 blocks, K and V of 1,024 tokens, 5,120 channels of two bytes.
            reference = method.video_reference(adapter, torch.ones(1, 16, 1, 64, 64), VideoIdentityConfig())
            assert sampling.SamplingReferences((reference,)).cache_bytes(base) == 800 << 20
        assert type(network).__name__ in sampling.VERIFIED


def test_files_of_other_kinds_are_refused(folder):
    safetensors.torch.save_file({"lora_up.weight": torch.ones(2, 2)}, folder / "loras" / "plain.safetensors")
    with pytest.raises(ValueError, match=r"plain\.safetensors.*lora_up\.weight of shape \(2, 2\)"):
        UnderstudyLoadVideoIdentityAdapter.execute("plain.safetensors")
