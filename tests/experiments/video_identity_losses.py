"""What a reference tells the theatre's video model after each stage of its training, as a loss, without sampling.

    python tests/experiments/video_identity_losses.py

48 validation clips of one puppet at noise level 0.95, the velocity's mean square error on the whole clip and on the
puppet: without a reference, with all words of the clothes, and with the clip's own or the next case's reference, read
by restricted attention, vanilla attention and at shared positions, without an adapter and, last, with the shipped
one. Needs the state of train_puppets_wan.py, and that of the shipped model. Writes
results/video_identity_losses.json: means and paired differences with 95 % intervals.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "workflows" / "models"
STATE = ROOT / ".cache" / "training" / "puppets_wan"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows"), str(ROOT / "workflows" / "theatre")]
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

scripts.add_comfy_path(STATE / "host", cpu=not torch.cuda.is_available())
import text_encoder  # noqa: E402
import wan_adapter  # noqa: E402
import wan_likeness  # noqa: E402
import wan_looks  # noqa: E402
import wan_stages as stages  # noqa: E402
from experiments import report, sampling, video_identity_variants  # noqa: E402
from pack.nodes.puppets import captions  # noqa: E402
from support import published_wan  # noqa: E402

CASES, LEVEL, SEED = 48, 0.95, 0x105
CPU = torch.device("cpu")
STAGES = ("looks", "aligned", "likeness")
TRANSFORMER = MODELS / "diffusion_models" / "puppets_wan.safetensors"
ADAPTER = MODELS / "loras" / "puppets_wan_identity.safetensors"
ENCODER = MODELS / "checkpoints" / "puppets_sd.safetensors"
READERS = {"restricted attention": published_wan.Wan, **video_identity_variants.VARIANTS}
MEASURES = ("whole", "puppet")
NONE, WORDS = "no reference", "all words of the clothes"
OURS, VANILLA, SHARED = READERS
UNTRAINED, SHIPPED = "no adapter", "the shipped adapter"


def reading(whose: str, reader: str, adapter: str) -> str:
    return f"{whose} reference, {reader}, {adapter}"


OWN = reading("own", OURS, UNTRAINED)
DIFFERENCES = (
    (WORDS, NONE), (OWN, NONE), (OWN, reading("another's", OURS, UNTRAINED)),
    (reading("own", VANILLA, UNTRAINED), OWN), (reading("own", SHARED, UNTRAINED), OWN),
    (reading("own", OURS, SHIPPED), OWN),
)


def difference(rows: list[dict[str, float]], others: list[dict[str, float]]) -> dict:
    """Of the same clips, paired."""
    pairs = zip(rows, others, strict=True)
    return report.summary([{measure: a[measure] - b[measure] for measure in MEASURES} for a, b in pairs], MEASURES)


def main() -> None:
    config = stages.Config()
    for name in STAGES:
        if not (STATE / f"{name}.pt").exists():
            raise SystemExit(f"{STATE / name}.pt is missing: train it with workflows/theatre/train_puppets_wan.py")
    file = safetensors.torch.load_file(TRANSFORMER)
    last = wan_looks.trained(STATE, STAGES[-1], config, CPU).state_dict()
    if any(not torch.equal(tensor.half(), file[name]) for name, tensor in last.items()):
        raise SystemExit(f"{STATE / STAGES[-1]}.pt is not what {TRANSFORMER.name} was written from: export it first")
    indices = [i for i in range(2 * CASES) if len(stages.clip_takes(i, "validation")) == 1][:CASES]
    takes = [stages.clip_takes(i, "validation")[0] for i in indices]
    vae = stages.trained_vae(STATE, config, CPU)["vae"]
    mean, deviation = (x[:, None, None, None] for x in stages.statistics(stages.latents(STATE, config)[1]))
    others = (
        wan_adapter.reference_take(take.identity, np.random.default_rng([SEED, i])) for i, take in enumerate(takes)
    )
    pictures = torch.stack([wan_adapter.reference_image(take, config.size) for take in others])

    def normalised(frames: np.ndarray) -> torch.Tensor:
        return (stages.whole_clip.encode(vae, stages.to_pixels(frames, CPU)).float() - mean) / deviation

    with torch.no_grad(), stages.host_in_training():
        pairs = zip(takes[::2], takes[1::2], strict=True)  # a batch of one is several times slower
        clips = ([stages.clip_frames([take], config.size) for take in pair] for pair in pairs)
        clean = torch.cat([normalised(np.stack(pair)) for pair in clips])
        shots = normalised((pictures.numpy() * 255).round().astype(np.uint8))
        covered = torch.from_numpy(np.stack([
            [wan_likeness.covered(moment, config.size) for moment in wan_likeness.moments(take)] for take in takes
        ]))
        encoder = text_encoder.trained(ENCODER, CPU)
        texts = [captions.group_caption([take]) for take in takes], [captions.caption(take) for take in takes]
        bare, full = (encoder(text_encoder.tokens(part, CPU)).last_hidden_state for part in texts)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(SEED))
        noisy, timestep = torch.lerp(clean, noise, LEVEL), torch.full((CASES,), 1000 * LEVEL)
        shipped = safetensors.torch.load_file(ADAPTER)
        untrained = {key: torch.zeros_like(tensor) for key, tensor in shipped.items()}

        def errors(output: torch.Tensor) -> list[dict[str, float]]:
            both = wan_likeness.velocity_errors(output, noise - clean, covered)
            return [dict(zip(MEASURES, map(float, pair), strict=True)) for pair in zip(*both, strict=True)]

        found: dict[str, dict[str, list]] = {}
        for stage in STAGES:
            dit, of_stage = wan_looks.trained(STATE, stage, config, CPU).eval(), found.setdefault(stage, {})
            for words, context in ((NONE, bare), (WORDS, full)):
                of_stage[words] = errors(dit(noisy, timestep, context=context).float())
            readings = [(reader, UNTRAINED, untrained) for reader in READERS]
            if stage == STAGES[-1]:
                readings.append((OURS, SHIPPED, shipped))
            for reader, said, adapter in readings:
                wan = READERS[reader](dit.state_dict(), dit.num_heads, dit.freq_dim, adapter, dtype=torch.float32)
                for whose, reference in (("own", shots), ("another's", shots.roll(1, 0))):
                    wan.attended.clear()
                    output = wan(noisy, timestep, bare, reference)
                    of_stage[reading(whose, reader, said)] = errors(output)
    results = {
        stage: {
            "losses": {name: report.summary(rows, MEASURES) for name, rows in own.items()},
            "differences": {f"{a} - {b}": difference(own[a], own[b]) for a, b in DIFFERENCES if a in own},
        }
        for stage, own in found.items()
    }
    for stage, both in results.items():
        for name, summary in (both["losses"] | both["differences"]).items():
            print(f"{stage}: {name}", {measure: summary[measure] for measure in MEASURES}, flush=True)
    report.write_json(report.RESULTS / "video_identity_losses.json", {
        "command": report.command("video_identity_losses.py"), "machine": report.machine(),
        "sha256": {path.name: sampling.sha256(path) for path in (TRANSFORMER, ADAPTER)}, "noise level": LEVEL,
        "cases": CASES, "interval": "95 %: [mean, low, high]", "stages": results,
    })


if __name__ == "__main__":
    main()
