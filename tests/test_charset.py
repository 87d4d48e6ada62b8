"""Charset: ids, the published rule for labels, damaged files, and what each protocol compares."""

import string
from pathlib import Path

import pytest

from loading.charset import PROTOCOLS, Charset
from utils import UserError

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("size", [36, 62, 94])
def test_files_hold_the_published_order(size):
    charset = Charset.from_file(DATA / f"charset_{size}.txt")
    everything = string.ascii_lowercase + "1234567890" + string.ascii_uppercase + string.punctuation
    assert charset.characters == everything[:size]
    assert charset.num_classes == size + 1
    assert charset.has_upper_case == (size > 36)


@pytest.mark.parametrize("size", [36, 62, 94])
def test_decode_undoes_encode(size):
    charset = Charset.from_file(DATA / f"charset_{size}.txt")
    classes = charset.encode(charset.characters)
    assert classes == list(range(1, size + 1))
    assert charset.decode([*classes, 0, 5, 0]) == charset.characters


def test_decode_stops_at_the_first_null():
    charset = Charset("abc")
    assert charset.decode([1, 2, 0, 3]) == "ab"
    assert charset.decode([0, 1]) == ""
    assert charset.decode([]) == ""


@pytest.mark.parametrize(
    ("size", "text", "normal"),
    [
        (36, "It's 5 O'Clock!", "its5oclock"),
        (36, "Café", "caf"),
        (36, "Cafe\u0301s", "cafs"),  # an e and an accent
        (36, "\u212aelvin \u0130", "elvin"),  # the Kelvin sign and dotted I lower-case to ASCII letters
        (62, "It's 5 O'Clock!", "Its5OClock"),
        (94, "It's 5 O'Clock!", "It's5O'Clock!"),
        (94, '#\t"x"\\', '#"x"\\'),
    ],
)
def test_normalize_follows_the_published_rule(size, text, normal):
    charset = Charset.from_file(DATA / f"charset_{size}.txt")
    assert charset.normalize(text) == normal
    assert charset.normalize(normal) == normal


def test_encode_names_the_unknown_character():
    with pytest.raises(UserError, match="'é'"):
        Charset("caf").encode("café")


def test_other_scripts_lower_case_too():
    assert Charset("привет").normalize("ПРИВЕТ!") == "привет"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0\ta\n1 b\n", r":2: '1 b' is not"),
        (b"0\ta\n\n1\tb\n", r":2: '' is not"),
        (b"0\ta\n1\tbc\n", r":2: .* single character"),
        (b"0\ta\n2\tb\n", r":2: .* with id 1"),
        (b"0\ta\n1\ta\n", r":2: .*character of its own"),
        (b"", r":1: '' is not"),
        (b"0\t\xff\n", "not UTF-8"),
    ],
)
def test_damaged_files_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "charset.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Charset.from_file(path)
    assert str(path) in str(error.value)


def test_file_forms_that_are_fine(tmp_path):
    path = tmp_path / "charset.txt"
    for content in ("0\t#\r\n1\t\"\r\n2\t'", "\ufeff0\t#\n1\t\"\n2\t'\n"):
        path.write_bytes(content.encode())
        assert Charset.from_file(path).characters == "#\"'"
    path.write_bytes("0\t\u2028\n1\t \n".encode())
    assert Charset.from_file(path).characters == "\u2028 "


def test_missing_file_and_repeated_characters(tmp_path):
    with pytest.raises(UserError, match=r"charset_path"):
        Charset.from_file(tmp_path / "none.txt")
    with pytest.raises(UserError, match="'a' comes more than once"):
        Charset("aba")
    with pytest.raises(UserError, match="no characters"):
        Charset("")


def test_letters_take_the_case_that_the_charset_has():
    plates = Charset("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert plates.normalize("Ab-12 \u212a\u017f", lower=True) == "AB12"  # the last two are no K and no S
    assert plates.normalize("Ab-12") == "A12"
    assert Charset("aAbB").normalize("AB", lower=True) == "ab"


@pytest.mark.parametrize(("protocol", "text"), [(36, "its5oclock"), (62, "Its5OClock"), (94, "It's5O'Clock!")])
def test_protocols(protocol, text):
    assert Charset(PROTOCOLS[protocol]).normalize("It's 5 O'Clock! é") == text


def test_folded_charsets_compare_without_case():
    folded = Charset("Éé1АБаIİ\u212a").folded()
    assert folded.characters == "é1абiİ\u212a"  # the last two have no lower case of one character of their own
    assert not folded.has_upper_case
    assert folded.normalize("аБ é-É İ") == "абééİ"
