"""Pickles: official checkpoints are read, and none can run."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from pack.nodes.files import names, pickles

WEIGHTS = {"weight": torch.arange(12.0).reshape(3, 4)}


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
    with pytest.raises(names.WeightFileError, match="model.ckpt.*safetensors"):
        pickles.read_pickle(path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(call))
    assert canary.exists()  # the canary does sing where nobody refuses


def test_official_checkpoints_are_read(tmp_path):
    weights = {"model.weight": torch.randn(3, 4), "model.bias": torch.nn.Parameter(torch.randn(4).half())}
    nested = {"state_dict": weights, "epoch": 3, "global_step": 100}
    for name, content in {"flat": weights, "nested": nested}.items():
        torch.save(content, tmp_path / name)
        tensors = pickles.read_pickle(tmp_path / name)
        assert tensors.keys() == weights.keys()
        assert all(torch.equal(tensors[key], weights[key]) for key in weights)


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(2)], {"a": torch.ones(1).expand(1 << 40)},
                                     {0: torch.ones(2)}])
def test_pickles_without_honest_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(names.WeightFileError, match="model.ckpt"):
        pickles.read_pickle(tmp_path / "model.ckpt")


def test_truncated_pickles_are_refused(tmp_path):
    torch.save(WEIGHTS, tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        (tmp_path / "cut.ckpt").write_bytes(whole[:length])
        with pytest.raises(names.WeightFileError, match="cut.ckpt"):
            pickles.read_pickle(tmp_path / "cut.ckpt")
