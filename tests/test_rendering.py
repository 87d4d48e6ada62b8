"""The renderer: what it promises of letters, masks, seeds, fonts, words and settings."""

import functools
import multiprocessing
import pickle
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import ImageFont

from rendering.backgrounds import find_photos, read_photo
from rendering.colours import luminance, with_luminance
from rendering.config import BACKGROUND_KINDS, CHANCES, RenderConfig, WordsConfig, load_render_config
from rendering.engine import Stream, WordRenderer, _Word
from rendering.fonts import FontBook, FontFamily, find_families, in_split, open_face
from rendering.geometry import Bend
from rendering.letters import Layout, sample_layout, set_letters
from rendering.words import WordSource, read_words, sample_number
from settings import Section, walk_schema
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = ["street", "market", "coffee", "open", "exit", "north", "jolly", "quiz", "don't"]
# Nothing of the letters beyond them.
PLAIN_LETTERS = [
    f"chances.{name}=0"
    for name in ("outline", "shadow", "extrusion", "glow", "relief", "dots", "stencil", "jersey", "neon")
]
ALONE = ["surroundings=0"]
NO_CAMERA = ["degradation=0"]


@pytest.fixture(scope="module")
def word_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("# a header\n" + "\n".join(f"{word}\t{10 + n}" for n, word in enumerate(VOCABULARY)) + "\n")
    return path


@pytest.fixture(scope="module")
def make(word_file):
    """Build a renderer from overrides, with a small word list that loads at once."""

    def build(*overrides):
        return WordRenderer(load_render_config(None, [f"words.file={word_file}", *overrides]))

    return build


@pytest.fixture(scope="module")
def renderer(make):
    return make()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 255, size=(30, 40, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), cv2.resize(noise, (1600, 1200)))
    return folder


def same(first, second):
    pairs = ((first.image, second.image), (first.mask, second.mask))
    return first.text == second.text and all(np.array_equal(*pair) for pair in pairs)


def render_range(renderer, start, stop):
    return [renderer.render(3, index) for index in range(start, stop)]


class TestSeeds:
    def test_same_seed_and_index_give_the_same_word(self, make, renderer):
        other = make()
        render_range(other, 50, 60)  # what a process drew before must not matter
        for first, second in zip(render_range(renderer, 0, 20), render_range(other, 0, 20), strict=True):
            assert same(first, second)

    def test_same_words_in_another_process(self, renderer):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            there = pool.apply(render_range, (renderer, 5, 12))
        assert all(same(*pair) for pair in zip(there, render_range(renderer, 5, 12), strict=True))

    def test_another_seed_or_index_gives_another_word(self, renderer):
        word = renderer.render(0, 0)
        assert not same(word, renderer.render(1, 0))
        assert not same(word, renderer.render(0, 1))

    def test_a_used_renderer_pickles_small(self, renderer):
        renderer.render(0, 0)
        assert len(pickle.dumps(renderer)) < 200_000


