"""JSON that is damaged, hostile, or of another shape is one sentence that begins with the name of the file."""

import json

import pytest

from dnnlib import json_file
from dnnlib.json_file import (
    JsonError,
    anything,
    either,
    listed,
    mapped,
    null,
    number,
    parse_json,
    read_json,
    record,
    whole,
)
from dnnlib.json_file import text as any_text
from dnnlib.text import one_line, shown

SCHEMA = record(
    {"name": any_text},
    {
        "fps": either([null, number(0.1, 1000)], "a rate"),
        "names": listed(any_text),
        "counts": mapped(whole(0, 9), "[a-z]+"),
    },
)


@pytest.mark.parametrize(
    "content",
    [
        '{"name": ""}',
        '{"name": "a", "fps": null, "more": [[{}]]}',
        '{"name": "\\ud83d\\ude00", "names": ["b"], "counts": {"x": 9}}',
    ],
)
def test_what_fits_is_read(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    assert read_json(tmp_path / "a.json", SCHEMA) == parse_json(content.encode(), "it", SCHEMA) == json.loads(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is damaged \(no JSON: it is empty\)"),
        (b"\0" * 99, r"is damaged \(no JSON: "),
        (b'{"name": "a"', r"is damaged \(no JSON: "),
        (b'{"name": "\xff"}', "is not text in UTF-8"),
        (b"[" * 50_000, "is nested too deeply"),
        (b'{"name": "\\ud800"}', "no Unicode"),
        (b'{"name": "\\uDFFF\\ud800"}', "no Unicode"),
        (b'{"name": "a", "x": ' + b"9" * 5000 + b"}", r"is damaged \(no JSON: Exceeds the limit"),
        (b"[]", r"has \[\] as its content, expected an object"),
        (b"{}", "has no entry 'name'"),
        (b'{"name": null}', "has None as name, expected text"),
        (b'{"name": "a", "fps": 0}', "has 0 as fps, expected a rate"),
        (b'{"name": "a", "fps": NaN}', "has nan as fps"),
        (b'{"name": "a", "fps": 1e999}', "has inf as fps"),
        (b'{"name": "a", "fps": true}', "has True as fps"),
        (b'{"name": "a", "names": "b"}', "has 'b' as names, expected a list"),
        (b'{"name": "a", "names": ["b", 3]}', "has 3 as names 1, expected text"),
        (b'{"name": "a", "counts": {"x": 10}}', "has 10 as counts x, expected a whole number from 0 to 9"),
        (b'{"name": "a", "counts": {"X": 1}}', "has the key 'X' in counts"),
        (b'{"name": "a", "counts": {"x": 1.0}}', "has 1.0 as counts x"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"is a pointer of git-lfs, .*\(git lfs pull\)"),
        (b"<!doctype html><html>", "is a web page, expected JSON"),
        (b'{"name": "' + b"\\u001b" * 5000 + b'", "names": 3}', "has 3 as names"),
        (b'["\\u001b[31m' + b"x" * 5000 + b'"]', r"has \['"),
    ],
)
def test_what_does_not_is_one_sentence(content, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(JsonError, match=message) as caught:
        read_json(path, SCHEMA, "write it again")
    sentence = str(caught.value)
    assert sentence.startswith(f"{path} ") and sentence.endswith("; write it again")
    assert sentence.isprintable() and len(sentence) < len(str(path)) + 400


def test_sizes_are_limited(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_bytes(b"[" + b" " * 5000 + b"]")
    with pytest.raises(JsonError, match="has more than 0 MiB"):
        read_json(tmp_path / "a.json", anything, max_bytes=5000)
    monkeypatch.setattr(json_file, "MAX_CONTAINERS", 100)
    with pytest.raises(JsonError, match="it has more than 100 lists and objects"):
        parse_json(b"[" + b"[]," * 100 + b"0]", "it", anything)


def test_keys_may_be_unique(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1, "b": {"c": 1, "c": 2}}')
    assert read_json(tmp_path / "a.json", anything) == {"a": 1, "b": {"c": 2}}
    with pytest.raises(JsonError, match="a.json has 'c' more than once"):
        read_json(tmp_path / "a.json", anything, unique=True)


def test_values_are_shown_short_and_without_control_characters():
    bomb: list = []
    for _ in range(60):
        bomb = [bomb, bomb]
    for value in (bomb, "\x1b[31m" * 100, "x" * 10**6, {"\0": "\n"}, 10**5000, float("nan"), ("\ud800",)):
        assert shown(value).isprintable() and len(shown(value)) < 100
    assert one_line("a\nb\x1b\u202e" + "c" * 300) == "a?b??" + "c" * 195 + " ..."
