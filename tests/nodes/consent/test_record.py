"""Consent records: what is refused, what survives JSON, and when a day ends for whom."""

import json
from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.nodes.consent import record
from pack.nodes.consent.record import NO_PERSON, PURPOSES, SCOPES, UNSPECIFIED, ConsentError, ConsentRecord

NOON = datetime(2026, 11, 28, 12, tzinfo=timezone.utc)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def agreed(**fields) -> ConsentRecord:
    return ConsentRecord(**{"subject": "Anna", "scopes": ("private", "training"), **fields})


@given(TEXTS.filter(bool), st.lists(st.sampled_from(SCOPES), min_size=1, unique=True), TEXTS, TEXTS)
def test_what_was_typed_survives_json_in_any_script(subject, scopes, granted_by, note):
    typed = ConsentRecord(subject, tuple(scopes), granted_by, "2026-11-28", "2027-12-31", note, ("0a" * 32,))
    assert record.from_json(typed.to_json()) == typed
    assert record.from_metadata(record.to_metadata(typed)) == typed


def test_the_json_holds_nothing_that_was_not_typed():
    content = json.loads(agreed(note="ノート").to_json())
    assert content == {"version": 1, "subject": "Anna", "scopes": ["private", "training"], "note": "ノート"}


def test_a_note_of_100_000_characters_is_whole_and_a_longer_one_refused():
    assert record.from_json(agreed(note="説" * 100_000).to_json()).note == "説" * 100_000
    with pytest.raises(ConsentError, match="note has 100001 characters: shorten it to 100000"):
        agreed(note="x" * 100_001)


def test_a_report_of_comfyui_does_not_repeat_it():
    assert "Anna" not in repr(agreed()) and "Anna" not in str([agreed()])


def test_the_empty_record_is_none():
    assert not ConsentRecord() and record.to_metadata(ConsentRecord()) == {} and record.to_metadata(None) == {}
    for nothing in (ConsentRecord(), None):
        assert record.problems(nothing, UNSPECIFIED, NOON) == [record.MISSING]
    assert record.from_metadata({}) is None


@pytest.mark.parametrize(("fields", "message"), [
    ({"subject": ""}, "subject is empty: name who agreed"),
    ({"scopes": ()}, "scopes is empty: choose at least one"),
    ({"scopes": ("private", "sale")}, "scopes has the entry 'sale': use private, editorial, commercial, training"),
    ({"scopes": ("private", NO_PERSON)}, "scopes has no person beside others: choose it alone"),
    ({"granted_on": "28.11.2026"}, "granted_on is '28.11.2026': write a day such as"),
    ({"granted_on": "2026-06-31"}, "granted_on is '2026-06-31'"),
    ({"granted_on": "2026-11-28T10:00Z"}, "granted_on"),
    ({"expires": "2027-13-01"}, "expires is '2027-13-01'"),
    ({"expires": "next year"}, "expires is 'next year': write a day such as 2027-12-31, or a moment"),
    ({"expires": "2027-12-31T18:00"}, "or a moment with its offset"),
    ({"expires": "٢٠٢٧-١٢-٣١"}, "expires"),
    ({"note": "\ud800"}, "note has half a character at place 1"),
    ({"references": ("xyz",)}, "references has the entry 'xyz': use SHA-256"),
    ({"references": ("0a" * 32,) * 1001}, "references has 1001 entries"),
])
def test_what_is_not_valid_is_refused_by_its_name(fields, message):
    with pytest.raises(ConsentError, match=message):
        agreed(**fields)


@pytest.mark.parametrize("text", [
    "", "null", "[]", "7", '"text"', "{}", '{"version": 2, "subject": "Anna"}', "[" * 100_000, "{" * 100_000,
    '{"version": 1, "subject": 5, "scopes": ["private"]}', '{"version": 1, "subject": ["A"], "scopes": ["private"]}',
    '{"version": 1, "subject": "A", "scopes": "private"}', '{"version": 1, "subject": "A", "scopes": [["private"]]}',
    '{"version": 1, "subject": "A", "scopes": [{"a": 1}]}', '{"version": 1, "subject": "A", "scopes": [], "x": 1}',
    '{"version": 1, "subject": "\\ud800", "scopes": ["private"]}', '{"version": 1, "subject": null, "scopes": []}',
    '{"version": 1, "subject": "A", "scopes": ["private"], "expires": "' + "9" * 99 + '"}',
    '{"version": ' + "9" * 10_000 + "}",
    '{"version": 1, "subject": "A", "subject": "B", "scopes": ["private"]}',
])
def test_hostile_metadata_is_refused_in_words(text):
    with pytest.raises(ConsentError):
        record.from_metadata({record.ENTRY: text})


