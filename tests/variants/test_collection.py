"""Which variants there are: added, replaced, removed, read from a folder; and what is refused."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import nn

import subspan
from subspan import SubspaceModel, SubspanError, Variants, checkpoint
from subspan.checkpoint.saving import to_bytes
from tests.nets import batch, build, scatter, wrap
from tests.variants.conftest import own, trained, vector


def save(model, path, seed):
    other = trained(model, seed)
    subspan.save(other, path)
    with torch.no_grad():
        return other(batch("cnn"))


def test_sources_are_vectors_files_and_models(model, tmp_path):
    x, expected = batch("cnn"), save(model, tmp_path / "a.safetensors", 5)
    variants = Variants(own(model))
    variants.add("file", tmp_path / "a.safetensors")
    variants.add("text", str(tmp_path / "a.safetensors"))
    variants.add("model", trained(model, 5))
    variants.add("network", trained(model, 5).body)
    variants.add("vector", vector(5))
    for name in ("file", "text", "model", "network"):
        assert torch.equal(variants(x, names=name), expected)
    assert not torch.allclose(variants(x, names="vector"), expected)  # the head is the model's
    assert variants.names == [*variants] == ["file", "text", "model", "network", "vector"]
    assert len(variants) == 5
    assert "file" in variants
    variants.replace("file", vector(5))
    variants.remove("text")
    assert torch.equal(variants(x, names="file"), variants(x, names="vector"))
    assert "text" not in variants
    assert variants.names == ["model", "network", "vector", "file"]


def test_a_folder_is_read_as_it_is_used(model, tmp_path, monkeypatch):
    x = batch("cnn")
    expected = {f"v{i}": save(model, tmp_path / f"v{i}.safetensors", i) for i in range(4)}
    variants, reads = Variants(own(model), tmp_path, resident=2), []
    take = variants._library._take

    def read(source):
        reads.extend([source.stem] if isinstance(source, Path) else [])
        return take(source)

    monkeypatch.setattr(variants._library, "_take", read)
    assert variants.names == sorted(expected)
    assert reads == []
    for name in ("v0", "v1", "v0", "v2", "v0", "v1"):  # v1 goes when v2 comes
        assert torch.equal(variants(x, names=name), expected[name])
    assert reads == ["v0", "v1", "v2", "v1"]
    variants.add("new", vector(9))
    variants.replace("v0", vector(9))
    assert torch.equal(variants(x, names="v0"), variants(x, names="new"))
    variants.remove("v1")
    assert variants.names == ["v2", "v3", "new", "v0"]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_that_is_replaced_is_read_again(model, tmp_path):
    """Whether it was in memory or not; one that is gone stays there."""
    x, file = batch("cnn"), tmp_path / "a.safetensors"
    first = save(model, file, 1)
    variants = Variants(own(model), tmp_path)
    assert torch.equal(variants(x, names="a"), first)
    expected = save(model, file, 2)
    assert torch.equal(variants(x, names="a"), expected)
    state = file.stat()
    save(model, tmp_path / "other", 3)
    file.write_bytes((tmp_path / "other").read_bytes())
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # as cp -p and rsync --inplace do
    expected = variants(x, names="a")
    variants.add("other", tmp_path / "other")
    assert torch.equal(variants(x, names="other"), expected)
    file.unlink()
    assert torch.equal(variants(x, names="a"), expected)


def test_compact_files_are_variants_too(model, tmp_path):
    x = batch("cnn")
    save(model, tmp_path / "a.safetensors", 1)
    subspan.save(trained(model, 2), tmp_path / "b.subspan", bits=6)
    variants = Variants(own(model), tmp_path)
    assert variants.names == ["a", "b"]
    variants.add("c", tmp_path / "b.subspan")
    assert torch.equal(variants(x, names="b"), variants(x, names="c"))
    (tmp_path / "a.subspan").write_bytes((tmp_path / "b.subspan").read_bytes())
    with pytest.raises(SubspanError, match=r"a.safetensors and .*a.subspan would both be .* 'a'"):
        Variants(own(model), tmp_path)


def test_a_variant_takes_the_memory_of_its_numbers(model):
    variants, coordinates = Variants(model), [torch.randn(12) for _ in range(2)]
    big = Variants(SubspaceModel(nn.Linear(100, 100), 1000).eval())
    vectors = torch.randn(10, 1000)
    for kept, numbers, source in ((variants, 12, coordinates), (big, 1000, vectors)):
        kept.add("first", source[0])
        tracemalloc.start()
        try:
            for n in range(500):
                kept.add(f"variant-{n}", source[n % len(source)])
            taken, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert taken / 500 < 4 * numbers + 400


@pytest.mark.heavy
@pytest.mark.slow
def test_ten_thousand_variants_are_resident_in_45_megabytes():
    code = """
import resource, torch, subspan
from torch import nn
model = subspan.SubspaceModel(nn.Linear(100, 100), 1000).eval()
variants = subspan.Variants(model)
vectors = torch.randn(100, 1000)
variants.add("first", vectors[0])
variants(torch.ones(1, 100), names="first")
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
before = resident()
for n in range(10_000):
    variants.add(f"variant-{n}", vectors[n % 100])
