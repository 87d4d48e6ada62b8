"""The schema: every key is described, and values are checked whenever they are set."""

import pytest

from config import Config
from settings import is_section, walk_schema


def test_every_key_has_a_description_and_a_default():
    for dotted, field in walk_schema(Config):
        text = field.annotation.__doc__ if is_section(field) else field.description
        assert text, dotted
        assert text.endswith("."), dotted
        assert not field.is_required(), dotted


def test_wrong_assignment_is_refused():
    config = Config()
    with pytest.raises(ValueError, match="valid integer"):
        config.training.epochs = "ten"
