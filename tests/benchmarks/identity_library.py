"""The identity library with many files: the first listing, later ones, after one new file, and hashing.

`python tests/benchmarks/identity_library.py [--files 10000] [--rounds 5]`. A quarter of the files are foreign LoRAs,
one in a hundred is damaged, half of the rest have a consent record. Each figure is the median of the rounds, but for
the first listing and the first hashing, which happen once. The list is checked against what was written.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[2] / folder) for folder in ("tests", "workflows")]

from support import benchmark  # noqa: E402

benchmark.start(__name__ == "__main__")

import folder_paths  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from pack.nodes.consent import record  # noqa: E402
from pack.nodes.library import index, listing  # noqa: E402

PRIOR = '{"token": "sks", "class_noun": "dog", "captions": ["a sks dog"], "base": "0123456789abcdef"}'


def write(folder: Path, count: int) -> dict[str, int]:
    """Files as large as a small LoRA's header makes them; how many there are of each kind of line."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"lora_unet_block_{i}_{part}.lora_{side}.weight": torch.zeros(4, 4)
        for i in range(16) for part in ("q", "k", "v", "out") for side in ("down", "up")
    }
    agreed = record.to_metadata(record.ConsentRecord("Anna", ("private",), "", "", "2099-12-31", "a note"))
    kinds = {
        "foreign": safetensors.torch.save(tensors, {"ss_network_dim": "4"}),
        "plain": safetensors.torch.save(tensors, {"understudy_identity": PRIOR}),
        "agreed": safetensors.torch.save(tensors, {"understudy_identity": PRIOR, **agreed}),
        "damaged": b"\xff" * 64,
    }
    counts = dict.fromkeys(kinds, 0)
    for i in range(count):
        usual = ("foreign", "plain", "agreed", "agreed" if i % 8 < 4 else "plain")[i % 4]
        kind = "damaged" if i % 100 == 0 else usual
        counts[kind] += 1
        (folder / f"subject{i // 10:04}_{i % 10 + 1:05}_.safetensors").write_bytes(kinds[kind])
    return counts


def report(name: str, work, rounds: int = 1) -> None:
    """Print the median seconds of a call, and those of the processor, which other programs do not lengthen."""
    walls, processor = [], []
    for _ in range(rounds):
        begin = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - begin[0])
        processor.append(time.process_time() - begin[1])
    print(f"{name:42}{statistics.median(walls):8.2f} s{statistics.median(processor):8.2f} s of the processor")


def lines() -> list[str]:
    """What the node's list holds, from ComfyUI's list of names on."""
    folder_paths.filename_list_cache.clear()
    return [listing.line(file) for file in listing.all_files()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = Path(folder_paths.get_output_directory()) / "loras"
    folder_paths.add_model_folder_path("loras", str(folder))
    counts = write(folder, options.files)
    time.sleep(index._SETTLED / 1e9)
    print(f"{options.files} files, {counts}")
    report("first listing, which reads every header", lines)
    listed = [line for line in lines() if line.startswith("subject")]
    assert len(listed) == options.files
    assert sum("consent for private until 2099-12-31" in line for line in listed) == counts["agreed"]
    assert sum("no consent record" in line for line in listed) == counts["plain"]
    assert sum("foreign" in line for line in listed) == counts["foreign"]
    assert sum("damaged" in line for line in listed) == counts["damaged"]
    report("later listing", lines, options.rounds)
    (folder / "subject0000_00011_.safetensors").write_bytes(b"new")
    report("after one new file", lines)
    paths = [str(file.path) for file in listing.all_files()][:500]
    report(f"first hashing of {len(paths)} files", lambda: [*map(index.sha256, paths)])
    report("hashing of the same again", lambda: [*map(index.sha256, paths)])


if __name__ == "__main__":
    main()
