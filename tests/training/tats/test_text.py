"""The byte-pair encoding against published ids; without the published list of merges, against one made here."""

import re

import pytest

from tests import golden_files
from training.tats import text
from training.tats.text import BytePairs, byte_symbols, clean, read_merges, words


@pytest.fixture(scope="module")
def pairs():
    try:
        return BytePairs(read_merges())
    except ValueError as error:
        pytest.skip(str(error))


@golden_files.entries("tats", "bpe*")
def test_ids_are_the_published_ones(entry, golden, pairs, request):
    cases = entry if isinstance(entry, list) else [entry]
    match = re.search(r"truncated_(\d+)", request.node.callspec.id)
    for case in cases:
        content = case["text"]
        if times := re.fullmatch(r'"(.*)" x(\d+)', content):
            content = times[1] * int(times[2])
        found = pairs.ids_of(content, int(match[1])).tolist() if match else pairs.encode(content)
        assert found == case["ids"]
        if match:
            with pytest.raises(ValueError, match=f"at most {match[1]} fit: shorten it"):
                pairs.ids_of(content, int(match[1]), cut=False)
        else:
            assert pairs.ids_of(content, 40).tolist() == case["ids"] + [0] * (40 - len(case["ids"]))


def test_parts_of_a_text():
    found = list(words("it's 42 caf\u00e9s!? they'll!'s<|endoftext|> \u00b2x"))
    wanted = ["it", "'s", "4", "2", "caf\u00e9s", "!?", "they", "'ll", "!'", "s", "<|endoftext|>", "\u00b2", "x"]
    assert found == wanted


def test_plain_text_is_cleaned_without_ftfy():
    assert clean("  A  Gear\tJumps ".replace("\t", " ")) == "a gear jumps"
    assert clean("left &amp;amp; right") == "left & right"


def test_pairs_of_smallest_rank_are_joined_first():
    made = BytePairs(["a b", "b c</w>", "ab c</w>", *(f"{a} {a}{a}" for a in byte_symbols().values())])
    assert made.word("abc") == (514,), "a b, then ab c"
    assert made.word("bc") == (513,) and made.word("a") == (256 + list(byte_symbols()).index(ord("a")),)


def test_lists_of_merges_are_checked(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no list of merges"):
        read_merges(tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("#version\na b\n")
    with pytest.raises(ValueError, match="does not hold 48894 pairs"):
        read_merges(tmp_path / "short.txt")
    (tmp_path / "bad.gz").write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(ValueError, match="is no list of merges"):
        read_merges(tmp_path / "bad.gz")
    monkeypatch.setattr(text, "stored_merges", lambda: tmp_path / "short.txt")
    with pytest.raises(ValueError, match="not the published list"):
        read_merges()
