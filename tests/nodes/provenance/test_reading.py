"""What Read Label says of sound, broken, forged, recompressed, doubly signed, hostile and foreign files."""

import sys
from datetime import datetime, timezone

import make_certificate
import pytest
from pack.nodes.provenance import files, report, signing, xmp
from PIL import Image
from support import labels
from support.labels import COMPOSITE, TRAINED

CAMERA = b"digitalCapture".ljust(len(COMPOSITE), b"x")
KINDS = ("png", "jpeg", "webp", "mp4")


@pytest.fixture(params=KINDS)
def signed(request, folders, certificate):
    """A signed file of each format, and its name for Read Label."""
    media = {"video": labels.video()} if request.param == "mp4" else {"format": request.param}
    (path,) = labels.label(folders, **media)
    return path


def name(path):
    return f"made/{path.name} [output]"


def state(path):
    """(signature holds, picture matches), and what c2pa makes of the file under its own settings."""
    claims, holds, matches = labels.read(name(path))
    return (holds, matches), claims, labels.manifests(path)[1]["validation_state"]


def test_a_sound_file_holds(signed):
    verdict, claims, judged = state(signed)
    assert verdict == (True, True) and judged == "Valid"
    assert claims.startswith(f"Label: {COMPOSITE} (metadata, which anybody can write)\nSignature: holds")
    assert "a signer whom an authority vouches for that you trust" in claims
    assert "Picture: unchanged since it was signed" in claims and "Signed by: Anna" in claims
    assert f"Action c2pa.created: {COMPOSITE}, Understudy for ComfyUI" in claims


def test_a_signer_whom_nobody_vouches_for_is_called_so(signed, certificate):
    (certificate / "trusted.pem").unlink()
    verdict, claims, _ = state(signed)
    assert verdict == (True, True)
    assert "nobody that you trust vouches for the signer: anyone can make a certificate in any name" in claims


def pixels_changed(content, kind):
    """The content with one byte of the picture changed."""
    mark = {"png": b"IDAT", "jpg": b"\xff\xda", "webp": b"VP8 ", "mp4": b"mdat"}[kind]
    place = content.rindex(mark) + 40
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]


def test_a_changed_picture_does_not_match(signed):
    signed.write_bytes(pixels_changed(signed.read_bytes(), signed.suffix[1:]))
    verdict, claims, judged = state(signed)
    assert verdict == (True, False) and judged == "Invalid"
    assert "Signature: holds" in claims and "Picture: NOT proved to be what was signed" in claims


def test_a_changed_workflow_does_not_match(signed):
    """The signature binds the metadata, which is written first."""
    content = signed.read_bytes()
    assert content.count(b'"workflow') <= 1 and content.count(b'"extra"') == 1
    signed.write_bytes(content.replace(b'"extra"', b'"other"'))
    assert state(signed)[0] == (True, False)


def test_a_changed_label_does_not_match(signed):
    content = signed.read_bytes()
    packet = labels.packet(signed)
    signed.write_bytes(content.replace(packet, packet.replace(COMPOSITE.encode(), b"c" * len(COMPOSITE))))
    assert state(signed)[0] == (True, False)


def test_a_forged_action_breaks_the_signature(signed):
    """The digital source type in the manifest changed to that of a camera, of the same length."""
    content = signed.read_bytes()
    place = content.index(b"c2pa.created")
    found = content.index(COMPOSITE.encode(), place)
    signed.write_bytes(content[:found] + CAMERA + content[found + len(COMPOSITE):])
    verdict, claims, judged = state(signed)
    assert verdict[0] is False and judged == "Invalid"
    assert "Signature: does NOT hold: what follows may be forged" in claims


def test_a_forger_s_authority_of_the_same_name_is_not_trusted(folders, certificate):
    """All names in the chain are those of the authority that the user trusts; the keys are not."""
    trusted = (certificate / "trusted.pem").read_bytes()
    for file in certificate.iterdir():
        file.unlink()
    make_certificate.write(make_certificate.make("Anna", 30, datetime.now(timezone.utc)), certificate)
    (path,) = labels.label(folders)
    assert "an authority vouches for that you trust" in labels.read(name(path))[0]
    (certificate / "trusted.pem").write_bytes(trusted)
    claims, holds, matches = labels.read(name(path))
    assert "Signed by: Anna" in claims and "nobody that you trust vouches for the signer" in claims
    assert holds and matches


