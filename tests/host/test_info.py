"""`python -m stvit.info` tells the truth, in both forms, and never fails."""

import json
import re
import subprocess

import pytest
import torch

import stvit
from stvit import info
from stvit.backends import extension


@pytest.fixture(scope="module")
def as_json(run_python):
    return json.loads(run_python("-m", "stvit.info", "--json", env={"STVIT_BACKEND": None}).stdout)


def test_versions(as_json):
    versions = as_json["versions"]
    assert versions["stvit"] == stvit.__version__
    assert versions["torch"] == torch.__version__
    assert as_json["torch_cuda"] == torch.version.cuda


def test_gpus(as_json):
    assert len(as_json["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for index, gpu in enumerate(as_json["gpus"]):
        assert gpu["name"] == torch.cuda.get_device_name(index)
        assert gpu["capability"] == "{}.{}".format(*torch.cuda.get_device_capability(index))


def test_backends(as_json):
    assert set(as_json["backends"]) == {"reference", "triton", "cuda"}
    assert as_json["backends"]["reference"] == []
    for reasons in as_json["backends"].values():
        assert all(isinstance(reason, str) and reason for reason in reasons)
    assert as_json["default_backend"] == "auto" and as_json["error"] is None
    assert as_json["backends"][as_json["auto_picks"]] == []


def test_text_names_every_fact(run_python, as_json):
    text = run_python("-m", "stvit.info", env={"STVIT_BACKEND": "reference"}).stdout
    assert re.search("^default backend +reference$", text, re.MULTILINE)
    for name, value in info.extension_rows(as_json["extension"]):
        assert name in text and value in text
    for version in as_json["versions"].values():
        assert version is None or version in text
    for backend, reasons in as_json["backends"].items():
        assert backend in text
        for reason in reasons:
            assert reason in text


def test_wrong_default_is_told_without_failing(run_python):
    wrong = {"STVIT_BACKEND": "nonsense"}
    facts = json.loads(run_python("-m", "stvit.info", "--json", env=wrong).stdout)
    assert facts["default_backend"] is None and "'nonsense'" in facts["error"]
    child = run_python("-m", "stvit.info", env=wrong)
    assert facts["error"] in child.stdout and child.stderr == ""


def test_reasons_are_shown_under_their_backend(as_json):
    facts = {**as_json, "backends": {"cuda": ["first reason", "second reason"], "reference": []}}
    tail = info.as_text(facts).split("backends\n")[1].splitlines()
    assert [line.split() for line in tail] == [
        ["cuda", "no"],
        ["-", "first", "reason"],
        ["-", "second", "reason"],
        ["reference", "available"],
    ]


def test_the_extension_is_shown():
    missing = {"origin": None, "built": None, "builds_for": None, "reasons": ["not installed", "no nvcc"]}
    assert info.extension_rows(missing) == [("extension", "none"), ("", "not installed"), ("", "no nvcc")]
    (*_, last) = info.extension_rows({**missing, "reasons": [], "builds_for": ["8.0", "9.0+PTX"]})
    assert last == ("", 'backend="cuda" builds it at first use, for 8.0, 9.0+PTX')
    there = {**missing, "origin": "installed: _C.so", "built": {"nvcc": "13.0.88", "torch": "2.11"}, "reasons": []}
    assert info.extension_rows(there) == [("extension", "installed: _C.so"), ("built with", "nvcc 13.0.88, torch 2.11")]


def test_build_ends_in_one_message(monkeypatch, capsys):
    def fail():
        raise extension.ExtensionError("no nvcc")

    monkeypatch.setattr(extension, "load", fail)
    with pytest.raises(SystemExit, match="^error: no nvcc$"):
        info.main(["--build"])
    monkeypatch.setattr(extension, "load", lambda: None)
    info.main(["--build", "--json"])
    assert json.loads(capsys.readouterr().out)["versions"]["stvit"] == stvit.__version__


def test_help_has_examples(run_python):
    shown = run_python("-m", "stvit.info", "--help").stdout
    assert "--json" in shown and "examples:" in shown and "STVIT_BACKEND" in shown
    assert all(option in shown for option in ("--build", "--explain", "--dtype", "--gpu"))


def test_missing_package_is_none():
    assert info.installed_version("a-package-that-does-not-exist") is None


def test_broken_nvidia_smi_is_none(monkeypatch):
    monkeypatch.setattr(info.shutil, "which", lambda name: "/usr/bin/nvidia-smi")

    def fail(*args, **kwargs):
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    monkeypatch.setattr(info.subprocess, "run", fail)
    assert info.driver_version() is None


def test_driver_is_read_from_nvidia_smi(monkeypatch):
    monkeypatch.setattr(info.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    answer = subprocess.CompletedProcess([], 0, stdout="580.65.06\n580.65.06\n")
    monkeypatch.setattr(info.subprocess, "run", lambda *args, **kwargs: answer)
    assert info.driver_version() == "580.65.06"
