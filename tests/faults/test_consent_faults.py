"""Consent in a real server: through training and files, by link from the library, and where it is required."""

import contextlib
import json

import pytest
import safetensors
from faults import prompts
from faults.test_identity_prior_faults import trained, training

SETTING = "Understudy.RequireConsent"
TYPED = {
    "subject": "Åsa 同意", "scopes": {"__value__": ["training", "private"]}, "granted_by": "",
    "granted_on": "2026-11-01", "expires": "2099-12-31", "note": "form 7",
}


@pytest.fixture(scope="module")
def prior(server):
    """The file of a prior that was trained with consent, and the one that ComfyUI's own node saved of it."""
    prompt = training(server)
    prompt["consent"] = prompts.node("UnderstudyConsentRecord", **TYPED)
    prompt["train"]["inputs"]["consent"] = ["consent", 0]
    prompt["native"] = prompts.node("SaveLoRA", lora=["train", 0], prefix="loras/native_without_consent")
    return trained(server, prompt)


def metadata(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def loading(prior, **settings):
    """The library's newest version of this prior, loaded by a link, and its trigger words saved nowhere."""
    name = prior.name.rsplit("_", 2)[0]
    return {
        prompts.LOADER: prompts.node("CheckpointLoaderSimple", ckpt_name=prompts.CHECKPOINT),
        "library": prompts.node(
            "UnderstudyIdentityLibrary", kind="identity prior", name=name, version=0, model=[prompts.LOADER, 0]
        ),
        "prior": prompts.node(
            "UnderstudyLoadIdentityPrior", model=[prompts.LOADER, 0], lora_name=["library", 0], strength=1.0,
            **settings,
        ),
        "show": prompts.node("PreviewAny", source=["prior", 2]),
        "list": prompts.node("PreviewAny", source=["library", 3]),
        "picture": prompts.node("PreviewImage", images=["library", 2]),
    }


@contextlib.contextmanager
def required(server):
    server.post(f"/settings/{SETTING}", True)
    try:
        yield
    finally:
        server.post(f"/settings/{SETTING}", False)


def log_since(server, start):
    return server.log.read_text(encoding="utf-8")[start:]


def ran(entry):
    return entry["status"]["status_str"] == "success"


def test_the_trained_file_carries_what_was_typed_and_comfyui_s_own_node_drops_it(server, prior):
    assert json.loads(metadata(prior)["understudy_consent"]) == {
        "version": 1, "subject": "Åsa 同意", "scopes": ["private", "training"], "granted_on": "2026-11-01",
        "expires": "2099-12-31", "note": "form 7",
    }
    native = list((server.base / "output" / "loras").glob("native_without_consent*"))
    assert native and all("consent" not in str(metadata(path)) for path in native)


def test_the_library_hands_the_file_on_and_the_loader_warns(server, prior):
    start = len(server.log.read_text(encoding="utf-8"))
    entry = server.queue(loading(prior, purpose="commercial"))
    assert ran(entry), entry["status"]["messages"]
    assert entry["outputs"]["show"]["text"] == ["sks robot"]
    (listed,) = entry["outputs"]["list"]["text"]
    line = next(line for line in listed.splitlines() if line.startswith(prior.name.rsplit("_", 2)[0]))
    assert "of the connected model; consent for private, training until 2099-12-31; made 20" in line
    said = log_since(server, start)
    assert "Load Identity Prior: consent of Åsa 同意 for private, training, since 2026-11-01" in said
    assert "and not for commercial" in said and "form 7" not in said


def test_the_setting_stops_a_cached_loader_and_lets_it_run_again(server, prior):
    prompt, covered = loading(prior, purpose="editorial"), loading(prior, purpose="private")
    assert ran(server.queue(prompt)) and ran(server.queue(covered))
    with required(server):
        entry = server.queue(prompt)
        error = prompts.message(entry, "execution_error")
        assert error["node_type"] == "UnderstudyLoadIdentityPrior" and error["exception_type"] == "ConsentError"
        assert "is for private, training, and not for editorial" in error["exception_message"]
        assert "form 7" not in json.dumps(error)
        assert ran(server.queue(covered))
        untold = training(server)
        error = prompts.message(server.queue(untold), "execution_error")
        assert error["node_type"] == "UnderstudyTrainIdentityPrior"
        assert "connect a Consent Record for training to consent" in error["exception_message"]
    assert ran(server.queue(prompt))
