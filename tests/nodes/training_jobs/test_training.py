"""Jobs whose data lie in files, trained in this process on small models, and their results in the Load nodes."""

import copy

import folder_paths
import pytest
import torch
from pack.nodes import extension
from pack.nodes.fusion_embedding import files as fusion_files
from pack.nodes.identity_prior import training as prior_training
from pack.nodes.training import checkpoints, parallel
from pack.nodes.training_jobs import conditionings, folder
from pack.nodes.video_identity import files as adapter_files
from pack.nodes.video_identity.training_nodes import UnderstudyTrainVideoIdentityAdapter
from support import every_training, fusions, tiny_model
from trainer import job
from trainer.encodings import Encodings

import nodes

FILE = ".safetensors"


class Tiny:
    """A loader as V1 nodes are, of what `things` holds."""

    FUNCTION = "load"
    things: dict = {}

    def load(self, name):
        return (self.things[name],)


@pytest.fixture
def target(tmp_path, monkeypatch):
    """A job's folder that is ComfyUI's own, as the command makes it, and a loader of small models."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", copy.deepcopy(folder_paths.folder_names_and_paths))
    for name in ("loras", "training_checkpoints"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / "output" / name)], {FILE}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Tiny", Tiny)
    extension.register_folders()
    made = folder.JobFolder("clip")
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(made.input))
    return made


def loader(name):
    return {"node": "Tiny", "output": 0, "inputs": {"name": name}}


class Sharing(parallel.Engine):
    """Encodings in files, as the command's engine has them, without its processes."""

    def __init__(self, cache):
        self.cache, self.made = cache, 0

    def encoded(self, what, key, count, encode):
        stored = Encodings(self.cache / f"{what}-{key()}", count)
        for i in stored.missing():
            stored.write(i, encode(i))
            self.made += 1
        return stored


SETTINGS = {"rank": 2, "batch_size": 2, "learning_rate": 1e-3, "seed": 1, "mask_floor": 0.5}


def video_job(target, steps):
    """An adapter's job, and its data as a graph has them."""
    latents = [torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    texts = [tiny_model.conditioning(i) for i in range(3)]
    target.write_tensors("latents", [({"samples": latent}, {}) for latent in latents])
    target.write_tensors("references", [({"samples": latents[0][:, :, :1]}, {})])
    target.write_tensors("positive", [conditionings.packed(text, "positive") for text in texts])
    target.write_pictures("masks", [torch.ones(1, 32, 32)])
    Tiny.things = {"wan": tiny_model.wan(num_layers=2)}
    data = {
        "latents": [{"samples": latent} for latent in latents], "references": [{"samples": latents[0][:, :, :1]}],
        "positive": texts, "masks": [torch.ones(1, 32, 32)],
    }
    return {
        "node": "UnderstudyTrainVideoIdentityAdapter", "name": "clip", "models": {"model": loader("wan")},
        "settings": {"steps": steps, **SETTINGS}, "data": {name: name for name in data},
    }, data


def trained_adapter(described, target, tmp_path, resume_from="none"):
    save, name = job.train(described, target.path, resume_from)
    save()
    assert name.startswith("Train Video Identity Adapter")
    folder_paths.filename_list_cache.clear()
    return adapter_files.load(max(path.name for path in (tmp_path / "output" / "loras").glob("clip*"))).tensors()


def test_an_adapter_s_job_trains_from_files_and_loads(target, tmp_path):
    assert len(trained_adapter(video_job(target, 2)[0], target, tmp_path)) == 12


def test_a_checkpoint_of_the_node_goes_on_in_the_job(target, tmp_path):
    """Same settings, same data, same file: the end is that of a job that ran through."""
    described, data = video_job(target, 3)
    whole = trained_adapter(described, target, tmp_path)
    values = {"model": Tiny.things["wan"], **SETTINGS, "steps": 1, "checkpoint_every": 1, "resume_from": "none"}
    with torch.inference_mode():
        UnderstudyTrainVideoIdentityAdapter.execute(**data, **{name: [value] for name, value in values.items()})
    folder_paths.filename_list_cache.clear()
    checkpoint = checkpoints.choices()[-1]
    assert checkpoint.startswith("video_identity_adapter")
    continued = trained_adapter(described, target, tmp_path, checkpoint)
    assert all(torch.equal(continued[key], whole[key]) for key in whole)
    described["settings"]["seed"] = 2
    with pytest.raises(ValueError, match="was made with seed 1 and this run has 2"):
        job.train(described, target.path, checkpoint)


def test_a_generator_s_pairs_are_encoded_once_and_shared(target, tmp_path):
    lists = fusions.pair_lists(3)
    for role, pictures in lists.items():
        target.write_pictures(f"pairs/{role}", list(pictures.split(1)))
    target.write_pictures("pairs/mask", [torch.ones(1, 64, 64)] * 3)
    Tiny.things = {"model": fusions.model(), "vae": fusions.autoencoder(), "vision": fusions.vision()}
    described = {
        "node": "UnderstudyTrainFusionGenerator", "name": "fusion", "data": {},
        "models": {"model": loader("model"), "vae": loader("vae"), "appearance_encoder": loader("vision")},
        "settings": {"steps": 2, "rank": 2, "batch_size": 2, "dataset_folder": "pairs", "checkpoint_every": 0},
    }
    engine = Sharing(tmp_path / "cache")
    with parallel.driven_by(engine):
        job.train(described, target.path, "none")[0]()
        assert engine.made == 3
        job.train(described, target.path, "none")
        assert engine.made == 3, "nothing is encoded again"
        target.write_pictures("pairs/source", [1 - picture for picture in lists["source"].split(1)])
        job.train(described, target.path, "none")
        assert engine.made == 6, "other pictures are"
    (path,) = (tmp_path / "output" / "fusion_embeddings").glob("fusion*.safetensors")
    assert fusion_files.load(path.name)[0].generator


class Two(parallel.Engine):
    processes = 2


@pytest.mark.parametrize("name", ["action", "pair"])
def test_action_and_pair_refuse_shares_in_words(name):
    with parallel.driven_by(Two()), pytest.raises(ValueError, match=f"an? {name} is trained by one process.*are 2"):
        every_training.trained(name)


def test_a_contrast_of_unequal_parts_is_refused_in_words():
    with parallel.driven_by(Two()), pytest.raises(ValueError, match="batch_size is 3 for 2 processes"):
        parallel.check_contrast(3)


def test_class_pictures_are_drawn_once_in_a_job(tmp_path):
    model, shape = tiny_model.as_loaded(tiny_model.picture()), (1, 4, 8, 8)
    texts, negative = [tiny_model.conditioning(1), tiny_model.conditioning(2)], tiny_model.conditioning(3)
    driver = Sharing(tmp_path)

    def drawn(prompts=texts, seed=1):
        return list(prior_training.draw_class_pictures(model, prompts, negative, shape, seed))

    with torch.inference_mode():
        alone = drawn()
        with parallel.driven_by(driver):
            for _ in range(2):
                assert all(torch.equal(a, b) for a, b in zip(drawn(), alone, strict=True))
            assert driver.made == 2
            drawn(seed=2)
            assert driver.made == 4, "of another seed"
            drawn([texts[0], negative])
            assert driver.made == 6, "of other words"
