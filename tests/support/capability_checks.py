"""What each node that takes a MODEL does with a family: it works, by the checks of its method, or refuses in words.

A check returns how it was checked; a refusal is an error before the network has run once, whose message names the
family and what to do. Texts and latents are random, of the family's shapes, since its text encoder and VAE are large.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from pack.kernels import spectral_guidance
from pack.nodes.action_identifier import nodes as action_nodes
from pack.nodes.action_identifier import sampling as action_sampling
from pack.nodes.frequency_guidance import nodes as frequency_nodes
from pack.nodes.frequency_guidance import training_nodes as pair_training
from pack.nodes.frequency_guidance.config import FrequencyGuidanceConfig
from pack.nodes.fusion_embedding import sampling as fusion_sampling
from pack.nodes.fusion_embedding.config import ApplyConfig
from pack.nodes.fusion_embedding.method import Fusion
from pack.nodes.identity_prior import files as prior_files
from pack.nodes.identity_prior import nodes as prior_nodes
from pack.nodes.identity_prior import training_nodes as prior_training
from pack.nodes.identity_prior.inversion import Inversion
from pack.nodes.identity_prior.method import Trajectory
from pack.nodes.inputs.families import family as family_name
from pack.nodes.patching import wan_blocks
from pack.nodes.reference_weight import nodes as reference_nodes
from pack.nodes.subject_tokens import SUBJECT_TOKENS
from pack.nodes.video_identity import method as video_method
from pack.nodes.video_identity import nodes as video_nodes
from pack.nodes.video_identity import training_nodes as video_training
from support import family_gradients, family_models, fusions, tiny_clip, tiny_model
from support.families import Family

STEPS = 3
WORKS, REFUSES = "works", "refuses"


class Refused(AssertionError):
    """A refusal that does not say what it must."""


@dataclasses.dataclass(eq=False)
class Case:
    """A family's model, and what its nodes are given."""

    family: Family
    model: Any
    calls: int = 0

    def __post_init__(self) -> None:
        self.model.model.diffusion_model.register_forward_pre_hook(self._count)

    def _count(self, *_args) -> None:
        self.calls += 1

    @property
    def sigmas(self) -> torch.Tensor:
        return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "simple", STEPS)

    def sample(self, model=None, sampler=None, seed=3, latent=None, noise=None, positive=None, cfg=2.0, sigmas=None):
        """Samples after `process_latent_out`; a list where there is sound beside the video."""
        guider = comfy.samplers.CFGGuider(model or self.model)
        positive = family_models.conditioning(self.family, 1) if positive is None else positive
        guider.set_conds(positive, family_models.conditioning(self.family, 2))
        guider.set_cfg(cfg)
        noise = family_models.latent(self.family, seed) if noise is None else noise
        latent = family_models.latent(self.family, 0, 0.0) if latent is None else latent
        with torch.inference_mode():
            result = guider.sample(
                noise, latent, sampler or comfy.samplers.sampler_object("euler"),
                self.sigmas if sigmas is None else sigmas, disable_pbar=True, seed=seed,
            )
        parts = result.unbind() if result.is_nested else [result]
        assert all(torch.isfinite(part).all() for part in parts), "the plain model itself is not finite"
        return parts

    def picture(self, seed: int) -> torch.Tensor:
        """A latent of one picture or video, as VAE Encode makes it."""
        return torch.randn(self.family.shape, generator=torch.Generator().manual_seed(seed))


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Texts:
    """A tiny CLIP whose texts come out as the family's: random tokens of its width, the same for the same text."""

    def __init__(self, family: Family):
        self._clip, self._family = tiny_clip.clip(), family

    def encode_from_tokens_scheduled(self, tokens, **_options):
        seed = zlib.crc32(repr([[entry[0] for entry in chunk] for chunk in tokens["l"]]).encode())
        return family_models.conditioning(self._family, seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clip, name)


class Pictures:
    """Encodes pictures as the family's latents: random, the same for the same picture."""

    def __init__(self, case: Case):
        self._case = case

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        latent = self._case.picture(int(1e6 * float(pixels.sum())) % 2**31)
        return latent[:, :, :1] if latent.ndim == 5 else latent

    def spacial_compression_encode(self) -> int:
        return 8


