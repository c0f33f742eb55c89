"""Pickles as data: unknown classes are left out, nothing is imported or called, and time and memory are bounded."""

import collections
import datetime
import enum
import functools
import io
import pathlib
import pickle
import resource
import struct
import sys
import types
import typing
import zipfile

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.nodes.files import names, pickles, unpickling
from pack.nodes.files.names import WeightFileError

WEIGHTS = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.nn.Parameter(torch.randn(4).half())}


def absent_class(monkeypatch, path, **members):
    """A class of a library that only the writer has, as pickle finds it."""
    module, _, name = path.rpartition(".")
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(".".join(parts[:count])))
    stand_in = type(name, (), {"__module__": module, **members})
    setattr(sys.modules[module], name, stand_in)
    return stand_in


class Colour(enum.Enum):
    RED = "red"


def training_settings(monkeypatch):
    """What the settings of OmegaConf and of training scripts pickle, in kind and by name."""
    config = absent_class(monkeypatch, "omegaconf.dictconfig.DictConfig")()
    metadata = absent_class(monkeypatch, "omegaconf.base.ContainerMetadata")()
    metadata.__dict__.update(ref_type=typing.Any, key_type=typing.Any, element_type=typing.Optional[int], kept=dict)
    several = absent_class(monkeypatch, "omegaconf.listconfig.ListConfig")()
    several._content = [1, "two", None]
    config.__dict__.update(
        _metadata=metadata, _content={"lr": 1e-4, "list": several}, factory=collections.defaultdict(list, {"a": [1]}),
    )
    return {
        "config": config, "any": typing.Any, "path": pathlib.PurePosixPath("a/b"), "colour": Colour.RED,
        "when": datetime.datetime(2024, 1, 2), "number": numpy.float64(3), "array": numpy.arange(3),
        "noise": numpy.random.default_rng(0), "union": int | str, "list": list[int], "set": {1}, "bytes": b"1",
        "frozen": frozenset("a"), "text": bytearray(b"1"), 7: 1j, (1, "a"): slice(3),
        "part": functools.partial(int, base=2), "argument": type(None),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_weights_beside_settings_of_any_class_are_read_without_importing_it(tmp_path, zipped, protocol):
    path = tmp_path / "published.ckpt"
    with pytest.MonkeyPatch.context() as monkeypatch:
        content = {"state_dict": WEIGHTS, "hyper_parameters": training_settings(monkeypatch)}
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    tensors = pickles.read_pickle(path)
    assert tensors.keys() == WEIGHTS.keys()
    for key, tensor in WEIGHTS.items():
        assert torch.equal(tensors[key], tensor) and tensors[key].dtype == tensor.dtype
        assert type(tensors[key]) is torch.Tensor
    assert "omegaconf" not in sys.modules


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int32,
          torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("zipped", [True, False])
def test_every_type_view_and_shared_storage_is_read_as_torch_does(tmp_path, zipped):
    whole = torch.arange(60.0).reshape(3, 4, 5)
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES
               if zipped or dtype != torch.float8_e4m3fn}
    tensors |= {"view": whole[1, 1:, ::2], "turned": whole.mT}
    tensors |= {"number": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    path = tmp_path / "a.pt"
    torch.save(collections.OrderedDict(tensors), path, _use_new_zipfile_serialization=zipped)
    expected, actual = torch.load(path, weights_only=True), pickles.read_pickle(path)
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].shape == tensor.shape and actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key].double(), tensor.double()), key
    assert actual["view"].untyped_storage().data_ptr() == actual["turned"].untyped_storage().data_ptr()


