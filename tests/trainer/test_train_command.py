"""A training that a real server exports, trained by the command, and loaded by the server's Load node."""

import shutil

import safetensors.torch
from faults import prompts
from launcher.scripts import ROOT
from support import processes

COMMAND = ROOT / "workflows" / "train.py"
MODELS = ROOT / "workflows" / "models"
PRIOR = "Train Identity Prior (LIPE)"


def export(server, folder, **widgets):
    """Export a prior of two puppets; returns the entry of the prompt and the job's folder."""
    puppets = prompts.defaults(server, "UnderstudyPuppetSet") | {"count": 2, "seed": 3}
    job = {
        "job": PRIOR, "job.model": [prompts.LOADER, 0], "job.clip": [prompts.LOADER, 1],
        "job.vae": [prompts.LOADER, 2], "job.images": ["puppets", 0], "job.captions": "a photo of {subject}",
        "job.identity_token": "sks", "job.class_noun": "robot", "job.steps": 4, "job.learning_rate": 1e-3,
        "job.rank": 2, "job.batch_size": 2, "job.seed": 5, "job.prior_weight": 1.0, "job.augment": "none",
        "job.class_count": 2,
    }
    prompt = {
        prompts.LOADER: prompts.node("CheckpointLoaderSimple", ckpt_name=prompts.CHECKPOINT),
        "puppets": prompts.node("UnderstudyPuppetSet", **puppets),
        "export": prompts.node("UnderstudyExportTrainingJob", **{**job, "folder": folder, **widgets}),
    }
    entry = server.queue(prompt)
    return entry, server.base / "output" / "training_jobs" / f"{folder}_00001", prompt


def trained(job, processes_=1):
    processes.run(COMMAND, job / "job.toml", "--models", MODELS, processes=processes_)
    (path,) = (job / "output" / "loras").glob("*.safetensors")
    return path


def test_an_exported_prior_is_trained_by_the_command_and_loads_in_its_node(server, tmp_path):
    entry, job, prompt = export(server, "anna")
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    assert sorted(path.name for path in (job / "input" / "images").iterdir()) == [
        "000001.png", "000001.txt", "000002.png", "000002.txt"
    ]
    assert (job / "input" / "images" / "000001.txt").read_text() == "a photo of sks robot"
    other = shutil.copytree(job, tmp_path / "job")  # another machine has no output of this one
    path = trained(other)
    two = trained(shutil.copytree(job, tmp_path / "two"), 2)
    first, second = (safetensors.torch.load_file(file) for file in (path, two))
    assert first.keys() == second.keys()
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-3  # fp32, after AdamW
    assert list((other / "runs").rglob("events.out.tfevents*"))
    loras = server.base / "output" / "loras"
    loras.mkdir(exist_ok=True)
    shutil.copy(path, loras / path.name)
    loaded = {
        prompts.LOADER: prompt[prompts.LOADER],
        "prior": prompts.node(
            "UnderstudyLoadIdentityPrior", model=[prompts.LOADER, 0], lora_name=path.name, strength=1.0
        ),
        "show": prompts.node("PreviewAny", source=["prior", 2]),
    }
    entry = server.queue(loaded)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    assert "sks robot" in str(entry["outputs"])

