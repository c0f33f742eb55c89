"""The identity prior in a real server: train, save, cancel, invert and edit, refuse, and what comes after."""

import itertools

import safetensors.torch
import torch
from faults import drives, prompts
from faults.test_training_faults import checkpoints, same

NUMBERS = itertools.count()
SIZE = 64


def puppets(server, prompt, count=2):
    """Pictures of one puppet in several actions."""
    settings = prompts.defaults(server, "UnderstudyPuppetSet")
    settings |= {"identities": "red striped robot", "actions": "standing\nwaving", "count": count, "size": SIZE}
    prompt["puppets"] = prompts.node("UnderstudyPuppetSet", **settings)


def training(server, steps=2, **widgets):
    """A prior trained on two puppets and saved under a name that only this prompt uses."""
    prompt = {prompts.LOADER: prompts.node("CheckpointLoaderSimple", ckpt_name=prompts.CHECKPOINT)}
    puppets(server, prompt)
    settings = prompts.defaults(server, "UnderstudyTrainIdentityPrior") | {
        "model": [prompts.LOADER, 0], "clip": [prompts.LOADER, 1], "vae": [prompts.LOADER, 2],
        "images": ["puppets", 0], "captions": "a {subject} standing\na {subject} waving", "class_noun": "robot",
        "steps": steps, "rank": 2, "class_count": 1, "checkpoint_every": 0,
    }
    prompt["train"] = prompts.node("UnderstudyTrainIdentityPrior", **settings | widgets)
    prompt["save"] = prompts.node(
        "UnderstudySaveIdentityPrior", lora=["train", 0], identity=["train", 1],
        filename_prefix=f"prior{next(NUMBERS)}",
    )
    return prompt


def priors(server, prompt):
    name = prompt["save"]["inputs"]["filename_prefix"]
    return sorted((server.base / "output" / "loras").glob(f"{name}_*.safetensors"))


def trained(server, prompt):
    entry = server.queue(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    (path,) = priors(server, prompt)
    return path


def editing(server, prior, steps=3, mask=None, **widgets):
    """A puppet's picture inverted and edited with this prior; the edit's latent is saved."""
    prompt = {prompts.LOADER: prompts.node("CheckpointLoaderSimple", ckpt_name=prompts.CHECKPOINT)}
    puppets(server, prompt, count=1)

    def node(name, class_type, **inputs):
        prompt[name] = prompts.node(class_type, **prompts.defaults(server, class_type) | inputs)

    node("prior", "UnderstudyLoadIdentityPrior", model=[prompts.LOADER, 0], lora_name=prior)
    for name, text in (("source", "a {subject} standing"), ("edit", "a {subject} waving")):
        node(name, "UnderstudyEncodeIdentity", clip=[prompts.LOADER, 1], identity=["prior", 1], text=text)
    node("nothing", "CLIPTextEncode", clip=[prompts.LOADER, 1], text="")
    node("latent", "VAEEncode", pixels=["puppets", 0], vae=[prompts.LOADER, 2])
    node("sigmas", "BasicScheduler", model=["prior", 0], scheduler="normal", steps=steps, denoise=1.0)
    node("invert", "UnderstudyInvertImage", model=["prior", 0], positive=["source", 0], latent=["latent", 0],
         sigmas=["sigmas", 0], iterations=2)
    blend = {} if mask is None else {"mask": ["solid", 0]}
    if mask is not None:
        node("solid", "SolidMask", value=mask, width=50, height=30)
    node("blend", "UnderstudyIdentityMaskBlend", model=["prior", 0], inversion=["invert", 0], positive=["edit", 0],
         **blend)
    node("guider", "CFGGuider", model=["blend", 0], positive=["edit", 0], negative=["nothing", 0], cfg=2.0)
    node("sampler", "KSamplerSelect", sampler_name="euler")
    node("sample", "SamplerCustomAdvanced", noise=["invert", 1], guider=["guider", 0], sampler=["sampler", 0],
         sigmas=["sigmas", 0], latent_image=["latent", 0])
    node("masks", "UnderstudyEditMasks", model=["blend", 0], samples=["sample", 0])
    node(prompts.RESULT, "SaveLatent", samples=["sample", 0], filename_prefix="edit")
    node("kept", "SaveLatent", samples=["latent", 0], filename_prefix="kept")
    for name, changed in widgets.items():
        prompt[name]["inputs"] |= changed
    return prompt


def test_a_prior_is_trained_cancelled_and_trained_again(fault_server):
    plain = prompts.run(fault_server, prompts.plain())
    first = trained(fault_server, training(fault_server))
    long = training(fault_server, steps=10_000, checkpoint_every=1)
    drives.cancel_after_checkpoint(fault_server, long, checkpoints)
    assert not priors(fault_server, long)
    for path in checkpoints(fault_server):
        assert all(torch.isfinite(tensor).all() for tensor in safetensors.torch.load_file(path).values())
        path.unlink()
    again = trained(fault_server, training(fault_server))
    assert same(*(safetensors.torch.load_file(path) for path in (first, again)))
    assert torch.equal(prompts.run(fault_server, prompts.plain()), plain), "the model was left changed"


def test_an_edit_runs_repeats_and_keeps_what_it_must(fault_server):
    plain = prompts.run(fault_server, prompts.plain(seed=8))
    prior = trained(fault_server, training(fault_server)).name
    entry = fault_server.queue(editing(fault_server, prior))
    edit = prompts.latent(fault_server, entry)
    assert entry["outputs"]["masks"]["images"] and torch.isfinite(edit).all()
    assert "MB on" in entry["outputs"]["invert"]["text"][0]
    kept_entry = fault_server.queue(editing(fault_server, prior, mask=0.0))
    saved = kept_entry["outputs"]["kept"]["latents"][0]
    path = fault_server.base / "output" / saved["subfolder"] / saved["filename"]
    source = safetensors.torch.load_file(path)["latent_tensor"]
    result = prompts.latent(fault_server, kept_entry)
    torch.testing.assert_close(result, source, rtol=1e-4, atol=1e-5)
    assert (edit - source).abs().mean() > 0.01
    assert torch.equal(prompts.run(fault_server, editing(fault_server, prior)), edit)
    assert torch.equal(prompts.run(fault_server, prompts.plain(seed=8)), plain), "patches leaked"


def test_what_does_not_fit_is_refused_by_name(fault_server):
    prior = trained(fault_server, training(fault_server)).name
    other = prompts.node("BasicScheduler", model=["prior", 0], scheduler="karras", steps=4, denoise=1.0)
    cases = (
        (editing(fault_server, prior, edit={"text": "a robot waving"}), "does not name the subject"),
        (editing(fault_server, prior, source={"text": "a cat"}), "does not name the subject"),
        (editing(fault_server, prior, blend={"positive": ["nothing", 0]}), "connect Encode Identity to `positive`"),
        ({**editing(fault_server, prior), "other": other}, "connect the same SIGMAS"),
        (training(fault_server, captions="a {subject}\na {subject}\na {subject}"), "3 texts for 2 pictures"),
        (training(fault_server, captions="a robot"), "does not name the subject"),
    )
    cases[3][0]["sample"]["inputs"]["sigmas"] = ["other", 0]
    for prompt, words in cases:
        error = prompts.message(fault_server.queue(prompt), "execution_error")
        assert words in error["exception_message"], (words, error)
