"""The inputs about consent that Train, Save and Load nodes share, said once."""

from comfy_api.latest import io

from .record import PURPOSES, SCOPES, UNSPECIFIED

CONSENT = io.Custom("UNDERSTUDY_CONSENT")  # a ConsentRecord


def to_train() -> io.Input:
    """A Train node's."""
    return CONSENT.Input(
        "consent", optional=True,
        tooltip="From Consent Record: goes with what is trained into its file. Without training among its scopes, or "
        "out of date, the node warns.",
    )


def to_save() -> io.Input:
    """A Save node's."""
    return CONSENT.Input(
        "consent", optional=True,
        tooltip="From Consent Record, to be saved in place of the one that it carries; an empty one removes that.",
    )


def purpose() -> io.Combo.Input:
    """A Load node's."""
    return io.Combo.Input(
        "purpose", options=list(PURPOSES), default=UNSPECIFIED, optional=True,
        tooltip=f"What the result is for: {', '.join(SCOPES)}. The node warns where the file's consent record is "
        f"missing, out of date or for something else. {UNSPECIFIED} asks for no scope.",
    )