def frequency_guidance(case: Case) -> str:
    source, driving = ({"samples": case.picture(seed)} for seed in (11, 12))
    plain_sampler = comfy.samplers.sampler_object("euler")

    def guided(**settings):
        settings = {**dataclasses.asdict(FrequencyGuidanceConfig()), "end_percent": 1.0, **settings}
        node = frequency_nodes.UnderstudyFrequencyGuidanceSampler
        return node.execute(plain_sampler, source, driving, **settings).result[0]

    idle = guided(start_percent=0.4001, end_percent=0.4002)
    unguided = case.sample(sampler=idle)  # or it refuses
    plain = case.sample()
    assert idle is not plain_sampler and same(unguided, plain), "an idle guide changed bits"
    inside = case.model.model.process_latent_in
    target = spectral_guidance.prepare(*(inside(latent["samples"].clone()) for latent in (source, driving)))
    for term in ("amplitude", "phase"):
        off = {"amplitude_scale": 0.0, "phase_scale": 0.0, f"{term}_scale": 0.5}
        result = case.sample(sampler=guided(**off))
        before, after = (
            getattr(spectral_guidance.losses(inside(parts[0].clone()), target), term).mean()
            for parts in (plain, result)
        )
        assert after < before, f"the {term} term rose from {before:.4g} to {after:.4g}"
    return "off is bit for bit, both terms fall"


_TRAIN = {"steps": 2, "learning_rate": 1e-2, "rank": 2, "seed": 5, "resume_from": "none", "checkpoint_every": 0}


def _picture(seed: int) -> torch.Tensor:
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(seed))


def _trains(case: Case, lora: dict, loss_map: dict) -> str:
    assert all(0 < loss < float("inf") for loss in loss_map["loss"]), loss_map
    ups = [weight for key, weight in lora.items() if key.endswith("lora_up.weight")]
    reached = sum(bool(up.any()) for up in ups)
    # What reads a sound, or only the text of the last block, gets no gradient.
    assert reached >= 0.6 * len(ups), f"gradients reached {reached} of {len(ups)} layers"
    family_gradients.check(case.family, case.model)
    return f"gradients reach {reached} of {len(ups)} layers and are the differences of the loss"


def identity_prior(case: Case) -> str:
    node = prior_training.UnderstudyTrainIdentityPrior
    values = {
        **_TRAIN, "model": case.model, "clip": Texts(case.family), "vae": Pictures(case), "identity_token": "sks",
        "class_noun": "robot", "batch_size": 1, "prior_weight": 1.0, "augment": "none",
    }
    with torch.inference_mode():
        lora, subject, loss_map = node.execute(
            images=[_picture(1)], captions=["a {subject} waving"], class_images=[_picture(2)],
            **{name: [value] for name, value in values.items()},
        ).result
    told = _trains(case, lora, loss_map)
    plain = case.sample()
    for strength in (0.0, 1.0):
        loaded = prior_files.apply(case.model, lora, subject, strength, "prior")
        layers = {key.partition(".lora_")[0] for key in lora if ".lora_" in key}
        taken = sum(map(len, loaded.patches.values()))
        assert not strength or taken == len(layers), "not every layer was loaded natively"
        assert same(case.sample(loaded), plain) == (strength == 0)
    case.model.unpatch_model()
    return f"{told}, the native loader takes all"


def source_driving_pair(case: Case) -> str:
    node = pair_training.UnderstudyTrainSourceDrivingPair
    values = {
        **_TRAIN, "model": case.model, "clip": Texts(case.family), "vae": Pictures(case), "steps": 1,
        "source": _picture(1), "driving": _picture(2), "source_text": "a robot", "driving_text": "a wolf waving",
    }
    with torch.inference_mode():
        lora, loss_map = node.execute(**{name: [value] for name, value in values.items()}).result
    return _trains(case, lora, loss_map)


def _tagged(case: Case, seed: int) -> list:
    (text, options), = family_models.conditioning(case.family, seed)
    return [[text, {**options, SUBJECT_TOKENS: (1, 2)}]]


