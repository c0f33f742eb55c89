"""Faults of the fusion embedding in a real server: cancel, resume, leaks, wrong weights, bad pictures."""

import time

import pytest
import safetensors.torch
import torch
from faults import prompts

FOLDER = "fusion_embeddings"


@pytest.fixture(scope="module")
def server(fault_server):
    yield fault_server
    for path in checkpoints(fault_server, "fusion"):
        path.unlink()


def pictures(count=3):
    """Sources standing, and the same puppets in other poses, with those poses."""
    people = "\n".join(f"test {i}" for i in range(count))
    settings = {"identities": people, "scenes": "beach", "count": count, "size": 64}
    return {
        "sources": prompts.node("UnderstudyPuppetSet", actions="standing", seed=1, **settings),
        "targets": prompts.node("UnderstudyPuppetSet", actions="waving", seed=2, **settings),
    }


def training(server, steps=3, seed=0, prefix="fusion", combiner=None, generator=None):
    """Stage 1, then stage 2 beside the theatre's checkpoint; the fusion is saved."""
    links = {"source": ["sources", 0], "pose": ["targets", 2], "target": ["targets", 0]}
    prompt = pictures() | {
        prompts.LOADER: prompts.node("CheckpointLoaderSimple", ckpt_name=prompts.CHECKPOINT),
        "vision": prompts.node("TinyVision", width=12),
    }
    first = prompts.defaults(server, "UnderstudyTrainFusionCombiner") | links | {
        "clip_vision": ["vision", 0], "steps": steps, "seed": seed, "batch_size": 3, "checkpoint_every": 0,
    }
    second = prompts.defaults(server, "UnderstudyTrainFusionGenerator") | links | {
        "model": [prompts.LOADER, 0], "vae": [prompts.LOADER, 2], "fusion": ["combiner", 0],
        "appearance_encoder": ["vision", 0], "steps": steps, "seed": seed, "rank": 2, "checkpoint_every": 0,
    }
    prompt["combiner"] = prompts.node("UnderstudyTrainFusionCombiner", **first | (combiner or {}))
    prompt["generator"] = prompts.node("UnderstudyTrainFusionGenerator", **second | (generator or {}))
    prompt["save"] = prompts.node("UnderstudySaveFusion", fusion=["generator", 0], filename_prefix=prefix)
    return prompt


def applying(server, fusion_name, name="applied", seed=1, source="test 5", batch=1, **changed):
    """The source puppet in another one's pose."""
    prompt = prompts.plain(seed, 2, name, batch)
    prompt["empty"]["inputs"] |= {"width": 64, "height": 64}
    for role, identity, action in (("source", source, "standing"), ("driver", "test 6", "waving")):
        puppet = {"identity": identity, "action": action, "size": 64, "seed": 5}
        prompt[role] = prompts.node("UnderstudyPuppet", **prompts.defaults(server, "UnderstudyPuppet") | puppet)
    prompt |= {
        "vision": prompts.node("TinyVision", width=12),
        "fusion": prompts.node("UnderstudyLoadFusion", fusion_name=fusion_name),
        "encode": prompts.node("CLIPVisionEncode", clip_vision=["vision", 0], image=["source", 0], crop="none"),
    }
    combined = {"fusion": ["fusion", 0], "source": ["source", 0], "pose": ["driver", 2]}
    prompt["combine"] = prompts.node("UnderstudyCombineFusion", **combined | changed.get("combine", {}))
    links = {
        "model": [prompts.LOADER, 0], "fusion": ["fusion", 0], "fusion_embed": ["combine", 0],
        "appearance": ["encode", 0], "pose": ["driver", 2], "strength": 1.0,
    }
    prompt["apply"] = prompts.node("UnderstudyApplyFusion", **links | changed.get("apply", {}))
    prompt[prompts.SAMPLER]["inputs"] |= {"model": ["apply", 0], "positive": ["apply", 1], "negative": ["apply", 2]}
    return prompt


def fusions(server, prefix):
    return sorted((server.base / "output" / FOLDER).glob(f"{prefix}_*.safetensors"))


