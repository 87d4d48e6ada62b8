"""Settings of the word renderer: schema, YAML loading, `key=value` overrides.

`CHANCES` holds the probability of every single effect. Most are those of `difficulty` 0.5 and grow with the difficulty;
amounts (`RenderConfig.amount`) grow as well, from a half at 0 to one and a half at 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator

from settings import Section, key, load_settings, nearest

BACKGROUND_KINDS = ("plain", "gradient", "texture", "scene", "photo", "clutter")

Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
PRINTABLE = "".join(chr(code) for code in range(33, 127))


class Chance(NamedTuple):
    """The probability of an effect and the section whose strength multiplies it.

    `growth`: "fixed" at any difficulty; "even": multiplied by twice the difficulty; "steep": 0 up to difficulty 0.3, as
    given at 0.5, twice that at 0.7 and three and a half times at 1.
    """

    section: str
    probability: float
    growth: str


_PROBABILITIES: dict[tuple[str, str], dict[str, float]] = {
    # Lines around the letters, shadows, sides and glows are not text in the mask; the line of hollow letters is.
    ("effects", "fixed"): {
        "outline": 0.12, "hollow": 0.02, "shadow": 0.15, "extrusion": 0.08, "glow": 0.04, "emboss": 0.08,
        "gradient": 0.15, "two_colours": 0.03, "worn": 0.12,
        "spacing": 0.3,  # letters set wider or tighter than usual
        "bounce": 0.03,  # letters above and below the baseline
        "initial": 0.06,  # a larger first letter
    },
    ("effects", "even"): {"dots": 0.02, "stencil": 0.015, "jersey": 0.02, "neon": 0.025, "low_contrast": 0.08},
    ("effects", "steep"): {"relief": 0.05},
    # cut, tight, loose: how the crop lies around the letters, the first for each side.
    ("geometry", "even"): {
        "rotation": 0.4, "shear": 0.25, "perspective": 0.4, "curve": 0.1, "cut": 0.06, "tight": 0.12
    },
    ("geometry", "steep"): {"strong_rotation": 0.06, "strong_curve": 0.04, "loose": 0.06},
    ("surroundings", "even"): {"neighbours": 0.5},
    ("surroundings", "steep"): {"occlusion": 0.05},
    ("degradation", "even"): {
        "lighting": 0.35, "exposure": 0.4, "blur": 0.45, "motion": 0.08, "low_resolution": 0.25, "sharpening": 0.15,
        "noise": 0.35, "jpeg": 0.5,
    },
    ("degradation", "steep"): {"night": 0.05, "veil": 0.06, "lights": 0.04, "tiny": 0.07},
}  # fmt: skip
CHANCES = {
    name: Chance(section, probability, growth)
    for (section, growth), group in _PROBABILITIES.items()
    for name, probability in group.items()
}


class CasesConfig(Section):
    """Weights of the ways to write a word."""

    upper: Amount = key(0.5, "WORD")
    title: Amount = key(0.27, "Word")
    lower: Amount = key(0.2, "word")
    mixed: Amount = key(0.03, "wOrd: the case of each letter is random.")


class WordsConfig(Section):
    """What is written."""

    file: str | None = key(None, "Word list, one a line, with a count after a tab where known; null: English words.")
    vocabulary: Annotated[int, Field(ge=100)] = key(60000, "Number of English words used when there is no file.")
    temperature: Annotated[float, Field(gt=0)] = key(
        1.8, "A word's probability is frequency ** (1 / temperature): 1 as counted, large numbers make all equal."
    )
    numbers: Share = key(0.16, "Share of numbers: prices, years, phone fragments, times, amounts.")
    random: Share = key(0.05, "Share of random letters and digits, which no vocabulary predicts.")
    punctuation: Share = key(0.07, "Share of words that get punctuation before, after or around them.")
    max_length: Annotated[int, Field(ge=1)] = key(25, "Longest text in characters.")
    characters: str = key(PRINTABLE, "Characters that may be written; words with any other are left out.")
    cases: CasesConfig = Field(default_factory=CasesConfig)


class FontsConfig(Section):
    """The fonts that words are written in."""

    folders: list[str] = key([], "Folders of .ttf, .otf and .ttc files; empty: the installed fontpkg-* packages.")
    exclude: list[str] = key([], "Families to leave out, by name, in any case.")
    split: Literal["all", "train", "held-out"] = key(
        "all", "Use all families, or one side of a fixed split by name that holds out about 15 % of them."
    )


class LettersConfig(Section):
    """Size of letters and crops."""

    height: Annotated[float, Field(gt=4)] = key(26.0, "Median height of a capital letter, pixels.")
    height_spread: Amount = key(0.5, "Standard deviation of the logarithm of that height.")
    margin: Amount = key(0.22, "Mean space on each side of the word, heights of a capital letter.")
    max_width: Annotated[int, Field(ge=32)] = key(480, "Widest image, pixels; longer words are made smaller.")


class OutputConfig(Section):
    """How words are stored; masks are always PNG: the share of each pixel that letters cover, 255 = all."""

    image: Literal["jpeg", "png"] = key("jpeg", "Format of the images in the LMDB.")


class RenderConfig(Section):
    """Everything that decides how words look."""

    length: Annotated[int, Field(ge=1)] = key(100000, "Words in an epoch when used as render:// training set.")
    difficulty: Share = key(0.5, "0: straight, sharp and clear words; 0.5: as real ones; 1: hard ones.")
    background: Literal["mixed", "plain", "gradient", "texture", "scene", "photo", "clutter"] = key(
        "mixed", "Kind of background; mixed: all kinds, photo only with `photos`."
    )
    photos: str | None = key(None, "Folder of photographs for the kind `photo`.")
    contrast: Share = key(0.3, "Smallest difference of luminance, 0 to 1, between letters and background.")
    saturated: Share = key(0.5, "Share of backgrounds of a strong colour.")
    effects: Amount = key(1.0, "Factor of the probabilities of outlines, shadows, worn paint, neon and the like.")
    geometry: Amount = key(1.0, "Factor of the probabilities of rotation, perspective, curves and tight crops.")
    surroundings: Amount = key(
        1.0, "Factor of the probabilities of neighbouring text and of objects that hide letters."
    )
    degradation: Amount = key(1.0, "Factor of the probabilities of night, blur, noise, low resolution and the like.")
    chances: dict[str, Share] = key(
        {}, "Probabilities of single effects, in place of those of CHANCES in rendering/config.py: {curve: 0.6}."
    )
    words: WordsConfig = Field(default_factory=WordsConfig)
    fonts: FontsConfig = Field(default_factory=FontsConfig)
    letters: LettersConfig = Field(default_factory=LettersConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)

    @field_validator("chances")
    @classmethod
    def _known_effects(cls, chances: dict[str, float]) -> dict[str, float]:
        for name in chances:
            if name not in CHANCES:
                raise ValueError(f"must name known effects; nearest to {name}: {nearest(name, list(CHANCES))}")
        return chances

    def chance(self, name: str) -> float:
        """Return the probability of an effect of `CHANCES` at this difficulty."""
        section, probability, growth = CHANCES[name]
        probability = self.chances.get(name, probability * getattr(self, section))
        if growth == "even":
            probability *= 2 * self.difficulty
        elif growth == "steep":
            probability *= max(0.0, self.difficulty - 0.3) / 0.2
        return min(1.0, probability)

    def amount(self, at_half: float) -> float:
        """Return the amount `at_half` (of difficulty 0.5) at this difficulty."""
        return at_half * (0.5 + self.difficulty)


def load_render_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RenderConfig:
    """Read a YAML file (None: all defaults) and apply `key=value` overrides, whose values are YAML too.

    Raises:
        UserError: the file cannot be read, or any key or value is unknown or wrong; one line for each.
    """
    return load_settings(RenderConfig, [] if path is None else [path], overrides, gone=["letters.reuse", "output.mask"])
