import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from subspan import SubspaceModel
from subspan.errors import SubspanError
from subspan.subspace.compartments import (
    ALLOCATIONS,
    Piece,
    allocate,
    check_dim,
    matches,
    partition,
    select,
)

SIZES = {"enc.conv1.weight": 40, "enc.conv1.bias": 4, "enc.fc.weight": 100, "fc.weight": 60, "s": 1}
ALIASES = {name: [name] for name in SIZES} | {"enc.fc.weight": ["enc.fc.weight", "tied.weight"]}


def cut(dim, rules="global", allocation="sqrt"):
    return partition(SIZES, ALIASES, dim, rules, allocation)


def names(parts):
    return {part.name: [piece.tensor for piece in part.pieces] for part in parts}


# ---- patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("enc.conv1.weight", {"enc.conv1.weight"}),  # the name
        ("weight", {"enc.conv1.weight", "enc.fc.weight", "fc.weight"}),  # its end
        ("conv1.weight", {"enc.conv1.weight"}),
        ("enc.conv1", {"enc.conv1.weight", "enc.conv1.bias"}),  # its module
        ("fc", {"enc.fc.weight", "fc.weight"}),  # the end of its module
        (r".*conv\d.*", {"enc.conv1.weight", "enc.conv1.bias"}),  # a regular expression
        ("tied", {"enc.fc.weight"}),  # another name of a tied tensor
        ("s", {"s"}),
        (".*", set(SIZES)),
        (["s", "bias"], {"s", "enc.conv1.bias"}),
        ((), set()),
        (None, set()),
    ],
)
def test_patterns_select_names_ends_modules_and_full_matches(pattern, chosen):
    assert select(ALIASES, pattern, "targets") == chosen


@pytest.mark.parametrize("pattern", ["eight", "c", "conv1.wei", "enc", "onv1", "", "conv.*"])
def test_parts_of_words_and_outer_modules_are_no_match(pattern):
    assert not any(matches(pattern, name) for name in SIZES)
    with pytest.raises(SubspanError, match=r"unknown pattern in exclude.*matches no parameter"):
        select(ALIASES, pattern, "exclude")


def test_a_pattern_without_match_is_answered_by_near_names():
    with pytest.raises(SubspanError, match=r"did you mean .*fc.weight"):
        select(ALIASES, ["s", "fc.wieght"], "targets")


@pytest.mark.parametrize("pattern", [True, 0.5, b"s", nn.Linear(1, 1), [nn.Linear(1, 1)], ["s", 3]])
def test_what_is_no_text_is_no_pattern(pattern):
    for name in ("targets", "exclude", "train_fully"):
        with pytest.raises(SubspanError, match=r"a pattern is a text .*, got (bool|float|int|Lin)"):
            SubspaceModel(nn.Sequential(nn.Linear(4, 2)), 3, **{name: pattern})


def test_a_broken_expression_is_refused():
    with pytest.raises(SubspanError, match=r"'con[(]v' is no regular expression"):
        select(ALIASES, "con(v", "targets")


# ---- rules ---------------------------------------------------------------------------------------


def test_global_is_one_compartment():
    (part,) = cut(7)
    assert (part.name, part.dim, part.weights) == ("global", 7, sum(SIZES.values()))
    assert part.pieces == tuple(Piece(name, 0, size) for name, size in SIZES.items())


def test_layer_groups_by_module_and_tensor_does_not():
    assert names(cut(10, "layer")) == {
        "enc.conv1": ["enc.conv1.weight", "enc.conv1.bias"],
        "enc.fc": ["enc.fc.weight"],
        "fc": ["fc.weight"],
        "s": ["s"],
    }
    assert names(cut(10, "tensor")) == {name: [name] for name in SIZES}


@pytest.mark.parametrize("k", [1, 2, 7, 205])
def test_uniform_cuts_equal_runs_across_tensors(k):
    parts = cut(max(k, 10), f"uniform:{k}")
    assert len(parts) == k
    weights = [part.weights for part in parts]
    assert sum(weights) == sum(SIZES.values())
    assert max(weights) - min(weights) <= 1
    flat = [
        (piece.tensor, i)
        for part in parts
        for piece in part.pieces
        for i in range(piece.start, piece.stop)
    ]
    assert flat == [(name, i) for name, size in SIZES.items() for i in range(size)]


def test_the_first_pattern_that_matches_takes_a_tensor():
    rules = {"conv1.bias": 2, "weight": 5, ".*": 1}
    parts = cut(None, rules)
    assert names(parts) == {
        "conv1.bias": ["enc.conv1.bias"],
        "weight": ["enc.conv1.weight", "enc.fc.weight", "fc.weight"],
        ".*": ["s"],
    }
    assert [part.dim for part in parts] == [2, 5, 1]
    assert cut(8, rules) == parts
    assert cut(None, [list(rule) for rule in rules.items()]) == parts


