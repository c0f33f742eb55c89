"""One picture a method, of the case at the median of its score: what the README shows.

    python tests/experiments/pictures.py frequency_guidance     # or several, or all
    python tests/experiments/pictures.py all --output FOLDER

The rows of the method's own arm in the test decide which cases are shown: run that first. JPEG for pictures, WebP
for what moves; both into results.
"""

import argparse
import dataclasses
import io
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows")]
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
    import torch

    scripts.alias_pack()
    scripts.add_comfy_path(ROOT / ".cache" / "experiments" / "host", cpu=not torch.cuda.is_available())

import numpy as np  # noqa: E402
from experiments import cases, report, runs, sampling  # noqa: E402
from PIL import Image  # noqa: E402

GAP, BUDGET = 4, 90_000  # pixels between cells; bytes of a picture
DIFFERENCE = 3.0  # how many times brighter a map of differences is
MILLISECONDS = 120  # a frame
Grid = Sequence[Sequence[np.ndarray | None]]


def middle(rows: Sequence[dict], measure: str, count: int = 1, of: str = "case") -> list[int]:
    """The `count` values of column `of` whose mean of `measure` is nearest to the median of all, nearest first."""
    means = {each: np.mean([row[measure] for row in rows if row[of] == each]) for each in {row[of] for row in rows}}
    median = np.median(list(means.values()))
    return sorted(means, key=lambda each: (abs(means[each] - median), each))[:count]


def kept(script, arm: str) -> list[dict]:
    """The arm's rows of the test. SystemExit where there are none."""
    name = Path(script.__file__).stem
    rows = runs.newest(runs.STATE / name / "test", arm)
    if not rows:
        raise SystemExit(f'there are no rows yet: run python tests/experiments/{name}.py --arm "{arm}"')
    return rows


def bench_of(script):
    """What its tests make pictures with."""
    options = argparse.Namespace(development=False, checkpoint=sampling.CHECKPOINT)
    return script.Bench(options, runs.STATE / Path(script.__file__).stem / "test")


def grid(cells: Grid) -> np.ndarray:
    """Rows of pictures uint8 [H, W, 3] of one size as one on white; None leaves a cell empty."""
    height, width = next(cell for row in cells for cell in row if cell is not None).shape[:2]
    rows, columns = len(cells), max(map(len, cells))
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            if cell is not None:
                top, left = i * (height + GAP), j * (width + GAP)
                sheet[top : top + height, left : left + width] = cell
    return sheet


def save(path: Path, frames: Sequence[np.ndarray]) -> None:
    """One picture as JPEG, several as a WebP that moves; as good as BUDGET allows."""
    images = [Image.fromarray(frame) for frame in frames]
    for quality in (90, 84, 76, 68, 60, 50, 40):
        file = io.BytesIO()
        if len(images) == 1:
            images[0].save(file, "JPEG", quality=quality, optimize=True)
        else:
            images[0].save(file, "WEBP", quality=quality, method=6, save_all=True, append_images=images[1:],
                           duration=MILLISECONDS, loop=0)
        if file.tell() <= BUDGET:
            break
    report.replace(path.with_suffix(".jpg" if len(images) == 1 else ".webp"), file.getvalue())
    print(f"{path.stem}: {len(images)} of {images[0].width} x {images[0].height}, {file.tell()} bytes")


def frequency_guidance() -> list[np.ndarray]:
    """Rows are three sources, columns three drivers of other scenes; beside them the same by img2img."""
    from experiments import frequency_guidance as method

    chosen = middle(kept(method, method.OURS), "identity_error", 3)
    bench, found = bench_of(method), [cases.transfer(int(case)) for case in chosen]
    rival = method.ARMS["img2img from the driver, 0.65"]

    def made(arm) -> list[list[np.ndarray]]:
        return [
            [bench.sampled(arm, [int(case)], [dataclasses.replace(one, driver=other.driver)])[0] for other in found]
            for case, one in zip(chosen, found, strict=True)
        ]

    sources, drivers = (list(cases.pictures([getattr(one, name) for one in found])) for name in ("source", "driver"))
    rows = zip(sources, made(method.ARMS[method.OURS]), made(rival), strict=True)
    return [grid([[None, *drivers, None, *drivers], *([one, *ours, None, *theirs] for one, ours, theirs in rows)])]


