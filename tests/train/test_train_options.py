"""Memory, speed, measuring and logging flags of the training program, and several processes against one."""

import copy
import sys
import types
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import stvit
from stvit.train import engine, graph
from stvit.train.checks import drop_path_rates
from stvit.train.cli import main, parse_args
from stvit.train.loop import DropPathSchedule
from tests.support.train_cases import assert_equal, contents, flags, one_line_error, rows

# One step from given weights with nothing random in it and BatchNorm frozen: a sum over the step's images.
PLAIN = "--mixup 0 --cutmix 0 --aa none --reprob 0 --scale 1 1 --hflip 0 --color-jitter 0 --no-repeated-aug".split()
ONE_STEP = [*PLAIN, "--drop-path", "0", "--opt", "sgd", "--warmup-epochs", "0", "--lr", "0.5", "--max-steps", "1"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights to start from."""
    path = tmp_path_factory.mktemp("start") / "start.pth"
    torch.manual_seed(1)
    stvit.save_checkpoint(path, model=stvit.stvit_tiny(num_classes=3).state_dict())
    return path


@pytest.fixture(scope="module")
def one_step(photos, start, tmp_path_factory):
    """Arguments of that step, and the weights that a batch of 12 gives."""
    arguments = flags(photos, *ONE_STEP, "--finetune", str(start))
    output = tmp_path_factory.mktemp("step")
    assert main([*arguments, "--batch-size", "12", "--output_dir", str(output)]) == 0
    return arguments, contents(output / "checkpoint.pth"), rows(output / "log.txt")


def assert_same_step(output, one_step, start):
    _, expected, logged = one_step
    given, before = contents(output / "checkpoint.pth")["model"], contents(start)["model"]
    moved = 0
    for name, value in expected["model"].items():
        if value.is_floating_point():
            step = value - before[name]
            moved += int(step.abs().max() > 0)
            torch.testing.assert_close(given[name] - before[name], step, rtol=1e-3, atol=1e-6, msg=name)
    assert moved > 50
    assert rows(output / "log.txt")[0]["test_acc1"] == logged[0]["test_acc1"]


@pytest.mark.parametrize("batch, accumulated", [("6", "2"), ("4", "3")])
def test_accumulated_gradients_are_those_of_the_larger_batch(one_step, start, tmp_path, batch, accumulated):
    size = ["--batch-size", batch, "--grad-accum-steps", accumulated, "--output_dir", str(tmp_path)]
    assert main([*one_step[0], *size]) == 0
    assert_same_step(tmp_path, one_step, start)


@pytest.mark.parametrize("processes, batch, accumulated", [(2, "3", "2"), (3, "4", "1")])
def test_processes_make_the_step_of_the_joined_batch(train, one_step, start, tmp_path, processes, batch, accumulated):
    """And every test image counts once, whatever 13 is divided by."""
    size = ["--batch-size", batch, "--grad-accum-steps", accumulated, "--output_dir", str(tmp_path)]
    codes, printed = train([*one_step[0], *size], (), processes)
    assert codes == [[0] * processes], printed
    assert printed.count("falls back to the PyTorch reference") <= 1  # process 0 says what holds for all
    assert_same_step(tmp_path, one_step, start)


@pytest.mark.parametrize(
    "more",
    [
        ["--fused"],
        ["--compile", "--compile-backend", "aot_eager"],
        pytest.param(["--compile"], marks=pytest.mark.compiled_all),  # inductor, for minutes
    ],
    ids=["fused", "aot_eager", "inductor"],
)
def test_fused_updates_and_compiled_processes_make_the_same_step(train, one_step, start, tmp_path, more):
    """Two processes, two batches each: gradients are exchanged once, whatever the model is wrapped in."""
    size = ["--batch-size", "3", "--grad-accum-steps", "2", "--output_dir", str(tmp_path)]
    codes, printed = train([*one_step[0], *size, *more], (), 2)
    assert codes == [[0, 0]], printed
    assert_same_step(tmp_path, one_step, start)


def test_a_failed_compilation_is_one_line(photos, capsys, monkeypatch):
    one_line_error(capsys, flags(photos, "--compile", "--compile-backend", "fast"), "--compile-backend fast", "fast")
    from torch._dynamo.backends import registry

    def failing(graph, inputs):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setitem(registry._COMPILER_FNS, "failing", failing)
    monkeypatch.setitem(registry._BACKENDS, "failing", None)
    arguments = flags(photos, "--compile", "--compile-backend", "failing")
    one_line_error(capsys, arguments, "no working C++ compiler", "--compile-backend failing")


def test_an_error_of_all_processes_is_one_line(train, photos):
    codes, printed = train([*flags(photos), "--resume", "/nowhere.pth"], (), 2)
    assert codes == [[2, 2]] and printed.count("/nowhere.pth") == 1
    codes, printed = train([*flags(photos), "--resume", "/nowhere.pth"], (), 2, "tests.support.late_speaker")
    assert codes == [[2, 2]] and printed.count("main.py:") == 1  # although one process has long said it
    codes, printed = train([*flags(photos), "--lr", "-1"], (), 2)
    assert codes == [[2, 2]] and printed.count("--lr") == 1


def test_checkpointed_activations_change_no_number(photos, tmp_path, capsys):
    weights = []
    for more in ([], ["--checkpoint-activations"]):
        output = tmp_path / str(len(weights))
        assert main([*flags(photos, *more), "--max-steps", "2", "--output_dir", str(output)]) == 0
        weights.append(contents(output / "checkpoint.pth")["model"])
    assert_equal(*weights)
    assert "MiB of activations an image are kept instead of" in capsys.readouterr().out
    one_line_error(capsys, flags(photos, "--sync-bn"), "--sync-bn", "GPU")


def test_out_of_memory_says_what_to_do(photos, capsys, monkeypatch):
    def step(self, batches):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(engine.Trainer, "step", step)
    told = "--batch-size 8 --grad-accum-steps 2", "--checkpoint-activations", "--input-size"
    one_line_error(capsys, flags(photos), *told, code=1)


def test_measuring_needs_no_data(capsys, tmp_path):
    size = "--model stvit_tiny --input-size 32 --batch-size 2 --threads 1 --device cpu --num_workers 0".split()
    assert main([*size, "--throughput", "1"]) == 0
    printed = capsys.readouterr().out
    assert "training " in printed and "inference " in printed and "images/s" in printed
    assert main([*size, "--synthetic", "--max-steps", "1", "--no-model-ema", "--output_dir", str(tmp_path)]) == 0
    assert rows(tmp_path / "log.txt")[0]["steps"] == 1


def test_the_first_layer_that_is_not_finite_is_named(photos, start, tmp_path, capsys):
    poisoned = contents(start)
    poisoned["model"]["layers.1.blocks.0.norm2.weight"][3] = torch.nan
    torch.save(poisoned, tmp_path / "poisoned.pth")
    arguments = [*flags(photos), "--detect-anomaly", "--max-steps", "1", "--finetune"]
    one_line_error(capsys, [*arguments, str(tmp_path / "poisoned.pth")], "layers.1.blocks.0.norm2", code=1)
    assert main([*arguments, str(start)]) == 0


def test_the_first_gradient_that_is_not_finite_is_named():
    from stvit.train.anomaly import watch
    from stvit.train.errors import LossNotFinite

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    watch(model, gradients=True)
    with pytest.raises(LossNotFinite, match=r"the gradient of 1\.bias, shape \(2,\), has 2 values"):
        (model(torch.ones(1, 2)) * torch.inf).sum().backward()


def test_wandb(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = flags(photos, "--max-steps", "1", "--wandb", "birds", "--output_dir", str(tmp_path))
    one_line_error(capsys, arguments, "pip install wandb")
    logged, started = [], []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    def init(**options):
        started.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    assert main(arguments) == 0
    assert started[0]["project"] == "birds" and started[0]["resume"] == "allow"
    assert "train/loss" in logged[0][1] and "test_acc1_ema" in logged[1][1] and logged[-1] == "finished"


def test_a_lagging_rate_is_the_authors(photos, tmp_path):
    """Their first two epochs run at --warmup-lr."""
    rates = []
    for more in ([], ["--lag-lr"]):
        output = tmp_path / str(len(rates))
        arguments = flags(
            photos, *more, "--epochs", "3", "--warmup-epochs", "2", "--batch-size", "48", "--no-model-ema"
        )
        assert main([*arguments, "--max-steps", "2", "--output_dir", str(output)]) == 0
        assert main([*arguments, "--output_dir", str(output)]) == 0  # resumed
        rates.append([row["lr"] for row in rows(output / "steps.jsonl")])
    plain, lagging = rates
    assert lagging == [plain[0], plain[0], plain[1]] and plain[1] > plain[0] == 1e-6


def test_drop_path_follows_its_schedule():
    model = stvit.stvit_tiny(drop_path_rate=0.6)
    schedule = DropPathSchedule(model, drop_path_rates("0:0.4,260:0.6"))
    rates = [module for module in model.modules() if hasattr(module, "drop_prob")]
    built = [module.drop_prob for module in rates]
    for epoch, last in ((0, 0.4), (259, 0.4), (260, 0.6), (299, 0.6)):
        schedule.set(epoch)
        assert [module.drop_prob for module in rates] == pytest.approx([rate * last / 0.6 for rate in built])
    assert parse_args(["--drop-path-schedule", "0:0.4,260:0.6"]).drop_path == 0.6


def test_why_a_step_is_not_recorded(photos, capsys):
    cuda, plain = torch.device("cuda"), parse_args([])
    assert graph.why_not(plain, cuda, False, 1) == ""
    for reason, arguments, scaled, world in (
        ("loss scaler", [], True, 1),
        ("processes", [], False, 2),
        ("--compile", ["--compile"], False, 1),
        ("--grad-accum-steps", ["--grad-accum-steps", "2"], False, 1),
        ("--opt sgd", ["--opt", "sgd"], False, 1),
        ("--detect-anomaly", ["--detect-anomaly"], False, 1),
    ):
        assert reason in graph.why_not(parse_args(arguments), cuda, scaled, world)
    assert main(flags(photos, "--cuda-graph", "--max-steps", "1")) == 0
    assert "--cuda-graph: it needs a CUDA device; steps run plainly" in capsys.readouterr().out


class Recording:
    """In place of torch.cuda's graphs: recording leaves everything as it was, replaying runs the recorded step."""

    def __init__(self, monkeypatch, model, optimizer, fails=False):
        self.model, self.optimizer, self.fails, self.replays = model, optimizer, fails, 0
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nothing())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.record)

    def wait_stream(self, stream):
        pass

    @contextmanager
    def record(self, recorded, stream):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        before = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        yield
        self.model.load_state_dict(before[0])
        self.optimizer.load_state_dict(before[1])

    def replay(self):
        self.replays += 1
        for group, rate in zip(self.optimizer.param_groups, self.graphed.rates, strict=True):
            group["lr"] = float(rate)
        self.optimizer.zero_grad()
        self.graphed.loss.copy_(self.graphed.step(self.graphed.images, self.graphed.targets))


