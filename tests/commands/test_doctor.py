"""The doctor: all is well here, and what is not is found."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from subspan import kernels
from subspan.commands import doctor
from subspan.commands.doctor import run_checks
from subspan.families import projections
from subspan.training import machine


def test_all_is_well(cli):
    found = run_checks()
    assert [f for f in found if not f.passed] == []
    subjects = [f.subject for f in found]
    assert subjects.count("Philox4x32-10 known answer") == 3
    assert {f"projection {name}" for name in projections()} <= set(subjects)
    seen = {f.subject: f.seen for f in found}
    assert seen["projection hash"].startswith("numba: ")
    assert seen["projection stored"].startswith("torch: ")
    versions = [f.seen for f in found if f.subject == "version"]
    assert f"torch {torch.__version__}" in versions
    said = cli("doctor")
    assert (said.code, said.err) == (0, "")
    assert len(said.out.splitlines()) == len(found)
    assert all(line.startswith("ok   ") for line in said.out.splitlines())


def test_a_wrong_answer_is_found(monkeypatch, cli):
    """Doctor reports a wrong generator, and a product, whatever it raises or returns."""
    counter, key, result = doctor.KNOWN_ANSWERS[0]
    monkeypatch.setattr(doctor, "KNOWN_ANSWERS", ((counter, key, (1, *result[1:])),))
    right = kernels.available("cpu")["fastfood"]

    def broken(*_):
        raise RuntimeError("[no] kernel")

    imprecise = right._replace(matvec=lambda *arguments: 1.001 * right.matvec(*arguments))
    monkeypatch.setitem(kernels.available("cpu"), "fastfood", imprecise)
    monkeypatch.setitem(kernels.available("cpu"), "sparse", right._replace(matvec=broken))
    ill = {f.subject: f.seen for f in run_checks() if not f.passed}
    assert {"Philox4x32-10 known answer", "projection fastfood", "projection sparse"} <= set(ill)
    assert "projection gaussian" not in ill
    assert "[no] kernel" in ill["projection sparse"]
    said = cli("doctor")
    assert said.code == 2
    assert "failed checks: Philox4x32-10 known answer, projection fastfood, " in said.err
    assert "FAIL projection sparse: numba: RuntimeError('[no] kernel')" in said.out


def test_versions_and_device():
    versions = machine.versions()
    assert set(versions) >= {"python", "subspan", "torch", "numpy", "safetensors"}
    name = machine.device_name(torch.device("cpu"))
    assert f"{torch.get_num_threads()} of " in name
    assert machine.processor() in name


@pytest.mark.parametrize("build", ["2.13.0+cu130", "2.13.0+cpu", "2.13.0"])
def test_the_version_of_pytorch_names_its_build(build, monkeypatch, cli):
    """The registry's build for CUDA is called 2.13.0 in its metadata, and says more when asked."""
    known = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "2.13.0" if name == "torch" else known(name)
    )
    monkeypatch.setattr(torch, "__version__", build)
    assert machine.versions()["torch"] == build
    assert f"ok version: torch {build}" in [
        " ".join(s.split()) for s in cli("doctor").out.splitlines()
    ]


def test_peak_memory():
    """Peaks count memory that was used in between, even if it is free again."""
    memory = machine.PeakMemory(torch.device("cpu"))
    before = memory.read()
    torch.zeros(30_000_000)
    assert memory.read() >= before + 100_000_000
