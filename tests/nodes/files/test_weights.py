"""Weight files: exact round trips, and nothing bad written."""

import os

import comfy.utils
import folder_paths
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack.nodes.files import names, weights
from pack.nodes.files.folders import LORAS

WEIGHTS = {"weight": torch.arange(12.0).reshape(3, 4)}


def bits(tensor: torch.Tensor) -> bytes:
    # Copied, since a single element may keep a stride other than 1 through `contiguous`.
    packed = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return packed.reshape(-1).view(torch.uint8).numpy().tobytes()


# Round trips

LAYOUTS = {
    "as it is": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, -1) if tensor.dim() else tensor,
    "every second": lambda tensor: tensor[::2] if tensor.dim() else tensor,
    "part of a larger one": lambda tensor: torch.stack([tensor, tensor])[1],
    "expanded": lambda tensor: tensor.unsqueeze(0).expand(3, *tensor.shape),
    "parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
}


@st.composite
def tensors_to_store(draw) -> torch.Tensor:
    """A tensor of any stored dtype, rank 0 to 4 and layout, of random bits without NaN and infinities."""
    dtype = draw(st.sampled_from(list(weights.DTYPES.values())))
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=generator, dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape)
    if dtype.is_floating_point:
        tensor = torch.where(tensor.double().isfinite(), tensor.double(), 0.0).to(dtype)
    return LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](tensor)


TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(TEXT.filter(lambda key: key != "__metadata__"), tensors_to_store(), min_size=1, max_size=4),
       st.dictionaries(TEXT, TEXT, max_size=3))
def test_what_is_saved_is_read_bit_by_bit(output, tensors, metadata):
    path = weights.save(tensors, metadata, "loras", "anna")
    for read_tensors in (weights.read(path)[0], safetensors.torch.load_file(path)):
        assert read_tensors.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert read_tensors[key].dtype == tensor.dtype and read_tensors[key].shape == tensor.shape
            assert bits(read_tensors[key]) == bits(tensor)
    assert weights.read(path)[1] == metadata


def test_tensors_that_share_memory_are_stored_by_value(output):
    base = torch.arange(10.0)
    tensors = {"whole": base, "tied": base, "tail": base[5:], "reversed": base.flip(0)}
    stored, _ = weights.read(weights.save(tensors, {}, "loras", "tied"))
    assert all(torch.equal(stored[key], tensors[key]) for key in tensors)


def test_a_tensor_read_does_not_hang_on_the_file(output):
    path = weights.save(WEIGHTS, {}, "loras", "anna")
    tensors, _ = weights.read(path)
    os.truncate(path, 10)
    assert torch.equal(tensors["weight"], WEIGHTS["weight"])


def test_comfyui_reads_and_lists_the_file_at_once(output):
    folder_paths.add_model_folder_path("loras", str(output / "loras"))
    assert LORAS.choices() == []
    path = weights.save(WEIGHTS, {"token": "anna"}, "loras", "people/anna")
    assert LORAS.choices() == [os.path.join("people", "anna_00001_.safetensors")]
    assert LORAS.find(LORAS.choices()[0]) == path
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    assert torch.equal(tensors["weight"], WEIGHTS["weight"]) and metadata["token"] == "anna"


# Nothing bad is written

BAD_WEIGHTS = {
    "NaN": ({"a": torch.tensor([1.0, float("nan")])}, "NaN"),
    "infinity": ({"a": torch.ones(2), "b": torch.tensor(-float("inf"))}, "'b'"),
    "NaN in fp16": ({"a": torch.tensor([float("nan")]).half()}, "NaN"),
    "NaN in bf16": ({"a": torch.tensor([float("nan")]).bfloat16()}, "NaN"),
    "NaN in e4m3": ({"a": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}, "NaN"),
    "infinity in e5m2": ({"a": torch.tensor([float("inf")]).to(torch.float8_e5m2)}, "NaN"),
    "no tensors": ({}, "no tensors"),
    "no elements": ({"a": torch.ones(3, 0)}, "no element"),
    "meta": ({"a": torch.empty(2, device="meta")}, "dense"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "dense"),
    "complex": ({"a": torch.ones(2, dtype=torch.complex64)}, "fp32"),
    "no tensor": ({"a": [1.0]}, "dense"),
    "nine dimensions": ({"a": torch.ones([1] * 9)}, "shape"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused_and_leave_no_file(output, case):
    tensors, words = BAD_WEIGHTS[case]
    with pytest.raises(names.WeightFileError, match=words):
        weights.save(tensors, {}, "loras", "anna")
    assert [path for path in output.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("metadata", [{"steps": 3}, {"a": None}, {1: "a"}, {"a": b"b"}, {"a": "\ud800"}])
def test_metadata_that_is_no_text_is_refused(output, metadata):
    with pytest.raises(names.WeightFileError, match="json.dumps"):
        weights.save(WEIGHTS, metadata, "loras", "anna")
    assert list(output.rglob("*.*")) == []


def test_a_header_that_could_not_be_read_again_is_never_published(output):
    with pytest.raises(names.WeightFileError, match="header"):
        weights.save(WEIGHTS, {"captions": "x" * (weights.MAX_HEADER + 1)}, "loras", "anna")
    assert [path for path in output.rglob("*") if path.is_file()] == []