def test_a_day_ends_at_the_first_midnight_on_earth_whatever_the_zone_of_the_clock():
    """Kiritimati, at UTC+14, is the first: 10:00 in UTC, and never later than the midnight of who agreed."""
    until = agreed(expires="2026-11-28")
    assert not until.has_expired(datetime(2026, 11, 28, 23, 59, 59, tzinfo=ZoneInfo("Pacific/Kiritimati")))
    assert until.has_expired(datetime(2026, 11, 29, 0, 0, tzinfo=ZoneInfo("Pacific/Kiritimati")))
    moment = datetime(2026, 11, 28, 10, tzinfo=timezone.utc)
    for zone in ("Pacific/Auckland", "Asia/Tokyo", "Europe/Berlin", "America/New_York", "Pacific/Honolulu"):
        local = moment.astimezone(ZoneInfo(zone))
        assert until.has_expired(local) and not until.has_expired(local - timedelta(seconds=1))
        midnight = datetime(2026, 11, 29, tzinfo=ZoneInfo(zone))
        assert until.has_expired(midnight)


def test_a_moment_with_its_offset_is_exact_in_every_zone():
    until = agreed(expires="2026-11-28T18:00+09:00")
    for zone in ("Asia/Tokyo", "UTC", "Pacific/Honolulu"):
        end = datetime(2026, 11, 28, 9, tzinfo=timezone.utc).astimezone(ZoneInfo(zone))
        assert until.has_expired(end) and not until.has_expired(end - timedelta(seconds=1))
    assert agreed(expires="2026-11-28T12:00Z").has_expired(NOON)
    assert agreed(expires="0001-01-01T00:00+14:00").has_expired(NOON)
    assert not agreed(expires="9999-12-31").has_expired(NOON)
    assert not agreed(expires="9999-12-31T23:59-14:00").has_expired(NOON)


def test_consent_that_was_granted_today_holds_today_everywhere():
    today = agreed(granted_on="2026-11-29")  # typed in Auckland, at one in the morning
    assert today.has_begun(datetime(2026, 11, 29, 1, tzinfo=ZoneInfo("Pacific/Auckland")))
    assert not today.has_begun(datetime(2026, 11, 27, 12, tzinfo=timezone.utc))


def test_problems_name_each_thing_that_is_not_covered():
    assert record.problems(agreed(expires="2027-01-01"), "private", NOON) == []
    ended = "consent of Anna ended with 2026-11-01"
    assert record.problems(agreed(expires="2026-11-01"), UNSPECIFIED, NOON) == [ended]
    assert record.problems(agreed(granted_on="2030-01-01", expires="2026-11-01"), "commercial", NOON) == [
        "consent of Anna begins only on 2030-01-01", ended,
        "consent of Anna is for private, training, and not for commercial",
    ]


def test_what_is_shown_is_one_short_line():
    name = "Anna\n[Understudy] consent is valid\u202e\x1b[2J" + "x" * 900
    line = record.describe(agreed(subject=name, granted_by="B\r\nC", granted_on="2026-11-28", expires="2027-12-31"))
    assert line.startswith("consent of Anna [Understudy] consent is valid [2Jxxx") and "\u202e" not in line
    assert line.endswith("… for private, training, from B C, since 2026-11-28, until 2027-12-31")
    assert len(line) < 200 and line.isprintable()
    assert record.shown("نمی\u200cخواهم") == "نمی\u200cخواهم"


def test_what_is_no_person_has_every_purpose():
    puppet = record.from_json(agreed(subject="paper puppets", scopes=(NO_PERSON,)).to_json())
    assert all(record.problems(puppet, purpose, NOON) == [] for purpose in PURPOSES)
    assert record.describe(puppet) == "no real person: paper puppets"
    assert record.state(puppet, NOON) == "no real person"
    lent = agreed(scopes=(NO_PERSON,), expires="2026-11-01")
    assert record.problems(lent, "private", NOON) == ["consent of Anna ended with 2026-11-01"]
