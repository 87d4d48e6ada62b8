"""YAML reading: plain data only, and every failure names file and line."""

import pytest

from utils import UserError
from yaml_io import dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize("text", ["1e-4", "1E+3", "-2.5e-3", "1.0e-4", "+1e4"])
def test_scientific_numbers_are_floats(text):
    assert parse_yaml(text, "x") == float(text)


@pytest.mark.parametrize("value", ["1e-4", "null", "yes", "3", "", "a: b", "#", "é", 1e-4, 1e-8, None, [1, 2.0], {}])
def test_dump_is_read_back_equal(value):
    back = parse_yaml(dump_yaml({"key": value}), "x")["key"]
    assert back == value
    assert type(back) is type(value)


def test_python_tuple_gives_a_list():
    assert parse_yaml("!!python/tuple [0.9, [1]]", "x") == [0.9, [1]]


def test_aliases_and_merge_keys_work():
    data = parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n", "x")
    assert data["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [ls]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!mine 3",
        "!!python/object/new:dict {}",
    ],
)
def test_tags_are_refused_by_name(tmp_path, tag):
    path = tmp_path / "evil.yaml"
    path.write_text(f"a: 1\nb: {tag}\n")
    with pytest.raises(UserError, match=r"evil\.yaml:2: .*refused: nothing in a YAML file can run code") as error:
        read_yaml(path)
    assert tag.split()[0] in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ":1: the file is empty"),
        (b"# only a comment\n", ":1: the file is empty"),
        (b"- 1\n", ":1: not a mapping"),
        (b"a: 1\nb: [1,\n", ":3: expected"),
        (b"a: 1\nb: 2\na: 3\n", ":3: duplicate key 'a'"),
        (b"a:\n  b: 1\n  b: 2\n", ":3: duplicate key 'b'"),
        (b"a: 1\nb: !!int x\n", ":1: not YAML: invalid literal"),
        (b"a: 2020-13-45\n", ":1: not YAML: month must be"),
        (b"a: !!bool perhaps\n", ":1: not YAML: 'perhaps'"),
        (b"a: \xff\xfe\n", ":1: not YAML"),
        (b"a: 1\n---\nb: 2\n", ":2: but found another document"),
        (b"a: *b\n", ":1: found undefined alias"),
        (b"? [1]\n: 2\n", ":1: "),
        (b"[" * 5000, ":1: nested too deeply"),
    ],
)
def test_failures_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.yaml" + message) as error:
        read_yaml(path)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: cannot read"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot read"):
        read_yaml(tmp_path)


def test_aliases_cannot_blow_up():
    levels = "\n".join(f"k{i}: &k{i} {{x: *k{i - 1}, y: *k{i - 1}}}" for i in range(1, 60))
    assert len(parse_yaml(f"k0: &k0 {{z: 1}}\n{levels}\n", "x")) == 60


def test_a_file_that_is_no_settings_is_refused_by_its_size(tmp_path):
    (tmp_path / "a.yaml").write_text("- a\n" * (1 << 17))
    with pytest.raises(UserError, match="256 KiB"):
        read_yaml(tmp_path / "a.yaml")
