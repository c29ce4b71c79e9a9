"""bench.training end to end on the CPU, its gate, its recovery from failures, and the breakdown of a profile."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from bench.harness import child
from bench.harness.categories import CATEGORIES, of_module
from bench.training import breakdown, contenders
from bench.training import case as training_case
from bench.training import gate as training_gate
from bench.training import run as training
from bench.training.contenders import CONTENDERS, CONTEXT_MODELS, Case, why_not
from stvit.model import CONFIGS, STViT

TINY = Case(
    "stvit_tiny",
    64,
    "ours-reference",
    batch=2,
    dtype="float32",
    device="cpu",
    seconds=0.01,
)
QUIET = {"OMP_NUM_THREADS": "1"}


def case(**changes):
    return dataclasses.replace(TINY, **changes)


def test_end_to_end(run_python, tmp_path):
    out = tmp_path / "training.json"
    options = "--device cpu --sizes 64 --batch 2 --seconds 0.05 --contenders ours-optimized ours-reference authors"
    done = run_python("-m", "bench.training", *options.split(), "--out", str(out), "--profile", env=QUIET)
    assert "Training step, float32 (CPU: a trial of the tool, no result)" in done.stdout
    content = json.loads(out.read_text())
    assert content["benchmark"] == "training" and content["environment"]["device"] == "cpu"
    rows = content["rows"]
    cases = [
        ("authors", "train"),
        ("authors", "inference"),
        ("ours-reference", "train"),
        ("ours-reference", "inference"),
        ("ours-optimized", "inference"),
    ]
    assert [(row["contender"], row["mode"]) for row in rows] == cases  # by importance, not as asked for
    for row in rows:
        assert row["gate"]["passed"] and row["p20"] <= row["median"] <= row["p80"]
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["median"] * 1e3)
        assert row["batch"] == row["batch_asked"] == 2
    assert rows[0]["loss"] == pytest.approx(rows[2]["loss"], rel=1e-4)
    for row in rows:
        profile = row["profile"]
        assert sum(profile["categories"].values()) == pytest.approx(profile["busy_ms"])
        expected = {"super token ops", "depthwise", "1x1 products", "other convolutions"}
        expected |= {"norms"} if row["contender"] != "ours-optimized" else set()  # folded there
        assert expected <= set(profile["categories"])
        assert ("optimiser" in profile["categories"]) == (row["mode"] == "train")


@pytest.mark.parametrize("name", ["authors-compile", "ours-compile"])
def test_compiled_contenders_pass_the_gate(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # no C++ compiler
    row = training_case.run(case(contender=name, modes=("train",)))[0]
    assert "error" not in row and row["gate"]["passed"]


def break_gradient(monkeypatch, name):
    build = contenders.contender_model

    def broken(*arguments):
        model = build(*arguments)
        dict(model.named_parameters())[name].register_hook(torch.zeros_like)
        return model

    monkeypatch.setattr(contenders, "contender_model", broken)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_gradient_gets_no_speed(monkeypatch, dtype):
    name = "layers.0.blocks.0.attn.stoken_refine.qkv.weight"
    break_gradient(monkeypatch, name)
    row = training_case.run(case(dtype=dtype, modes=("train",)))[0]
    assert row["error"].startswith(f"wrong result: d {name}")
    assert "median" not in row and "images_per_s" not in row and not row["gate"]["passed"]


def test_wrong_logits_get_no_speed(monkeypatch):
    build = contenders.contender_model

    def broken(*arguments):
        model = build(*arguments)
        model.layers[0].blocks[0].mlp2.register_forward_hook(lambda module, inputs, output: output * 1.1)
        return model

    monkeypatch.setattr(contenders, "contender_model", broken)
    row = training_case.run(case(modes=("inference",)))[0]
    assert row["error"].startswith("wrong result: logits") and "median" not in row


def test_the_gate_refuses_nan_shapes_and_what_is_missing():
    right = training_gate.Truth({"loss": torch.ones(2)}, {"loss": 0.0}, torch.float32)
    assert training_gate.check({"loss": torch.ones(2)}, right).passed
    for wrong in ({"loss": torch.full((2,), float("nan"))}, {"loss": torch.ones(3)}, {}):
        verdict = training_gate.check(wrong, right)
        assert not verdict.passed and verdict.as_row()["worst"] is None
        json.dumps(verdict.as_row(), allow_nan=False)


def test_the_truth_is_shared_and_the_same(tmp_path):
    batch = contenders.fresh_batch(2, 64, torch.device("cpu"))
    first = training_gate.truth("stvit_tiny", "train", batch, torch.bfloat16, tmp_path)
    assert len(list(tmp_path.glob("*.pt"))) == 1
    again = training_gate.truth("stvit_tiny", "train", batch, torch.bfloat16, tmp_path)
    assert first.errors == again.errors and torch.equal(first.values["loss"], again.values["loss"])
    assert 0 < first.errors["loss"]  # bfloat16 rounds


def test_the_batch_is_halved_until_it_fits(monkeypatch):
    tried = []

    def measure(case, mode, batch):
        tried.append(batch)
        if batch > 2:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                if batch == 4:  # a capture that fails says so in its own words
                    raise RuntimeError("operation failed due to a previous error during capture")
        return {"median": 1.0}

    monkeypatch.setattr(training_case, "measure", measure)
    rows = training_case.run(case(batch=8))
    assert [(row["batch"], row["batch_asked"], row["median"]) for row in rows] == [(2, 8, 1.0)] * 2
    assert tried == [8, 4, 2] * 2


def test_what_a_contender_raises_is_its_row(monkeypatch):
    monkeypatch.setattr(contenders, "contender_model", lambda *_: 1 / 0)
    kept = []
    rows = training_case.run(TINY, lambda rows: kept.append(len(rows)))
    assert [row["error"] for row in rows] == ["ZeroDivisionError: division by zero"] * 2 and kept == [1, 2]


class Clock:
    """CUDA's events and counters as far as they are used; step i takes lengths[i], later ones the last."""

    def __init__(self, monkeypatch, lengths):
        self.now, self.lengths, self.steps, clock = 0.0, lengths, 0, self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 150)

    def step(self):
        self.now += self.lengths[min(self.steps, len(self.lengths) - 1)]
        self.steps += 1


