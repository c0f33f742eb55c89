"""A process that trains small models of each method for 20 steps, alone or beside others.

    python tests/support/parallel_runs.py FOLDER ACCUMULATION STOP METHOD ... [--fp32]

Started by `accelerate launch` as well. Each result goes to FOLDER/METHOD.safetensors. Unless STOP is 0, a run ends
after so many steps, and another goes on from its checkpoint. In double precision, if not asked otherwise.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.remove(str(Path(__file__).parent))
sys.path += [str(ROOT / "tests"), str(ROOT / "workflows")]

PRECISION = torch.float32
if "--fp32" not in sys.argv:
    # AdamW amplifies rounding: all that is fp32 in ComfyUI and in the pack is in double precision here.
    PRECISION = torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)

from launcher import scripts  # noqa: E402

scripts.alias_pack()

from trainer import engine  # noqa: E402

STEPS = 20
RUN = {"steps": STEPS, "checkpoint_every": 0}
RESUME = {"resume_from": "none"}


def prior(pack):
    from pack.nodes.identity_prior import training
    from pack.nodes.identity_prior.config import IdentityPriorConfig
    from support import tiny_clip, tiny_model

    classes = training.ClassPictures(["a cat", "a dog"], latents(2, seed=10))
    weights, losses = training.train(
        tiny_model.picture(dtype=PRECISION), tiny_clip.clip(), None, latents(3), ["a red cat", "a", "a sks dog"],
        classes, IdentityPriorConfig(rank=2), config(batch_size=3), **untold(pack),
        weights=[torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)],
    )
    return weights, losses


def combiner(pack):
    from support import fusions
    from support.fusion_trainings import data

    fusion, losses = trained_combiner(pack, doubled(fusions.vision()), data(6))
    return {**fusion.combiner, **{f"encoder.{key}": value for key, value in fusion.encoder.get_sd().items()}}, losses


def trained_combiner(pack, vision, pairs):
    from pack.nodes.fusion_embedding import encoding, training
    from pack.nodes.fusion_embedding.config import CombinerConfig

    encoding.rebuild = lambda _config, weights: SimpleNamespace(get_sd=lambda: weights)  # which halves the precision
    settings = CombinerConfig(projection=16, hidden=16, train_encoder=True, batch_size=4, dropout=0.2)
    return training.train_combiner(vision, pairs, config(batch_size=4), settings, **untold(pack))


def generator(pack, masks=None, **options):
    from pack.nodes.fusion_embedding import training
    from pack.nodes.fusion_embedding.config import GeneratorConfig
    from pack.nodes.fusion_embedding.method import Fusion
    from support import fusions
    from support.fusion_trainings import data

    vision = doubled(fusions.vision())
    settings = GeneratorConfig(hidden=8, rank=2, pose_channels=(4, 6, 8, 10), **options)
    fusion, losses = training.train_generator(
        fusions.model(dtype=PRECISION), fusions.autoencoder(), vision, data(4), Fusion(fusions.combiner()),
        vision, config(batch_size=3), settings, masks=masks, mask_floor=0.25, **untold(pack),
    )
    return {**fusion.generator, **fusion.unet}, losses


def generator_by_paths(pack):
    """All that is newer: tokens of the embedding, rates and clipping of paths, early drops, masks."""
    masks = [torch.rand(1, 64, 64, 1, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    return generator(
        pack, masks, embedding_tokens=2, embedding_rate=3.0, clip_by_path=True, early_source_drop=0.9,
        early_steps=STEPS // 2,
    )


def adapter(pack):
    from pack.nodes.video_identity import training
    from support import tiny_model

    videos = latents(3, (1, 16, 3, 4, 4))
    references = latents(3, (1, 16, 1, 4, 4), seed=10)
    texts = [tiny_model.conditioning(i) for i in range(3)]
    trained, losses = training.train(
        tiny_model.wan(num_layers=2, dtype=PRECISION), videos, references, texts, config(batch_size=3), 2,
        weights=[torch.rand(1, 1, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)],
        loss_weighting="bell", **untold(pack),
    )
    return trained.tensors(), losses


def latents(count, shape=(1, 4, 8, 8), seed=0):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]


def config(**settings):
    from pack.nodes.training.config import TrainingConfig

    return TrainingConfig(learning_rate=1e-3, seed=3, **RUN, **settings)


def untold(pack):
    from pack.nodes.training.checkpoints import Checkpoints

    return {"checkpoints": Checkpoints("test", {}), **RESUME}


def doubled(vision):
    vision.model.to(PRECISION)
    vision.dtype = PRECISION
    return vision


def main(folder: Path, accumulation: int, stop: int, methods: list[str]) -> None:
    accelerator = engine.accelerator(folder, accumulation)
    scripts.add_comfy_path(folder / "comfyui")
    import pack
    from pack.nodes.training import checkpoints, parallel

    checkpoints.FOLDER.register()
    driver = engine.Parallel(accelerator, folder / "cache")

    def trained(name: str, steps: int, checkpoint_every: int = 0, resume_from: str = "none"):
        RUN.update(steps=steps, checkpoint_every=checkpoint_every)
        RESUME.update(resume_from=resume_from)
        with torch.no_grad(), parallel.driven_by(driver):
            return globals()[name](pack)

    for name in methods:
        resume_from = "none"
        if stop:
            trained(name, stop, checkpoint_every=stop)
            resume_from = driver.agreed(checkpoints.choices()[-1])  # the newest, which the main process wrote
        weights, losses = trained(name, STEPS, resume_from=resume_from)
        if accelerator.is_main_process:
            tensors = {**weights, "losses": torch.tensor(losses["loss"])}
            assert all(value.dtype == PRECISION for value in tensors.values())
            safetensors.torch.save_file(
                {key: value.detach().contiguous().clone() for key, value in tensors.items()},
                folder / f"{name}.safetensors",
            )


main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [name for name in sys.argv[4:] if name != "--fp32"])