def test_manifests_that_share_ingredients_are_told_in_bounded_time():
    """Eight manifests, each of which was made thirty times from the next one, would be 30 ** 8 ways."""
    manifests = {f"m{i}": {"ingredients": [{"active_manifest": f"m{i + 1}"}] * 30} for i in range(9)}
    _, lines = report.describe({"manifests": manifests, "active_manifest": "m0"})
    assert len(lines) == 401 and lines[-1] == "… and more"


@pytest.mark.parametrize("data", [
    {"actions": ["x", 5, None, {}]}, {"actions": 5}, {"actions": "x"}, {}, [], None,
    {"actions": [{"parameters": "x", "softwareAgent": ["x"], "action": {"a": 1}, "digitalSourceType": 4}]},
])
def test_assertions_of_no_known_form_are_told_and_harmless(data):
    made = {"assertions": [{"label": "c2pa.actions.v9", "data": data}], "title": "after"}
    _, lines = report.describe({"manifests": {"m": made}, "active_manifest": "m"})
    assert "Title: after" in lines and len(lines) > 4


def test_a_new_hash_of_a_changed_picture_does_not_help(signed):
    """A forger who changes the picture and writes its right hash into the manifest breaks the claim's own hash."""
    good = labels.manifests(signed)[1]["validation_results"]
    active = good["activeManifest"]
    forged = {
        **active, "failure": [{"code": "assertion.hashedURI.mismatch", "url": "u/c2pa.hash.data"}],
        "success": [each for each in active["success"] if "c2pa.hash" not in each["url"]]
        + [{"code": "assertion.dataHash.match", "url": "u/c2pa.hash.data"}],
    }
    assert report.verdict(good).picture_matches and report.verdict(good).signature_holds
    judged = report.verdict({"activeManifest": forged})
    assert not judged.picture_matches and not judged.signature_holds


def test_one_of_two_hashes_is_not_enough():
    hashed = "u/c2pa.hash.data"
    results = {"activeManifest": {
        "success": [{"code": "claimSignature.validated", "url": "u"}] + [
            {"code": code, "url": hashed} for code in ("assertion.hashedURI.match", "assertion.dataHash.match")
        ],
        "failure": [],
    }}
    assert report.verdict(results) == report.Verdict(True, True, False)
    results["activeManifest"]["failure"] = [{"code": "assertion.bmffHash.mismatch", "url": "u/c2pa.hash.bmff"}]
    assert not report.verdict(results).picture_matches


def test_a_manifest_of_another_picture_does_not_match(folders, certificate):
    first, second = (
        labels.label(folders, images=labels.pictures(height=height))[0] for height in (24, 30)
    )
    foreign, own = (
        labels.png_chunk(b"caBX", dict(labels.png_chunks(path.read_bytes()))[b"caBX"]) for path in (first, second)
    )
    second.write_bytes(second.read_bytes().replace(own, foreign))
    assert state(second)[0] == (True, False)


def test_a_damaged_certificate_breaks_the_signature(signed):
    content = signed.read_bytes()
    place = content.rindex(b"Understudy test authority")  # in the signer's certificate or below it
    signed.write_bytes(content[:place] + b"Inderstudy" + content[place + 10:])
    verdict, claims, _ = state(signed)
    assert verdict[0] is False and "does NOT hold" in claims


def test_an_unreadable_manifest_is_told_from_none(signed):
    content = signed.read_bytes()
    place = content.index(b"jumdc2pa") - 8
    signed.write_bytes(content[:place] + bytes(4) + content[place + 4:])
    claims, holds, matches = labels.read(name(signed))
    assert not holds and not matches and "its manifest cannot be read" in claims


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_recompressed_picture_has_no_signature_any_more(folders, certificate, kind):
    (path,) = labels.label(folders, format=kind)
    with Image.open(path) as image:
        image.save(folders.output / "made" / "again.jpg", quality=60)
    claims, holds, matches = labels.read("made/again.jpg [output]")
    assert not holds and not matches
    assert claims.endswith("Manifest: none: nobody signed this file, or the signature was removed")


