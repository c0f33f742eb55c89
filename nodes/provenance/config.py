"""What labels say: the terms of IPTC's list of digital source types, and the names under which the pack writes."""

# IPTC NewsCodes, digitalsourcetype: the two that generated pictures have.
LABELS = ("compositeWithTrainedAlgorithmicMedia", "trainedAlgorithmicMedia")
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATOR = "Understudy for ComfyUI"
VENDOR = "io.github.understudy"  # begins the labels of what C2PA does not define, as it asks for
EMAIL_PROTECTION, DOCUMENT_SIGNING, CLAIM_SIGNING = (
    "1.3.6.1.5.5.7.3.4", "1.3.6.1.5.5.7.3.36", "1.3.6.1.4.1.62558.2.1",
)
# Purposes of certificates that may sign: those of C2PA's own list, and the older two that it took before.
PURPOSES = (CLAIM_SIGNING, DOCUMENT_SIGNING, EMAIL_PROTECTION)
