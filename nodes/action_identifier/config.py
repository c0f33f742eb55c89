"""Settings of the action identifier. Defaults name their source: ADI (arXiv 2311.15841), or "ours"."""

import re
from dataclasses import dataclass

from ...kernels.channel_mask import MERGES
from ..inputs.ranges import check_choice, check_limits, check_range
from ..inputs.words import entries

# Prompts give these a meaning: spaces separate words, brackets and colons weight them.
_FORBIDDEN = re.compile(r"[\s():\\{}]")
HIGHEST_STRENGTH = 2.0
MINIMUM_EXEMPLARS = 2
# Beside the MERGES: no triples and no masks, as P+ (arXiv 2303.09522) trains tokens for each layer, on batches.
EVERY = "every channel"
PICTURES_A_STEP = 3  # a triple's; as many in a batch


@dataclass(frozen=True)
class ActionTrainingConfig:
    """What is trained and how. Raises ValueError, naming the field and the fix, for values that train nothing."""

    # Ours: brackets that no prompt has by chance.
    placeholder: str = "<action>"
    # Ours: a word for an action in general that every text encoder knows, the theatre's too.
    initial_word: str = "dancing"
    # Recalled of the publication: 3,000 steps of AdamW at 1e-4, percentile 0.6.
    steps: int = 3000
    learning_rate: float = 1e-4
    mask_percentile: float = 0.6
    # Ours: the merge that moves more channels; EVERY moves all, and compares nothing.
    merge: str = MERGES[0]
    # Ours: trained briefly, so that the context's token does not learn the action as well.
    context_steps: int = 100
    context_learning_rate: float = 5e-3
    # Ours: actions that a base model can draw, to compare with the one that is learned.
    contrast_words: str = "standing, sitting, running, jumping, kicking"
    # Directional Textual Inversion (ICLR 2026) learns the direction of an embedding alone: a norm that grows crowds
    # out the rest of a prompt. Ours is AdamW's step, then turned back to the length of what the masks free.
    fixed_norm: bool = False
    # Ours, after the textual bypass of NeTI (arXiv 2305.15391): what is learned is added behind the text encoder,
    # which lets through only what is near to words that it knows.
    behind_encoder: bool = False
    # Ours: noise levels are drawn between these fractions of the schedule; ADI draws all of it. How a body stands is
    # decided at high noise, to which ReVersion (arXiv 2303.13495) gives more weight; the very highest shows nothing.
    lowest_noise: float = 0.0
    highest_noise: float = 1.0
    # False: one token for all layers, as textual inversion (arXiv 2208.01618) has; for comparisons.
    layer_wise: bool = True

    def __post_init__(self) -> None:
        check_placeholder(self.placeholder)
        if not self.initial_word.strip():
            raise ValueError("initial_word is empty: give a word that is close to the action, say dancing")
        if not self.contrasts:
            raise ValueError("contrast_words is empty: name actions other than the one to learn, separated by commas")
        if not 0 < self.mask_percentile < 1:
            raise ValueError(f"mask_percentile is {self.mask_percentile}: use a number between 0 and 1, say 0.6")
        check_choice(self, merge=(*MERGES, EVERY))
        check_limits(self, "context_steps", lowest=1, fix="1 or more")
        check_limits(self, "lowest_noise", "highest_noise", lowest=0, highest=1, fix="0 to 1")
        check_range("the range of noise", lowest_noise=self.lowest_noise, highest_noise=self.highest_noise)
        if self.fixed_norm and self.behind_encoder:
            raise ValueError(
                "fixed_norm keeps the length of tokens, and behind_encoder leaves tokens as they are: turn one off"
            )

    @property
    def triples(self) -> bool:
        """Whether a step compares three pictures, rather than learning from each of a batch."""
        return self.merge != EVERY

    @property
    def contrasts(self) -> list[str]:
        """The other actions, without the initial word unless it is the only one."""
        words = entries(self.contrast_words)
        return [word for word in words if word != self.initial_word.strip()] or words


def check_placeholder(placeholder: str) -> None:
    """Raises ValueError for a placeholder that could not be one word of a prompt."""
    if not placeholder or _FORBIDDEN.search(placeholder):
        raise ValueError(
            f"placeholder is {placeholder!r}: use one word without spaces, brackets ( ) {{ }}, colons and "
            "backslashes, say <action>"
        )
