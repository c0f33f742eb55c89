"""Training in a real server: cancel, resume, two in a queue, bad numbers, and what comes after them."""

import random
import time

import pytest
import safetensors.torch
import torch
from faults import prompts

TRAIN = "train"
CHECKPOINTS = "training_checkpoints"


def training(server, steps=6, seed=0, name="trained", **widgets) -> dict:
    """A pair of puppets trained on for a few steps; the LoRA is saved as output/loras/NAME_….safetensors."""
    prompt = {prompts.LOADER: prompts.node("CheckpointLoaderSimple", ckpt_name=prompts.CHECKPOINT)}
    settings = prompts.defaults(server, "UnderstudyTrainSourceDrivingPair") | {
        "model": [prompts.LOADER, 0], "clip": [prompts.LOADER, 1], "vae": [prompts.LOADER, 2],
        "steps": steps, "seed": seed, "rank": 2, "checkpoint_every": 0,
    }
    for role, action in (("source", "standing"), ("driving", "waving")):
        puppet = prompts.defaults(server, "UnderstudyPuppet") | {"action": action, "seed": 5}
        prompt[f"{role} puppet"] = prompts.node("UnderstudyPuppet", **puppet)
        settings |= {role: [f"{role} puppet", 0], f"{role}_text": [f"{role} puppet", 3]}
    prompt[TRAIN] = prompts.node("UnderstudyTrainSourceDrivingPair", **settings | widgets)
    prompt["save"] = prompts.node("SaveLoRA", lora=[TRAIN, 0], prefix=f"loras/{name}")
    return prompt


def loras(server, name):
    return sorted((server.base / "output" / "loras").glob(f"{name}_*.safetensors"))


def checkpoints(server):
    return sorted((server.base / "output" / CHECKPOINTS).glob("*.safetensors"))


def trained(server, entry, name="trained"):
    """The LoRA that an ended prompt saved; its file is taken away."""
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    (path,) = loras(server, name)
    weights = safetensors.torch.load_file(path)
    path.unlink()
    return weights


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(autouse=True)
def no_files_left(fault_server):
    yield
    for path in (*checkpoints(fault_server), *loras(fault_server, "*")):
        path.unlink()


def cancel(server, seconds, **settings):
    """Cancel a training that would run for many minutes, this long after its first step."""
    prompt_id = server.submit(training(server, steps=10_000, name="cancelled", checkpoint_every=1, **settings))
    deadline = time.monotonic() + 120
    while not checkpoints(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(seconds)
    server.interrupt()
    asked = time.monotonic()
    entry = server.wait(prompt_id, timeout=120)
    assert prompts.message(entry, "execution_interrupted"), entry["status"]
    assert not loras(server, "cancelled")
    return time.monotonic() - asked


def cancel_and_go_on(server, count):
    plain = prompts.run(server, prompts.plain())
    whole = trained(server, server.queue(training(server)))
    generator = random.Random(count)
    for _ in range(count):
        cancel(server, generator.uniform(0, 1))
        (state,) = checkpoints(server)
        tensors = safetensors.torch.load_file(state)
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
        assert {int(value) for key, value in tensors.items() if key.startswith("step.")} == {len(tensors["losses"])}
        state.unlink()
        assert torch.equal(prompts.run(server, prompts.plain()), plain), "the model was left changed"
        assert same(trained(server, server.queue(training(server))), whole)


def test_a_cancelled_training_keeps_its_state_and_leaves_the_model_alone(fault_server):
    cancel_and_go_on(fault_server, 1)


@pytest.mark.soak
def test_twenty_cancelled_trainings_leave_nothing_behind(fault_server):
    cancel_and_go_on(fault_server, 20)


def test_a_training_resumed_from_its_checkpoint_equals_the_whole_one(fault_server):
    whole = trained(fault_server, fault_server.queue(training(fault_server, steps=6)))
    trained(fault_server, fault_server.queue(training(fault_server, steps=5, checkpoint_every=4)))
    (state,) = checkpoints(fault_server)
    options = fault_server.object_info()["UnderstudyTrainSourceDrivingPair"]["input"]["required"]["resume_from"]
    assert state.name in str(options), "the node does not list it"
    entry = fault_server.queue(training(fault_server, steps=6, resume_from=state.name))
    assert same(trained(fault_server, entry), whole)
    refused = fault_server.queue(training(fault_server, steps=6, rank=3, resume_from=state.name))
    error = prompts.message(refused, "execution_error")
    assert "made with rank 2 and this run has 3" in error["exception_message"]


def test_two_trainings_in_a_queue_and_a_picture_after_them_are_as_alone(fault_server):
    plain = prompts.run(fault_server, prompts.plain())
    alone = [trained(fault_server, fault_server.queue(training(fault_server, seed=seed))) for seed in (1, 2)]
    ids = [fault_server.submit(training(fault_server, seed=seed, name=f"queued{seed}")) for seed in (1, 2)]
    last = fault_server.submit(prompts.plain())
    for seed, prompt_id, expected in zip((1, 2), ids, alone, strict=True):
        assert same(trained(fault_server, fault_server.wait(prompt_id), f"queued{seed}"), expected)
    assert torch.equal(prompts.latent(fault_server, fault_server.wait(last)), plain)
    assert not same(*alone)


def test_more_than_one_picture_is_refused_by_name(fault_server):
    prompt = training(fault_server)
    prompt["source puppet"]["inputs"]["frames"] = 5
    error = prompts.message(fault_server.queue(prompt), "execution_error")
    assert "source holds 5 pictures" in error["exception_message"]
