"""Settings of the word renderer: schema, YAML loading, `key=value` overrides.

The schema is the only place where a key, its default, its limits and its meaning are written; `configs/render.yaml`
holds what a user would change first.

Probabilities and amounts are those of `difficulty` 0.5. A probability is multiplied by twice the difficulty (at most
1), an amount by a half plus the difficulty: at 0 nothing distorts or degrades a word, at 1 every effect is twice as
frequent and half as strong again. A steep probability (what makes words hard: night, tiny letters, strong rotation) is
0 up to difficulty 0.3, doubles from 0.5 to 0.7 and is three and a half times as large at 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from rapidfuzz import fuzz, process

from schema import Section, key, walk_schema
from utils import UserError
from yaml_io import dump_yaml, parse_yaml, read_yaml

BACKGROUND_KINDS = ("plain", "gradient", "texture", "scene", "photo", "clutter")
SPLITS = ("all", "train", "held-out")

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
PRINTABLE = "".join(chr(code) for code in range(33, 127))


class CasesConfig(Section):
    """Weights of the ways to write a word."""

    upper: Weight = key(0.5, "WORD")
    title: Weight = key(0.27, "Word")
    lower: Weight = key(0.2, "word")
    mixed: Weight = key(0.03, "wOrd: each letter by chance.")


class WordsConfig(Section):
    """What is written."""

    file: str | None = key(None, "Word list, one a line, with a count after a tab where known; null: English words.")
    vocabulary: Annotated[int, Field(ge=100)] = key(60000, "Number of English words used when there is no file.")
    temperature: Annotated[float, Field(gt=0)] = key(
        1.8, "A word's chance is frequency ** (1 / temperature): 1 as counted, large numbers make all equal."
    )
    numbers: Share = key(0.16, "Share of numbers: prices, years, phone fragments, times, amounts.")
    random: Share = key(0.05, "Share of random letters and digits, which no vocabulary predicts.")
    punctuation: Share = key(0.07, "Share of words that get punctuation before, after or around them.")
    max_length: Annotated[int, Field(ge=1)] = key(25, "Longest text in characters.")
    characters: str = key(PRINTABLE, "Characters that may be written; a word with another one is left out.")
    cases: CasesConfig = Field(default_factory=CasesConfig)


class FontsConfig(Section):
    """What it is written with."""

    packages: bool = key(True, "Use the families of installed fontpkg-* packages.")
    system: bool = key(False, "Use the fonts of the system; results then differ from machine to machine.")
    folders: list[str] = key([], "Folders of .ttf, .otf and .ttc files, searched with what is below them.")
    exclude: list[str] = key([], "Families to leave out, by name without regard to case.")
    split: Literal["all", "train", "held-out"] = key("all", "Use all families, or one side of a fixed split of them.")
    held_out_share: Share = key(0.15, "Share of families that the split holds out, decided by a hash of the name.")


class LettersConfig(Section):
    """Size and spacing of the letters. Lengths are in heights of a capital letter, but for the height itself."""

    height: Annotated[float, Field(gt=4)] = key(26.0, "Median height of a capital letter in the image, pixels.")
    height_spread: Amount = key(0.5, "Standard deviation of the logarithm of that height.")
    min_height: Annotated[float, Field(gt=4)] = key(11.0, "Lower limit of that height, pixels.")
    max_height: Annotated[float, Field(gt=4)] = key(80.0, "Upper limit of that height, pixels.")
    max_width: Annotated[int, Field(ge=32)] = key(480, "Widest image, pixels; a longer word is made smaller.")
    stretch: Amount = key(0.15, "Standard deviation of the logarithm of the width of the letters.")
    spacing: Share = key(0.3, "Probability of letters set wider or tighter than the font has them.")
    widest_spacing: Amount = key(0.5, "Most space added between letters.")
    bounce: Share = key(0.03, "Probability of letters that leave the base line up and down.")
    initial: Share = key(0.06, "Probability of a larger first letter, in words that begin with a capital.")
    reuse: Annotated[int, Field(ge=1)] = key(
        1,
        "Consecutive words that share their letters, warp included, and differ in colours, background and camera. "
        "Larger numbers render faster, where words are asked for in order, with fewer different texts.",
    )


class EffectsConfig(Section):
    """Probabilities of what is done to the letters; up to `worn` independent of difficulty, then at difficulty 0.5."""

    outline: Share = key(0.12, "A line of another colour around each letter; not text in the mask.")
    hollow: Share = key(0.02, "Letters drawn by their outline alone; the line is text in the mask.")
    shadow: Share = key(0.15, "A shadow, sharp or soft; not text in the mask.")
    extrusion: Share = key(0.08, "Sides, as of letters of wood or metal; not text in the mask.")
    glow: Share = key(0.04, "Light around the letters, in their own colour; not text in the mask.")
    emboss: Share = key(0.08, "A light and a dark edge inside the letters.")
    gradient: Share = key(0.15, "A colour that changes over the letters.")
    two_colours: Share = key(0.03, "A colour for the upper and another for the lower part, or for each letter.")
    worn: Share = key(0.12, "Paint that is uneven and lets the background through.")
    relief: Share = key(0.05, "Letters of the background's own colour, told by light and shade alone (steep).")
    dots: Share = key(0.02, "Letters of dots, as of a matrix of lamps, mostly shining on a dark panel; text: the dots.")
    stencil: Share = key(0.015, "Letters with the bridges of a stencil; the bridges are not text in the mask.")
    jersey: Share = key(0.02, "Two outlines, as of the letters on a jersey; not text in the mask.")
    neon: Share = key(0.025, "Shining tubes before a dark background; the glow is not text in the mask.")


class GeometryConfig(Section):
    """Probabilities and amounts of the warp, at difficulty 0.5."""

    rotation: Share = key(0.4, "Probability of a rotation.")
    degrees: Amount = key(5.0, "Standard deviation of the rotation, degrees.")
    shear: Share = key(0.25, "Probability of a slant.")
    shear_amount: Amount = key(0.18, "Standard deviation of the slant, width over height.")
    perspective: Share = key(0.4, "Probability of a perspective view.")
    perspective_amount: Amount = key(0.12, "Standard deviation of the relative change of size from end to end.")
    curve: Share = key(0.1, "Probability of a curved base line.")
    curve_degrees: Amount = key(60.0, "Largest angle from the first to the last letter of a word on an arc, degrees.")
    strong_rotation: Share = key(0.06, "Probability of a rotation by any angle, mostly within 45 degrees (steep).")
    strong_degrees: Amount = key(24.0, "Mean size of it, degrees, of a Laplace distribution; as it is.")
    strong_curve: Share = key(0.04, "Probability of a word on an arc of more than `curve_degrees` (steep).")
    strong_curve_degrees: Amount = key(60.0, "Mean of what such an arc has beyond that, degrees; as it is.")
    margin: Amount = key(0.22, "Mean space on each side, heights of a capital letter; independent of difficulty.")
    cut: Share = key(0.06, "Probability of a side that cuts a little into the letters.")
    tight: Share = key(0.12, "Probability of a crop without space around the letters.")
    loose: Share = key(0.06, "Probability of a crop with much space, the letters off its middle (steep).")


class ColoursConfig(Section):
    """Contrast of letters and background, luminance from 0 to 1."""

    saturated: Share = key(0.5, "Share of backgrounds of a strong colour.")
    min_contrast: Share = key(0.3, "Least difference of luminance between letters and the background behind them.")
    low_contrast: Share = key(0.08, "Probability, at difficulty 0.5, of a third to all of that difference.")
    neutral: Share = key(0.6, "Share of letters that are white, grey or black.")


class SurroundingsConfig(Section):
    """Probabilities, at difficulty 0.5, of what is beside and before the word; none of it is text in the mask."""

    neighbours: Share = key(0.5, "Other text above, below or beside the word, warped with it and cut by the crop.")
    same_face: Share = key(0.85, "Share of such text in the word's own face, size and colour; as it is.")
    occlusion: Share = key(0.05, "Poles, leaves or other things before a part of the letters (steep).")


class DegradationConfig(Section):
    """Probabilities and amounts of what a camera does, at difficulty 0.5."""

    night: Share = key(0.05, "Probability of a dark, noisy image in the colour of the lamps (steep).")
    veil: Share = key(0.06, "Probability of haze, dust or glass that leaves hardly any contrast (steep).")
    lights: Share = key(0.04, "Probability of lamps in the image, or of bright parts that bloom (steep).")
    tiny: Share = key(0.07, "Probability of letters enlarged from about 7 pixels (steep).")
    lighting: Share = key(0.35, "Probability of uneven light: a slope, a cast shadow or a shine.")
    exposure: Share = key(0.4, "Probability of an image too dark, too light or too flat.")
    blur: Share = key(0.45, "Probability of a Gaussian blur.")
    blur_amount: Amount = key(0.04, "Largest standard deviation of it, heights of a capital letter.")
    motion: Share = key(0.08, "Probability of a motion blur.")
    motion_amount: Amount = key(0.2, "Longest motion, heights of a capital letter.")
    low_resolution: Share = key(0.25, "Probability of an image enlarged from a smaller one.")
    resolution_loss: Amount = key(2.2, "Largest factor of that enlargement.")
    sharpening: Share = key(0.15, "Probability of a sharpened image, with the halos of it.")
    noise: Share = key(0.35, "Probability of sensor noise.")
    noise_amount: Amount = key(9.0, "Largest standard deviation of it, of 255.")
    jpeg: Share = key(0.5, "Probability of JPEG artefacts.")
    jpeg_quality: Annotated[int, Field(ge=1, le=95)] = key(35, "Lowest JPEG quality, 1 to 95, whatever the difficulty.")


class BackgroundWeightsConfig(Section):
    """Weights of the kinds of background where `background` is mixed."""

    plain: Weight = key(0.28, "One colour.")
    gradient: Weight = key(0.2, "A colour that changes evenly.")
    texture: Weight = key(0.2, "Noise, stripes, bricks, planks, stone, cloth, mesh.")
    scene: Weight = key(0.1, "Blurred surfaces and edges, as of a view out of focus.")
    photo: Weight = key(0.1, "A piece of a photograph; counts only with `photos`.")
    clutter: Weight = key(0.22, "Lines, frames, shapes and pieces of other texts on one of the others.")


class OutputConfig(Section):
    """How images are stored; masks are always PNG."""

    image: Literal["jpeg", "png"] = key("jpeg", "Format of the images in the LMDB.")
    quality: Annotated[int, Field(ge=1, le=100)] = key(95, "JPEG quality, 1 to 100; colour at full resolution.")
    mask: Literal["soft", "binary"] = key(
        "soft", "soft: the share of each pixel that letters cover, 255 = all; binary: 0 or 255, cut at one half."
    )


class RenderConfig(Section):
    """Everything that decides how words look."""

    length: Annotated[int, Field(ge=1)] = key(100000, "Words in an epoch when used as render:// training set.")
    difficulty: Share = key(0.5, "0: straight, sharp and clear words; 0.5: as real ones; 1: hard ones.")
    background: Literal["mixed", "plain", "gradient", "texture", "scene", "photo", "clutter"] = key(
        "mixed", "One kind of background for all words, or mixed by the weights of `backgrounds`."
    )
    photos: str | None = key(None, "Folder of photographs for the kind `photo`.")
    backgrounds: BackgroundWeightsConfig = Field(default_factory=BackgroundWeightsConfig)
    words: WordsConfig = Field(default_factory=WordsConfig)
    fonts: FontsConfig = Field(default_factory=FontsConfig)
    letters: LettersConfig = Field(default_factory=LettersConfig)
    effects: EffectsConfig = Field(default_factory=EffectsConfig)
    geometry: GeometryConfig = Field(default_factory=GeometryConfig)
    colours: ColoursConfig = Field(default_factory=ColoursConfig)
    surroundings: SurroundingsConfig = Field(default_factory=SurroundingsConfig)
    degradation: DegradationConfig = Field(default_factory=DegradationConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)

    def with_difficulty(self, difficulty: float) -> "RenderConfig":
        """The same settings at another difficulty.

        Raises:
            ValueError: it is not between 0 and 1.
        """
        if not 0 <= difficulty <= 1:
            raise ValueError(f"difficulty={difficulty}: must be from 0 to 1")
        return self.model_copy(update={"difficulty": float(difficulty)})

    def probability(self, at_half: float) -> float:
        """The probability `at_half` (of difficulty 0.5) at this difficulty."""
        return min(1.0, at_half * 2 * self.difficulty)

    def steep(self, at_half: float) -> float:
        """The steep probability `at_half` (of difficulty 0.5) at this difficulty."""
        return min(1.0, at_half * max(0.0, self.difficulty - 0.3) / 0.2)

    def amount(self, at_half: float) -> float:
        """The amount `at_half` (of difficulty 0.5) at this difficulty."""
        return at_half * (0.5 + self.difficulty)

    def to_yaml(self) -> str:
        """All settings as YAML that `load_render_config` reads back equal."""
        return dump_yaml(self.model_dump(), width=120)


def load_render_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RenderConfig:
    """Read a YAML file (None: all defaults) and apply `key=value` overrides, whose values are YAML too.

    Raises:
        UserError: the file cannot be read, or any key or value is unknown or wrong; one line for each.
    """
    source = "render settings" if path is None else str(path)
    data = {} if path is None else read_yaml(Path(path)).data
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"override {override}: not of the form key=value, such as difficulty=0.3")
        if dotted not in _known_keys():
            raise UserError(f"override {override}: unknown key; nearest known key: {_nearest(dotted)}")
        data = _with(data, dotted.split("."), parse_yaml(text, f"override {override}").data)
    try:
        return RenderConfig.model_validate(data)
    except ValidationError as errors:
        raise UserError("\n".join(_messages(source, errors))) from errors


def _with(data: Any, names: Sequence[str], value: Any) -> Any:
    """`data` with a nested value set; a wrong thing in a section's place stays, to be reported."""
    if not names:
        return value
    if data is not None and not isinstance(data, Mapping):
        return data
    return {**(data or {}), names[0]: _with((data or {}).get(names[0]), names[1:], value)}


def _known_keys() -> list[str]:
    return [dotted for dotted, _ in walk_schema(RenderConfig)]


def _nearest(dotted: str) -> str:
    return process.extractOne(dotted, _known_keys(), scorer=fuzz.ratio)[0]


def _messages(source: str, errors: ValidationError) -> Iterator[str]:
    for error in errors.errors(include_url=False):
        dotted = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            yield f"{source}: {dotted}: unknown key; nearest known key: {_nearest(dotted)}"
        else:
            yield f"{source}: {dotted}: {error['msg'].replace('Input should', 'must')}, not {error['input']!r}"
