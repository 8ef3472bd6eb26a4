"""Short JSON: every value comes back, and what is cut short or unknown is refused."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspan.checkpoint.compact import TEMPLATES, apply_patch, difference
from subspan.coding.packing import WORDS, Reader, pack

TEXTS = st.text(max_size=8) | st.sampled_from([*WORDS[:9], "00ff", "0", "ABCD"])
PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
    | st.floats(allow_nan=False, width=32)
)  # fmt: skip
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
)


@settings(max_examples=40)
@given(JSON)
def test_every_value_comes_back(value):
    data = pack(value)
    reader = Reader(data)
    assert repr(reader.value()) == repr(value) or Reader(data).value() == value
    assert reader.place == len(data)


@settings(max_examples=40)
@given(st.dictionaries(TEXTS, JSON, max_size=4), st.dictionaries(TEXTS, JSON, max_size=4))
def test_a_patch_makes_one_value_of_another(value, template):
    patch = difference(value, template)
    assert apply_patch(Reader(pack(patch)).value(), template) == value
    assert difference(value, value) == {}


def test_what_is_common_is_short():
    assert [len(pack(value)) for value in (0, 127, 128, "recipe", None, -1)] == [1, 1, 3, 1, 1, 2]
    assert len(pack(0.130634159)) == 5  # nine digits: a float32
    assert len(pack(math.pi)) == 9
    assert len(pack("8814d1b59be6eef9")) == 10


@pytest.mark.parametrize(
    "data", [b"", b"\xe3\x80", b"\xe9\x02\x00", b"\xe7\x09ab", b"\xff", b"\xdf"]
)
def test_what_is_cut_short_or_unknown_is_refused(data):
    with pytest.raises(ValueError, match=r"early|does not know"):
        Reader(data).value()


def test_words_keep_their_numbers():
    assert len(set(WORDS)) == len(WORDS) <= 96
    assert (WORDS[0], WORDS[18], WORDS[-1]) == ("extra", "dim", "int64")
    assert TEMPLATES[1]["weights"] == 61_706
