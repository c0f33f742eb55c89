"""A job's files: what the node writes is what the command reads, and what neither can hold is refused in words."""

import json
import sys

import folder_paths
import pytest
import torch
from comfy_api.latest import io
from pack.nodes.training import inputs
from pack.nodes.training.stored import Stored, chained, is_stored
from pack.nodes.training_jobs import conditionings, folder, loaders, other_trainers
from pack.nodes.training_jobs import nodes as job_nodes
from pack.nodes.training_jobs.nodes import TRAININGS, UnderstudyExportTrainingJob
from support import tiny_model
from trainer import job

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return folder.JobFolder("anna")


def test_numbers_texts_lists_and_tables_survive_toml():
    values = {
        "text": 'quotes " \\ and\nlines, 顔, \x7f, \x01', "whole": 2**60, "rate": 1e-7, "on": True, "off": False,
        "list": ["a", "b"], "nothing": None, "table": {"inner": {"odd key.1": 0.5}, "b": 1}, "empty": {},
    }
    read = tomllib.loads(folder.toml(values))
    values.pop("nothing")
    assert read == values
    with pytest.raises(ValueError, match="model is of type object"):
        folder.toml({"model": object()})


def test_each_job_gets_a_new_folder(target):
    again = folder.JobFolder("anna")
    assert (target.name, again.name) == ("anna_00001", "anna_00002")
    with pytest.raises(ValueError, match="points outside"):
        folder.JobFolder("../anna")


def test_pictures_of_8_bits_texts_latents_and_masks_come_back_exactly(target):
    pictures = [torch.randint(0, 256, (1, 8, 6, 3)).float() / 255 for _ in range(3)]
    target.write_pictures("images", pictures)
    target.write_texts("images", ["a", "b", "c"])
    target.write_pictures("masks", [picture[..., 0] for picture in pictures])
    latents = [{"samples": torch.randn(2, 16, 3, 4, 4)}]
    target.write_tensors("latents", [({"samples": one}, {}) for one in inputs.single_latents(latents, "latents")])
    read = {
        widget.id: job._data(widget, target.input / where) for widget, where in (
            (io.Image.Input("images"), "images"), (io.String.Input("captions"), "images"),
            (io.Mask.Input("masks"), "masks"), (io.Latent.Input("latents"), "latents"),
        )
    }
    assert read["captions"] == ["a", "b", "c"]
    assert all(isinstance(read[name], Stored) for name in ("images", "masks", "latents"))
    for i, picture in enumerate(pictures):
        assert torch.equal(inputs.pictures(read["images"], "images")[i], picture)
        assert torch.equal(read["masks"][i], picture[..., 0])
    assert inputs.digest(inputs.single_latents(read["latents"], "x")) == inputs.digest(
        inputs.single_latents(latents, "x")
    )
    with pytest.raises(job.JobError, match="has no file that ends with"):
        job._data(io.Image.Input("images"), target.input / "nowhere")


def test_conditionings_come_back_and_others_are_refused():
    conditioning = [[torch.randn(1, 4, 8), {"pooled_output": torch.randn(1, 5), "strength": 0.5, "none": None}]]
    (back,) = conditionings.unpacked(*conditionings.packed(conditioning, "positive"))
    assert torch.equal(back[0], conditioning[0][0]) and back[1]["strength"] == 0.5 and back[1]["none"] is None
    assert torch.equal(back[1]["pooled_output"], conditioning[0][1]["pooled_output"])
    with pytest.raises(ValueError, match="positive holds 'hooks' of type list"):
        conditionings.packed([[torch.ones(1, 1, 1), {"hooks": []}]], "positive")


