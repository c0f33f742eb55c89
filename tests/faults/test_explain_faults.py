"""Explain Result in a real server: connected after a run, it makes the sampler run again and changes no result."""

from faults import prompts


def explained(server, **settings) -> dict:
    prompt = prompts.identified(server, **settings)
    prompt["explain"] = prompts.node("UnderstudyExplain", model=["apply", 0], samples=[prompts.SAMPLER, 0])
    return prompt


def test_a_graph_that_ran_before_is_explained_once_it_is_asked(fault_server):
    prompts.save_adapter(fault_server)
    plain = prompts.run(fault_server, prompts.identified(fault_server))
    entry = fault_server.queue(explained(fault_server))
    assert entry["outputs"]["explain"]["images"], entry["status"]["messages"]
    assert (prompts.latent(fault_server, entry) == plain).all(), "recording changes no bit"
    again = fault_server.queue(explained(fault_server, seed=2))
    assert again["status"]["status_str"] == "success", again["status"]["messages"]


def test_a_model_without_a_method_is_refused_by_name(fault_server):
    prompt = prompts.plain()
    prompt["explain"] = prompts.node("UnderstudyExplain", model=[prompts.LOADER, 0], samples=[prompts.SAMPLER, 0])
    error = prompts.message(fault_server.queue(prompt), "execution_error")
    assert error["node_id"] == "explain" and "nothing to explain" in error["exception_message"]