def checkpoints(server, prefix):
    return sorted((server.base / "output" / "training_checkpoints").glob(f"{prefix}_*.safetensors"))


def trained(server, prefix, **settings):
    entry = server.queue(training(server, prefix=prefix, **settings))
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    return fusions(server, prefix)[-1]


@pytest.fixture(scope="module")
def files(server):
    """A fusion with a LoRA, and one with a whole UNet."""
    whole = {"whole_unet": True, "learning_rate": 1e-3}
    return {"LoRA": trained(server, "lora"), "whole UNet": trained(server, "whole", generator=whole)}


def message(server, prompt):
    return prompts.message(server.queue(prompt), "execution_error")["exception_message"]


def test_a_lora_and_a_whole_unet_from_files_leave_the_cached_model_alone(server, files):
    plain = prompts.run(server, prompts.plain(seed=3))
    first = {}
    for kind in ("LoRA", "whole UNet", "LoRA", "whole UNet"):
        result = prompts.run(server, applying(server, files[kind].name))
        assert torch.isfinite(result).all() and torch.equal(result, first.setdefault(kind, result))
        assert torch.equal(prompts.run(server, prompts.plain(seed=3)), plain), f"the {kind} was left in the model"
    assert not torch.equal(first["LoRA"], first["whole UNet"])
    other = prompts.run(server, applying(server, files["LoRA"].name, source="test 9"))
    assert not torch.equal(other, first["LoRA"])


def test_a_run_resumed_in_either_stage_equals_the_whole_one(server):
    def same(a, b):
        first, second = (safetensors.torch.load_file(path) for path in (a, b))
        return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

    whole = trained(server, "resumed", steps=4, seed=3)
    every = {"checkpoint_every": 2}
    trained(server, "resumed", steps=3, seed=3, combiner=every, generator=every)
    states = {stage: checkpoints(server, f"fusion_{stage}")[-1].name for stage in ("combiner", "generator")}
    # A generator's checkpoint is of one combiner, so that stage 1 alone is resumed, then stage 2 from the beginning.
    resumed = trained(server, "resumed", steps=4, seed=3, combiner={"resume_from": states["combiner"]})
    assert same(whole, resumed)
    refused = message(server, training(server, 4, 3, "refused", generator={"resume_from": states["generator"]}))
    assert "different combiner" in refused and "set resume_from to none" in refused


def cancel(server, stage):
    prompt = training(server, 3, 7, "cancelled")
    prompt[stage]["inputs"] |= {"steps": 100_000, "checkpoint_every": 1}
    before = len(checkpoints(server, f"fusion_{stage}"))
    prompt_id = server.submit(prompt)
    deadline = time.monotonic() + 240
    while len(checkpoints(server, f"fusion_{stage}")) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    server.interrupt()
    entry = server.wait(prompt_id, timeout=120)
    assert prompts.message(entry, "execution_interrupted"), entry["status"]
    assert not fusions(server, "cancelled")
    tensors = safetensors.torch.load_file(checkpoints(server, f"fusion_{stage}")[-1])
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert {int(value) for key, value in tensors.items() if key.startswith("step.")} == {len(tensors["losses"])}


def test_cancelled_trainings_keep_their_state_and_leave_everything_alone(server, files):
    plain = prompts.run(server, prompts.plain(seed=4))
    for stage in ("combiner", "generator"):
        cancel(server, stage)
        assert torch.equal(prompts.run(server, prompts.plain(seed=4)), plain)
    again = safetensors.torch.load_file(trained(server, "lora"))
    expected = safetensors.torch.load_file(files["LoRA"])
    assert all(torch.equal(again[key], expected[key]) for key in expected)


def saved(server, name, tensors, **metadata):
    header = {"kind": "understudy fusion", "unet": "none", **metadata}
    safetensors.torch.save_file(tensors, server.base / "output" / FOLDER / name, header)
    return name