def test_a_model_is_loaded_again_by_the_nodes_above_it():
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "a", "weight_dtype": "default"}},
        "2": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["1", 0], "lora_name": "b"}},
        "3": {"class_type": "Export", "inputs": {"job.model": ["2", 0], "job.clip": "typed"}},
    }
    above = loaders.loader(prompt, "3", "job.model", {"Train"})
    assert above == {"node": "LoraLoaderModelOnly", "output": 0, "inputs": {
        "lora_name": "b", "model": {
            "node": "UNETLoader", "output": 0, "inputs": {"unet_name": "a", "weight_dtype": "default"},
        },
    }}
    with pytest.raises(ValueError, match="clip comes from a node that the graph does not show"):
        loaders.loader(prompt, "3", "job.clip", set())
    with pytest.raises(ValueError, match="model comes from a training"):
        loaders.loader(prompt, "3", "job.model", {"UNETLoader"})


def test_the_node_has_the_inputs_of_each_train_node():
    (combo, *_others) = UnderstudyExportTrainingJob.define_schema().inputs
    assert [option.key for option in combo.options] == [node.define_schema().display_name for node in TRAININGS]
    for option, node in zip(combo.options, TRAININGS, strict=True):
        names = [widget.id for widget in node.define_schema().inputs]
        assert [widget.id for widget in option.inputs] == [name for name in names if name != "resume_from"]
        assert {"masks", "mask_floor", "offload", "gradient_checkpointing"} <= set(names)


def test_a_video_job_is_written_and_read(target, tmp_path, monkeypatch):
    """Of an adapter: latents, references, texts and settings; the model is the graph's."""
    hidden = type("Hidden", (), {"unique_id": "9", "prompt": {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "wan"}},
        "9": {"class_type": "UnderstudyExportTrainingJob", "inputs": {"job.model": ["1", 0]}},
    }})
    monkeypatch.setattr(UnderstudyExportTrainingJob, "hidden", hidden)
    UnderstudyExportTrainingJob.execute(folder=["clip"], job={
        "job": ["Train Video Identity Adapter (Stand-In)"], "model": [object()], "steps": [3], "rank": [2],
        "latents": [{"samples": torch.ones(2, 16, 2, 4, 4)}], "references": [{"samples": torch.ones(1, 16, 4, 4)}],
        "positive": [tiny_model.conditioning(0), tiny_model.conditioning(1)], "masks": [torch.ones(1, 32, 32)],
    })
    read = job.read(tmp_path / "training_jobs" / "clip_00001" / "job.toml")
    assert read["settings"] == {"steps": 3, "rank": 2} and read["models"]["model"]["node"] == "UNETLoader"
    assert read["data"] == {name: name for name in ("latents", "references", "positive", "masks")}
    files = {path.parent.name for path in (tmp_path / "training_jobs" / "clip_00001" / "input").glob("*/*")}
    assert files == {"latents", "references", "positive", "masks"}


SETTINGS = {"rank": 8, "steps": 40, "batch_size": 2, "learning_rate": 1e-4, "prior_weight": 0.5, "seed": 3}


def test_other_programs_get_their_keys():
    pictures, folders = [torch.zeros(1, 96, 64, 3)], ("input/images", "input/classes")
    sets = tomllib.loads(other_trainers.musubi(*folders, pictures, 2))
    assert sets["general"]["resolution"] == [64, 96] and sets["general"]["caption_extension"] == ".txt"
    assert sets["general"]["batch_size"] == 2
    assert [data["image_directory"] for data in sets["datasets"]] == list(folders)
    assert len({data["cache_directory"] for data in sets["datasets"]}) == 2
    read = json.loads(other_trainers.ai_toolkit("anna", *folders, pictures, SETTINGS, "Flux.1", "flow"))
    (process,) = read["config"]["process"]
    assert process["train"]["noise_scheduler"] == "flowmatch" and process["network"]["linear"] == 8
    assert process["model"]["arch"] == "flux" and not process["model"]["is_v_pred"]
    assert [data["is_reg"] for data in process["datasets"]] == [False, True]
    assert process["train"]["reg_weight"] == 0.5 and not any("mask_path" in data for data in process["datasets"])
    settings = {**SETTINGS, "mask_floor": 0.25}
    read = json.loads(other_trainers.ai_toolkit("anna", *folders, pictures, settings, "SDXL", "v", "input/masks"))
    (process,) = read["config"]["process"]
    assert process["model"]["arch"] == "sdxl" and process["model"]["is_v_pred"]
    assert process["train"]["noise_scheduler"] == "ddpm"
    subject, classes = process["datasets"]
    assert subject["mask_path"] == "input/masks" and subject["mask_min_value"] == 0.25
    assert "mask_path" not in classes