class TestMasks:
    def test_shapes_types_and_label(self, renderer):
        for index in range(40):
            word = renderer.render(0, index)
            height, width = word.mask.shape
            assert word.image.shape == (height, width, 3)
            assert word.image.dtype == word.mask.dtype == np.uint8
            assert 8 <= height <= 260
            assert 8 <= width <= 480
            assert word.mask.max() > 127, word.text
            assert word.text

    @pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
    def test_recolouring_changes_the_mask_and_nothing_else(self, make, difficulty, monkeypatch):
        def other_colours(word, stream):
            index = 1000 if stream is Stream.COLOURS else word.index
            return word.renderer.generator.at((word.seed, index), (0, stream, 0))

        settings = [*PLAIN_LETTERS, *ALONE, *NO_CAMERA, f"difficulty={difficulty}", "contrast=0"]
        renderer = make(*settings)
        changed_letters = 0
        for index in range(30):
            word = renderer.render(0, index)
            with monkeypatch.context() as patch:
                patch.setattr(_Word, "stream", other_colours)
                other = renderer.render(0, index)
            assert np.array_equal(word.mask, other.mask)
            difference = np.abs(word.image.astype(int) - other.image).max(axis=2)
            assert not difference[word.mask == 0].any(), word.text
            if difference.max() > 80:  # the two colours differ clearly: then all of the letters must have changed
                changed_letters += 1
                assert (difference[word.mask >= 0.9 * word.mask.max()] > 0).mean() > 0.95
        assert changed_letters > 5

    def test_recolouring_by_the_mask_gives_the_rendered_image(self, make):
        one_colour = [f"chances.{name}=0" for name in ("gradient", "two_colours", "worn", "emboss", "hollow")]
        renderer = make(*PLAIN_LETTERS, *ALONE, *one_colour, *NO_CAMERA, "background=plain", "chances.curve=0.5")
        for index in range(20):
            word = renderer.render(0, index)
            ground = np.median(word.image[word.mask == 0], axis=0)
            if word.mask.max() < 255:
                continue
            ink = np.median(word.image[word.mask == 255], axis=0)
            share = word.mask[..., None] / 255
            assert np.abs(ground * (1 - share) + ink * share - word.image).max() <= 2, word.text

    def test_letters_stay_when_the_background_changes(self, renderer):
        words = renderer.render_on_backgrounds(0, 4, [kind for kind in BACKGROUND_KINDS if kind != "photo"])
        assert set(words) == set(BACKGROUND_KINDS) - {"photo"}
        first = words["plain"]
        for kind, word in words.items():
            assert word.background == kind
            assert word.text == first.text
            assert np.array_equal(word.mask, first.mask)
            assert same(word, renderer.render(0, 4, background=kind))

    def test_hollow_letters_are_their_line(self, make):
        filled = make("chances.hollow=0").render(0, 2, text="HOB")
        hollow = make("chances.hollow=1").render(0, 2, text="HOB")
        inside = cv2.erode((filled.mask > 200).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        if inside.any():
            assert hollow.mask[inside].mean() < 0.5 * filled.mask[inside].mean()

    def test_distractors_are_not_in_the_mask(self, make):
        """Clutter changes the image beyond the letters and leaves the mask."""
        renderer = make(*NO_CAMERA, *PLAIN_LETTERS, *ALONE)
        changed = 0
        for index in range(10):
            words = renderer.render_on_backgrounds(0, index, ["plain", "clutter"])
            assert np.array_equal(words["plain"].mask, words["clutter"].mask)
            outside = words["plain"].mask == 0
            changed += (words["plain"].image != words["clutter"].image)[outside].any()
        assert changed > 5

    def test_letters_can_be_told_from_the_background(self, make):
        renderer = make(*PLAIN_LETTERS, *NO_CAMERA, "difficulty=0", "chances.worn=0", "chances.gradient=0")
        for index in range(60):
            word = renderer.render(0, index)
            grey = cv2.cvtColor(word.image, cv2.COLOR_RGB2GRAY) / 255.0
            if (word.mask > 250).sum() > 20:
                contrast = abs(np.median(grey[word.mask > 250]) - np.median(grey[word.mask == 0]))
                assert contrast > 0.12, (index, word.text, word.background)


def median_colours(word):
    """Colours of the ground and of the letters: medians where the mask is 0, and where it is 255."""
    return (np.median(word.image[word.mask == value], axis=0) for value in (0, 255))


class TestKinds:
    """Each kind of letter, crop, light and surrounding does what its key says."""

    @pytest.fixture
    def plain(self, make, renderer):
        """Words of one colour on one colour, upright, and nothing else but what `more` asks for."""
        off = ["effects=0", "geometry=0", "letters.height=40", "letters.height_spread=0"]

        @functools.cache
        def build(*more):
            built = make(*ALONE, *NO_CAMERA, *off, "background=plain", *more)
            built.fonts = renderer.fonts  # their letters are drawn already
            return built

        return build

    def test_a_glow_has_the_colour_of_the_letters(self, plain):
        for index, word in enumerate(render_range(plain("chances.glow=1"), 0, 12)):
            ground, ink = median_colours(plain().render(3, index))
            near = (cv2.dilate(word.mask, np.ones((5, 5))) > 0) & (word.mask == 0)
            towards = (word.image[near].astype(float) - ground) @ (ink - ground)
            assert np.mean(towards) > 0.1 * np.sum((ink - ground) ** 2), word.text

    def test_worn_paint_shows_the_ground(self, plain):
        for index, word in enumerate(render_range(plain("chances.worn=1"), 0, 12)):
            ground, ink = median_colours(plain().render(3, index))
            letters = word.image[word.mask == 255].astype(float)
            assert (letters >= np.minimum(ground, ink) - 2).all(), word.text
            assert (letters <= np.maximum(ground, ink) + 2).all(), word.text
            assert np.abs(letters - ink).max() > 8

    def test_relief_has_the_colour_of_the_ground_and_light_and_shade(self, plain):
        for word in render_range(plain("chances.relief=1"), 0, 12):
            ground, ink = median_colours(word)
            assert np.abs(ground - ink).max() <= 20, word.text
            grey = cv2.cvtColor(word.image, cv2.COLOR_RGB2GRAY)
            assert np.ptp(grey) > 45, word.text

    def test_dots_are_apart_in_image_and_mask(self, plain):
        def parts(word):
            return cv2.connectedComponents((word.mask > 180).astype(np.uint8))[0] - 1

        dotted = 0
        for index in range(8):
            word = plain("chances.dots=1", "letters.height=70").render(3, index, text="HOLE")
            whole = plain("letters.height=70").render(3, index, text="HOLE")
            if not np.array_equal(word.mask, whole.mask):  # else a face that the grid is too coarse for
                dotted += parts(word) > 20
                assert 0.3 < word.mask.sum() / whole.mask.sum() < 0.9
        assert dotted >= 3

    def test_a_stencil_cuts_bridges(self, plain):
        changed = 0
        for index in range(8):
            word = plain("chances.stencil=1").render(3, index, text="BOO")
            whole = plain().render(3, index, text="BOO")
            assert (word.mask <= whole.mask).all()
            assert (word.image == whole.image)[whole.mask == 0].all()
            changed += (whole.mask.astype(int) - word.mask).max() > 200
        assert changed >= 6

    def test_a_jersey_has_two_outlines(self, plain):
        for index, word in enumerate(render_range(plain("chances.jersey=1"), 0, 8)):
            whole = plain().render(3, index)
            assert np.array_equal(word.mask, whole.mask)
            _, ink = median_colours(whole)
            beyond = (word.image != whole.image).any(axis=2) & (word.mask == 0)
            far = np.abs(word.image[beyond].astype(float) - ink).max(axis=1)
            assert (far < 3).any(), word.text  # the outer line has the letters' colour
            assert (far > 60).any(), word.text  # the inner one another

    def test_neon_shines_before_the_dark(self, plain):
        for word in render_range(plain("chances.neon=1", "chances.hollow=0"), 0, 12):
            if word.mask.max() == 255:
                ground, ink = median_colours(word)
                assert luminance(ink) > 0.15 + luminance(ground), word.text

    def test_large_initials(self, renderer):
        face = open_face(renderer.fonts.choose("HHH", np.random.default_rng(0)))
        plain, large = set_letters(face, "HHH", 30), set_letters(face, "HHH", 30, Layout(initial=1.5))
        (left, right), (other_left, other_right) = (letters.spans[0] for letters in (plain, large))
        assert 1.3 < (other_right - other_left) / (right - left) < 1.7
        assert large.box[3] - large.box[1] > 1.3 * (plain.box[3] - plain.box[1])
        config = load_render_config(None, ["chances.initial=1"])
        assert sample_layout("Market", config, np.random.default_rng(0)).initial > 1.1
        assert sample_layout("market", config, np.random.default_rng(0)).initial == 1.0

    def test_rotations_and_arcs_have_heavy_tails(self, make):
        words = render_range(make("chances.strong_rotation=1", "chances.curve=0"), 0, 60)
        angles = np.abs([word.rotation for word in words])
        assert 0.2 < np.mean(angles > 20) < 0.7
        assert np.mean(angles > 60) > 0.01
        arcs = [word.arc for word in render_range(make("chances.strong_curve=1"), 0, 60) if len(word.text) > 5]
        assert np.mean(np.array(arcs) > 90) > 0.3
        assert max(arcs) < 321

    def test_easy_words_have_no_steep_kinds(self, make):
        steep = [name for name, chance in CHANCES.items() if chance.growth == "steep"]
        first, second = (make("difficulty=0.3", *(f"chances.{name}={value}" for name in steep)) for value in (1, 0))
        assert all(same(*pair) for pair in zip(render_range(first, 0, 10), render_range(second, 0, 10), strict=True))
        assert first.config.chance("night") == 0
        assert make("difficulty=0.7", "chances.night=0.1").config.chance("night") == pytest.approx(0.2)

    def test_loose_and_tight_crops(self, plain):
        def spaces(word):
            rows, columns = np.nonzero(word.mask > 60)
            height, width = word.mask.shape
            return np.array([columns[0:].min(), rows.min(), width - 1 - columns.max(), height - 1 - rows.max()]) / 40

        loose = np.array([spaces(word) for word in render_range(plain("chances.loose=1"), 0, 12)])
        tight = np.array([spaces(word) for word in render_range(plain("chances.tight=1"), 0, 12)])
        assert loose.min() > 0.1
        assert np.abs(loose[:, 0] - loose[:, 2]).max() > 0.5  # off the middle
        assert tight.max() < 0.15

    def test_night_is_dark_and_a_veil_flat(self, plain):
        def grey(word):
            return cv2.cvtColor(word.image, cv2.COLOR_RGB2GRAY).astype(float)

        for index in range(12):
            day = grey(plain().render(3, index))
            night = grey(plain("chances.night=1").render(3, index))
            veiled = grey(plain("chances.veil=1").render(3, index))
            assert night.mean() < 0.75 * day.mean() + 15
            assert np.ptp(veiled) < 0.6 * np.ptp(day)
            assert np.ptp(veiled) > 10

    @pytest.mark.parametrize("kind", ["night", "veil", "exposure", "tiny"])
    def test_letters_keep_a_contrast(self, plain, kind):
        """Letters of low contrast, a degradation on top: the mean grey of letters and of what is near them differs."""
        renderer = plain(f"chances.{kind}=1", "chances.low_contrast=1", "difficulty=0.8")
        for word in render_range(renderer, 0, 25):
            image, letters = word.image.astype(float), word.mask > 127
            near = (cv2.dilate(word.mask, np.ones((9, 9))) > 127) & (word.mask < 32)
            if letters.sum() > 30 and near.sum() > 30:
                difference = image[letters].mean(axis=0) - image[near].mean(axis=0)
                contrast = max(abs(float(luminance(difference))), 0.5 * np.abs(difference).max() / 255)
                assert contrast > 0.075, word.text

    def test_relief_is_neither_dark_nor_veiled_nor_tiny(self, plain):
        names = ("night", "veil", "tiny")
        bad = plain("chances.relief=1", *(f"chances.{name}=1" for name in names))
        good = plain("chances.relief=1")
        assert all(same(*pair) for pair in zip(render_range(bad, 0, 5), render_range(good, 0, 5), strict=True))

    def test_lights_add_light(self, plain):
        for index in range(12):
            dark, lit = plain().render(3, index), plain("chances.lights=1").render(3, index)
            brighter = lit.image.astype(int) - dark.image
            assert brighter.max() > 8 or dark.image.max() < 120 or dark.image.min() > 230, dark.text
            assert np.array_equal(dark.mask, lit.mask)

    def test_tiny_letters_have_no_fine_detail(self, plain):
        def detail(word):
            grey = cv2.cvtColor(word.image, cv2.COLOR_RGB2GRAY).astype(np.float32)
            small = cv2.resize(grey, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
            return np.abs(grey - cv2.resize(small, grey.shape[::-1], interpolation=cv2.INTER_CUBIC)).mean()

        for index in range(8):
            sharp, tiny = plain().render(3, index), plain("chances.tiny=1").render(3, index)
            assert sharp.image.shape == tiny.image.shape
            assert np.array_equal(sharp.mask, tiny.mask)
            assert detail(tiny) < 0.6 * detail(sharp)

    @pytest.mark.parametrize("warp", [[], ["chances.curve=1", "chances.rotation=1", "chances.perspective=1"]])
    def test_neighbours_are_seen_and_not_in_the_mask(self, plain, warp):
        warp = [*warp, "letters.margin=0.5"]
        seen = 0
        for index in range(20):
            alone = plain(*warp).render(3, index)
            among = plain(*warp, "chances.neighbours=1").render(3, index)
            assert np.array_equal(alone.mask, among.mask)
            assert (alone.image == among.image)[alone.mask == 255].all()
            seen += (np.abs(alone.image.astype(int) - among.image).max(axis=2)[alone.mask == 0] > 30).sum() > 20
        assert seen >= 15

    def test_what_is_covered_is_no_text_and_every_letter_stays(self, plain):
        covered = 0
        for index in range(40):
            free = plain("chances.curve=1").render(3, index)
            word = plain("chances.curve=1", "chances.occlusion=1").render(3, index)
            assert (word.mask <= free.mask).all()
            assert (word.image == free.image)[(word.mask == free.mask) & (free.mask == 255)].all()
            covered += (free.mask.astype(int) - word.mask).max() > 200
            count, labels = cv2.connectedComponents((free.mask > 127).astype(np.uint8))
            for part in range(1, count):
                if (labels == part).sum() > 60:
                    assert word.mask[labels == part].sum() > 0.4 * free.mask[labels == part].sum(), word.text
        assert covered > 8

    def test_saturated_grounds(self, make):
        def saturation(share):
            words = render_range(make(f"saturated={share}", "background=plain", *NO_CAMERA), 0, 30)
            return np.mean([cv2.cvtColor(word.image, cv2.COLOR_RGB2HSV)[..., 1].mean() for word in words])

        assert saturation(1.0) > 1.5 * saturation(0.0)


class TestDifficulty:
    def test_easy_words_are_upright_and_sharp(self, make):
        config = make("difficulty=0").config
        assert config.chance("rotation") == config.chance("blur") == 0

    def test_a_word_may_have_a_difficulty_of_its_own(self, make, renderer):
        hard = make("difficulty=0.9")
        assert all(same(renderer.render(3, i, difficulty=0.9), hard.render(3, i)) for i in range(5))
        assert same(renderer.render(3, 0, difficulty=0.5), renderer.render(3, 0))
        assert renderer.config.difficulty == 0.5

    def test_hard_words_have_less_detail(self, make):
        def sharpness(difficulty):
            renderer = make(f"difficulty={difficulty}", "background=plain", "chances.noise=0")
            greys = [cv2.cvtColor(renderer.render(0, i).image, cv2.COLOR_RGB2GRAY) for i in range(40)]
            return np.mean([cv2.Laplacian(grey, cv2.CV_64F).std() for grey in greys])

        assert sharpness(1.0) < 0.8 * sharpness(0.0)

    def test_bent_base_lines_can_be_undone(self):
        points = np.random.default_rng(0).uniform(-40, 40, size=(50, 2))
        for bend in (Bend(radius=90), Bend(radius=-90), Bend(amplitude=8, length=60, phase=1)):
            bent = bend.forward(points)
            np.testing.assert_allclose(np.stack(bend.backward(bent[:, 0], bent[:, 1]), 1), points, atol=1e-9)


class TestBackgrounds:
    @pytest.mark.parametrize("kind", BACKGROUND_KINDS)
    def test_each_kind(self, make, photos, kind):
        renderer = make(f"background={kind}", f"photos={photos}")
        assert {renderer.render(0, index).background for index in range(8)} == {kind}

    def test_mixed_backgrounds_use_every_kind(self, make, photos):
        renderer = make(f"photos={photos}")
        assert {renderer.render(0, index).background for index in range(80)} == set(BACKGROUND_KINDS)

    def test_photographs_are_made_small(self, photos):
        assert max(read_photo(find_photos(str(photos))[0]).shape) == 640

    def test_small_photographs_keep_their_pixels(self, tmp_path):
        noise = np.random.default_rng(0).integers(0, 255, size=(192, 288, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "small.png"), noise[..., ::-1])
        assert np.array_equal(read_photo(str(tmp_path / "small.png")), noise)

    def test_photo_without_a_folder(self, make, renderer):
        with pytest.raises(UserError, match="photos"):
            make("background=photo")
        with pytest.raises(UserError, match="photos"):
            renderer.render(0, 0, background="photo")

    def test_folder_without_images_and_broken_images(self, make, tmp_path):
        with pytest.raises(UserError, match="no such folder"):
            make(f"photos={tmp_path / 'none'}")
        with pytest.raises(UserError, match="holds no image"):
            make(f"photos={tmp_path}")
        (tmp_path / "broken.jpg").write_bytes(b"no image")
        with pytest.raises(UserError, match=r"broken\.jpg"):
            make(f"photos={tmp_path}", "background=photo").render(0, 0)

    def test_unknown_kind(self, renderer):
        with pytest.raises(UserError, match="sky"):
            renderer.render(0, 0, background="sky")


class TestFonts:
    def test_every_family_draws_capitals_and_digits(self, renderer):
        for family in renderer.fonts.families:
            assert any(renderer.fonts.covers(path, "AZ09") for path in family.files), family.name

    def test_no_font_draws_a_box(self, renderer):
        """A character that hardly any font has is refused, not drawn as the sign of a missing one."""
        with pytest.raises(UserError, match="none can draw"):
            renderer.render(0, 0, text="\U0001f984")

    def test_another_font_steps_in_for_missing_characters(self, renderer):
        for index in range(30):
            word = renderer.render(0, index, text="Łódź")
            assert word.text == "Łódź"
            face = next(family for family in renderer.fonts.families if family.name == word.family)
            assert any(renderer.fonts.covers(path, "Łódź") for path in face.files)

    def test_fonts_without_small_letters_do_not_draw_them(self, renderer):
        capitals_only = [family for family in renderer.fonts.families if family.name == "Bebas Neue"]
        if not capitals_only:
            pytest.skip("needs fontpkg-bebas-neue")
        book = FontBook(capitals_only)
        assert book.covers(capitals_only[0].files[0], "AB12")
        assert not book.covers(capitals_only[0].files[0], "Ab")

    def test_each_character_leaves_ink(self, renderer):
        rng = np.random.default_rng(0)
        for text in ("Il1.,'", "WORD", "jgy", '"-"'):
            typeface = renderer.fonts.choose(text, rng)
            face = open_face(typeface)
            before = 0
            for count in range(1, len(text) + 1):
                letters = set_letters(face, text[:count], 40, Layout(spacing=0.1))
                ink = int((letters.fill > 0).sum())
                assert ink > before
                before = ink

    def test_split_parts_the_families(self):
        families = {
            split: {f.name for f in find_families(load_render_config(None, [f"fonts.split={split}"]).fonts)}
            for split in ("all", "train", "held-out")
        }
        assert all(families.values())
        assert families["train"] | families["held-out"] == families["all"]
        assert not families["train"] & families["held-out"]
        assert in_split("Some Family", "train") == in_split("some family", "train")

    def test_folder_of_fonts_and_exclusion(self, tmp_path, renderer, caplog):
        source = renderer.fonts.families[0].files[0]
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "one.ttf").write_bytes(Path(source).read_bytes())
        (tmp_path / "broken.ttf").write_bytes(b"no font")
        settings = [f"fonts.folders=[{tmp_path}]"]
        (family,) = find_families(load_render_config(None, settings).fonts)
        assert family == FontFamily(ImageFont.truetype(source, 10).getname()[0], (str(tmp_path / "deep" / "one.ttf"),))
        assert "broken.ttf" in caplog.text
        with pytest.raises(UserError, match="no family is left"):
            find_families(load_render_config(None, [*settings, f"fonts.exclude=[{family.name}]"]).fonts)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(UserError, match="no such folder"):
            find_families(load_render_config(None, [f"fonts.folders=[{tmp_path / 'none'}]"]).fonts)

    def test_axes_change_the_letters(self, renderer):
        for family in renderer.fonts.families:
            if "wght" in family.files[0]:
                break
        else:
            pytest.skip("no variable font is installed")
        chosen = {renderer.fonts.choose("H", np.random.default_rng(n)) for n in range(200)}
        assert len({typeface.axes for typeface in chosen}) > 10
        assert all(30 < open_face(typeface).unit < 90 for typeface in chosen)


class TestWords:
    def test_texts_keep_to_the_limits(self, word_file):
        source = WordSource(WordsConfig(file=str(word_file), max_length=5, characters="abcdeEXITxit0123"))
        rng = np.random.default_rng(0)
        for _ in range(300):
            text = source.sample(rng)
            assert 1 <= len(text) <= 5
            assert set(text) <= set("abcdeEXITxit0123")

    def test_frequent_words_come_more_often_at_temperature_one(self, tmp_path):
        path = tmp_path / "words.txt"
        path.write_text("often\t900\nseldom\t100\n")
        quiet = {"numbers": 0.0, "random": 0.0, "punctuation": 0.0}

        def share(temperature):
            source = WordSource(WordsConfig(file=str(path), temperature=temperature, **quiet))
            rng = np.random.default_rng(0)
            return np.mean([source.sample(rng).lower() == "often" for _ in range(1000)])

        assert share(1.0) == pytest.approx(0.9, abs=0.04)
        assert share(50.0) == pytest.approx(0.51, abs=0.06)

    def test_cases(self, word_file):
        source = WordSource(WordsConfig(file=str(word_file), numbers=0.0, random=0.0, punctuation=0.0))
        rng = np.random.default_rng(0)
        texts = [source.sample(rng) for _ in range(500)]
        assert 0.35 < np.mean([text.isupper() for text in texts]) < 0.55
        assert 0.15 < np.mean([text.islower() for text in texts]) < 0.35
        assert "Don't" in texts  # not "Don'T"

    def test_numbers_hold_digits(self):
        rng = np.random.default_rng(0)
        assert all(any(c.isdigit() for c in sample_number(rng)) for _ in range(300))

    def test_word_lists(self, tmp_path):
        path = tmp_path / "words.txt"
        path.write_text("# header\n\nalpha\t3\nbeta\n", encoding="utf-8")
        assert list(read_words(path)) == [("alpha", 3.0), ("beta", 1.0)]
        path.write_text("alpha\n", encoding="utf-8-sig")
        assert list(read_words(path)) == [("alpha", 1.0)]
        path.write_text("alpha\tmany\n")
        with pytest.raises(UserError, match=r"words\.txt:1"):
            list(read_words(path))
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match="UTF-8"):
            list(read_words(path))
        path.write_text("# nothing\n")
        with pytest.raises(UserError, match="no word"):
            WordSource(WordsConfig(file=str(path)))
        with pytest.raises(UserError, match="cannot read"):
            list(read_words(tmp_path / "none"))

    def test_english_words(self):
        source = WordSource(WordsConfig(vocabulary=2000, numbers=0.0, random=0.0))
        rng = np.random.default_rng(0)
        assert len({source.sample(rng).lower() for _ in range(200)}) > 100


