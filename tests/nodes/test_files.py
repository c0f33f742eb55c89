"""Weight files: exact round trips, names that cannot escape, nothing bad written, pickles that cannot run."""

import copy
import json
import os
import pickle
import unicodedata
import zipfile
from pathlib import Path

import comfy.utils
import folder_paths
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack.nodes import files, files_names

WEIGHTS = {"weight": torch.arange(12.0).reshape(3, 4)}


@pytest.fixture
def output(tmp_path, monkeypatch) -> Path:
    """The host's output folder, with lists of models of its own, for one test."""
    folder = tmp_path / "output"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(folder))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(
        folder_paths, "folder_names_and_paths", copy.deepcopy(folder_paths.folder_names_and_paths)
    )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.delenv("UNDERSTUDY_THEATRE", raising=False)
    return folder


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
def weights(draw) -> torch.Tensor:
    """A tensor of any stored dtype, rank 0 to 4 and layout, of random bits without NaN and infinities."""
    dtype = draw(st.sampled_from(list(files.DTYPES.values())))
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
@given(st.dictionaries(TEXT.filter(lambda key: key != "__metadata__"), weights(), min_size=1, max_size=4),
       st.dictionaries(TEXT, TEXT, max_size=3))
def test_what_is_saved_is_read_bit_by_bit(output, tensors, metadata):
    path = files.save(tensors, metadata, "loras", "anna")
    for read_tensors in (files.read(path)[0], safetensors.torch.load_file(path)):
        assert read_tensors.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert read_tensors[key].dtype == tensor.dtype and read_tensors[key].shape == tensor.shape
            assert bits(read_tensors[key]) == bits(tensor)
    assert files.read(path)[1] == metadata


def test_tensors_that_share_memory_are_stored_by_value(output):
    base = torch.arange(10.0)
    tensors = {"whole": base, "tied": base, "tail": base[5:], "reversed": base.flip(0)}
    stored, _ = files.read(files.save(tensors, {}, "loras", "tied"))
    assert all(torch.equal(stored[key], tensors[key]) for key in tensors)


def test_a_tensor_read_does_not_hang_on_the_file(output):
    path = files.save(WEIGHTS, {}, "loras", "anna")
    tensors, _ = files.read(path)
    os.truncate(path, 10)
    assert torch.equal(tensors["weight"], WEIGHTS["weight"])