def test_what_does_not_fit_is_said_before_sampling_and_the_server_lives_on(server, files):
    name = files["LoRA"].name
    black = prompts.node("EmptyImage", width=64, height=64, batch_size=1, color=0)
    cases = []
    blank = applying(server, name)
    blank["blank"] = black
    blank["combine"]["inputs"]["pose"] = ["blank", 0]
    cases.append((blank, "pose shows no person"))
    unequal = applying(server, name)
    unequal["source"]["inputs"]["frames"], unequal["driver"]["inputs"]["frames"] = 5, 9
    cases.append((unequal, "source 5, pose 9"))
    cases.append((applying(server, name, batch=2) | {}, None))  # one pose for a batch of two
    batch = applying(server, name)
    batch["driver"]["inputs"]["frames"] = 5
    cases.append((batch, "for 5 pictures and the latent has 1"))
    size = applying(server, name)
    size["driver"]["inputs"]["size"] = 96
    cases.append((size, "scale the pose to 64 x 64 pixels"))
    tensors = safetensors.torch.load_file(files["LoRA"])
    alone = {key: value for key, value in tensors.items() if not key.startswith(("encoder.", "unet."))}
    frozen = applying(server, saved(server, "frozen.safetensors", alone))
    cases.append((frozen, "connect that one to clip_vision"))
    frozen = applying(server, "frozen.safetensors", combine={"clip_vision": ["wide", 0]})
    frozen["wide"] = prompts.node("TinyVision", width=20)
    cases.append((frozen, "embeddings of 20 numbers and the combiner takes 12"))
    key = "generator.appearance.second.weight"
    other = alone | {key: torch.zeros(99, tensors[key].shape[1]), key.replace("weight", "bias"): torch.zeros(99)}
    wrong = applying(server, saved(server, "wrong.safetensors", other), combine={"clip_vision": ["vision", 0]})
    cases.append((wrong, "gives 99 channels and the model takes 128"))
    odd = saved(server, "odd.safetensors", {"x": torch.zeros(2)})
    cases.append((applying(server, odd), "'x' belongs to no part"))
    for prompt, words in cases:
        entry = server.queue(prompt)
        if words is None:
            assert prompts.latent(server, entry).shape[0] == 2
            continue
        error = prompts.message(entry, "execution_error")
        assert words in error["exception_message"], error["exception_message"]
    assert torch.isfinite(prompts.run(server, applying(server, name))).all()


def test_training_refuses_unequal_counts_and_poses_of_nobody(server):
    unequal = training(server)
    unequal["targets"]["inputs"]["count"] = 2
    assert "source 3, pose 2, target 2" in message(server, unequal)
    nobody = training(server)
    nobody["blank"] = prompts.node("EmptyImage", width=64, height=64, batch_size=3, color=0)
    nobody["combiner"]["inputs"]["pose"] = ["blank", 0]
    assert "shows no person" in message(server, nobody)


def test_a_sequence_of_poses_becomes_a_video(server, files):
    """Poses as a list, so that each is sampled with the same seed, and one video of all."""
    prompt = applying(server, files["LoRA"].name, name="sequence")
    prompt["driver"]["inputs"]["frames"] = 5
    prompt |= {
        "poses": prompts.node("RebatchImages", images=["driver", 2], batch_size=1),
        "decode": prompts.node("VAEDecode", samples=[prompts.SAMPLER, 0], vae=[prompts.LOADER, 2]),
        "frames": prompts.node("RebatchImages", images=["decode", 0], batch_size=4096),
        "video": prompts.node("CreateVideo", images=["frames", 0], fps=8.0),
        "show": prompts.node(
            "SaveVideo", video=["video", 0], filename_prefix="sequence", format="auto", codec="auto"
        ),
    }
    for node in ("combine", "apply"):
        prompt[node]["inputs"]["pose"] = ["poses", 0]
    entry = server.queue(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    latents = [
        safetensors.torch.load_file(server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]
        for saved in entry["outputs"][prompts.RESULT]["latents"]
    ]
    assert len(latents) == 5 and all(latent.shape == (1, 16, 8, 8) for latent in latents)
    assert not torch.equal(latents[0], latents[1])
    assert [path.suffix for path in (server.base / "output").glob("sequence_*") if path.suffix == ".mp4"] == [".mp4"]
