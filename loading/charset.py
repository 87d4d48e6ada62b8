"""Turns text into class ids and back, and decides which characters count when a prediction is scored."""

import functools
import itertools
import string
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from modules.outputs import NULL_CLASS
from utils import UserError, read_text

# Characters that each published protocol compares, by their number: 36 compares letters without their case, and spaces
# never count.
PROTOCOLS = {
    36: string.digits + string.ascii_lowercase,
    62: string.digits + string.ascii_letters,
    94: string.digits + string.ascii_letters + string.punctuation,
}


@dataclass(frozen=True)
class Charset:
    """The characters that a network knows, in the order of their classes.

    Class 0 is the null symbol; character i (from 0) is class i + 1. In this project the length of a text always counts
    its end: `len(text) + 1`.

    Args:
        characters: distinct ones, in the order of their ids.

    Raises:
        UserError: there are no characters, or one comes twice.
    """

    characters: str

    def __post_init__(self) -> None:
        if not self.characters:
            raise UserError("charset: holds no characters")
        if len(self._classes) != len(self.characters):
            twice = sorted({character for character in self.characters if self.characters.count(character) > 1})
            raise UserError(f"charset: {', '.join(map(repr, twice))} comes more than once")

    @functools.cached_property
    def _classes(self) -> dict[str, int]:
        return {character: index for index, character in enumerate(self.characters, start=NULL_CLASS + 1)}

    @classmethod
    def from_file(cls, path: str | Path) -> "Charset":
        """Read a file with `id<TAB>character` per line, ids 0, 1, 2, ... in order.

        Raises:
            UserError: the file is missing, not UTF-8, empty or damaged; names the line.
        """
        text = read_text(path, "charset", "check dataset.charset_path")
        characters: list[str] = []
        for number, line in enumerate(text.replace("\r\n", "\n").removesuffix("\n").split("\n"), start=1):
            identifier, _, character = line.partition("\t")
            if identifier != str(len(characters)) or len(character) != 1 or character in characters:
                raise UserError(
                    f"{path}:{number}: {line!r} is not `id<TAB>character` with id "
                    f"{len(characters)}, counted from 0, and a single character of its own"
                )
            characters.append(character)
        return cls("".join(characters))

    @property
    def num_classes(self) -> int:
        """Number of classes: the characters and the null symbol."""
        return len(self.characters) + 1

    @functools.cached_property
    def has_upper_case(self) -> bool:
        """Whether the charset tells upper from lower case."""
        return any(_lower(character) != character for character in self.characters)

    def folded(self) -> "Charset":
        """Return the charset with its letters in lower case, each once: what is compared if case does not count."""
        return Charset("".join(dict.fromkeys(map(_lower, self.characters))))

    def normalize(self, text: str, *, lower: bool = False) -> str:
        """Return what the network can read of a text: lower-cased on request or without upper case, the rest dropped.

        This is the published rule (for 36 characters: keep `[0-9a-zA-Z]`, lower-cased). A letter of which the charset
        has only the upper case gets that. Nothing else is folded: an accented letter, in one Unicode character or two,
        is dropped where the charset lacks it, not read as its base letter.
        """
        if not text.isascii() and any(map(unicodedata.combining, text)):
            text = unicodedata.normalize("NFC", text)
        characters = map(self._fold, text) if lower or not self.has_upper_case else text
        return "".join(character for character in characters if character in self._classes)

    def _fold(self, character: str) -> str:
        """Return a letter in the case that the charset has, if possible in lower case."""
        cases = (_lower(character), _in_case(character, character.upper()))
        return next((each for each in cases if each in self._classes), character)

    def encode(self, text: str) -> list[int]:
        """Return the classes of a text's characters, without the end; one that is not in the charset is a UserError."""
        try:
            return [self._classes[character] for character in text]
        except KeyError as error:
            raise UserError(f"{text!r} holds {error.args[0]!r}, which is not in the charset") from error

    def decode(self, classes: Iterable[int]) -> str:
        """Return the text of a sequence of classes, up to its first null."""
        read = itertools.takewhile(lambda index: index != NULL_CLASS, map(int, classes))
        return "".join(self.characters[index - 1] for index in read)

    def __len__(self) -> int:
        return len(self.characters)


def _lower(character: str) -> str:
    return _in_case(character, character.lower())


def _in_case(character: str, changed: str) -> str:
    """Return a character in another case, but never as several or, if foreign (the Kelvin sign), as an ASCII one."""
    return changed if len(changed) == 1 and changed.isascii() == character.isascii() else character