def _inverted(case: Case):
    with torch.inference_mode():
        return prior_nodes.UnderstudyInvertImage.execute(
            case.model, _tagged(case, 1), {"samples": case.picture(7)}, case.sigmas, "fixed_point", 2, 0.5
        ).result


def invert_and_blend(case: Case) -> str:
    source = case.picture(7)
    inversion, noise, _ = _inverted(case)
    noise = noise.generate_noise({"samples": torch.zeros_like(source)})
    positive = _tagged(case, 5)
    plain = case.sample(noise=noise, positive=positive)
    for value in (0.0, 1.0):
        mask = torch.full((1, *source.shape[-2:]), value)
        blended = prior_nodes.UnderstudyIdentityMaskBlend.execute(
            case.model, inversion, positive, 0.5, 0, 0.0, 1.0, mask
        ).result[0]
        (result,) = case.sample(blended, noise=noise, positive=positive)
        if value:
            assert same([result], plain), "a mask of ones changed bits"
        else:
            torch.testing.assert_close(result, source, rtol=2e-3, atol=2e-3)
    return "a mask of zeros ends on the source, one of ones is bit for bit"


def attention_maps(case: Case) -> str:
    positive, grid = _tagged(case, 5), [float(sigma) for sigma in case.sigmas]
    blend = prior_nodes.UnderstudyIdentityMaskBlend.execute
    path = Trajectory(grid, torch.zeros(len(grid), *case.family.shape))
    blend(case.model, Inversion(path, torch.ones(1, 1, 1, 1), "ddim"), positive, 0.5, 0, 0.0, 1.0)  # or it refuses
    inversion, noise, mask = _inverted(case)
    blended = blend(case.model, inversion, positive, 0.5, 0, 0.0, 1.0).result[0]
    noise = noise.generate_noise({"samples": case.picture(7)})
    (samples,) = case.sample(blended, noise=noise, positive=positive)
    source, edited = prior_nodes.UnderstudyEditMasks.execute(blended, {"samples": samples}).result
    assert 0 < float(mask.mean()) < 1 and 0 < float(edited.mean()) < 1, "a map covers all or nothing"
    return "both masks are a part of the picture"


def action_identifier(case: Case) -> str:
    applied = action_nodes.UnderstudyApplyActionIdentifier.execute(case.model, 1.0).result[0]
    off = action_nodes.UnderstudyApplyActionIdentifier.execute(case.model, 0.0).result[0]
    (text, options), = family_models.conditioning(case.family, 1)
    count = len(action_sampling.places(case.model.model.diffusion_model))
    contexts = torch.randn(count, *text.shape[1:], generator=torch.Generator().manual_seed(4))
    attached = action_sampling.attach_contexts([[text, options]], [contexts], [])
    plain = case.sample()
    assert same(case.sample(off, positive=attached), plain), "strength 0 changed bits"
    assert not same(case.sample(applied, positive=attached), plain)
    return "strength 0 is bit for bit, each layer reads its own"


def fusion(case: Case) -> str:
    unet = isinstance(case.model.model.diffusion_model, UNetModel)
    generator = fusions.weights(case.model if unet else fusions.model())

    def applied(strength):
        return fusion_sampling.apply(
            case.model, Fusion(generator=generator), fusions.states(), fusions.fused(), fusions.poses(),
            ApplyConfig(strength),
        )

    (off, plain, _), (model, positive, _) = applied(0.0), applied(1.0)
    assert off is case.model
    assert not same(case.sample(model, positive=positive), case.sample(off, positive=plain))
    return "strength 0 is the model itself, source and pose act"


def video_identity(case: Case) -> str:
    wan = wan_blocks.is_wan(case.model.model.diffusion_model)
    adapter = video_method.adapter_from(tiny_model.video_adapter(case.model if wan else tiny_model.video()))
    reference = {"samples": torch.randn(1, case.family.latent[0], 1, 6, 4)}

    def shown(strength):
        node = video_nodes.UnderstudyApplyVideoIdentity
        return node.execute(case.model, adapter, reference, strength, 0.0, 1.0, "all").result[0]

    off = shown(0.0)
    plain = case.sample()
    assert same(case.sample(off), plain) and not same(case.sample(shown(1.0)), plain)
    assert not same(case.sample(shown(0.5)), plain)
    return "strength 0 is bit for bit, the reference acts"


