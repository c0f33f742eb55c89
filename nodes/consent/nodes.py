"""The node that records consent, for every node that trains, saves or labels."""

import hashlib

import torch
from comfy_api.latest import io

from ..inputs.checked import CheckedNode
from ..inputs.pictures import check_pictures, colour
from .record import NO_PERSON, SCOPES, ConsentRecord
from .widgets import CONSENT

CATEGORY = "Understudy/Consent"


class UnderstudyConsentRecord(CheckedNode):
    """Who agreed to be learned and shown, for what, and until when."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyConsentRecord", display_name="Consent Record", category=CATEGORY,
            description="Records who agreed to be learned and shown, for what and until when. Connected to Train and "
            "Save nodes, it goes into their files, and Load nodes show it and warn where it does not hold.",
            search_aliases=[
                "consent", "permission", "release form", "model release", "privacy", "GDPR", "licence", "同意",
                "许可", "授权", "許諾",
            ],
            inputs=[
                io.String.Input(
                    "subject", default="",
                    tooltip="Who agreed: a name or a pseudonym. With all texts empty this is the empty record, which "
                    "removes another one on saving.",
                ),
                io.MultiCombo.Input(
                    "scopes", options=[*SCOPES, NO_PERSON],
                    tooltip="What the person agreed to: private, editorial and commercial say where results may be "
                    f"shown, training that a model may learn the person. {NO_PERSON}, alone: it is a drawn figure, "
                    "an animal or a thing, so that nobody has to agree and every purpose holds.",
                ),
                io.String.Input(
                    "granted_by", default="",
                    tooltip="Who gave consent, if not the person: a parent, an agency. Empty is the person.",
                ),
                io.String.Input(
                    "granted_on", default="", tooltip="The day on which consent was given: 2026-11-28. May be empty.",
                ),
                io.String.Input(
                    "expires", default="",
                    tooltip="The last day, 2027-12-31, which ends with the first midnight on earth, at UTC+14; or a "
                    "moment with its offset from UTC, 2027-12-31T18:00+09:00. Empty is without end.",
                ),
                io.String.Input(
                    "note", default="", multiline=True,
                    tooltip="Anything else, such as where the signed form is; up to 100,000 characters.",
                ),
                io.Image.Input(
                    "references", optional=True,
                    tooltip="The pictures that consent is about. Only a SHA-256 of each is recorded, by which the "
                    "same picture can be recognised, and nothing of it restored.",
                ),
            ],
            outputs=[
                CONSENT.Output(display_name="consent", tooltip="Connect it to the consent of Train and Save nodes."),
            ],
        )

    @classmethod
    def execute(
        cls, subject, scopes, granted_by, granted_on, expires, note, references=None
    ) -> io.NodeOutput:
        texts = [text.strip() for text in (subject, granted_by, granted_on, expires, note)]
        pictures = () if references is None else picture_digests(references)
        if not any(texts) and not pictures:
            return io.NodeOutput(ConsentRecord())
        subject, granted_by, granted_on, expires, note = texts
        in_order = tuple(scope for scope in (*SCOPES, NO_PERSON) if scope in scopes)
        return io.NodeOutput(ConsentRecord(subject, in_order, granted_by, granted_on, expires, note, pictures))


def picture_digests(images: torch.Tensor) -> tuple[str, ...]:
    """The SHA-256 of each picture [B, H, W, 1, 3 or 4] in 0..1, in hex: of "<width>x<height>", a line feed, and the
    red, green and blue bytes row by row, as a PNG of it holds them. Raises ValueError for other tensors.
    """
    check_pictures(images, "references", least=1)
    digests = []
    for picture in colour(images, "references"):
        content = picture.detach().cpu().mul(255).round().clamp(0, 255).to(torch.uint8).contiguous()
        head = f"{picture.shape[1]}x{picture.shape[0]}\n".encode()
        digests.append(hashlib.sha256(head + content.numpy().tobytes()).hexdigest())
    return tuple(dict.fromkeys(digests))


NODES = [UnderstudyConsentRecord]
