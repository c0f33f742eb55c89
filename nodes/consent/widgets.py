"""The inputs about consent that Train, Save and Load nodes share, said once."""

from comfy_api.latest import io

from .record import PURPOSES, SCOPES, UNSPECIFIED

CONSENT = io.Custom("UNDERSTUDY_CONSENT")  # a ConsentRecord


def to_train(kept: bool = True) -> io.Input:
    """A Train node's; `kept` is whether the pack's Save node writes it into the file."""
    goes = "goes with what is trained into its file" if kept else (
        "checked, and not kept, since Save LoRA Weights is ComfyUI's own and writes none into the file"
    )
    return CONSENT.Input(
        "consent", optional=True,
        tooltip=f"From Consent Record: {goes}. Without training among its scopes, or out of date, the node warns.",
    )


def to_save() -> io.Input:
    """A Save node's."""
    return CONSENT.Input(
        "consent", optional=True,
        tooltip="From Consent Record, to be saved in place of the one that it carries; an empty one removes that.",
    )


def purpose(of: str = "the file's consent record") -> io.Combo.Input:
    """A Load node's, or that of a node which publishes; `of` is the record that is checked."""
    return io.Combo.Input(
        "purpose", options=list(PURPOSES), default=UNSPECIFIED, optional=True,
        tooltip=f"What the result is for: {', '.join(SCOPES)}. The node warns where {of} is missing, out of date or "
        f"for something else. {UNSPECIFIED} asks for no scope.",
    )