def video_identity_training(case: Case) -> str:
    node = video_training.UnderstudyTrainVideoIdentityAdapter
    picture = torch.randn(1, case.family.latent[0], 1, 4, 4, generator=torch.Generator().manual_seed(3))
    values = {**_TRAIN, "model": case.model, "batch_size": 1}
    with torch.inference_mode():
        adapter, loss_map = node.execute(
            latents=[{"samples": case.picture(7)}], references=[{"samples": picture}],
            positive=[family_models.conditioning(case.family, 1)],
            **{name: [value] for name, value in values.items()},
        ).result
    assert all(0 < loss < float("inf") for loss in loss_map["loss"])
    ups = [tensor for key, tensor in adapter.tensors().items() if ".up." in key]
    # Nothing reads the queries of the last block.
    assert sum(bool(up.any()) for up in ups) >= len(ups) - 1
    return "gradients reach every update"


def reference_weight(case: Case) -> str:
    family = case.family
    pictures = [torch.randn(1, *family.latent, generator=torch.Generator().manual_seed(i)) for i in (21, 22)]
    shown, alone = (
        family_models.conditioning(family, 1, reference_latents=pictures[:count]) for count in (2, 1)
    )

    def weighed(strength, mask=None):
        node = reference_nodes.UnderstudyReferenceWeight
        return node.execute(case.model, 2, strength, 0.0, 1.0, "all", mask).result[0]

    off = weighed(0.0)
    plain = case.sample(positive=shown)
    assert same(case.sample(weighed(1.0), positive=shown), plain), "strength 1 changed bits"
    removed, one = case.sample(off, positive=shown), case.sample(positive=alone)
    assert not same(plain, one)
    for a, b in zip(removed, one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert not same(case.sample(weighed(2.0), positive=shown), plain)
    return "1 is bit for bit, 0 is as without the picture, 2 is stronger"


# The table's columns: what it says, the node's ids, and the check.
CHECKS: dict[str, tuple[tuple[str, ...], Callable[[Case], str]]] = {
    "Frequency guidance": (("UnderstudyFrequencyGuidanceSampler",), frequency_guidance),
    "Pair training": (("UnderstudyTrainSourceDrivingPair",), source_driving_pair),
    "Identity prior": (("UnderstudyTrainIdentityPrior", "UnderstudyLoadIdentityPrior"), identity_prior),
    "Invert, blend with a mask": (("UnderstudyInvertImage", "UnderstudyIdentityMaskBlend"), invert_and_blend),
    "Masks by attention": (("UnderstudyIdentityMaskBlend", "UnderstudyEditMasks"), attention_maps),
    "Reference Weight": (("UnderstudyReferenceWeight",), reference_weight),
    "Video identity": (("UnderstudyApplyVideoIdentity",), video_identity),
    "its training": (("UnderstudyTrainVideoIdentityAdapter",), video_identity_training),
    "Action identifier": (("UnderstudyApplyActionIdentifier",), action_identifier),
    "Fusion": (("UnderstudyApplyFusion",), fusion),
}
# Tested in their own rooms: the first two refuse by the same look at the network as the nodes above, the others take
# whatever those made.
ELSEWHERE = (
    "UnderstudyTrainActionIdentifier", "UnderstudyTrainFusionGenerator", "UnderstudyExplain",
    "UnderstudyTrainingDoctor", "UnderstudyIdentityLibrary",
)


def outcome(case: Case, name: str) -> tuple[str, str]:
    """WORKS and how that was checked, or REFUSES and the message. Raises for any other outcome."""
    calls = case.calls
    try:
        return WORKS, CHECKS[name][1](case)
    except ValueError as error:
        if case.calls > calls:
            raise Refused(f"{case.family.name} refused {name} after sampling had begun: {error}") from error
        if family_name(case.model) not in str(error):
            raise Refused(f"{case.family.name} refused {name} without its name: {error}") from error
        return REFUSES, str(error)