def test_musubi_tuner_gets_a_training_of_the_families_that_it_knows():
    text, script = other_trainers.musubi_training("Qwen-Image", "anna", SETTINGS)
    read = tomllib.loads(text)
    assert script == "qwen_image" and read["network_module"] == "networks.lora_qwen_image"
    asked = {"network_dim": 8, "network_alpha": 8.0, "max_train_steps": 40, "learning_rate": 1e-4, "seed": 3}
    assert asked.items() <= read.items() and read["dataset_config"] == "musubi_dataset.toml"
    text, _ = other_trainers.musubi_training("Flux.2", "anna", SETTINGS)
    assert "discrete_flow_shift" not in tomllib.loads(text)
    text, script = other_trainers.musubi_training("Wan 2.1", "anna", SETTINGS)
    assert script == "wan" and {"task", "t5"} < tomllib.loads(text).keys()
    assert other_trainers.musubi_training("SDXL", "anna", SETTINGS) is None


def test_what_other_programs_do_not_get_is_told(target, monkeypatch):
    values = {
        "images": [torch.zeros(3, 8, 8, 3)], "masks": [torch.ones(1, 8, 8)], "model": [tiny_model.picture()],
    }

    def told(program, data, **changes):
        return "\n".join(job_nodes._written_for(program, target, {**values, **changes}, data, SETTINGS))

    data = {"images": "images", "masks": "masks"}
    lines = told(other_trainers.AI_TOOLKIT, data)
    assert "ai-toolkit gets no class pictures" in lines and "connect one for each picture" in lines
    lines = told(other_trainers.AI_TOOLKIT, {**data, "class_images": "classes"}, masks=[torch.ones(3, 8, 8)])
    assert lines.endswith("start run.py in the job's folder")
    written = (target.path / "ai_toolkit.json").read_text()
    (process,) = json.loads(written)["config"]["process"]
    assert process["datasets"][0]["mask_path"] == "input/masks"
    lines = told(other_trainers.MUSUBI, data, masks=[torch.ones(3, 8, 8)])
    assert "musubi-tuner gets no masks" in lines and "knows no training of SD 1.5 in musubi-tuner" in lines
    assert not (target.path / "musubi_training.toml").exists()
    monkeypatch.setattr(job_nodes, "family", lambda _model: "Z-Image")
    assert "zimage_train_network.py with --config_file musubi_training.toml" in told(other_trainers.MUSUBI, data)
    written += "".join(path.read_text() for path in target.path.glob("musubi_*.toml"))
    assert str(target.path) not in written, "a job is moved to another machine"


def test_data_in_files_is_read_when_it_is_looked_at():
    read = []
    stored = Stored(4, lambda i: read.append(i) or i, "key")
    doubled = stored.map(lambda x: 2 * x)
    assert read == [] and doubled[1] == 2 and list(doubled[2:]) == [4, 6] and read == [1, 2, 3]
    assert list(chained([9], stored)) == [9, 0, 1, 2, 3] and chained([1], [2]) == [1, 2]
    assert is_stored(doubled) and not is_stored([1]) and not is_stored("text")
    with pytest.raises(IndexError):
        stored[4]


def test_an_unfinished_job_is_refused_in_words(tmp_path):
    path = tmp_path / "job.toml"
    for text, words in (("node = 'x'", "has no settings, models"), ("node =", "is not a job")):
        path.write_text(text)
        with pytest.raises(job.JobError, match=words):
            job.read(path)
    described = {"node": "Other", "settings": {}, "data": {}, "models": {}}
    with pytest.raises(job.JobError, match="node is 'Other'"):
        job.train(described, tmp_path, "none")
    described = {**described, "node": TRAININGS[0].define_schema().node_id, "settings": {"stepps": 3}}
    with pytest.raises(job.JobError, match="settings of the job has stepps"):
        job.train(described, tmp_path, "none")
