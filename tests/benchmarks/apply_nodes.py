"""Every node that changes a MODEL or a SAMPLER, on real models' shapes with random weights: one step of each.

Weights in bf16, and in fp8 computed in bf16. A result must be finite and must not be the plain model's. Told are the
step's time, what ComfyUI does around it included, and the peak of memory above the plain step's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from pack.nodes.action_identifier import nodes as action_nodes
from pack.nodes.action_identifier import sampling as action_sampling
from pack.nodes.frequency_guidance import nodes as frequency_nodes
from pack.nodes.frequency_guidance.config import FrequencyGuidanceConfig
from pack.nodes.fusion_embedding import layout
from pack.nodes.fusion_embedding import sampling as fusion_sampling
from pack.nodes.fusion_embedding.config import ApplyConfig
from pack.nodes.fusion_embedding.method import Fusion
from pack.nodes.identity_prior import files as prior_files
from pack.nodes.identity_prior import nodes as prior_nodes
from pack.nodes.identity_prior.inversion import Inversion
from pack.nodes.identity_prior.method import Trajectory
from pack.nodes.patching import wan_blocks
from pack.nodes.reference_weight import nodes as reference_nodes
from pack.nodes.subject_tokens import SUBJECT_TOKENS, Subject
from pack.nodes.training.config import LoraConfig
from pack.nodes.training.lora import chosen_layers
from pack.nodes.video_identity import method as video_method
from pack.nodes.video_identity import nodes as video_nodes
from support.benchmark import Report, WrongResultError
from support.random_models import RandomModel

FP8 = torch.float8_e4m3fn
RANK = 16
# Families in which a reference picture is in the sequence, for the one node that is for nothing else.
EDITING = ("Flux.1",)


@dataclasses.dataclass(frozen=True)
class Applied:
    """What a node gives to a sampler; None is what the plain run has."""

    model: Any = None
    sampler: Any = None
    positive: Any = None
    negative: Any = None


def frequency_guidance(made: RandomModel) -> Applied:
    settings = dataclasses.asdict(FrequencyGuidanceConfig()) | {"end_percent": 1.0}
    pictures = [{"samples": made.noise(seed)} for seed in (11, 12)]
    euler = comfy.samplers.sampler_object("euler")
    return Applied(sampler=frequency_nodes.UnderstudyFrequencyGuidanceSampler.execute(
        euler, *pictures, **settings
    ).result[0])


def identity_prior(made: RandomModel) -> Applied:
    generator, lora = torch.Generator().manual_seed(6), {}
    for name, layer in chosen_layers(made.network, LoraConfig(RANK)).items():
        down = torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5
        lora[f"diffusion_model.{name}.lora_down.weight"] = down
        up = 0.1 * torch.randn(layer.out_features, RANK, generator=generator)
        lora[f"diffusion_model.{name}.lora_up.weight"] = up
    return Applied(prior_files.apply(made.model, lora, Subject("sks", "dog"), 1.0, "random"))


def identity_mask_blend(made: RandomModel) -> Applied:
    grid = [float(sigma) for sigma in made.sigmas(1)]
    path = Trajectory(grid, torch.stack([made.noise(20 + i) for i in range(len(grid))]))
    positive = made.conditioning(1, **{SUBJECT_TOKENS: (1, 2)})
    mask = torch.zeros(1, *made.latent[-2:])
    mask[:, : made.latent[-2] // 2] = 1
    frames = made.latent[1] if len(made.latent) == 4 else 1
    inversion = Inversion(path, mask[:, None].expand(-1, frames, -1, -1), "ddim")
    node = prior_nodes.UnderstudyIdentityMaskBlend
    return Applied(node.execute(made.model, inversion, positive, 0.5, 0, 0.0, 1.0).result[0], positive=positive)


def action_identifier(made: RandomModel) -> Applied:
    (text, options), = made.conditioning(1)
    count = len(action_sampling.places(made.network))
    contexts = torch.randn(count, *text.shape[1:], generator=torch.Generator().manual_seed(4))
    return Applied(
        action_nodes.UnderstudyApplyActionIdentifier.execute(made.model, 1.0).result[0],
        positive=action_sampling.attach_contexts([[text, options]], [contexts], []),
    )


def fusion(made: RandomModel) -> Applied:
    generator = torch.Generator().manual_seed(5)
    sizes = fusion_sampling.model_sizes(made.model, 32, 16)
    weights = layout.new_generator(sizes, 32, (8, 16, 32, 64), generator)
    pose = torch.rand(1, *(8 * side for side in made.latent[-2:]), 3, generator=generator)
    model, positive, negative = fusion_sampling.apply(
        made.model, Fusion(generator=weights), torch.randn(1, 257, 32, generator=generator),
        torch.randn(1, 16, generator=generator), pose, ApplyConfig(1.0),
    )
    return Applied(model, None, positive, negative)


def video_identity(made: RandomModel) -> Applied:
    network, generator = made.network, torch.Generator(made.model.load_device).manual_seed(7)

    sizes = {"down": (min(128, network.dim), network.dim), "up": (network.dim, min(128, network.dim))}

    def drawn(part: str) -> torch.Tensor:
        value = torch.randn(sizes[part], generator=generator, device=made.model.load_device)
        return (value / sizes[part][1] ** 0.5).bfloat16()

    adapter = video_method.adapter_from({
        video_method.weight_key(i, name, part): drawn(part)
        for i in range(len(network.blocks)) for name in video_method.PROJECTIONS for part in ("down", "up")
    })
    side = 64 if network.dim > 1000 else 8
    reference = {"samples": torch.randn(1, 16, 1, side, side, generator=torch.Generator().manual_seed(8))}
    node = video_nodes.UnderstudyApplyVideoIdentity
    return Applied(node.execute(made.model, adapter, reference, 1.0, 0.0, 1.0, "all").result[0])


def reference_weight(made: RandomModel) -> Applied:
    node = reference_nodes.UnderstudyReferenceWeight
    return Applied(node.execute(made.model, 0, 0.5, 0.0, 1.0, "all").result[0], positive=_shown(made))


def _shown(made: RandomModel) -> Any:
    """A prompt with a reference picture, for a family that takes one; None is the plain one."""
    return made.conditioning(1, reference_latents=[made.noise(30)]) if made.family in EDITING else None


NODES: dict[str, Callable[[RandomModel], Applied]] = {
    "Frequency Guidance Sampler": frequency_guidance,
    "Load Identity Prior": identity_prior,
    "Identity Mask Blend": identity_mask_blend,
    "Apply Action Identifier": action_identifier,
    "Apply Fusion": fusion,
    "Apply Video Identity": video_identity,
    "Reference Weight": reference_weight,
}


def takes(node: Callable[[RandomModel], Applied], family: str) -> bool:
    """Whether it is measured on this family."""
    if family in EDITING or node is reference_weight:
        return family in EDITING and node is reference_weight
    wan = family.startswith("Wan")
    return not (node is fusion and wan) and not (node is video_identity and not wan)


def measure_family(report: Report, family: str) -> None:
    """All nodes of this family in both precisions."""
    for stored in (torch.bfloat16, FP8):
        made = RandomModel(family, report.device, stored, torch.bfloat16 if stored == FP8 else None, report.small)
        alone = wan_blocks.is_wan(made.network) or family in EDITING
        shape = f"{family}, {str(stored).removeprefix('torch.')}, {' x '.join(map(str, made.latent))}"
        base = Applied(positive=_shown(made))
        plain, _ = _step(report, made, base, alone)
        plain, _ = _step(report, made, base, alone, shape, "plain")  # warm
        for name, node in NODES.items():
            if not takes(node, family):
                continue
            result, _ = _step(report, made, node(made), alone, shape, name)
            if torch.equal(result, plain):
                raise WrongResultError(f"{shape}: {name} changed nothing")
        del made
        release(report.device)


def _step(report: Report, made: RandomModel, applied: Applied, alone: bool, shape: str = "", name: str = ""):
    with peak_memory(report.device) as peak:
        begin = time.perf_counter()
        # Of a large model one half of CFG is long enough.
        result = made.sample(
            applied.model, applied.sampler, applied.positive, applied.negative, cfg=1.0 if alone else 2.0
        )
        seconds = time.perf_counter() - begin
    if not result.isfinite().all():
        raise WrongResultError(f"{shape}: {name} gave values that are not finite")
    if name:
        report.figure(name, [1000 * seconds], shape, "ms")
        if peak:
            report.figure(f"{name}, peak", [peak[0] / 2**20], shape, "MiB")
    return result, peak


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """The highest bytes allocated inside the block, in a list; an empty one on a CPU."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if device.type == "cuda":
        torch.cuda.synchronize()
        found.append(torch.cuda.max_memory_allocated())


def release(device: torch.device) -> None:
    """Nothing of an earlier model stays on the device."""
    comfy.model_management.unload_all_models()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_sd15(report: Report) -> None:
    measure_family(report, "SD 1.5")


def measure_sdxl(report: Report) -> None:
    measure_family(report, "SDXL")


def measure_wan(report: Report) -> None:
    measure_family(report, "Wan 2.1 14B")


def measure_flux(report: Report) -> None:
    measure_family(report, "Flux.1")
