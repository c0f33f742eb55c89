"""Faults in a real server: leaks between prompts, memory, cancelling, queues, bad inputs."""

import pytest
import safetensors.torch
import torch
from faults import drives, prompts, server_memory
from launcher.server import Server, ServerError
from PIL import Image


def alternate(server: Server, count: int) -> None:
    first = drives.alternate(server, {
        "plain": prompts.plain,
        "guided": lambda: prompts.guided(server),
        "other seed": lambda: prompts.guided(server, seed=2),
    }, count)
    assert not torch.equal(first["plain"], first["guided"]), "guidance did nothing"


def test_patches_do_not_leak_between_prompts(fault_server):
    alternate(fault_server, 7)


@pytest.mark.soak
def test_patches_do_not_leak_between_two_hundred_prompts(fault_server):
    alternate(fault_server, 200)


@pytest.mark.soak
def test_memory_is_flat_over_three_hundred_prompts(fault_server):
    used = []
    for seed in range(330):
        prompts.run(fault_server, prompts.guided(fault_server, seed=seed, steps=2))
        used.append(server_memory.resident_megabytes(fault_server))
    assert server_memory.growth(used, 30, 60) < 0.1


def long(server: Server) -> dict:
    return prompts.guided(server, seed=9, steps=5000, name="cancelled")


def cancel_and_rerun(server: Server, count: int) -> None:
    drives.cancel_and_rerun(server, lambda: prompts.guided(server), lambda: long(server), count)


def test_a_cancelled_prompt_leaves_nothing_behind(fault_server):
    cancel_and_rerun(fault_server, 2)


@pytest.mark.soak
def test_ten_cancelled_prompts_leave_nothing_behind(fault_server):
    cancel_and_rerun(fault_server, 10)


@pytest.mark.soak
def test_a_rerun_after_cancelling_equals_a_fresh_server(fault_server, comfy_path, tmp_path):
    drives.cancel(fault_server, long(fault_server), 0.5)
    rerun = prompts.run(fault_server, prompts.guided(fault_server))
    with Server(comfy_path, tmp_path, cpu=True) as fresh:
        assert torch.equal(prompts.run(fresh, prompts.guided(fresh)), rerun)


def test_queued_prompts_are_independent(fault_server):
    drives.queue_together(fault_server, [
        lambda name: prompts.guided(fault_server, seed=3, name=name),
        lambda name: prompts.plain(seed=4, name=name),
    ])


# Inputs


def save_latent(server: Server, name: str, samples: torch.Tensor) -> dict:
    """A node that loads these samples, as ComfyUI's Save Latent would have written them."""
    content = {"latent_tensor": samples, "latent_format_version_0": torch.tensor([])}
    safetensors.torch.save_file(content, server.base / "input" / f"{name}.latent")
    return prompts.node("LoadLatent", latent=f"{name}.latent")


GOOD = torch.linspace(-1, 1, 16 * 16 * 16).reshape(1, 16, 16, 16)
BAD_LATENTS = {
    "NaN": torch.full_like(GOOD, float("nan")),
    "one infinite value": GOOD.clone().index_fill_(3, torch.tensor([7]), float("inf")),
    "three for a batch of two": GOOD.repeat(3, 1, 1, 1),
    "four channels": GOOD[:, :4],
    "empty batch": GOOD[:0],
    "three axes": GOOD[0],
}


@pytest.mark.parametrize("role", ["source", "driving"])
@pytest.mark.parametrize("case", BAD_LATENTS)
def test_bad_latents_give_a_node_s_error_and_the_server_lives_on(fault_server, case, role):
    prompt = prompts.guided(fault_server, batch=2)
    prompt[role] = save_latent(fault_server, "bad", BAD_LATENTS[case])
    entry = fault_server.queue(prompt)
    error = prompts.message(entry, "execution_error")
    assert error, f"{case} as {role} ran to the end: {entry['status']}"
    assert error["node_id"] in ("guidance", prompts.SAMPLER)
    # The pack's own message, not that of a tensor operation.
    assert error["exception_type"] == "ValueError" and role in error["exception_message"]
    assert torch.isfinite(prompts.run(fault_server, prompts.plain())).all()


@pytest.mark.parametrize("batch", [1, 2])
def test_one_guide_serves_a_batch(fault_server, batch):
    result = prompts.run(fault_server, prompts.guided(fault_server, batch=batch))
    assert result.shape == (batch, 16, 16, 16) and torch.isfinite(result).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_pictures_with_alpha_and_grey_ones_are_sources(fault_server, mode):
    """ComfyUI's loader converts them to RGB, so that a transparent and a grey picture guide like any other."""
    picture = Image.radial_gradient("L").resize((128, 128)).convert(mode)
    picture.save(fault_server.base / "input" / f"{mode}.png")
    prompt = prompts.guided(fault_server)
    prompt["source puppet"] = prompts.node("LoadImage", image=f"{mode}.png")
    result = prompts.run(fault_server, prompt)
    assert torch.isfinite(result).all()
    assert not torch.equal(result, prompts.run(fault_server, prompts.guided(fault_server)))


def test_an_image_of_four_channels_is_a_source(fault_server):
    prompt = prompts.guided(fault_server)
    opaque = {**prompt, "alpha": prompts.node("SolidMask", value=0.0, width=128, height=128)}
    opaque["four"] = prompts.node("JoinImageWithAlpha", image=["source puppet", 0], alpha=["alpha", 0])
    opaque["source"] = prompts.node("VAEEncode", pixels=["four", 0], vae=[prompts.LOADER, 2])
    assert torch.equal(prompts.run(fault_server, opaque), prompts.run(fault_server, prompt))


def test_wrong_words_are_refused_before_anything_runs(fault_server):
    prompt = prompts.guided(fault_server)
    prompt["source puppet"]["inputs"]["identity"] = "a purple dragon"
    with pytest.raises(ServerError, match="dragon"):
        fault_server.submit(prompt)
    assert fault_server.alive()