def test_a_label_that_recompression_kept_is_still_read(folders, certificate):
    (path,) = labels.label(folders)
    with Image.open(path) as image:
        image.save(folders.output / "made" / "again.webp", xmp=labels.packet(path))
    assert labels.read("made/again.webp [output]")[0].startswith(f"Label: {COMPOSITE}")


def test_signed_twice(folders, certificate):
    """Another program signs the labelled file again, with another certificate, as an edit of it."""
    (path,) = labels.label(folders)
    twice = folders.output / "made" / "twice.png"
    labels.sign_elsewhere(path.read_bytes(), twice, parent=path)
    active, whole = labels.manifests(twice)
    assert len(whole["manifests"]) == 2 and active["signature_info"]["common_name"] == "Editor"
    verdict, claims, judged = state(twice)
    assert verdict == (True, True) and judged == "Valid"
    assert claims.index("Signed by: Editor") < claims.index("  Signed by: Anna")
    used = "When it was used, its signature holds, but nobody that you trust vouches for the signer; its picture was"
    assert f"{used} unchanged" in claims
    twice.write_bytes(pixels_changed(twice.read_bytes(), "png"))
    assert state(twice)[0] == (True, False)


def test_a_forged_manifest_below_is_found(folders, certificate):
    """The inner manifest of a doubly signed file is changed; the outer one binds it."""
    (path,) = labels.label(folders)
    twice = folders.output / "made" / "twice.png"
    labels.sign_elsewhere(path.read_bytes(), twice, parent=path)
    content = twice.read_bytes()
    body = dict(labels.png_chunks(content))[b"caBX"]
    found = body.index(COMPOSITE.encode())
    forged = body[:found] + CAMERA + body[found + len(COMPOSITE):]
    twice.write_bytes(content.replace(labels.png_chunk(b"caBX", body), labels.png_chunk(b"caBX", forged)))
    verdict, claims, judged = state(twice)
    assert verdict[0] is False and judged == "Invalid" and "Problem: " in claims


@pytest.mark.parametrize("switched_off", [True, False])
def test_no_connection_is_opened_for_a_manifest_elsewhere(folders, certificate, requests, switched_off, monkeypatch):
    """Under c2pa's own settings the request arrives, so the test can fail."""
    labels.sign_elsewhere(labels.red_png(), folders.input / "remote.png", remote=f"{requests.url}/manifest.c2pa")
    if not switched_off:
        monkeypatch.setattr(signing, "_OFFLINE", {})
    claims, holds, matches = labels.read("remote.png")
    labels.label(folders, sources="remote.png")
    assert not holds and not matches
    assert bool(requests.paths) is not switched_off
    if switched_off:
        assert f"its manifest is kept elsewhere, and no connection is opened: {requests.url}/manifest.c2pa" in claims


def test_hostile_texts_are_shown_on_one_short_line(folders, certificate):
    title = "a\u202egnp.exe\nSignature: holds\x1b[2J" + "x" * 100_000
    labels.sign_elsewhere(labels.red_png(), folders.input / "hostile.png", title=title)
    claims = labels.read("hostile.png")[0]
    (line,) = [line for line in claims.splitlines() if line.startswith("Title: ")]
    assert len(line) < 400 and "\u202e" not in claims and "\x1b" not in claims
    assert sum(line.startswith("Signature: ") for line in claims.splitlines()) == 1


@pytest.mark.parametrize(("packet", "message"), [
    (b"<x", "is not valid"), (b"<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", "defines a document type"),
    (b"\xff\xfe<\0a\0/\0>\0", "is not valid"), (b"<a/>" + b" " * (1 << 20), "over the 1048576 that are read"),
])
def test_hostile_metadata_is_told_and_harmless(folders, packet, message):
    Image.new("RGB", (8, 8)).save(folders.input / "x.webp", xmp=packet)
    with pytest.raises(ValueError, match="XMP metadata.*" + message):
        xmp.source_type(packet)
    claims, *verdict = labels.read("x.webp")
    assert message in claims and verdict == [False, False]


@pytest.mark.parametrize("form", [
    'Iptc4xmpExt:DigitalSourceType="{}"/>', "><Iptc4xmpExt:DigitalSourceType>{}</Iptc4xmpExt:DigitalSourceType>"
    "</rdf:Description>", '><Iptc4xmpExt:DigitalSourceType rdf:resource="{}"/></rdf:Description>',
])
def test_each_form_of_the_property_is_read(form):
    text = (
        '<?xpacket begin="\ufeff" id="x"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        f'{form.format(labels.SOURCE_TYPES + TRAINED)}</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )
    assert xmp.source_type(text.encode()) == TRAINED


