"""Training in a real server: cancel, resume, two in a queue, no memory, and what comes after them."""

import itertools
import random
import time

import pytest
import safetensors.torch
import torch
from faults import prompts, server_memory

TRAIN = "train"
CHECKPOINTS = "training_checkpoints"

NUMBERS = itertools.count()


def training(server, steps=6, seed=0, **widgets) -> dict:
    """Train on two puppets for a few steps and save the LoRA under a name that only this prompt uses."""
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
    prompt["save"] = prompts.node("SaveLoRA", lora=[TRAIN, 0], prefix=f"loras/pair{next(NUMBERS)}")
    return prompt


def loras(server, prompt=None):
    """The LoRA files of a prompt, or of all."""
    name = "pair*" if prompt is None else prompt["save"]["inputs"]["prefix"].removeprefix("loras/")
    return sorted((server.base / "output" / "loras").glob(f"{name}_*.safetensors"))


def checkpoints(server):
    return sorted((server.base / "output" / CHECKPOINTS).glob("*.safetensors"))


def trained(server, prompt, prompt_id=None):
    """The LoRA that a prompt saves, queued now or before."""
    entry = server.wait(prompt_id) if prompt_id else server.queue(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    (path,) = loras(server, prompt)
    return safetensors.torch.load_file(path)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(autouse=True)
def no_files_left(fault_server):
    yield
    for path in (*checkpoints(fault_server), *loras(fault_server)):
        path.unlink()


def cancel(server, seconds, **settings):
    """Cancel a training that would run for many minutes, `seconds` after its first step."""
    prompt = training(server, steps=10_000, checkpoint_every=1, **settings)
    prompt_id = server.submit(prompt)
    deadline = time.monotonic() + 120
    while not checkpoints(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(seconds)
    server.interrupt()
    entry = server.wait(prompt_id, timeout=120)
    assert prompts.message(entry, "execution_interrupted"), entry["status"]
    assert not loras(server, prompt)


def cancel_and_go_on(server, count):
    plain = prompts.run(server, prompts.plain())
    whole = trained(server, training(server))
    generator = random.Random(count)
    for _ in range(count):
        cancel(server, generator.uniform(0, 1))
        (state,) = checkpoints(server)
        tensors = safetensors.torch.load_file(state)
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
        assert {int(value) for key, value in tensors.items() if key.startswith("step.")} == {len(tensors["losses"])}
        state.unlink()
        assert torch.equal(prompts.run(server, prompts.plain()), plain), "the model was left changed"
        assert same(trained(server, training(server)), whole)


def test_a_cancelled_training_keeps_its_state_and_leaves_the_model_alone(fault_server):
    cancel_and_go_on(fault_server, 1)


@pytest.mark.soak
def test_twenty_cancelled_trainings_leave_nothing_behind(fault_server):
    cancel_and_go_on(fault_server, 20)


def test_a_training_resumed_from_its_checkpoint_equals_the_whole_one(fault_server):
    whole = trained(fault_server, training(fault_server, steps=6))
    trained(fault_server, training(fault_server, steps=5, checkpoint_every=4))
    (state,) = checkpoints(fault_server)
    options = fault_server.node_info("UnderstudyTrainSourceDrivingPair")["input"]["required"]["resume_from"]
    assert state.name in str(options), "the node does not list it"
    assert same(trained(fault_server, training(fault_server, steps=6, resume_from=state.name)), whole)
    refused = fault_server.queue(training(fault_server, steps=6, rank=3, resume_from=state.name))
    error = prompts.message(refused, "execution_error")
    assert "made with rank 2 and this run has 3" in error["exception_message"]


def test_previews_do_not_change_the_training(fault_server):
    plain = prompts.run(fault_server, prompts.plain(seed=3))
    alone = trained(fault_server, training(fault_server, seed=7))
    watched = trained(fault_server, training(fault_server, seed=7, preview_every=2))
    assert same(watched, alone)
    assert torch.equal(prompts.run(fault_server, prompts.plain(seed=3)), plain)


def test_two_trainings_in_a_queue_and_a_picture_after_them_are_as_alone(fault_server):
    plain = prompts.run(fault_server, prompts.plain())
    alone = [trained(fault_server, training(fault_server, seed=seed)) for seed in (1, 2)]
    queued = [training(fault_server, seed=seed) for seed in (1, 2)]
    ids = [fault_server.submit(prompt) for prompt in queued]
    last = fault_server.submit(prompts.plain())
    for prompt, prompt_id, expected in zip(queued, ids, alone, strict=True):
        assert same(trained(fault_server, prompt, prompt_id), expected)
    assert torch.equal(prompts.latent(fault_server, fault_server.wait(last)), plain)
    assert not same(*alone)


def test_a_whole_unet_learns_and_leaves_the_model_alone(fault_server):
    plain = prompts.run(fault_server, prompts.plain(seed=4))
    settings = {"whole_unet": True, "seed": 9, "learning_rate": 2e-6}
    whole = trained(fault_server, training(fault_server, steps=3, **settings))
    assert whole and all(key.endswith((".diff", ".diff_b")) for key in whole)
    moved = {key: value.abs().max().item() for key, value in whole.items()}
    wrong = {key: value for key, value in moved.items() if not 0 < value <= 1.3e-5}
    assert wrong == {}, "six steps of Adam at this rate"
    assert torch.equal(prompts.run(fault_server, prompts.plain(seed=4)), plain)
    refused = fault_server.queue(training(fault_server, **settings | {"learning_rate": 1e-3}))
    assert "published 0.000002" in prompts.message(refused, "execution_error")["exception_message"]


def run_out_of_memory(server, count):
    """512 pixels do not fit into this limit, 128 do."""
    plain = prompts.run(server, prompts.plain(seed=6))
    small = trained(server, training(server, steps=1, seed=11))
    limit = server_memory.address_space(server) + (150 << 20)
    for i in range(count):
        large = training(server, seed=13 + i)
        for role in ("source", "driving"):
            large[f"{role} puppet"]["inputs"]["size"] = 512
        with server_memory.limited(server, limit):
            error = prompts.message(server.queue(large), "execution_error")
        assert error["node_type"] == "UnderstudyTrainSourceDrivingPair"
        assert "memory" in error["exception_message"]
        assert not loras(server, large) and not checkpoints(server)
        assert torch.equal(prompts.run(server, prompts.plain(seed=6)), plain), "the model was left changed"
        assert same(trained(server, training(server, steps=1, seed=11)), small)


@pytest.mark.skipif(not server_memory.COUNTED, reason="limits a process's memory as Linux does")
def test_out_of_memory_is_an_error_and_a_smaller_training_works(fault_server):
    run_out_of_memory(fault_server, 1)


@pytest.mark.soak
@pytest.mark.skipif(not server_memory.COUNTED, reason="limits a process's memory as Linux does")
def test_out_of_memory_ten_times(fault_server):
    run_out_of_memory(fault_server, 10)


@pytest.mark.soak
def test_memory_is_flat_over_sixty_trainings(fault_server):
    used = []
    for seed in range(60):
        trained(fault_server, training(fault_server, steps=1, seed=seed))
        used.append(server_memory.resident_megabytes(fault_server))
    assert server_memory.growth(used, 12, 12) < 0.1


def test_more_than_one_picture_is_refused_by_name(fault_server):
    prompt = training(fault_server)
    prompt["source puppet"]["inputs"]["frames"] = 5
    error = prompts.message(fault_server.queue(prompt), "execution_error")
    assert "source holds 5 pictures" in error["exception_message"]
