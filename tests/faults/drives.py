"""What every method's prompts are put through on one server. A builder makes a prompt, anew at each call."""

import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from faults import prompts
from launcher.server import Server

Builder = Callable[..., dict]


def alternate(server: Server, builders: Mapping[str, Builder], count: int) -> dict[str, torch.Tensor]:
    """`count` prompts in turn on one cached model: each kind must repeat its first bits, which are returned."""
    first = {}
    for index in range(count):
        name = list(builders)[index % len(builders)]
        entry = server.queue(builders[name]())
        result = prompts.latent(server, entry)
        cached = prompts.message(entry, "execution_cached").get("nodes", [])
        assert prompts.SAMPLER not in cached, "the sampler did not run, so this prompt shows nothing"
        assert index == 0 or prompts.LOADER in cached, "the model was loaded anew, so no patch could leak"
        assert torch.equal(result, first.setdefault(name, result)), f"prompt {index} ({name}) changed"
    return first


def cancel(server: Server, prompt: dict, seconds: float) -> None:
    """Cancel a prompt that would run for minutes, this long after it began."""
    prompt_id = server.submit(prompt)
    while not any(item[1] == prompt_id for item in server.get("/queue")["queue_running"]):
        time.sleep(0.02)
    time.sleep(seconds)
    server.interrupt()
    entry = server.wait(prompt_id, timeout=120)
    assert prompts.message(entry, "execution_interrupted"), entry["status"]
    assert prompts.RESULT not in entry["outputs"]


def cancel_and_rerun(server: Server, short: Builder, long: Builder, count: int) -> None:
    """`count` times: `long` cancelled at a random moment, then `short`, whose bits must be a clean run's."""
    clean = prompts.run(server, short())
    generator = random.Random(count)
    for _ in range(count):
        cancel(server, long(), generator.uniform(0, 1))
        assert torch.equal(prompts.run(server, short()), clean)


def queue_together(server: Server, builders: Sequence[Builder]) -> None:
    """Each of `builders`, which take a name, twice in one queue: their results must be those that they have alone."""
    alone = [prompts.run(server, build("alone")) for build in builders]
    ids = [server.submit(build("together")) for build in (*builders, *builders)]
    results = [prompts.latent(server, server.wait(prompt_id)) for prompt_id in ids]
    assert all(torch.equal(result, expected) for result, expected in zip(results, alone * 2, strict=True))
    assert not torch.equal(*alone[:2]), "both give the same, so nothing could be crossed"
