"""Sequences of prompts that every method has to survive on one server. A builder makes a new prompt at each call."""

import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from faults import prompts
from launcher.server import Server

Builder = Callable[..., dict]


def alternate(server: Server, builders: Mapping[str, Builder], count: int) -> dict[str, torch.Tensor]:
    """Run `count` prompts in turn on one cached model: each kind must repeat its first bits, which are returned."""
    first = {}
    for index in range(count):
        name = list(builders)[index % len(builders)]
        entry = server.queue(builders[name]())
        result = prompts.latent(server, entry)
        cached = prompts.message(entry, "execution_cached").get("nodes", [])
        assert prompts.SAMPLER not in cached, "the sampler did not run, so this prompt shows nothing"
        assert index == 0 or prompts.LOADER in cached, "the model was loaded again, so no patch could leak"
        assert torch.equal(result, first.setdefault(name, result)), f"prompt {index} ({name}) changed"
    return first


def cancel(server: Server, prompt: dict, seconds: float) -> None:
    """Cancel a prompt that would run for minutes, `seconds` after it started."""
    prompt_id = server.submit(prompt)
    while not any(item[1] == prompt_id for item in server.get("/queue")["queue_running"]):
        time.sleep(0.02)
    time.sleep(seconds)
    server.interrupt()
    entry = server.wait(prompt_id, timeout=120)
    assert prompts.message(entry, "execution_interrupted"), entry["status"]
    assert prompts.RESULT not in entry["outputs"]


def cancel_after_checkpoint(server: Server, prompt: dict, checkpoints: Callable[[Server], Sequence]) -> dict:
    """The history entry of a training that was cancelled as soon as it had a checkpoint."""
    prompt_id = server.submit(prompt)
    deadline = time.monotonic() + 120
    while not checkpoints(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    server.interrupt()
    entry = server.wait(prompt_id, timeout=120)
    assert prompts.message(entry, "execution_interrupted"), entry["status"]
    return entry


def cancel_and_rerun(server: Server, short: Builder, long: Builder, count: int) -> None:
    """`count` times: cancel `long` at a random moment, then run `short`, whose bits must be those of a clean run."""
    clean = prompts.run(server, short())
    generator = random.Random(count)
    for _ in range(count):
        cancel(server, long(), generator.uniform(0, 1))
        assert torch.equal(prompts.run(server, short()), clean)


def queue_together(server: Server, builders: Sequence[Builder]) -> None:
    """Queue each of `builders`, which take a name, twice: the results must equal those of separate runs."""
    alone = [prompts.run(server, build("alone")) for build in builders]
    ids = [server.submit(build("together")) for build in (*builders, *builders)]
    results = [prompts.latent(server, server.wait(prompt_id)) for prompt_id in ids]
    assert all(torch.equal(result, expected) for result, expected in zip(results, alone * 2, strict=True))
    assert not torch.equal(*alone[:2]), "both results are the same, so a mix-up would not show"
