"""The gallery of a run: the saved files, a contact sheet and one self-contained page."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import string
from collections.abc import Sequence
from pathlib import Path

from .workflow_files import Workflow

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
VIDEOS = (".mp4", ".webm", ".mkv")
CELL = 384
MARGIN = 24
THUMBNAIL = 512  # pixels of a square side: twice what ComfyUI's template browser shows
BACKGROUND = "#16181d"


@dataclasses.dataclass
class Entry:
    """A workflow of a run. `state` is "done", "skipped" or "failed", and `message` says why; files have captions."""

    workflow: Workflow
    state: str
    message: str = ""
    seconds: float = 0.0
    files: list[tuple[Path, str]] = dataclasses.field(default_factory=list)
    main: Path | None = None


def is_shown(name: str) -> bool:
    """Whether a browser shows a file of that name."""
    return Path(name).suffix.lower() in PICTURES + VIDEOS


def main_file(files: Sequence[dict]) -> dict | None:
    """The first file of the node that saved a picture last; a video or a preview if no node saved a picture."""

    def rank(file: dict) -> tuple[bool, bool]:
        return file["type"] == "output", Path(file["filename"]).suffix.lower() in PICTURES

    last = max(reversed(files), key=rank, default=None)  # the last of equals
    return None if last is None else next(file for file in files if file["node_id"] == last["node_id"])


def picture(path: Path):
    """The picture in a file as RGB, or the first frame of a video. Transparency becomes white."""
    from PIL import Image

    if path.suffix.lower() in VIDEOS:
        import av

        with av.open(str(path)) as container:
            return next(container.decode(video=0)).to_image()
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def fitted(image, side: int):
    """The picture scaled up or down so that its longer side is `side` pixels."""
    from PIL import Image

    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def squared(image, side: int = THUMBNAIL):
    """The picture in a square. A strip of three or more equal panels is laid out in two rows."""
    from PIL import Image

    panels = round(image.width / image.height)
    columns = -(-panels // 2)
    if panels > 2:
        width = image.width // panels
        rows = Image.new("RGB", (columns * width, 2 * image.height), BACKGROUND)
        for i in range(panels):
            left = i % columns * width + (i >= columns) * (2 * columns - panels) * width // 2
            rows.paste(image.crop((i * width, 0, (i + 1) * width, image.height)), (left, i // columns * image.height))
        image = rows
    return padded(image, side)


def padded(image, side: int = THUMBNAIL):
    """The whole picture in the middle of a square."""
    from PIL import Image

    image = fitted(image, side)
    square = Image.new("RGB", (side, side), BACKGROUND)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def save_thumbnail(main: Path, target: Path) -> None:
    """Write the picture that ComfyUI shows for a workflow template."""
    squared(picture(main)).save(target, quality=76, optimize=True, progressive=True)  # so that the tree stays small


def write_contact_sheet(entries: list[Entry], target: Path) -> None:
    """Write the main picture of every workflow into one JPEG, with its title below it."""
    from PIL import Image, ImageDraw, ImageFont

    shown = [entry for entry in entries if entry.main]
    columns = max(1, min(4, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    step, row_height = CELL + MARGIN, CELL + MARGIN + 36
    sheet = Image.new("RGB", (columns * step + MARGIN, rows * row_height + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=18)
    for index, entry in enumerate(shown):
        left, top = MARGIN + index % columns * step, MARGIN + index // columns * row_height
        image = fitted(picture(entry.main), CELL)
        sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
        title = entry.workflow.title
        while draw.textlength(title, font=font) > CELL:
            title = title[:-2].rstrip() + "…"
        draw.text((left, top + CELL + 8), title, fill="#e8e6e3", font=font)
    sheet.save(target, quality=90)


def write_page(entries: list[Entry], target: Path, machine: str) -> None:
    """Write `index.html` with every picture embedded; videos are files beside it, which it links to."""
    cards = "\n".join(_card(entry, target.parent) for entry in entries)
    template = string.Template((Path(__file__).parent / "gallery.html").read_text(encoding="utf-8"))
    done = sum(entry.state == "done" for entry in entries)
    seconds = sum(entry.seconds for entry in entries)
    summary = f"{done} of {len(entries)} workflows run in {seconds:.0f} seconds"
    page = template.substitute(cards=cards, machine=html.escape(machine), summary=html.escape(summary))
    target.write_text(page, encoding="utf-8")


def _card(entry: Entry, folder: Path) -> str:
    # markdown-it comes with comfy-cli; "js-default" lets no HTML through.
    from markdown_it import MarkdownIt

    description = MarkdownIt("js-default").render(entry.workflow.description)
    status = {"done": f"{entry.seconds:.1f} s", "skipped": "skipped", "failed": "failed"}[entry.state]
    message = f"<pre>{html.escape(entry.message)}</pre>" if entry.message else ""
    # The result first, then the pictures that led to it.
    files = sorted(entry.files, key=lambda item: item[0] != entry.main)
    figures = "".join(_figure(path, caption, path == entry.main, folder) for path, caption in files)
    name = html.escape(entry.workflow.path.name)
    return (
        f'<article class="{entry.state}"><h2>{html.escape(entry.workflow.title)} <span>{status}</span></h2>'
        f'{description}{message}<div class="files">{figures}</div><p class="name">{name}</p></article>'
    )


def _figure(path: Path, caption: str, is_main: bool, folder: Path) -> str:
    link = html.escape(path.relative_to(folder).as_posix())
    text = html.escape(caption)
    if path.suffix.lower() in VIDEOS:
        shown = f'<video src="{link}" controls loop muted playsinline></video>'
    else:
        shown = f'<a href="{link}"><img src="{_data_uri(path)}" alt="{text}"></a>'
    return f"<figure{' class=main' if is_main else ''}>{shown}<figcaption>{text}</figcaption></figure>"


def _data_uri(path: Path) -> str:
    content, kind = path.read_bytes(), path.suffix.lower().lstrip(".").replace("jpg", "jpeg")
    if len(content) > 2_000_000:
        buffer = io.BytesIO()
        image = picture(path)
        image.thumbnail((1280, 1280))
        image.save(buffer, "JPEG", quality=88)
        content, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