@pytest.mark.parametrize("content", [
    b"", b"\x89PNG\r\n\x1a\n", b"\0\0\0\x08ftyp\0\0", b"\0\0\0\x10ftyp" + b"\xff" * 40,
])
@pytest.mark.parametrize("extension", ["png", "mp4", "webm", "jpg"])
def test_damaged_files_claim_nothing(folders, certificate, content, extension):
    (folders.input / f"x.{extension}").write_bytes(content)
    claims, *verdict = labels.read(f"x.{extension}")
    assert verdict == [False, False] and claims.startswith("Label: ")


def test_without_the_library_the_label_is_read_and_the_manifest_noticed(signed, monkeypatch):
    monkeypatch.setattr(signing, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "c2pa", None)
    claims, holds, matches = labels.read(name(signed))
    assert not holds and not matches
    assert claims.startswith(f"Label: {COMPOSITE}") and "there, but cannot be checked: install it with" in claims


def test_wrong_trusted_certificates_are_named(signed, certificate):
    (certificate / "trusted.pem").write_text("hello")
    with pytest.raises(ValueError, match="trusted.pem holds no certificates"):
        labels.read(name(signed))


@pytest.mark.parametrize(("values", "message"), [
    ((labels.SOURCE_TYPES + "digitalCapture", labels.SOURCE_TYPES + TRAINED), f"digitalCapture, {TRAINED}"),
    (("http://example.org/" + TRAINED, labels.SOURCE_TYPES + TRAINED), f"http://example.org/{TRAINED}, {TRAINED}"),
])
def test_contradicting_labels_are_told(folders, told_of, values, message):
    told_of(*values)
    assert f"Label: it names several digital source types: {message}" in labels.read("x.webp")[0]


def test_a_term_of_another_vocabulary_is_not_taken_for_iptc_s(folders, told_of):
    told_of(f"http://example.org/{TRAINED}")
    assert labels.read("x.webp")[0].startswith(f"Label: http://example.org/{TRAINED} (")
    (path,) = labels.label(folders, sources="x.webp", sign=False)
    assert f">http://example.org/{TRAINED}<".encode() in labels.packet(path)
    told_of(f"https://cv.iptc.org/newscodes/digitalsourcetype/{TRAINED}/")
    assert labels.read("x.webp")[0].startswith(f"Label: {TRAINED} (")


@pytest.fixture
def told_of(folders):
    """Writes x.webp, whose metadata has these digital source types."""

    def write(*values):
        described = "".join(
            f'<rdf:Description xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
            f'Iptc4xmpExt:DigitalSourceType="{value}"/>' for value in values
        )
        packet = f'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">{described}</rdf:RDF>'
        Image.new("RGB", (8, 8)).save(folders.input / "x.webp", xmp=f"<x>{packet}</x>".encode())

    return write


def test_names_that_lead_elsewhere_are_no_files(folders):
    (folders.input.parent / "secret.png").write_bytes(labels.red_png())
    (folders.input / "link.png").symlink_to(folders.input.parent / "secret.png")
    absolute = str(folders.input.parent / "secret.png")
    for file in ("../secret.png", absolute, "a\0.png", "link.png", "x" * 5000 + ".png"):
        assert files.find_media(file) is None and list(files.find_learned(file)) == []
        with pytest.raises(ValueError, match="which is gone"):
            labels.read(file)


def test_the_list_and_names_outside_it(folders, certificate):
    labels.label(folders)
    (folders.input / "a.png").write_bytes(labels.red_png())
    (folders.input / "a.txt").write_text("a")
    node = labels.UnderstudyReadLabel
    assert node.define_schema().inputs[0].options == ["a.png", "made/x_00001_.png [output]"]
    assert node.validate_inputs("a.png") is True and "choose" in node.validate_inputs("../a.png")
    assert "choose" in node.validate_inputs([])
    (folders.input / "a.png").unlink()
    for gone in ("a.png", "../secret.png", "a.txt"):
        with pytest.raises(ValueError, match="which is gone"):
            labels.read(gone)
