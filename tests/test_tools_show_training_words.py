"""The sheet of training words shows what the loader gives."""

import cv2
import numpy as np
import pytest

from config import save_config
from tests.small_networks import WORDS, small_config, write_masks, write_words
from tools import show_training_words
from utils import UserError


@pytest.fixture
def config(tmp_path):
    write_masks(tmp_path / "masks" / "set", tmp_path / "set", write_words(tmp_path / "set", 10))
    config = small_config(masks={"root": str(tmp_path / "masks")})
    config.dataset.train.roots, config.dataset.train.batch_size = [str(tmp_path / "set")], 4
    save_config(config, tmp_path / "config.yaml")
    return config


def test_words_are_those_of_the_run_at_the_networks_size(config):
    cells = show_training_words.read_training_words(config, 7, epoch=2)
    assert len(cells) == 7
    assert all(cell.image.shape == (32, 128, 3) and cell.mask.shape == (32, 128) for cell in cells)
    assert {cell.caption for cell in cells} <= set(WORDS)
    again, other = (show_training_words.read_training_words(config, 7, epoch=epoch) for epoch in (2, 3))
    assert all(np.array_equal(one.image, two.image) for one, two in zip(cells, again, strict=True))
    assert not all(np.array_equal(one.image, two.image) for one, two in zip(cells, other, strict=True))
    assert len(show_training_words.read_training_words(config, 100)) == 8  # an epoch's


def test_command_line(config, tmp_path, capsys):
    arguments = ["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "out" / "sheet.png")]
    assert show_training_words.main([*arguments, "--count", "6", "dataset.data_aug=rand"]) == 0
    assert cv2.imread(str(tmp_path / "out" / "sheet.png")).shape[1] > 6 * 256
    assert "words  6" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not trained on words"):
        show_training_words.main([*arguments, "model.name=ssn"])