@contextmanager
def nothing():
    yield


@pytest.mark.parametrize("fails", [False, True])
def test_replayed_steps_are_the_plain_ones(monkeypatch, fails):
    """Eight steps at changing rates, three of them before the recording; or all plain where it fails."""
    results, told = [], []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

        def step(images, targets, model=model, optimizer=optimizer):
            loss = ((model(images) - targets) ** 2).mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        call = step
        if graphed:
            monkeypatch.setattr(torch.optim.AdamW, "step", plain_rates(torch.optim.AdamW.step))
            fake = Recording(monkeypatch, model, optimizer, fails)
            call = fake.graphed = graph.GraphedStep(step, optimizer, torch.device("cpu"), told.append)
            for group in optimizer.param_groups:
                group["capturable"] = False  # which wants a GPU
        losses = []
        for i in range(8):
            images, targets = torch.randn(4, 3), torch.randn(4, 2)
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            optimizer.zero_grad()
            losses.append(float(call(images, targets)))
        results.append((losses, model.state_dict()))
        if graphed:
            assert fake.replays == (0 if fails else 5)
    assert results[0][0] == pytest.approx(results[1][0])
    torch.testing.assert_close(*(weights for _, weights in results))
    assert bool(told) == fails and all("capturing" in line for line in told)


def plain_rates(step):
    """A tensor as the rate wants capturable=True, hence a GPU: read it here."""

    def stepped(self, *args):
        for group in self.param_groups:
            group["lr"] = float(group["lr"])
        return step(self, *args)

    return stepped


def test_tensorboard_has_the_averaged_accuracy(photos, tmp_path):
    assert main(flags(photos, "--max-steps", "1", "--tensorboard", "--output_dir", str(tmp_path))) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/lr", "test_acc1", "test_acc1_ema"} <= set(events.Tags()["scalars"])