class TestConfig:
    def test_files_of_the_repository(self):
        for path in sorted((ROOT / "configs").glob("render*.yaml")):
            assert load_render_config(path).length > 0

    def test_every_key_is_described(self):
        for dotted, field in walk_schema(RenderConfig):
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
                assert field.description, dotted

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("dificulty=1", "nearest known key: difficulty"),
            ("difficulty", "key=value"),
            ("difficulty=2", "less than or equal to 1"),
            ("background=sky", "background"),
            ("words.cases=3", "words.cases"),
            ("chances.curves=1", "must name known effects; nearest to curves: curve"),
            ("chances.curve=2", "chances.curve.*less than or equal to 1"),
            ("geometry.curve=0.6", "geometry: must be a valid number"),
        ],
    )
    def test_wrong_overrides(self, override, message):
        with pytest.raises(UserError, match=message):
            load_render_config(None, [override])

    def test_unknown_key_of_a_file(self, tmp_path):
        (tmp_path / "render.yaml").write_text("letters: {hight: 3}\n")
        with pytest.raises(UserError, match=r"letters\.hight: unknown key; nearest known key: letters\.height"):
            load_render_config(tmp_path / "render.yaml")

    def test_a_section_has_one_strength(self):
        config = load_render_config(None, ["degradation=0.5", "chances.blur=0.2"])
        assert config.chance("noise") == pytest.approx(0.5 * CHANCES["noise"].probability)
        assert config.chance("blur") == pytest.approx(0.2)  # as given
        assert config.chance("rotation") == pytest.approx(CHANCES["rotation"].probability)


def test_luminance_can_be_chosen():
    for wanted in (0.0, 0.2, 0.5, 1.0):
        colour = with_luminance(np.array([200.0, 30.0, 30.0]), wanted)
        assert float(luminance(colour)) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.slow
def test_speed(make):
    """400 words with masks a second: the best CPU time of each word, as other programs may want the core too."""
    cv2.setNumThreads(1)
    renderer = make()
    best = np.full(200, np.inf)
    for _ in range(10):
        for index in range(len(best)):
            start = time.process_time()
            renderer.render(3, index)
            best[index] = min(best[index], time.process_time() - start)
    cv2.setNumThreads(-1)
    assert 1 / best.mean() > 400
