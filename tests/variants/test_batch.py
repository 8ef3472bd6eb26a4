"""A batch whose rows have variants of their own."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import subspan
from subspan import SubspaceModel, SubspanError, Variants
from tests.nets import batch
from tests.variants.conftest import trained, vector

NAMES = ["b", None, "a", "b", "c"]


def fill(variants, model, dim=12):
    variants.add("a", trained(model, 1))
    variants.add("b", trained(model, 2))
    variants.add("c", vector(3, dim))
    return variants


def row_by_row(variants, x, names):
    return torch.cat([variants(x[i : i + 1], names=name) for i, name in enumerate(names)])


def test_rows_of_the_full_space_are_grouped_by_variant(model):
    variants, x, batches = fill(Variants(model), model), batch("cnn"), []
    model.body.register_forward_hook(lambda net, args, out: batches.append(len(args[0])))
    expected = row_by_row(variants, x, NAMES)
    del batches[:]
    out = variants(x, names=NAMES)
    torch.testing.assert_close(out, expected)
    assert batches == [2, 1, 1, 1]
    assert not out.requires_grad
    del batches[:]
    variants(x, names=["a"] * 5)
    assert batches == [5]


class Point(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.answer = lambda y: y

    def forward(self, x, *, scale=None, extra=None):
        y = self.fc(x) if scale is None else self.fc(x) * scale["by"]
        return self.answer(y)


@pytest.fixture
def many():
    net = Many()
    variants = Variants(SubspaceModel(net, 4).eval())
    variants.add("a", vector(1, 4))
    variants.add("b", vector(2, 4))
    return net, variants


@pytest.mark.parametrize(
    "answer",
    [
        lambda y: (y, [y + 1]),
        lambda y: Point(y, -y),
        lambda y: Result(y),
        lambda y: {"out": y, "many": (y, y), "none": None, "text": "t", "number": 3},
    ],
)
def test_results_keep_their_form(many, answer):
    net, variants = many
    x, scale = torch.randn(4, 3), {"by": torch.randn(4, 1)}
    expected = torch.cat(
        [
            variants(x[i : i + 1], names=n, scale={"by": scale["by"][i : i + 1]})
            for i, n in enumerate("abba")
        ]
    )
    net.answer = answer
    out = variants(x, names=list("abba"), scale=scale)
    whole = answer(expected)
    assert type(out) is type(whole)
    flat = torch.utils._pytree.tree_leaves(vars(out) if isinstance(out, Result) else out)
    wanted = torch.utils._pytree.tree_leaves(vars(whole) if isinstance(whole, Result) else whole)
    for ours, theirs in zip(flat, wanted, strict=True):
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(ours, theirs)
        else:
            assert ours == theirs


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda y: y.sum(), r"the result has shapes \[\(\), \(\)\] for batches of \[1, 2\] rows"),
        (lambda y: Result(y, y.mean()), "loss has shapes"),
        (lambda y: {"cache": object()}, "cache is a object, whose rows cannot be put together"),
        (lambda y: (len(y), y), r"the result\[0\] is a int"),
        (lambda y: y if len(y) == 1 else [y], "another type for some rows"),
    ],
)
def test_results_without_rows_are_refused(many, answer, words):
    net, variants = many
    net.answer = answer
    with pytest.raises(SubspanError, match=words):
        variants(torch.ones(3, 3), names=["a", "b", "b"])


@pytest.fixture
def adapted():
    net = Many()
    variants = Variants(subspan.lora(net, 4, rank=2, targets=["fc"]).eval())
    variants.add("a", vector(1, 4))
    variants.add("b", vector(2, 4))
    return net, variants


@pytest.mark.parametrize("names", ["ab", "abba", "aabb"])
@pytest.mark.parametrize("which", ["many", "adapted"])
def test_tables_of_all_rows_by_all_rows_are_refused(which, names, request):
    net, variants = request.getfixturevalue(which)
    net.answer = lambda y: Result(y, y @ y.T)
    for _ in range(2):
        with pytest.raises(SubspanError, match=r"^loss has shapes \[\(., .\), \(., .\)\] for"):
            variants(torch.randn(len(names), 3), names=list(names))


@pytest.mark.parametrize(
    ("which", "names", "counts"), [("many", "abba", [2, 2]), ("adapted", "ab", [2])]
)
def test_as_many_classes_as_rows_are_no_table(which, names, counts, request):
    net, variants = request.getfixturevalue(which)
    x, runs = torch.randn(len(names), 3), []
    want = row_by_row(variants, x, names)
    variants(torch.randn(3, 3), names=["a", "b", "b"])
    net.register_forward_hook(lambda net, args, out: runs.append(len(args[0])))
    for more in ([3], []):  # a run with a row more finds that out, once
        del runs[:]
        torch.testing.assert_close(variants(x, names=list(names)), want)
        assert runs == counts + more


@pytest.mark.parametrize("answer", [lambda y: y.mean(), lambda y: Result(y, y.mean())])
def test_a_loss_by_row_is_refused(adapted, answer):
    net, variants = adapted
    net.answer = answer
    with pytest.raises(SubspanError, match=r"has shapes \[\(\)\] for batches of \[3\] rows"):
        variants(torch.ones(3, 3), names=["a", None, None])


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ([torch.ones(2, 3)], {}, r"argument 1 has shape \(2, 3\) and there are 3 names"),
        ([torch.ones(3, 3)], {"scale": {"by": torch.ones(1)}}, r"scale\['by'\] has shape \(1,\)"),
        ([torch.ones(3, 3)], {"extra": object()}, "extra is a object, whose rows"),
        ([torch.ones(3, 3)], {"extra": ["a", "b", "c"]}, "extra is a list, whose rows"),
        ([torch.ones(3, 3)], {"extra": [1, 2, 3]}, "extra is a list of as many values as there"),
        ([torch.ones(3, 3)], {"extra": {"by": [[1], [2, 3], []]}}, r"extra\['by'\] is a list"),
        ([3], {}, "no argument is a tensor"),
    ],
)
def test_arguments_without_rows_are_refused(many, args, kwargs, words):
    _, variants = many
    with pytest.raises(SubspanError, match=words):
        variants(*args, names=["a", "b", "b"], **kwargs)


@pytest.mark.parametrize("rows", [lambda: sentences()[0], lambda: None])
def test_names_are_one_for_each_row(many, rows):
    x, variants = torch.randn(4, 3), many[1]
    if (of_factors := rows()) is not None:
        x, variants = torch.randint(0, 11, (4, 7)), of_factors
    want = row_by_row(variants, x, "abba")
    for names in (list("abba"), tuple("abba"), iter("abba"), np.array(list("abba"))):
        torch.testing.assert_close(variants(x, names=names), want)
    assert torch.equal(variants(x[:0], names=[]), want[:0])
    for names, words in (
        ({"a", "b"}, "names is a set, and each row needs one: give a list"),
        ({"a": 1, "b": 2}, "names is a dict, and"),
        (3, "names is a int, and"),
        ([["a"], ["b"]], r"unknown variant \['a'\]"),
        ([1, 2], "unknown variant 1"),
        ([], "there are 0 names"),
    ):
        with pytest.raises(SubspanError, match=words):
            variants(x[:2], names=names)


# ---- LoRA factors ----------------------------------------------------------------------------


class Sentences(nn.Module):
    """Layers over words, one over their mean, and a head."""

    def __init__(self, words_first=False, flat=False):
        super().__init__()
        self.embed, self.words_first, self.flat = nn.Embedding(11, 8), words_first, flat
        self.up, self.down, self.pool = (
            nn.Linear(8, 12),
            nn.Linear(12, 8, bias=False),
            nn.Linear(8, 6),
        )
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        h = self.embed(ids)
        if self.words_first:
            h = h.transpose(0, 1)
        if self.flat:
            h = h.flatten(0, 1)
        h = h + self.down(self.up(h).tanh())
        h = h.view(*ids.shape, 8) if self.flat else h.transpose(0, 1) if self.words_first else h
        return self.head(self.pool(h.mean(1)).tanh())


def sentences(**options):
    torch.manual_seed(0)
    net = Sentences(**options)
    model = subspan.lora(net, 20, rank=2, targets=["up", "down", "pool"], train_fully=["head"])
    runs = []
    net.register_forward_hook(lambda net, args, out: runs.append(len(args[0])))
    model.eval()
    return fill(Variants(model), model, 20), runs


def test_rows_of_lora_factors_are_one_run():
    variants, runs = sentences()
    ids = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(1))
    expected = row_by_row(variants, ids, NAMES)
    for counts in ([2, 5], [5]):  # first, where rows lie is found out with the two of "b"
        del runs[:]
        torch.testing.assert_close(variants(ids, names=NAMES), expected)
        assert runs == counts
    before = variants(ids, names=None)
    torch.testing.assert_close(variants(ids, names=NAMES)[1:2], before[1:2])
    torch.testing.assert_close(
        variants(ids, names=[*NAMES[:3], "c", "a"]),
        row_by_row(variants, ids, [*NAMES[:3], "c", "a"]),
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.weight.data.mul_(2.0),
        lambda head: setattr(head.weight, "data", 2 * head.weight.data),
        lambda head: setattr(head, "weight", nn.Parameter(2 * head.weight.data)),
        lambda head: head.double().float(),
    ],
)
def test_rows_of_the_base_follow_the_head(change):
    variants, _ = sentences()
    ids = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(1))
    variants(ids, names=NAMES)
    change(variants.model.head)
    torch.testing.assert_close(variants(ids, names=NAMES), row_by_row(variants, ids, NAMES))


@pytest.mark.parametrize("names", [NAMES, ["a", "b", "c", "a", "b"]])
def test_a_mixed_batch_that_was_written_to_is_made_anew(names):
    variants, _ = sentences()
    ids, head = torch.ones(5, 3, dtype=torch.long), variants.model.head
    want = variants(ids, names=names)
    handle = head.register_forward_pre_hook(lambda head, args: head.weight.add_(1.0).sum() and None)
    for _ in range(2):
        with pytest.raises(SubspanError, match=r"changed head\.weight during a call"):
            variants(ids, names=names)
    handle.remove()
    torch.testing.assert_close(variants(ids, names=names), want)


@pytest.mark.parametrize("options", [{"words_first": True}, {"flat": True}])
def test_rows_that_are_not_the_first_dimension_are_grouped(options):
    variants, _ = sentences(**options)
    for words in (7, 5, 1):  # as many words as rows: nobody could tell
        ids = torch.randint(0, 11, (5, words), generator=torch.Generator().manual_seed(1))
        expected = row_by_row(variants, ids, NAMES)
        torch.testing.assert_close(variants(ids, names=NAMES), expected)
        assert not variants._by_row  # and is not tried again


class Prompted(nn.Module):
    """Rows beside a table of the network's own, which is as long as the batch."""

    def __init__(self, shape):
        super().__init__()
        self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.randn(*shape, 8), False)

    def forward(self, x):
        table = self.up(self.table).flatten(0, -2)
        return self.head(torch.cat([table.expand(len(x), -1, 8), self.up(x[:, None])], 1)).sum(1)


