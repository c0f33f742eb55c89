"""Adapters in all their forms, and what is refused, by key and shape; no model needed."""

import argparse
import collections
import typing

import folder_paths
import pytest
import safetensors.torch
import torch
from pack.nodes.files.names import WeightFileError
from pack.nodes.files.weights import read
from pack.nodes.video_identity import files, method


def weights(blocks=2, width=6, rank=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(blocks):
        for name in "qkv":
            stem = f"blocks.{i}.self_attn.{name}_loras"
            tensors[f"{stem}.down.weight"] = torch.randn(rank, width, generator=generator).to(dtype)
            tensors[f"{stem}.up.weight"] = torch.randn(width, rank, generator=generator).to(dtype)
    return tensors


@pytest.fixture
def folder(tmp_path, monkeypatch):
    listed = ([str(tmp_path)], folder_paths.supported_pt_extensions)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", listed)
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    folder_paths.filename_list_cache.clear()
    return tmp_path


def same(adapter, tensors):
    actual = adapter.tensors()
    assert actual.keys() == tensors.keys()
    return all(torch.equal(actual[key], tensors[key]) and actual[key].dtype == tensors[key].dtype for key in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("form", ["ckpt", "nested ckpt", "safetensors"])
def test_every_form_of_file(folder, form, prefix, dtype):
    tensors = weights(dtype=dtype, rank=5)
    named = {prefix + key: tensor for key, tensor in tensors.items()}
    if form == "safetensors":
        safetensors.torch.save_file(named, folder / "a.safetensors")
    else:
        content = {"state_dict": named, "epoch": 3, "note": "x"} if "nested" in form else named
        torch.save(content, folder / "a.ckpt")
    name = "a.safetensors" if form == "safetensors" else "a.ckpt"
    assert name in files.FOLDER.choices()
    assert same(files.load(name), tensors)


@pytest.mark.parametrize("rank", [1, 4, 128])
def test_any_rank_and_layers_of_different_rank(folder, rank):
    tensors = weights(rank=rank)
    tensors["blocks.1.self_attn.k_loras.down.weight"] = torch.ones(7, 6)
    tensors["blocks.1.self_attn.k_loras.up.weight"] = torch.ones(6, 7)
    safetensors.torch.save_file(tensors, folder / "a.safetensors")
    adapter = files.load("a.safetensors")
    assert same(adapter, tensors) and adapter.width == 6 and len(adapter.blocks) == 2


def changed(**changes):
    tensors = weights()
    for key, tensor in changes.items():
        key = key.replace("__", ".")
        if tensor is None:
            del tensors[key]
        else:
            tensors[key] = tensor
    return tensors


Q0 = "blocks__0__self_attn__q_loras__"
PLAIN = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 6)}


@pytest.mark.parametrize(("tensors", "message"), [
    (PLAIN, r"blocks\.0\.self_attn\.q\.lora_A\.weight of shape \(4, 6\).*q_loras\.down.*Load LoRA"),
    ({**weights(), **PLAIN}, r"lora_A\.weight of shape \(4, 6\)"),
    (changed(**{Q0 + "up__weight": None}), r"q_loras\.up\.weight should be \(6, 3\) and is nothing"),
    (changed(**{Q0 + "up__weight": torch.ones(6, 4)}), r"q_loras\.up\.weight should be \(6, 3\) and is \(6, 4\)"),
    (changed(**{Q0 + "down__weight": torch.ones(0, 6), Q0 + "up__weight": torch.ones(6, 0)}), r"\(0, 6\)|\[0, 6\]"),
    (changed(**{Q0 + "down__weight": torch.ones(3, 5)}), r"should be \(\d, \d\) and is \(\d, \d\)"),
    (changed(**{Q0 + "down__weight": torch.ones(3, 6, 1)}), r"down\.weight should be \(rank, width\).*\(3, 6, 1\)"),
    (changed(**{Q0 + "down__weight": torch.ones(3, 6, dtype=torch.int8)}), r"fp16, bf16 or fp32 .*int8"),
    (changed(**{Q0 + "down__weight": torch.full((3, 6), float("nan"))}), r"q_loras\.down\.weight .*NaN"),
    ({k: v for k, v in weights().items() if not k.startswith("blocks.0")}, r"blocks\.0\.self_attn\.q_loras\.down"),
    ({**weights(), **{f"diffusion_model.{k}": v for k, v in weights(1).items()}}, "twice"),
])
@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_other_weights_are_refused_by_key_and_shape(folder, tensors, message, ending):
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    save = torch.save if ending == "ckpt" else safetensors.torch.save_file
    save(tensors, folder / f"a.{ending}")
    with pytest.raises(WeightFileError, match=message) as caught:
        files.load(f"a.{ending}")
    assert f"a.{ending}" in str(caught.value)


def test_an_adapter_is_read_past_what_a_training_script_stores_beside_it(folder):
    settings = {"args": argparse.Namespace(lr=1e-4), "any": typing.Any, "by": collections.defaultdict(list, a=[1])}
    for zipped in (True, False):
        torch.save({"state_dict": weights(), **settings}, folder / "a.ckpt", _use_new_zipfile_serialization=zipped)
        assert files.load("a.ckpt").tensors().keys() == weights().keys()


class Canary:
    def __reduce__(self):
        return (open, ("canary", "w"))


def test_a_pickle_that_would_run_code_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.save({"state_dict": weights(), "x": Canary()}, folder / "a.ckpt")
    with pytest.raises(WeightFileError, match="more than weights"):
        files.load("a.ckpt")
    assert not (folder / "canary").exists()


@pytest.mark.parametrize(("blocks", "width", "message"), [
    (2, 8, r"blocks\.0\.self_attn\.q_loras\.down\.weight should be \(rank, 8\) and is \(3, 6\).*width 8"),
    (3, 6, r"blocks\.2\.self_attn\.q_loras\.down\.weight should be \(rank, 6\) and is nothing.*3 blocks"),
    (1, 6, r"blocks\.1\.self_attn\.q_loras\.down\.weight should be no such key and is \(3, 6\)"),
])
def test_another_model_s_adapter_is_refused(blocks, width, message):
    adapter = method.adapter_from(weights())
    adapter.check(6, 2)
    with pytest.raises(method.AdapterError, match=message):
        adapter.check(width, blocks)


def test_save_and_load_give_the_same_bits_under_the_published_names(folder):
    tensors = weights(dtype=torch.bfloat16)
    adapter = method.adapter_from({f"diffusion_model.{key}": tensor for key, tensor in tensors.items()})
    path = files.save(adapter, "people/ann")
    assert path.relative_to(folder).as_posix() == "output/loras/people/ann_00001_.safetensors"
    stored, metadata = read(path)
    assert stored.keys() == tensors.keys() and metadata["width"] == "6" and metadata["blocks"] == "2"
    assert same(method.adapter_from(stored), tensors)
