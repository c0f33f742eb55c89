"""The action identifier in a real server: train, save, load, apply, cancel in each phase, resume, wrong wiring."""

import itertools
import json

import pytest
import safetensors.torch
import torch
from faults import drives, prompts
from launcher.server import ServerError

TRAIN, IDENTIFIERS, CHECKPOINTS = "train", "action_identifiers", "training_checkpoints"
NUMBERS = itertools.count()
TEXT = "a blue cat <action> on a beach"


def training(server, steps=3, pictures=2, **widgets) -> dict:
    """Train on two puppets with one action and save the result under a name that only this prompt uses."""
    puppets = prompts.defaults(server, "UnderstudyPuppetSet") | {
        "count": pictures, "actions": "saluting", "identities": "random", "scenes": "", "seed": 4,
    }
    settings = prompts.defaults(server, "UnderstudyTrainActionIdentifier") | {
        "model": [prompts.LOADER, 0], "clip": [prompts.LOADER, 1], "vae": [prompts.LOADER, 2],
        "images": ["puppets", 0], "subjects": ["puppets", 4], "initial_word": "waving", "steps": steps,
        "context_steps": 1, "learning_rate": 0.01, "seed": 0, "checkpoint_every": 0, **widgets,
    }
    return {
        prompts.LOADER: prompts.node("CheckpointLoaderSimple", ckpt_name=prompts.CHECKPOINT),
        "puppets": prompts.node("UnderstudyPuppetSet", **puppets),
        TRAIN: prompts.node("UnderstudyTrainActionIdentifier", **settings),
        "save": prompts.node(
            "UnderstudySaveActionIdentifier", action=[TRAIN, 0], filename_prefix=f"act{next(NUMBERS)}",
            textual_inversion=True,
        ),
    }


def saved(server, prompt):
    name = prompt["save"]["inputs"]["filename_prefix"]
    return sorted((server.base / "output" / IDENTIFIERS).glob(f"{name}_*.safetensors"))


def checkpoints(server):
    return sorted((server.base / "output" / CHECKPOINTS).glob("action_identifier*.safetensors"))