def identity_prior() -> list[np.ndarray]:
    """A photograph and three edits; under each what changed; below, the same without the prior."""
    from experiments import identity_prior as method

    index = int(middle(kept(method, method.OURS), "worn_error", of="subject")[0])
    subject, bench = cases.subject(index), bench_of(method)
    source, learned = subject.edits[0].source, {take.action for take in subject.learned}
    wanted = [action for action in ("waving", "sitting", "handstand", "cheering", "kicking") if action not in learned]
    edits = [cases.Edit(source, dataclasses.replace(source, action=action)) for action in wanted[:3]]
    own = [index * cases.EDITS + i for i in range(3)]
    ours, without = (bench.edited(method.ARMS[arm], index, own, edits)[1] for arm in (method.OURS, method.NONE))
    shown = cases.pictures([source])[0]
    maps = [np.abs(edit.astype(float) - shown).max(-1, keepdims=True) * DIFFERENCE for edit in ours]
    changed = [one.clip(0, 255).astype(np.uint8).repeat(3, -1) for one in maps]
    return [grid([[shown, *ours], [None, *changed], [None, *without]])]


def action_identifier() -> list[np.ndarray]:
    """Pictures of an action, one word for it on six puppets, and below what a LoRA makes of the same prompts."""
    from experiments import action_identifier as method

    (action,) = middle(kept(method, method.OURS), "composition", of="asked")
    bench, takes = bench_of(method), cases.performers(action)
    first = {take.identity.species: i for i, take in reversed(list(enumerate(takes)))}
    chosen = sorted(first.values())[:6]
    begin = cases.TEST_ACTIONS.index(action) * len(takes)
    learned, rival = (
        [bench.sampled(method.ARMS[arm].learning, action, begin + i, takes[i])[0] for i in chosen]
        for arm in (method.OURS, method.LORA)
    )
    return [grid([list(cases.pictures(cases.exemplars(action)[:4])), learned, rival])]


def fusion_embedding() -> list[np.ndarray]:
    """Who, a moving pose and the puppet in it; halfway only the source changes."""
    from experiments import fusion_embedding as method
    from pack.nodes.puppets import render

    index = int(middle(kept(method, method.FULL), "identity_error")[0])
    one, bench, training = method.case(index), bench_of(method), method.TRAININGS[method.FULL]
    fusion, _ = method.arms.learned(bench.theatre, bench.folder, training)
    moving = [dataclasses.replace(one.truth, action="dancing", phase=i / 12) for i in range(12)]
    pose = np.stack([render.draw_pose(cases.drawn(take).joints, 128) for take in moving])
    frames = []
    for take in (one.source, one.other):
        source = cases.pictures([take]).repeat(len(pose), 0)
        shown = {path: source for path in (method.TOKENS, method.EMBEDDING)}
        # One noise for all: only the pose differs.
        seeds = [cases.noise_seed(cases.FUSION, index)] * len(pose)
        made = bench.drawn(training, fusion, shown, pose, seeds)
        frames += [grid([list(parts)]) for parts in zip(source, pose, made, strict=True)]
    return frames


def video_identity() -> list[np.ndarray]:
    """One prompt and noise, three references; below, without a reference."""
    from experiments import video_identity as method

    index = int(middle(kept(method, method.arms.RESTRICTED), "identity_error")[0])
    one, bench, everybody = method.case(index), bench_of(method), cases.people()
    people = [everybody[(one.puppet + step) % cases.PEOPLE] for step in (0, 8, 16)]  # of one species
    shown = [method.arms.reference_image(dataclasses.replace(one.reference, identity=who)) for who in people]
    arms, three = (method.arms.RESTRICTED, method.NONE), [one] * 3
    ours, without = (bench.clips(method.ARMS[arm], [index] * 3, three, shown) for arm in arms)
    references = [method.as_bytes(image)[0] for image in shown]
    frames = [grid([references, list(ours[:, t]), list(without[:, t])]) for t in range(ours.shape[1])]
    return frames + frames[-2:0:-1]


METHODS = {
    method.__name__: method
    for method in (frequency_guidance, identity_prior, action_identifier, fusion_embedding, video_identity)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="+", choices=(*METHODS, "all"))
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    for name in METHODS if "all" in options.method else options.method:
        save(options.output / name, METHODS[name]())


if __name__ == "__main__":
    main()