def test_modules_hold_their_parameters(tmp_path):
    """As the first textual inversions are saved."""
    torch.save({"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 8))})},
               tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tensor,) = pickles.read_pickle(tmp_path / "old.pt", under="string_to_param").values()
    assert torch.equal(tensor, torch.ones(2, 8))


def raw_call(module, name, argument=b"V1\n"):
    """A stream that calls a function with one text, without that function's module being there."""
    return b"\x80\x02}X\x01\x00\x00\x00xc" + f"{module}\n{name}\n".encode() + argument + b"\x85Rs."


@pytest.mark.parametrize("path", [
    "os system", "posix system", "nt system", "builtins eval", "__builtin__ exec", "builtins __import__",
    "builtins getattr", "builtins open", "subprocess Popen", "importlib import_module", "runpy run_path",
    "sys exit", "socket socket", "shutil rmtree", "pty spawn", "code InteractiveInterpreter", "types CodeType",
    "types FunctionType", "operator attrgetter", "operator methodcaller", "functools cached_property",
    "torch load", "torch.hub load", "torch.hub os.system", "torch.hub os", "torch.serialization load",
    "numpy load", "numpy.testing._private.utils runstring", "pip main", "joblib load", "commands getoutput",
    "webbrowser open", "argparse open", "my_library run",
])
def test_what_could_run_code_is_refused_by_its_name(tmp_path, path):
    module, name = path.split()
    stream = raw_call(module, name)
    with pytest.raises(unpickling.UnsafePickleError, match=name):
        unpickling.load(io.BytesIO(stream))
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("a/data.pkl", stream)
    with pytest.raises(WeightFileError, match=f"a.ckpt.*more than weights.*{name}.*could run code"):
        pickles.read_pickle(tmp_path / "a.ckpt")


def string(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


ENDLESS = {
    # Each would take minutes or gigabytes if its objects were built as a pickle asks.
    "doubling tuples as a key": b"\x80\x02K\x01" + 60 * b"2\x86" + b"}q\x002h\x002K\x01s.",
    "memo number": b"\x80\x02Nr\xff\xff\xff\xff.",
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"a.",
    "long number": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"\x01.",
    "many steps": b"\x80\x02(" + (1 << 21) * b"}" + b"l.",
    "one state for many": b"\x80\x02}(" + b"".join(string(f"{i}") + b"N" for i in range(30_000)) + b"uq\x000"
    + 30_000 * b"ccollections\nOrderedDict\nh\x00\x85R0" + b"N.",
    "deep nesting": b"\x80\x02" + 900_000 * b"]" + 400_000 * b"a" + b".",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_costly_streams_end_soon(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        unpickling.load(io.BytesIO(ENDLESS[name]))
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10


def archive_of(path, content):
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_tensors_beyond_their_storage_are_refused(tmp_path):
    honest = archive_of(tmp_path / "a.ckpt", {"w": torch.arange(6.0)})
    pickled = honest["a/data.pkl"]
    assert pickled.count(b"K\x06\x85") == 1
    for change in (b"K\x07\x85", b"K\xff\x85"):
        with zipfile.ZipFile(tmp_path / "b.ckpt", "w") as archive:
            for name, data in honest.items():
                archive.writestr(name, pickled.replace(b"K\x06\x85", change) if data is pickled else data)
        with pytest.raises(WeightFileError, match="b.ckpt.*more elements than it stores"):
            pickles.read_pickle(tmp_path / "b.ckpt")


def test_one_storage_under_very_many_names_is_refused(tmp_path):
    weight = torch.zeros(10_000)
    torch.save({f"w{i}": weight for i in range(1000)}, tmp_path / "a.ckpt")
    with pytest.raises(WeightFileError, match="a.ckpt.*names 40000000 bytes"):
        pickles.read_pickle(tmp_path / "a.ckpt")


def test_tensors_that_are_not_dense_are_named(tmp_path):
    torch.save({"w": torch.ones(2), "s": torch.eye(3).to_sparse()}, tmp_path / "a.ckpt")
    with pytest.raises(WeightFileError, match="'s'.*_rebuild_sparse_tensor"):
        pickles.read_pickle(tmp_path / "a.ckpt")


def test_an_object_in_place_of_a_dictionary_is_named(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    torch.save(argument := pathlib.PurePosixPath("a"), tmp_path / "path.pt")
    assert pickles.read_pickle(tmp_path / "model.pt").keys() == {"weight", "bias"}
    with pytest.raises(WeightFileError, match=f"path.pt.*{type(argument).__name__}"):
        pickles.read_pickle(tmp_path / "path.pt")


def test_safetensors_under_a_pickle_s_ending_are_read(tmp_path):
    import safetensors.torch

    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "a.ckpt", {"kind": "b"})
    tensors, metadata = pickles.read_any(tmp_path / "a.ckpt")
    assert tensors.keys() == {"w"} and metadata == {"kind": "b"}


SOUND = {zipped: io.BytesIO() for zipped in (True, False)}
for zipped, buffer in SOUND.items():
    torch.save({"state_dict": WEIGHTS, "extra": [1, (2.0, "a")]}, buffer, _use_new_zipfile_serialization=zipped)


@settings(max_examples=300, deadline=None)
@given(st.booleans(), st.data())
def test_damage_anywhere_is_refused_by_name_or_does_not_reach_a_shape(tmp_path_factory, zipped, data):
    content = bytearray(SOUND[zipped].getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "mutant.ckpt"
    path.write_bytes(content)
    try:
        tensors = pickles.read_pickle(path)
    except names.WeightFileError as error:
        assert "mutant.ckpt" in str(error)
    else:
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 8 * len(content)


def test_what_the_canary_would_do_is_real(tmp_path):
    """Without this, a stream that never calls would prove nothing."""
    canary = tmp_path / "canary"
    stream = raw_call("posix", "mkdir", b"V" + str(canary).encode() + b"\n")
    with pytest.raises(unpickling.UnsafePickleError, match="posix.mkdir"):
        unpickling.load(io.BytesIO(stream))
    assert not canary.exists()
    pickle.loads(stream)
    assert canary.exists()