@pytest.mark.parametrize("shape", [(5,), (5, 2), (2,), (2, 3)])
def test_a_table_as_long_as_a_batch_has_no_rows(shape):
    torch.manual_seed(0)
    model = subspan.lora(Prompted(shape), 20, rank=2, targets=["up"], train_fully=["head"]).eval()
    variants, x = fill(Variants(model), model, 20), torch.randn(5, 8)
    for names in (NAMES, NAMES[1:3], NAMES):
        some = x[: len(names)]
        expected = row_by_row(variants, some, names)
        torch.testing.assert_close(variants(some, names=names), expected)


@pytest.mark.parametrize("fully", ["head.weight", "head.bias"])
@pytest.mark.parametrize("words", [1, 3, 5, 7])
def test_a_part_of_a_head_by_row(fully, words):
    torch.manual_seed(0)
    net = nn.ModuleDict({"up": nn.Linear(8, 8), "head": nn.Linear(8, 3)})
    net.forward = lambda x: net["head"](net["up"](x))
    model = subspan.lora(net, 20, rank=2, targets=["up"], train_fully=[fully]).eval()
    variants, x = fill(Variants(model), model, 20), torch.randn(5, words, 8)
    torch.testing.assert_close(variants(x, names=NAMES), row_by_row(variants, x, NAMES))
    assert variants._by_row


