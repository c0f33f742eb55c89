"""GPU memory and operations of each training at its published size, by arithmetic: a table for TRAINING.md.

    python tests/benchmarks/training_needs.py             # all rows
    python tests/benchmarks/training_needs.py "SD 1.5"    # those of this model

The real models run forward on the meta device, which computes nothing: what autograd would keep for the backward pass
is counted in bytes, and multiplications by PyTorch's counter. By arithmetic; nobody has measured these on a GPU.
"""

import contextlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.remove(str(Path(__file__).parent))
sys.path += [str(ROOT / "tests"), str(ROOT / "workflows")]

from launcher import scripts  # noqa: E402

scripts.alias_pack()
scripts.add_comfy_path(Path(tempfile.mkdtemp(prefix="understudy-needs-")))

import comfy.supported_models  # noqa: E402
from pack.nodes.patching.wan_blocks import OVERRIDE  # noqa: E402
from pack.nodes.training import differentiable  # noqa: E402
from pack.nodes.training.config import LoraConfig  # noqa: E402
from pack.nodes.training.lora import trainable  # noqa: E402
from pack.nodes.training.whole_network import BYTES_PER_PARAMETER  # noqa: E402
from support.real_configurations import FLUX, REAL_CONFIGURATIONS, RealConfiguration  # noqa: E402

META = torch.device("meta")
GIB = 2**30
# Eight H100, dense bf16, of which a good training uses two fifths.
FLOPS = 8 * 989e12 * 0.4


@dataclass(frozen=True)
class Case:
    """One training: model, latent of a sample, tokens of its text, what is trained, and the published size."""

    name: str
    model: str
    shape: tuple[int, ...]
    tokens: int
    rank: int | None  # None is the whole network
    samples: int  # of the published or usual run
    batch: int = 1


# As published, in their `config.json`; the tests need no more of them than this table.
CONFIGURATIONS = {
    **REAL_CONFIGURATIONS,
    "Flux.1": FLUX,
    "Qwen-Image": RealConfiguration(comfy.supported_models.QwenImage, {"image_model": "qwen_image"}, 20.4),
}
CASES = (
    Case("prior, SD 1.5, 512 x 512, rank 8", "SD 1.5", (4, 64, 64), 77, 8, 800),
    Case("prior, SDXL, 1024 x 1024, rank 16", "SDXL", (4, 128, 128), 77, 16, 800),
    Case("prior, Flux.1, 1024 x 1024, rank 16", "Flux.1", (16, 128, 128), 512, 16, 800),
    Case("prior, Qwen-Image, 1024 x 1024, rank 16", "Qwen-Image", (16, 1, 128, 128), 512, 16, 800),
    Case("fusion generator, SD 2.1, 352 x 512, rank 16", "SD 2.1", (4, 64, 44), 257, 16, 1_000_000),
    Case("fusion generator, SD 2.1, 352 x 512, whole UNet", "SD 2.1", (4, 64, 44), 257, None, 1_000_000),
    Case("adapter, Wan 1.3B, 832 x 480 x 81", "Wan 2.1 1.3B", (16, 22, 60, 104), 512, 128, 144_000, 48),
    Case("adapter, Wan 14B, 832 x 480 x 81", "Wan 2.1 14B", (16, 22, 60, 104), 512, 128, 144_000, 48),
)


class Attention(torch.autograd.Function):
    """What flash attention keeps: q, k, v and its result."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


class Kept:
    """Bytes that autograd keeps, each storage once, without the model's own weights."""

    def __init__(self, network):
        self.weights = {tensor.untyped_storage()._cdata for tensor in network.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.storages[storage._cdata] = storage  # held, so that its address is not given again
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    def counting(self):
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)


@contextlib.contextmanager
def counted_blocks(network, inputs: Kept, largest: list[int]):
    """Of checkpointed blocks what is kept: the inputs of all, and all of one while it is computed again."""
    with contextlib.ExitStack() as stack:
        for block in differentiable._blocks(network):
            stack.callback(block.__dict__.pop, "forward", None)
            block.forward = _counting(block.forward, network, inputs, largest)
        yield


