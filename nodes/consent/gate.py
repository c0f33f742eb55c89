"""What nodes do with consent records: read them from files, show them, and warn or stop where one does not hold."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from .. import settings
from ..files import weights
from ..files.names import WeightFileError
from ..messages import tell
from . import record
from .record import UNSPECIFIED, ConsentError, ConsentRecord

TRAINING = "training"
_SWITCH = "*Understudy: Require consent* is on"
_PURPOSE = "purpose is unspecified, so that no scope can be checked"


def is_required() -> bool:
    """Whether nodes stop where consent does not hold: `UNDERSTUDY_REQUIRE_CONSENT`, else the setting."""
    return settings.is_on("UNDERSTUDY_REQUIRE_CONSENT", "Understudy.RequireConsent", default=False)


def read(metadata: Mapping[str, str], name: str) -> ConsentRecord | None:
    """The record in a file's metadata; one that cannot be read counts as none, and the running node says why."""
    try:
        return record.from_metadata(metadata)
    except ConsentError as error:
        tell(name, [f"its consent record cannot be read and counts as missing: {error}"], logging.WARNING)
        return None


def with_consent(node: str, carrier: Any, connected: ConsentRecord | None) -> Any:
    """What a Save node writes: IDENTITY, ACTION, FUSION or adapter, with the connected record in place of its own."""
    return dataclasses.replace(carrier, consent=_replaced(node, connected, carrier.consent))


def check_used(
    node: str, consent: ConsentRecord | None, purpose: str, otherwise: str = "load another file"
) -> None:
    """Show the record of a loaded file or a result, and what it does not cover. Raises ConsentError where consent is
    required; `otherwise` is what to do then, beside choosing another purpose.
    """
    lines = warnings(consent, purpose)
    if consent:
        tell(node, [record.describe(consent)])
    if lines and is_required():
        raise ConsentError(
            f"{'; '.join(lines)}: {otherwise}, choose the purpose that holds, or switch off the setting, since "
            f"{_SWITCH}"
        )
    tell(node, lines, logging.WARNING)


def warnings(consent: ConsentRecord | None, purpose: str) -> list[str]:
    """What a record does not cover today. That there is none is no news where nobody said a purpose."""
    if is_required():
        unspecified = purpose == UNSPECIFIED and not (consent and consent.is_no_person)
        return record.problems(consent, purpose, _now()) + [_PURPOSE] * unspecified
    return record.problems(consent, purpose, _now()) if consent or purpose != UNSPECIFIED else []


def file_warnings(path: str | os.PathLike, purpose: str) -> list[str]:
    """What a fingerprint of a weight file's consent holds: nothing while there is nothing to warn of."""
    try:
        consent = record.from_metadata(weights.inspect(path)[1])
    except (WeightFileError, ConsentError):  # what reads the file says it
        consent = None
    lines = warnings(consent, purpose)
    return [*lines, f"required: {is_required()}"] if lines else []


def day_if_required() -> str:
    """The fingerprint of a file that is not known yet: the day where consent is required, since a cache may outlast
    it, else "".
    """
    return str(record.day_of(_now())) if is_required() else ""


def check_training(
    node: str, connected: ConsentRecord | None, inherited: ConsentRecord | None = None
) -> ConsentRecord | None:
    """The record that goes with what is trained; the node says what it does not cover.

    `inherited` is that of what the training continues. Raises ConsentError as `check_used`.
    """
    consent = _replaced(node, connected, inherited)
    required = is_required()
    lines = record.problems(consent, TRAINING, _now()) if consent or required else []
    if lines and required:
        raise ConsentError(f"{'; '.join(lines)}: connect a Consent Record for {TRAINING} to consent, since {_SWITCH}")
    tell(node, lines, logging.WARNING)
    return consent


def _replaced(node: str, connected: ConsentRecord | None, inherited: ConsentRecord | None) -> ConsentRecord | None:
    """The record to hand on: a connected one in place of another, which the node names, or the inherited one."""
    if connected is None:
        return inherited
    if inherited and connected != inherited:
        tell(node, [f"replaced: {record.describe(inherited)}"], logging.WARNING)
    return connected or None


def _now() -> datetime:
    return datetime.now(timezone.utc)
