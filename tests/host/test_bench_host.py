"""bench.host measures what it says: the host code of every op runs, and nothing is launched."""

import json


def test_every_op_is_measured_beside_torch_add(run_python, tmp_path):
    said = run_python("-m", "bench.host", "--repeats", "3", "--json", str(tmp_path / "host.json")).stdout
    rows = {row["op"]: row for row in json.loads((tmp_path / "host.json").read_text())}
    assert list(rows) == [
        "torch.add",
        "residual_depthwise",
        "channel_layer_norm",
        "residual_branch",
        "sampling + upsampling",
    ]
    assert len(said.splitlines()) == len(rows)
    assert rows["torch.add"]["launches"] == [] and all(row["microseconds"] > 0 for row in rows.values())
    for name in ("residual_depthwise", "channel_layer_norm", "residual_branch"):
        forward, *backward = rows[name]["launches"]
        assert forward == f"{name}_kernel" and backward[0] == f"{name}_backward_kernel"
    assert rows["sampling + upsampling"]["launches"][0] == "pooling_kernel"


def test_the_cuda_extension_is_measured_beside_triton(run_python, tmp_path):
    run_python("-m", "bench.host", "--cuda", "--repeats", "3", "--json", str(tmp_path / "host.json"))
    *_, row = json.loads((tmp_path / "host.json").read_text())
    assert row["op"] == "sampling + upsampling, CUDA" and row["microseconds"] > 0 and row["to_triton"] > 0
    kernels = ["walk", "spread", "walk", "spread"]  # forward, forward; the backward of upsampling, of sampling
    assert len(row["launches"]) == 4 and all(
        name in launch for name, launch in zip(kernels, row["launches"], strict=True)
    )


def test_the_interpreter_is_refused(run_python):
    child = run_python("-m", "bench.host", env={"TRITON_INTERPRET": "1"}, check=False)
    assert child.returncode == 2 and child.stderr.startswith("error: TRITON_INTERPRET is set")