def test_the_host_reads_and_lists_the_file_at_once(output):
    folder_paths.add_model_folder_path("loras", str(output / "loras"))
    assert files.list_files("loras") == []
    path = files.save(WEIGHTS, {"token": "anna"}, "loras", "people/anna")
    assert files.list_files("loras") == [os.path.join("people", "anna_00001_.safetensors")]
    assert files.find("loras", files.list_files("loras")[0]) == path
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
    with pytest.raises(files.WeightFileError, match=words):
        files.save(tensors, {}, "loras", "anna")
    assert [path for path in output.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("metadata", [{"steps": 3}, {"a": None}, {1: "a"}, {"a": b"b"}, {"a": "\ud800"}])
def test_metadata_that_is_no_text_is_refused(output, metadata):
    with pytest.raises(files.WeightFileError, match="json.dumps"):
        files.save(WEIGHTS, metadata, "loras", "anna")
    assert list(output.rglob("*.*")) == []


def test_a_header_that_could_not_be_read_again_is_never_published(output):
    with pytest.raises(files.WeightFileError, match="header"):
        files.save(WEIGHTS, {"captions": "x" * (files.MAX_HEADER + 1)}, "loras", "anna")
    assert [path for path in output.rglob("*") if path.is_file()] == []


# Names

REFUSED = None
BAD_NAMES = {
    "../anna": REFUSED, "../../etc/anna": REFUSED, "a/../../anna": REFUSED, "a/..": REFUSED, "..": REFUSED,
    ".. /anna": REFUSED, "..\\anna": REFUSED, "a\\..\\..\\anna": REFUSED, "/etc/anna": REFUSED,
    "//server/share/anna": REFUSED, "\\\\server\\share": REFUSED, "C:\\anna": REFUSED, "c:anna": REFUSED,
    "": REFUSED, " ": REFUSED, ".": REFUSED, "...": REFUSED, "/": REFUSED, "///": REFUSED,
    "a/b/c/d/e/f/g/h/i": REFUSED,
    "anna\0": "anna_", "an\nna": "an_na", "an\r\nna": "an__na", "\x1b[31manna": "_[31manna",
    "anna\x7f": "anna_", "anna\u202egnp": "anna_gnp", "anna\ud800": "anna_", "anna\u2028b": "anna_b",
    "a:b": REFUSED, "anna:b": "anna_b", 'a<b>"c"|d?e*f': "a_b__c__d_e_f",
    "con": "_con", "NUL.txt": "_NUL.txt", "a/COM1/b": "a/_COM1/b", "lpt¹": "_lpt¹", "aux ": "_aux",
    "anna. . .": "anna", " anna ": "anna", ".hidden": "hidden", ".git/hooks": "git/hooks", "a//./b": "a/b",
    "e\u0301lodie": "\u00e9lodie", "a" * 300: "a" * 120, "\u00e9" * 300: "\u00e9" * 60, "猫" * 300: "猫" * 40,
    "-rf": "-rf", "$(touch x)": "$(touch x)", "~/anna": "~/anna", "%00": "%00", "👩\u200d🎤": "👩\u200d🎤",
}


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_names_stay_inside_and_overwrite_nothing(tmp_path, output, name):
    expected = BAD_NAMES[name]
    if expected is REFUSED:
        with pytest.raises(files.WeightFileError, match="inside the output folder"):
            files.save(WEIGHTS, {}, "loras", name)
        assert files_in(tmp_path) == {}
        return
    first = files.save(WEIGHTS, {}, "loras", name)
    assert first == output / "loras" / f"{expected}_00001_.safetensors"
    before = files_in(tmp_path)
    second = files.save({"other": torch.zeros(1)}, {}, "loras", name)
    assert second == output / "loras" / f"{expected}_00002_.safetensors"
    after = files_in(tmp_path)
    assert after.keys() == {first, second} and after[first] == before[first]


def test_there_are_forty_bad_names():
    assert len(BAD_NAMES) >= 40


@settings(max_examples=400)
@given(st.text(st.one_of(st.characters(), st.sampled_from("./\\: \0\n%CONnul~")), max_size=150))
def test_no_text_becomes_a_name_outside_the_folder(text):
    try:
        name = files.normalise_prefix(text)
    except files.WeightFileError:
        return
    assert files.normalise_prefix(name) == name
    assert name == unicodedata.normalize("NFC", name)
    for part in name.split("/"):
        assert part and part not in (".", "..") and len(part.encode()) <= files_names.MAX_PART + 1
        assert part == part.strip(" .") and not set(part) & set('\0\n\\:<>"|?*')
    assert os.path.normpath(os.path.join("/output", name)).startswith("/output/")


def test_one_name_in_two_unicode_forms_is_one_series(output):
    names = [files.save(WEIGHTS, {}, "loras", form).name for form in ("\u00e9", "e\u0301")]
    assert names == ["\u00e9_00001_.safetensors", "\u00e9_00002_.safetensors"]


def test_a_leading_folder_key_is_not_doubled(output):
    assert files.save(WEIGHTS, {}, "loras", "loras/anna") == output / "loras" / "anna_00001_.safetensors"


@pytest.mark.parametrize("link", ["loras", "loras/people", "loras/people/deep"])
def test_links_out_of_the_output_folder_are_refused(tmp_path, output, link):
    outside = tmp_path / "outside"
    outside.mkdir()
    (output / link).parent.mkdir(parents=True, exist_ok=True)
    (output / link).symlink_to(outside, target_is_directory=True)
    with pytest.raises(files.WeightFileError, match="link"):
        files.save(WEIGHTS, {}, "loras", "people/deep/anna")
    assert list(outside.iterdir()) == []


def test_a_link_in_the_way_of_the_file_is_not_followed(tmp_path, output):
    (output / "loras").mkdir()
    (output / "loras" / "anna_00001_.safetensors").symlink_to(tmp_path / "elsewhere")
    assert files.save(WEIGHTS, {}, "loras", "anna").name == "anna_00002_.safetensors"
    assert not (tmp_path / "elsewhere").exists()


# Pickles


class _Call:
    """Pickles as a call, as an attacker would write it."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def payloads(canary: Path) -> dict[str, _Call]:
    return {
        "system": _Call(os.system, f"touch {canary}"),
        "exec": _Call(exec, f"open({str(canary)!r}, 'w').close()"),
        "eval": _Call(eval, f"open({str(canary)!r}, 'w').close()"),
        "open": _Call(open, str(canary), "w"),
        "mkdir": _Call(os.mkdir, str(canary)),
    }


def _raw(path: Path, content) -> None:
    path.write_bytes(pickle.dumps(content))


def _zip(path: Path, content) -> None:
    torch.save(content, path)


def _legacy(path: Path, content) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _deflated(path: Path, content) -> None:
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


CONTAINERS = {"raw": _raw, "zip": _zip, "legacy": _legacy, "deflated": _deflated}


@pytest.mark.parametrize("payload", ["system", "exec", "eval", "open", "mkdir"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_pickles_that_call_are_refused_and_call_nothing(tmp_path, container, payload):
    canary, path = tmp_path / "canary", tmp_path / "model.ckpt"
    call = payloads(canary)[payload]
    CONTAINERS[container](path, {"state_dict": {"weight": torch.ones(3), "extra": call}})
    with pytest.raises(files.WeightFileError, match="model.ckpt.*safetensors"):
        files.read_pickle(path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(call))
    assert canary.exists()  # the canary does sing where nobody refuses


def test_official_checkpoints_are_read(tmp_path):
    weights = {"model.weight": torch.randn(3, 4), "model.bias": torch.nn.Parameter(torch.randn(4).half())}
    nested = {"state_dict": weights, "epoch": 3, "global_step": 100}
    for name, content in {"flat": weights, "nested": nested}.items():
        torch.save(content, tmp_path / name)
        tensors = files.read_pickle(tmp_path / name)
        assert tensors.keys() == weights.keys()
        assert all(torch.equal(tensors[key], weights[key]) for key in weights)


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(2)], {"a": torch.ones(1).expand(1 << 40)},
                                     {0: torch.ones(2)}])
def test_pickles_without_honest_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(files.WeightFileError, match="model.ckpt"):
        files.read_pickle(tmp_path / "model.ckpt")


def test_truncated_pickles_are_refused(tmp_path):
    torch.save(WEIGHTS, tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        (tmp_path / "cut.ckpt").write_bytes(whole[:length])
        with pytest.raises(files.WeightFileError, match="cut.ckpt"):
            files.read_pickle(tmp_path / "cut.ckpt")


# Folders and the theatre's switch


@pytest.mark.parametrize("key", [files.ACTION_IDENTIFIERS, files.FUSION_EMBEDDINGS])
def test_own_folders_list_safetensors_of_models_and_output(tmp_path, output, key, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_THEATRE", "0")
    # As from extra_model_paths.yaml: the key is there already, and its empty set would list every file.
    folder_paths.add_model_folder_path(key, str(tmp_path / "shelf"))
    files.register_folders()
    files.register_folders()
    for folder in (tmp_path / "shelf", tmp_path / "models" / key):
        folder.mkdir(parents=True)
        safetensors.torch.save_file(WEIGHTS, folder / f"{folder.parent.name}.safetensors")
        (folder / "notes.txt").touch()
    saved = files.save(WEIGHTS, {}, key, "anna")
    listed = files.list_files(key)
    assert len(listed) == 3 and saved.name in listed and all(name.endswith(".safetensors") for name in listed)
    assert len(folder_paths.get_folder_paths(key)) == 3


def test_a_file_that_is_gone_is_named_with_its_places(output):
    files.register_folders()
    with pytest.raises(files.WeightFileError, match=r"'anna\.safetensors'.*action_identifiers"):
        files.find(files.ACTION_IDENTIFIERS, "anna.safetensors")
    with pytest.raises(files.WeightFileError):
        files.find(files.ACTION_IDENTIFIERS, "../../../../etc/passwd")


@pytest.mark.parametrize(("variable", "setting", "enabled"), [
    (None, None, True), (None, True, True), (None, False, False), (None, "false", True),
    ("0", None, False), ("0", True, False), ("off", None, False), ("False", None, False),
    ("1", False, True), ("", False, False), (" ", None, True),
])
def test_the_theatre_s_switch(output, monkeypatch, variable, setting, enabled):
    if variable is not None:
        monkeypatch.setenv("UNDERSTUDY_THEATRE", variable)
    settings_file = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    settings_file.parent.mkdir(parents=True)
    settings_file.write_text(json.dumps({} if setting is None else {"Understudy.Theatre": setting}))
    assert files.theatre_enabled() is enabled


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_damaged_settings_leave_the_theatre_open(output, content):
    settings_file = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    settings_file.parent.mkdir(parents=True)
    settings_file.write_bytes(content)
    assert files.theatre_enabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_theatre_s_models_stand_only_in_the_lists_they_belong_to(tmp_path, output, monkeypatch, enabled):
    models = tmp_path / "pack" / "workflows" / "models"
    shipped = {"checkpoints": files.THEATRE_FILES["checkpoints"][0], "loras": files.THEATRE_FILES["loras"][-1]}
    for key, name in shipped.items():
        (models / key).mkdir(parents=True)
        (models / key / name).touch()
    monkeypatch.setattr(files, "PACK_ROOT", tmp_path / "pack")
    monkeypatch.setenv("UNDERSTUDY_THEATRE", str(int(enabled)))
    files.register_folders()
    shown = [key for key in files.THEATRE_FILES if str(models / key) in folder_paths.get_folder_paths(key)]
    assert shown == (list(shipped) if enabled else [])
    assert all((name in files.list_files(key)) is enabled for key, name in shipped.items())
