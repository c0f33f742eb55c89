"""Faults of the video identity adapter in a real server: leaks, cancelling, queues, memory, bad inputs."""

import pytest
import safetensors.torch
import torch
from faults import drives, prompts, server_memory
from launcher.server import Server


@pytest.fixture(autouse=True, scope="module")
def theatre_adapter(fault_server):
    prompts.save_adapter(fault_server)


def alternate(server: Server, count: int) -> None:
    first = drives.alternate(server, {
        "plain": prompts.video,
        "one": lambda: prompts.identified(server, "test 3"),
        "other": lambda: prompts.identified(server, "test 8"),
        "larger": lambda: prompts.identified(server, "test 3", size=80),
    }, count)
    assert not torch.equal(first["plain"], first["one"]) and not torch.equal(first["one"], first["other"])


def test_references_do_not_leak_between_prompts(fault_server):
    alternate(fault_server, 9)


@pytest.mark.soak
def test_references_do_not_leak_between_two_hundred_prompts(fault_server):
    alternate(fault_server, 200)


@pytest.mark.soak
@pytest.mark.skipif(not server_memory.COUNTED, reason="reads a process's memory as Linux tells it")
def test_memory_is_flat_over_three_hundred_videos(fault_server):
    used = []
    for seed in range(330):
        prompts.run(fault_server, prompts.identified(fault_server, f"test {seed % 24}", seed=seed, steps=1))
        used.append(server_memory.resident_megabytes(fault_server))
    assert server_memory.growth(used, 30, 60) < 0.1


def cancel_and_rerun(server: Server, count: int) -> None:
    def long() -> dict:
        return prompts.identified(server, seed=9, steps=5000, name="cancelled")

    drives.cancel_and_rerun(server, lambda: prompts.identified(server), long, count)


def test_a_cancelled_video_leaves_nothing_behind(fault_server):
    cancel_and_rerun(fault_server, 2)


@pytest.mark.soak
def test_ten_cancelled_videos_leave_nothing_behind(fault_server):
    cancel_and_rerun(fault_server, 10)


def test_queued_videos_are_independent(fault_server):
    drives.queue_together(fault_server, [
        lambda name: prompts.identified(fault_server, "test 3", seed=3, name=name),
        lambda name: prompts.identified(fault_server, "test 8", seed=4, name=name),
    ])


def test_models_unloaded_in_mid_run_change_nothing(fault_server):
    clean = prompts.run(fault_server, prompts.identified(fault_server, steps=12))
    prompts.run(fault_server, prompts.video())  # so that the next one is not cached
    prompt_id = fault_server.submit(prompts.identified(fault_server, steps=12))
    fault_server.post("/free", {"unload_models": True, "free_memory": True})
    result = prompts.latent(fault_server, fault_server.wait(prompt_id))
    assert float((result - clean).abs().max() / clean.abs().max()) <= 1e-5


def test_one_frame_a_batch_and_an_odd_size(fault_server):
    for settings, shape in (
        ({"frames": 1}, (1, 16, 1, 8, 8)),
        ({"batch": 2}, (2, 16, 2, 8, 8)),
        ({"size": 80, "frames": 9}, (1, 16, 3, 10, 10)),
    ):
        result = prompts.run(fault_server, prompts.identified(fault_server, **settings))
        assert result.shape == shape and torch.isfinite(result).all()


OTHERS = {
    "narrower": (prompts.adapter(width=128), "blocks.0.self_attn.q_loras.down.weight should be (rank, 256)"),
    "shallower": (prompts.adapter(blocks=7), "blocks.7.self_attn.q_loras.down.weight"),
    "deeper": (prompts.adapter(blocks=9), "blocks.8.self_attn.q_loras.down.weight"),
    "a plain LoRA": ({"lora_unet_x.lora_down.weight": torch.ones(2, 4)}, "Load LoRA"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_model_s_adapter_is_refused_before_sampling(fault_server, case):
    tensors, words = OTHERS[case]
    path = fault_server.base / "output" / "loras" / f"{case.replace(' ', '_')}.safetensors"
    safetensors.torch.save_file(tensors, path)
    try:
        entry = fault_server.queue(prompts.identified(fault_server, adapter=path.name))
    finally:
        path.unlink()
    error = prompts.message(entry, "execution_error")
    assert error["node_id"] in ("adapter", "apply") and words in error["exception_message"]
    assert torch.isfinite(prompts.run(fault_server, prompts.video())).all()


def saved_reference(server: Server, samples: torch.Tensor) -> dict:
    content = {"latent_tensor": samples, "latent_format_version_0": torch.tensor([])}
    safetensors.torch.save_file(content, server.base / "input" / "reference.latent")
    return prompts.node("LoadLatent", latent="reference.latent")


GOOD = torch.linspace(-1, 1, 16 * 8 * 8).reshape(1, 16, 1, 8, 8)
BAD_REFERENCES = {
    "NaN": torch.full_like(GOOD, float("nan")), "two pictures": GOOD.repeat(2, 1, 1, 1, 1),
    "a video": GOOD.repeat(1, 1, 3, 1, 1), "all zero": GOOD * 0,
}


@pytest.mark.parametrize("case", BAD_REFERENCES)
def test_bad_references_give_the_node_s_error_and_the_server_lives_on(fault_server, case):
    prompt = prompts.identified(fault_server)
    prompt["reference"] = saved_reference(fault_server, BAD_REFERENCES[case])
    error = prompts.message(fault_server.queue(prompt), "execution_error")
    assert error and error["node_id"] == "apply" and "reference" in error["exception_message"]
    assert torch.isfinite(prompts.run(fault_server, prompts.video())).all()


def run_out_of_memory(server: Server, count: int) -> None:
    """17 frames of 768 pixels do not fit into this limit, 5 of 64 do."""
    prompts.save_adapter(server)
    clean = prompts.run(server, prompts.identified(server))
    limit = server_memory.address_space(server) + (150 << 20)
    for i in range(count):
        with server_memory.limited(server, limit):
            entry = server.queue(prompts.identified(server, size=768, frames=17, seed=i))
        error = prompts.message(entry, "execution_error")
        assert error["node_id"] == prompts.SAMPLER and "memory" in error["exception_message"]
        assert torch.equal(prompts.run(server, prompts.identified(server)), clean)


@pytest.mark.skipif(not server_memory.COUNTED, reason="limits a process's memory as Linux does")
def test_out_of_memory_is_an_error_and_a_smaller_video_works(fault_server):
    run_out_of_memory(fault_server, 1)


@pytest.mark.soak
@pytest.mark.skipif(not server_memory.COUNTED, reason="limits a process's memory as Linux does")
def test_videos_out_of_memory_ten_times(fault_server):
    run_out_of_memory(fault_server, 10)