def test_dimensions_can_be_listed():
    assert [part.dim for part in cut([3, 1, 2, 1], "layer")] == [3, 1, 2, 1]
    assert [part.dim for part in cut((9,))] == [9]


@pytest.mark.parametrize(
    ("dim", "rules", "allocation", "message"),
    [
        (0, "global", "sqrt", "dim must be a positive integer, the number of coordinates; got 0"),
        (-1, "global", "sqrt", "got -1"),
        (True, "global", "sqrt", "got True"),
        ("7", "global", "sqrt", "got '7'"),
        (7.0, "global", "sqrt", "got 7.0"),
        (None, "global", "sqrt", "got None"),
        ([3, 0, 1, 1], "layer", "sqrt", "got 0"),
        (206, "global", "sqrt", "dim=206 .* at most the number of weights, 205"),
        (3, "layer", "sqrt", "dim=3 must be at least the number of compartments, 4"),
        ([3, 1], "layer", "sqrt", "dim lists 2 dimensions for 4 compartments: .*enc.conv1"),
        ([3, 1, 1, 2], "layer", "sqrt", "compartment 's' has 1 weights, too few for d=2"),
        (9, "layer", "sqr", "unknown allocation 'sqr': did you mean sqrt"),
        (9, "layers", "sqrt", "compartments must be 'global', 'layer'.*got 'layers'"),
        (9, "uniform:0", "sqrt", "got 'uniform:0'"),
        (9, "uniform:x", "sqrt", "got 'uniform:x'"),
        (9, 5, "sqrt", "got 5"),
        (300, "uniform:300", "sqrt", "uniform:300 needs at least 300 weights, the network has 205"),
        (9, {".*": 8}, "sqrt", "the rules say d=8 in all, dim says 9"),
        (None, {"weight": 8}, "sqrt", "no compartment for enc.conv1.bias, s: add a pattern"),
        (None, {".*": 8, "s": 1}, "sqrt", "compartment 's' is empty: earlier patterns took"),
        (None, {"nothing": 8}, "sqrt", "unknown pattern in compartments"),
        (None, {".*": 206}, "sqrt", "205 weights, too few for d=206 coordinates; use d <= 205"),
        (9, {".*": "9"}, "sqrt", "got '9'"),
        (None, {}, "sqrt", "no compartment for enc.conv1.weight"),
    ],
)
def test_what_cannot_be_cut_is_refused(dim, rules, allocation, message):
    with pytest.raises(SubspanError, match=message):
        cut(dim, rules, allocation)


def test_check_dim_gives_the_integer_back():
    assert check_dim(5) == 5


# ---- allocation ----------------------------------------------------------------------------------

allocations = st.sampled_from(sorted(ALLOCATIONS))
several = st.lists(st.integers(1, 3000), min_size=1, max_size=12)


@given(several, st.floats(0, 1), allocations)
def test_allocation_divides_all_within_bounds_and_follows_size(sizes, share, allocation):
    total = len(sizes) + round(share * (sum(sizes) - len(sizes)))
    dims = allocate(total, sizes, allocation)
    assert sum(dims) == total
    assert all(1 <= d <= size for d, size in zip(dims, sizes, strict=True))
    assert allocate(total, sizes, allocation) == dims
    for (d, size), (e, other) in itertools.permutations(zip(dims, sizes, strict=True), 2):
        assert size <= other or d >= e  # the larger never gets less


@given(several, allocations)
def test_allocation_does_not_depend_on_the_order(sizes, allocation):
    total = (len(sizes) + sum(sizes)) // 2
    there = sorted(zip(sizes, allocate(total, sizes, allocation), strict=True))
    back = sorted(zip(sizes[::-1], allocate(total, sizes[::-1], allocation), strict=True))
    assert there == back


def test_allocation_follows_its_weight():
    sizes = [100, 400, 1600]
    assert allocate(30, sizes, "equal") == [10, 10, 10]
    assert allocate(70, sizes, "sqrt") == [10, 20, 40]
    assert allocate(21, sizes, "size") == [1, 4, 16]


def test_allocation_fills_small_ones_and_gives_the_rest_to_others():
    assert allocate(100, [5, 1000, 1000], "equal") == [5, 48, 47]
    assert allocate(10, [1, 10**9], "size") == [1, 9]


def test_allocation_that_rounds_is_pinned():
    """Files hold the total only: dimensions that came out differently would be another model."""
    sizes = [156000, 200, 2000, 10, 61, 7, 3, 3]
    # 39.1, 1.40, 4.43 and five times 1: the one that is left over goes to 4.43.
    assert allocate(50, sizes, "sqrt") == [39, 1, 5, 1, 1, 1, 1, 1]
    assert allocate(50, sizes, "size") == [43, 1, 1, 1, 1, 1, 1, 1]
    assert allocate(6, [25, 49], "sqrt") == [2, 4]  # 2.5 and 3.5: the larger is first