def _counting(forward, network, inputs, largest):
    def counted(*args, **kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                inputs.add(value)
        own = Kept(network)
        with own.counting():
            result = forward(*args, **kwargs)
        largest.append(own.bytes)
        return result

    return counted


def model_of(case: Case):
    """The real model's network on meta, as `session` makes it: a whole UNet is fp32, computed in bf16."""
    real = CONFIGURATIONS[case.model]
    stored = torch.float32 if case.rank is None else torch.bfloat16
    config = real.host_class({**real.unet_config, "dtype": stored})
    config.set_inference_dtype(stored, torch.bfloat16 if case.rank is None else None)
    return config.get_model({}, device=META).diffusion_model.requires_grad_(False)


def forward(network, case: Case):
    """One sample through the network."""
    x = torch.empty(1, *case.shape, dtype=torch.bfloat16, device=META).requires_grad_()
    config = CONFIGURATIONS[case.model].unet_config
    width = next((config[key] for key in ("context_dim", "text_dim", "context_in_dim") if key in config), 3584)
    context = torch.empty(1, case.tokens, width, dtype=torch.bfloat16, device=META)
    pooled = {"SDXL": 2816, "Flux.1": 768}.get(case.model)
    extra = {} if pooled is None else {"y": torch.empty(1, pooled, dtype=torch.bfloat16, device=META)}
    if case.model == "Flux.1":
        extra["guidance"] = torch.ones(1, dtype=torch.bfloat16, device=META)
    network(x, torch.ones(1, device=META), context=context, transformer_options={OVERRIDE: attention}, **extra)


OPERATIONS = [0.0]


def attention(_function, q, k, v, heads, *_args, skip_reshape=False, **_options):
    batch, queries, width = q.shape if not skip_reshape else (q.shape[0], q.shape[2], q.shape[1] * q.shape[3])
    keys = k.shape[2] if skip_reshape else k.shape[1]
    OPERATIONS[0] += 4 * batch * queries * keys * width
    out = Attention.apply(q, k, v)
    return out.transpose(1, 2).reshape(batch, queries, width) if skip_reshape else out


def measured(case: Case) -> list[str]:
    """A row of the table."""
    network = model_of(case)
    weights = sum(p.numel() for p in network.parameters()) * (4 if case.rank is None else 2)
    lora = None if case.rank is None else LoraConfig(rank=case.rank)
    trained = trainable(network, lora, 0, META)
    count = sum(p.numel() for p in trained.parameters().values())
    # The copies that a whole network is trained as are among the sixteen bytes.
    kept, inputs, largest = Kept(network), Kept(network), []
    with trained.attached():
        kept.weights |= {p.untyped_storage()._cdata for p in trained.parameters().values()}
        OPERATIONS[0] = 0.0
        with kept.counting(), FlopCounterMode(display=False) as counter:
            forward(network, case)
        operations = counter.get_total_flops() + OPERATIONS[0]
        with counted_blocks(network, inputs, largest):
            forward(network, case)
    fixed = weights + BYTES_PER_PARAMETER * count
    layer = max(module.weight.numel() for module in network.modules() if hasattr(module, "in_features"))
    passes = 3 if case.rank is None else 2  # forward, and backward for activations and, of a whole network, weights
    days = case.samples * operations * passes / FLOPS / 86400
    checkpointed = fixed + inputs.bytes + max(largest)
    # A streamed layer is there twice, in its own type and as it is computed.
    streamed = "–" if case.rank is None else f"{(checkpointed - weights + 4 * layer) / GIB:.0f}"
    days_told = f"{days:.1f} days" if days >= 1 else f"{days * 24:.1f} h" if days * 24 >= 0.1 else "minutes"
    sizes = [weights, BYTES_PER_PARAMETER * count, kept.bytes]
    together = [fixed + kept.bytes, checkpointed]
    return [
        case.name, *(f"{size / GIB:.1f}" for size in sizes), *(f"{size / GIB:.0f}" for size in together), streamed,
        f"{operations * passes / 1e12:.1f}", f"{case.samples:,}", days_told,
    ]


HEADER = (
    "Training", "Weights", "Trained", "Activations", "Together", "… with `gradient_checkpointing`", "… and `offload`",
    "TFLOP a sample", "Samples", "8 × H100",
)


def main(models: list[str]) -> None:
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for case in (case for case in CASES if not models or case.model in models):
        print("| " + " | ".join(measured(case)) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