def test_as_many_words_as_rows_are_one_run_once_it_is_known_which_are_which():
    variants, runs = sentences()
    for words, counts in ((2, [2, 2, 1, 1, 1]), (5, [2, 5]), (5, [5]), (2, [5])):
        ids = torch.randint(0, 11, (5, words), generator=torch.Generator().manual_seed(1))
        expected = row_by_row(variants, ids, NAMES)
        del runs[:]
        torch.testing.assert_close(variants(ids, names=NAMES), expected)
        assert runs == counts


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
def test_a_network_of_transformers_by_row():
    from tests.pretrained import bert

    net = bert(num_hidden_layers=2)
    model = subspan.lora(net, 20, rank=2, exclude=["classifier"], train_fully=["classifier"]).eval()
    runs = []
    net.bert.register_forward_hook(lambda *_: runs.append(1))
    variants = fill(Variants(model), model, 20)
    ids = torch.randint(0, 50, (5, 7))
    mask = torch.ones_like(ids).tril(4)
    expected = torch.cat(
        [
            variants(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1], names=name).logits
            for i, name in enumerate(NAMES)
        ]
    )
    del runs[:]
    out = variants(input_ids=ids, attention_mask=mask, names=NAMES)
    assert runs == [1, 1]  # one of them to find out where rows lie
    assert type(out).__name__ == "SequenceClassifierOutput"
    torch.testing.assert_close(out.logits, expected)
    model.unwrap()
    full = SubspaceModel(
        net, 20, targets=[".*bias", ".*LayerNorm.weight"], train_fully=["classifier"]
    )
    variants = fill(Variants(full.eval()), full, 20)
    out = variants(input_ids=ids, names=NAMES, output_hidden_states=True)
    assert type(out).__name__ == "SequenceClassifierOutput"
    torch.testing.assert_close(out.logits[2], variants(input_ids=ids, names="a").logits[2])
    assert len(out.hidden_states) == 3