variants(torch.ones(2, 100), names=["variant-1", "variant-9999"])
print((resident() - before) / 1e6)
"""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 40 < float(out.stdout) < 45


def test_variants_that_share_a_head_store_it_once(model):
    variants = Variants(model)
    variants.add("a", vector(1))
    variants.add("b", vector(2))
    assert variants._find("a").beside is variants._find("b").beside


def refused(variants, source, words, name="new"):
    before, theta = variants.names, variants(batch("cnn"), names=None)
    with pytest.raises(SubspanError, match=words):
        variants.add(name, source)
    assert variants.names == before
    assert torch.equal(variants(batch("cnn"), names=None), theta)


def test_what_is_no_variant_of_the_model_is_refused(model, tmp_path):
    path = tmp_path / "a.safetensors"
    variants = Variants(model)
    variants.add("taken", vector(1))
    refused(variants, vector(1), r"there is a variant 'taken': use replace\(\)", "taken")
    refused(variants, vector(1), "text of one letter or more, got ''", "")
    refused(variants, vector(1), "got 3", 3)
    refused(variants, torch.zeros(11), r"vector of d = 12 real numbers, got .* \(11,\)")
    header, tensors = checkpoint.contents(own(model))
    for w in (torch.zeros(0), torch.zeros(11), torch.zeros(12, 1)):
        path.write_bytes(to_bytes(header, tensors | {"coordinates": w}))
        refused(variants, path, "vector of d = 12 real numbers")
    del tensors["coordinates"]
    path.write_bytes(to_bytes(header, tensors))
    refused(variants, path, "vector of d = 12 real numbers")
    path.unlink()
    refused(variants, torch.zeros(12, dtype=torch.complex64), "complex64")
    refused(variants, vector(1).double() / 3, "coordinates is float64 in the vector and float32 in")
    refused(variants, [0.0] * 12, "a tensor of coordinates, the path .* got list")
    refused(variants, nn.Linear(2, 2), "got Linear")
    refused(variants, path, "is not a file")
    subspan.save(wrap("cnn", train_fully=["head"], seed=3), path)
    refused(variants, path, "of another recipe: seed is 3 there and 0 in this model")
    subspan.save(wrap("cnn"), path)
    refused(variants, path, "of another recipe: train_fully is None there")
    other = build("cnn")
    with torch.no_grad():
        other.conv.weight.add_(1.0)
    subspan.save(SubspaceModel(other, 12, train_fully=["head"]), path)
    refused(variants, path, "trained from other initial weights")
    subspan.save(wrap("cnn", train_fully=["head"]).double(), path)
    variants.add("the same numbers in another dtype", path)
    variants.remove("the same numbers in another dtype")
    subspan.save(scatter(wrap("cnn", train_fully=["head"]).double()), path)
    refused(variants, path, "is float64 in .*safetensors and float32 in the network")
    subspan.save(build("cnn"), path)
    refused(variants, path, r"is a whole network \(full\)")
    subspan.save(own(model), path)
    path.write_bytes(path.read_bytes()[:-9])
    refused(variants, path, "damaged")
    with torch.no_grad():
        model.body.norm.running_mean.add_(1.0)
    subspan.save(own(model), path)
    refused(variants, path, "buffer norm.running_mean of its base")


def test_an_unknown_name_has_its_neighbours_named(model):
    variants = Variants(model)
    for name in ("alpha", "beta"):
        variants.add(name, vector(1))
    words = "unknown variant 'alhpa' among 2: did you mean 'alpha'"
    for act in (
        lambda: variants(batch("cnn"), names="alhpa"),
        lambda: variants(batch("cnn"), names=["alpha"] * 4 + ["alhpa"]),
        lambda: variants.remove("alhpa"),
        lambda: variants.replace("alhpa", vector(1)),
        lambda: variants.use("alhpa").__enter__(),
    ):
        with pytest.raises(SubspanError, match=words):
            act()
    with pytest.raises(SubspanError, match=r"'zzz' among 2: add\(\) it first"):
        variants(batch("cnn"), names="zzz")


def test_a_folder_without_variants_and_a_damaged_file_are_refused(model, tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(SubspanError, match="has no checkpoints"):
            Variants(model, folder)
    save(model, tmp_path / "a.safetensors", 1)
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    variants = Variants(own(model), tmp_path)
    with pytest.raises(SubspanError, match=r"b.safetensors is damaged"):
        variants(batch("cnn"), names=["a", "b", "a", "a", "a"])
    variants(batch("cnn"), names="a")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"resident": 0}, "resident must be an integer of at least 1, got 0"), ({"formed": -1}, "-1")],
)
def test_numbers_out_of_range_are_refused(model, options, words):
    with pytest.raises(SubspanError, match=words):
        Variants(model, **options)


def test_a_network_that_is_in_no_subspace_is_refused():
    with pytest.raises(SubspanError, match="got Linear: wrap the network"):
        Variants(nn.Linear(2, 2))