def trained(server, prompt):
    entry = server.queue(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    (path,) = saved(server, prompt)
    return path


def applied(server, name, strength=1.0, text=TEXT, apply=True) -> dict:
    """Plain sampling with a loaded action in the positive prompt."""
    prompt = prompts.plain()
    prompt["action"] = prompts.node("UnderstudyLoadActionIdentifier", action_name=name)
    prompt["positive"] = prompts.node(
        "UnderstudyEncodeAction", clip=[prompts.LOADER, 1], text=text, **{"actions.action0": ["action", 0]}
    )
    if apply:
        prompt["apply"] = prompts.node(
            "UnderstudyApplyActionIdentifier", model=[prompts.LOADER, 0], strength=strength
        )
        prompt[prompts.SAMPLER]["inputs"]["model"] = ["apply", 0]
    return prompt


def error(server, prompt) -> str:
    return prompts.message(server.queue(prompt), "execution_error")["exception_message"]


@pytest.fixture(autouse=True)
def no_files_left(fault_server):
    yield
    output = fault_server.base / "output"
    for folder in (IDENTIFIERS, CHECKPOINTS, "embeddings"):
        for path in (output / folder).glob("*.safetensors"):
            path.unlink()


def test_an_action_is_trained_saved_loaded_and_applied(fault_server):
    plain = prompts.run(fault_server, prompts.plain(seed=8))
    path = trained(fault_server, training(fault_server))
    (tokens,) = safetensors.torch.load_file(path).values()
    assert tokens.shape[1:] == (1, 128) and not torch.equal(tokens[0], tokens[1])
    exported = list((fault_server.base / "output" / "embeddings").glob("*.safetensors"))
    assert [list(safetensors.torch.load_file(path)) for path in exported] == [["emb_params"]]
    sampled = prompts.run(fault_server, applied(fault_server, path.name))
    word = prompts.plain()
    word["positive"]["inputs"]["text"] = TEXT.replace("<action>", "waving")
    expected = prompts.run(fault_server, word)
    assert torch.equal(prompts.run(fault_server, applied(fault_server, path.name, 0.0)), expected)
    assert torch.isfinite(sampled).all() and not torch.equal(sampled, expected)
    assert "connect Apply Action Identifier" in error(fault_server, applied(fault_server, path.name, apply=False))
    assert "text does not contain <action>" in error(fault_server, applied(fault_server, path.name, text="a cat"))
    assert torch.equal(prompts.run(fault_server, prompts.plain(seed=8)), plain), "the model was left changed"


def test_an_identifier_of_another_model_and_too_few_pictures_are_refused(fault_server):
    path = trained(fault_server, training(fault_server, steps=1))
    tensors = safetensors.torch.load_file(path)
    (width,) = {tensor.shape[-1] for tensor in tensors.values()}
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    places = json.loads(metadata["layers"])
    fewer = {key: tensor[:-1].clone() for key, tensor in tensors.items()}
    wider = {key: torch.zeros(len(places), 1, 2 * width) for key in tensors}
    for name, content, layers, message in (
        ("fewer", fewer, places[:-1], "cross-attention layers"), ("wider", wider, places, f"of width {2 * width}"),
    ):
        other = path.with_name(f"{name}_00001_.safetensors")
        safetensors.torch.save_file(content, other, metadata={**metadata, "layers": json.dumps(layers)})
        assert message in error(fault_server, applied(fault_server, other.name))
    assert "images holds 1 picture: give at least 2" in error(fault_server, training(fault_server, pictures=1))
    mismatched = training(fault_server, subjects="a cat\na dog\na fox")
    assert "subjects has 3 texts for 2 pictures" in error(fault_server, mismatched)


def cancel(server, seconds, **settings):
    prompt = training(server, **settings)
    drives.cancel(server, prompt, seconds)
    assert not saved(server, prompt)


def test_cancelled_in_contexts_and_in_tokens_it_leaves_the_model_alone(fault_server):
    plain = prompts.run(fault_server, prompts.plain(seed=9))
    cancel(fault_server, 2.0, context_steps=10_000)
    assert checkpoints(fault_server) == []
    assert torch.equal(prompts.run(fault_server, prompts.plain(seed=9)), plain)
    prompt = training(fault_server, steps=10_000, checkpoint_every=1)
    drives.cancel_after_checkpoint(fault_server, prompt, checkpoints)
    (state,) = checkpoints(fault_server)
    tensors = safetensors.torch.load_file(state)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert {f"contrast.{i}" for i in range(2)} <= tensors.keys()
    assert torch.equal(prompts.run(fault_server, prompts.plain(seed=9)), plain), "the model was left changed"


def test_resumed_it_equals_the_whole_run_and_other_settings_are_refused(fault_server):
    whole = safetensors.torch.load_file(trained(fault_server, training(fault_server, steps=4)))
    trained(fault_server, training(fault_server, steps=3, checkpoint_every=2))
    (state,) = checkpoints(fault_server)
    resumed = trained(fault_server, training(fault_server, steps=4, resume_from=state.name))
    tensors = safetensors.torch.load_file(resumed)
    assert all(torch.equal(tensors[key], tensor) for key, tensor in whole.items())
    other = training(fault_server, steps=4, resume_from=state.name, merge="intersection")
    assert "made with merge 'union' and this run has 'intersection'" in error(fault_server, other)


def test_a_training_does_not_begin_whose_file_cannot_be_written(fault_server):
    """By a file where a folder would be, which not even root can write to."""
    blocked = fault_server.base / "output" / IDENTIFIERS / "people"
    blocked.parent.mkdir(exist_ok=True)
    blocked.touch()
    prompt = training(fault_server)
    prompt["save"]["inputs"]["filename_prefix"] = "people/anna"
    try:
        with pytest.raises(ServerError, match="'people/anna' could not be saved in .*choose another folder"):
            fault_server.submit(prompt)
    finally:
        blocked.unlink()