def test_steps_are_timed_one_after_another(monkeypatch):
    clock = Clock(monkeypatch, [900.0, 20.0, 20.0, 20.0, 500.0, 10.0])  # warm-up, 3 to estimate, the first of all
    times = training_case.back_to_back(clock.step, torch.device("cuda"), 1.0)
    assert times == (10.0, 10.0, 10.0, 50)  # 1 s at the estimated 20 ms a step; the first step's 500 ms are not taken
    assert clock.steps == 1 + 3 + 51


@pytest.mark.parametrize(
    ("contender", "at_capture", "expected"),
    [
        ("ours-triton", None, (100, "allocated")),
        ("ours-graph", 70, (70, "allocated")),
        ("ours-max-autotune", None, (150, "reserved")),
    ],
)
def test_peak_memory(monkeypatch, contender, at_capture, expected):
    prepared = training_case.Prepared(Clock(monkeypatch, [1.0]).step, torch.nn.Identity(), 0.0, at_capture)
    found = training_case.peak(prepared, case(contender=contender, device="cuda"))
    assert (found["peak_bytes"], found["peak_of"]) == expected


def test_a_crash_costs_one_case(monkeypatch, tmp_path):
    monkeypatch.setattr(child, "ROOT", tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("raise SystemExit('no bench to run')\n")
    rows, missing = training.run_case(TINY, 60, tmp_path)
    assert missing == "" and len(rows) == 1
    assert rows[0]["error"].startswith("ended with code 1") and "bench" in rows[0]["error"]


def test_time_that_ends_is_said(tmp_path):
    rows, missing = training.run_case(TINY, 0.2, tmp_path)
    assert rows == [] and missing == "out of time"


def test_a_spent_budget_leaves_cases_out(tmp_path, capsys):
    out = tmp_path / "training.json"
    arguments = ["--device", "cpu", "--contenders", "authors", "--minutes", "0.001", "--out", str(out)]
    assert training.main(arguments) == 1
    assert json.loads(out.read_text())["left_out"][0]["why"] == "out of time"
    assert "left out: stvit_tiny 64 authors: out of time" in capsys.readouterr().out


def test_the_most_important_cases_come_first(monkeypatch):
    monkeypatch.setattr(training, "why_not", lambda name, device: ["not built"] if name == "ours-cuda" else [])
    options = training.parser().parse_args([])
    cases, left_out = training.plan(options, torch.device("cuda"))
    assert (cases[0].model, cases[0].size, cases[0].contender) == ("stvit_small", 224, "authors")
    order = [(c.size, CONTENDERS[c.contender].tier) for c in cases]
    assert order == sorted(order)
    assert {c.model for c in cases if c.contender == "timm-compile"} == set(CONTEXT_MODELS)
    assert {c.contender for c in cases} == set(CONTENDERS) - {"ours-cuda"}
    assert left_out == [{"contender": "ours-cuda", "why": "not built"}]
    quick, _ = training.plan(training.parser().parse_args(["--quick"]), torch.device("cuda"))
    assert {(c.model, c.size) for c in quick} == {("stvit_small", 224), *((m, 224) for m in CONTEXT_MODELS)}
    assert not any("max-autotune" in c.contender for c in quick)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--train", "--contenders", "ours-optimized"], "ours-optimized takes no part in training"),
        (["--contenders", "ours-graph"], "ours-graph can't run here: CUDA graphs need a CUDA device"),
        (["--contenders", "nobody"], "invalid choice: 'nobody'"),
        (["--official", "nowhere"], "expected a checkout of the authors' repository"),
        (["--batch", "0"], "expected a whole number, at least 1, got '0'"),
        (["--minutes", "soon"], "--minutes: expected a number, got 'soon'"),
        (["--train", "--inference"], "not allowed with"),
    ],
)
def test_wrong_command_lines(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        training.main(["--device", "cpu", *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_interpreted_kernels_are_not_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "Triton's interpreter is on, and its speed says nothing" in why_not("ours-triton", torch.device("cpu"))


DEPTHWISE, POINT, DENSE = [64, 1, 3, 3], [64, 32, 1, 1], [64, 32, 3, 3]


@pytest.mark.parametrize(
    ("kernel", "ops", "weight", "part", "expected"),
    [
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", ["aten::_fused_adamw_"], None, "", "optimiser"),
        ("walk_kernel", [], None, "", "super token ops"),
        ("some_kernel", ["stvit::upsampling_backward"], None, "", "super token ops"),
        ("void stvit::walk_kernel<__half, (stvit::Map)0, true>(stvit::Walk)", [], None, "", "super token ops"),
        ("void stvit::(anonymous namespace)::sum_kernel<float>(float const*)", [], None, "", "super token ops"),
        ("stvit::residual_depthwise", ["stvit::residual_depthwise"], None, "", "depthwise"),  # a CPU's own operator
        (
            "void at::native::elementwise_kernel",
            ["aten::div"],
            None,
            "super token ops",
            "super token ops",
        ),
        ("nvjet_tst_128x64", ["aten::bmm"], None, "attention", "attention"),
        ("conv2d_grouped_direct_kernel", ["aten::cudnn_convolution"], None, "", "depthwise"),
        ("unknown", ["aten::_conv_depthwise2d"], DEPTHWISE, "", "depthwise"),
        ("sm90_xmma_fprop_implicit_gemm", ["aten::cudnn_convolution", "aten::conv2d"], POINT, "", "1x1 products"),
        ("sm90_xmma_fprop_implicit_gemm", ["aten::cudnn_convolution"], DENSE, "", "other convolutions"),
        ("sm90_xmma_wgrad_implicit_gemm", [], None, "", "other convolutions"),
        ("void at::native::reduce_kernel", ["aten::convolution_backward"], POINT, "", "1x1 products"),
        ("void cudnn::ops::nchwToNhwcKernel", ["aten::cudnn_convolution"], DENSE, "", "copies"),
        ("Memcpy DtoD (Device -> Device)", [], None, "", "copies"),
        ("void at::native::direct_copy_kernel_cuda", ["aten::copy_"], None, "", "copies"),
        ("residual_branch_kernel", [], None, "", "pointwise"),
        ("residual_depthwise_kernel", ["stvit::residual_depthwise"], None, "", "depthwise"),
        ("channel_layer_norm_backward_kernel", [], None, "", "norms"),
        ("flash_fwd_kernel", ["aten::_flash_attention_forward"], None, "", "attention"),
        ("nvjet_hsh_256x128", ["aten::mm"], None, "", "1x1 products"),
        ("void at::native::batch_norm_collect_statistics", [], None, "", "norms"),
        ("triton_red_fused_native_layer_norm_3", [], None, "", "norms"),
        ("triton_poi_fused_add_gelu_native_batch_norm_7", [], None, "", "pointwise"),
        ("triton_poi_fused__to_copy_2", [], None, "", "copies"),
        ("triton_tem_fused_convolution_4", [], None, "", "other convolutions"),
        ("void at::native::vectorized_elementwise_kernel<GeluCUDAKernelImpl>", ["aten::gelu"], None, "", "pointwise"),
        ("never_heard_of", [], None, "", "other"),
    ],
)
def test_categories(kernel, ops, weight, part, expected):
    assert breakdown.category(kernel, ops, weight, part) == expected
    assert expected in CATEGORIES


def test_modules_give_categories():
    """Tiles of one pixel are plain attention."""
    model = STViT(**CONFIGS["stvit_tiny"])
    attentions = [block.attn for stage in model.layers for block in stage.blocks]
    found = {of_module(attention) for attention in attentions if attention.stoken_size != (1, 1)}
    assert found == {"super token ops"}
    assert {of_module(attention) for attention in attentions if attention.stoken_size == (1, 1)} == {None}
    assert {of_module(attention.stoken_refine) for attention in attentions} == {"attention"}
    assert of_module(model) is of_module(model.layers[0].blocks[0].mlp2) is None


def test_overlapping_kernels_count_once():
    assert breakdown.union([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5
    assert breakdown.union([]) == 0


def event(name, start, end, on=DeviceType.CPU, number=-1, parent=None, shapes=None):
    made = FunctionEvent(0, name, 0, start, end, sequence_nr=number, device_type=on, input_shapes=shapes)
    made.cpu_parent = parent
    return made


def test_device_kernels_have_the_category_of_their_module():
    """Two steps: a product of the super tokens and its backward, the optimiser, and a kernel that a graph launched."""
    part = event(breakdown.SCOPE + "super token ops", 0, 10)
    forward = event("aten::cudnn_convolution", 1, 2, number=7, parent=part, shapes=[[2, 32, 8, 8], POINT])
    engine = event("autograd::engine::evaluate_function: ConvolutionBackward0", 20, 30, number=7)
    backward = event("aten::convolution_backward", 21, 22, number=7, parent=engine, shapes=[[], [], POINT])
    ranged = event("Optimizer.step#AdamW.step", 40, 50)
    adam = event("aten::_fused_adamw_", 41, 42, parent=ranged)
    forward.append_kernel("fprop_kernel", 0, 100)
    backward.append_kernel("dgrad_kernel", 0, 200)
    adam.append_kernel("adam_kernel", 0, 40)
    ranged.append_kernel(ranged.name, 0, 999)  # a range's mirror on the device
    gpu = DeviceType.CUDA
    device = [
        event("fprop_kernel", 100, 200, gpu),
        event("dgrad_kernel", 150, 350, gpu),
        event("adam_kernel", 400, 440, gpu),
        event("walk_kernel", 440, 500, gpu),
        event(ranged.name, 0, 999, gpu),
        event(part.name, 0, 999, gpu),
    ]
    found = breakdown.read([part, forward, engine, backward, ranged, adam, *device], 2, on_gpu=True)
    assert found.busy_ms == pytest.approx(0.175)
    assert found.categories == pytest.approx({"super token ops": 0.18, "optimiser": 0.02})
    assert [(entry.name, entry.calls) for entry in found.entries][0] == ("dgrad_kernel", 0.5)


def test_no_file_is_written_on_the_cpu_unless_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(training.record, "RESULTS", tmp_path)
    assert training.main(["--device", "cpu", "--contenders", "authors", "--minutes", "0.001"]) == 1
    assert list(Path(tmp_path).iterdir()) == []
