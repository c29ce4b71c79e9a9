"""bench.traffic: the counter on cases worked out by hand, whole steps, the floor, and the recorded ceiling."""

import json
import math
import re
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stvit
from bench.baselines.model import authors_model
from bench.harness.categories import CATEGORIES
from bench.traffic import run as traffic
from bench.traffic.count import Counter, Saved, added_up, count
from bench.traffic.fake import backward, cuda_autocast, fake_gpu
from bench.traffic.floor import floor
from bench.traffic.per_op import Traffic, nbytes
from stvit.backends import extension
from stvit.modules import SuperTokenBlock
from tests.support import emulated
from tests.support.block_cases import wide_programs

DOCS = Path(__file__).resolve().parents[2] / "docs"
DOCUMENT, ACCELERATE = DOCS / "traffic.md", DOCS / "accelerate.md"
needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="counts the ops of a CUDA build of PyTorch")


def rows_of(run, *shapes, dtype=torch.float32, memory_format=torch.contiguous_format):
    """What the counter adds up over run(*tensors), on fake tensors of these shapes."""
    with fake_gpu():
        tensors = [torch.empty(s, dtype=dtype, device="cuda").to(memory_format=memory_format) for s in shapes]
        with Counter() as counter, torch.no_grad():
            run(*tensors)
    return added_up(counter.calls)


def counted(run, *shapes, **options):
    """Bytes and kernels."""
    return reduce(Traffic.plus, rows_of(run, *shapes, **options).values(), Traffic())._replace(flops=0)


# --- The counter, by hand ---


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(24),
        lambda x: x.permute(2, 0, 1),
        lambda x: x[:, 1:, ::2],
        lambda x: x.detach(),
        lambda x: x.chunk(2, 1),
        lambda x: x.unsqueeze(0).expand(5, 2, 3, 4),
        lambda x: x.contiguous(),
        lambda x: torch.empty_like(x),
    ],
)
def test_views_and_allocations_are_free(view):
    assert counted(view, (2, 3, 4)) == Traffic()


@pytest.mark.parametrize(
    ("run", "shapes", "elements"),
    [
        (lambda x, y: x + y, [(6, 4), (6, 4)], 3 * 24),
        (lambda x: x + x, [(6, 4)], 2 * 24),  # one tensor, read once
        (lambda x, y: x + y, [(6, 4), (6, 1)], 24 + 6 + 24),
        (lambda x, y: x + y.expand(6, 4), [(6, 4), (6, 1)], 24 + 6 + 24),
        (lambda x, y: x.add_(y), [(6, 4), (6, 4)], 3 * 24),
        (lambda x, y: x.copy_(y), [(6, 4), (6, 4)], 2 * 24),
        (lambda x: x.zero_(), [(6, 4)], 24),
        (lambda x: torch.zeros_like(x), [(6, 4)], 24),
        (lambda x: x.t().contiguous(), [(6, 4)], 2 * 24),
        (lambda x, y: x @ y, [(6, 4), (4, 5)], 24 + 20 + 30),
        (lambda x: F.gelu(x), [(6, 4)], 2 * 24),
        (lambda x, y: torch.stack([x, y]), [(6, 4), (6, 4)], 4 * 24),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_op_reads_its_inputs_and_writes_its_outputs(run, shapes, elements, dtype):
    assert counted(run, *shapes, dtype=dtype) == Traffic(moved=elements * dtype.itemsize, kernels=1)


def test_casting():
    assert counted(lambda x: x.to(torch.bfloat16), (6, 4)) == Traffic(moved=24 * (4 + 2), kernels=1)


def test_convolution():
    """Weight (8, 3, 3, 3), bias (8,); cuDNN adds the bias in a kernel of its own."""
    x, weight, y = 2 * 3 * 5 * 5, 8 * 3 * 3 * 3, 2 * 8 * 5 * 5
    found = counted(lambda x, w, b: F.conv2d(x, w, b, padding=1), (2, 3, 5, 5), (8, 3, 3, 3), (8,))
    # The bias in a pass of its own.
    assert found == Traffic(4 * (x + weight + 8 + y + 2 * y), kernels=2)


@pytest.mark.parametrize(
    ("run", "shapes", "flops"),
    [
        (lambda x, w: F.conv2d(x, w, padding=1), [(2, 3, 5, 5), (8, 3, 3, 3)], 2 * 2 * 8 * 5 * 5 * 3 * 3 * 3),
        (lambda x, w: F.conv2d(x, w, padding=1, groups=8), [(2, 8, 5, 5), (8, 1, 3, 3)], 0),  # not by tensor cores
        (lambda x, y: x @ y, [(6, 4), (4, 5)], 2 * 6 * 4 * 5),
        (lambda x: F.gelu(x), [(6, 4)], 0),
    ],
)
def test_flops_are_those_of_products(run, shapes, flops):
    assert sum(row.flops for row in rows_of(run, *shapes).values()) == flops


def test_depthwise_in_nchw_is_one_kernel_and_its_category_is_known():
    shapes = (2, 8, 5, 5), (8, 1, 3, 3), (8,)
    rows = rows_of(lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=8), *shapes)
    assert [(key.category, moved.kernels) for key, moved in rows.items()] == [("depthwise", 1)]


def test_16_bit_convolutions_keep_channels_last_as_cudnn_does():
    with fake_gpu():
        x = torch.empty(2, 8, 5, 5, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
        weight = torch.empty(16, 8, 3, 3, dtype=torch.bfloat16, device="cuda")
        assert F.conv2d(x, weight).is_contiguous(memory_format=torch.channels_last)
        assert F.conv2d(x.contiguous(), weight).is_contiguous()


def test_fused_attention_is_one_kernel_forward():
    q = 2 * 4 * 49 * 64
    rows = rows_of(F.scaled_dot_product_attention, *[(2, 4, 49, 64)] * 3, dtype=torch.bfloat16)
    moved = sum(row.moved for row in rows.values())
    assert {key.category for key in rows} == {"attention"}
    assert 4 * q * 2 <= moved <= 4 * q * 2 + 4 * 2 * 4 * 49 + 64  # and the logarithms of the sums, and the seed


def test_a_custom_op_counts_by_its_inputs_and_outputs():
    torch.library.define("stvit_test::half_rows", "(Tensor x, int n) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake("stvit_test::half_rows", lambda x, n: x.new_empty((x.shape[0] // n, x.shape[1])))
    found = counted(lambda x: torch.ops.stvit_test.half_rows(x, 2), (6, 4))
    assert found == Traffic(moved=4 * (24 + 12), kernels=1)


def test_sampling_is_taken_apart_into_its_launches():
    """16-bit pixels (2, 32, 16, 24) in tiles of 8 x 8: a grid of 2 x 3; runs are one tile long for so few tiles."""
    x, tokens, weights, mass = 2 * 32 * 16 * 24 * 2, 2 * 32 * 2 * 3 * 2, 2 * 9 * 16 * 24 * 2, 2 * 2 * 3 * 4
    partial = 2 * 2 * 3 * (1 + 2) * 3 * 4  # (B, gh, segments, run + 2, 3) float32; times C for the sums
    pooling = x + tokens
    walk = x + tokens + weights + 32 * partial + partial + mass  # mass: a pointer that this map doesn't use
    fold = 32 * partial + partial + tokens + mass
    found = counted(
        lambda x: torch.ops.stvit.sampling(x, 8, 8, 1, 1.0, False, "triton"), (2, 32, 16, 24),
        dtype=torch.bfloat16, memory_format=torch.channels_last,
    )  # fmt: skip
    assert found == Traffic(moved=pooling + walk + fold, kernels=3)


def test_upsampling_moves_the_weights_the_tokens_and_the_pixels():
    def run(stokens, weights):
        torch.ops.stvit.upsampling(stokens, weights.permute(0, 3, 1, 2), None, 8, 8, True, "triton")

    found = counted(run, (2, 32, 2, 3), (2, 16, 24, 9))
    assert found == Traffic(moved=4 * (2 * 32 * 2 * 3 + 2 * 16 * 24 * 9 + 2 * 32 * 16 * 24), kernels=1)


def test_upsampling_backward_writes_partial_sums_and_folds_them():
    """As in sampling, without the mass; the fold is given pixels for the pointers to it, and doesn't read them."""
    pixels, tokens, weights = 2 * 32 * 16 * 24 * 2, 2 * 32 * 2 * 3 * 2, 2 * 9 * 16 * 24 * 2
    partial = 2 * 2 * 3 * (1 + 2) * 3 * 32 * 4

    def run(grad, weights):
        torch.ops.stvit.upsampling_backward(grad, weights.permute(0, 3, 1, 2), 8, 8, True, "triton")

    found = counted(run, (2, 32, 16, 24), (2, 16, 24, 9), dtype=torch.bfloat16)
    walk = pixels + weights + partial + tokens  # tokens: a pointer that this map doesn't use
    assert found == Traffic(moved=walk + partial + tokens, kernels=2)


PIXELS, TOKENS, WEIGHTS, MASS = (4, 56, 56, 64), (4, 7, 7, 64), (4, 56, 56, 9), (4, 1, 7, 7)


@pytest.mark.parametrize(
    ("op", "shapes", "call"),
    [
        ("sampling", [PIXELS], lambda op, x: op(x, 8, 8, 1, 0.125, False, "cuda")),
        ("upsampling", [TOKENS, WEIGHTS, PIXELS], lambda op, *tensors: op(*tensors, 8, 8, True, "cuda")),
        ("upsampling_backward", [PIXELS, WEIGHTS], lambda op, *tensors: op(*tensors, 8, 8, True, "cuda")),
        ("sampling_backward", [TOKENS, WEIGHTS, MASS], lambda op, *tensors: op(*tensors, 8, 8, True, "cuda")),
    ],
)
def test_the_extension_moves_what_the_rule_counts(op, shapes, call, monkeypatch):
    """Stage 1 of stvit_small, on an emulated GPU that four images fill."""
    monkeypatch.setattr(extension, "_state", extension._state)  # undoes use()
    extension.use(emulated.extension())

    def run(*tensors):
        last = [x if x.shape == MASS else x.permute(0, 3, 1, 2) for x in tensors]
        call(getattr(torch.ops.stvit, op), *last)

    rule = counted(run, *shapes, dtype=torch.bfloat16)
    device = emulated.device()
    with device.limits(multiprocessors=4):
        device.counts()
        run(*(torch.rand(shape, dtype=torch.float32 if shape == MASS else torch.bfloat16) for shape in shapes))
        found = device.counts()
    assert found.launches == rule.kernels == 1
    moved = found.loaded + found.stored
    assert moved == rule.moved if op == "sampling" else 1 <= moved / rule.moved < 1.1


def test_saved_bytes_are_those_of_live_nodes_each_storage_once():
    model = nn.Linear(4, 4)
    with fake_gpu():
        model.to_empty(device="cuda")
        saved = Saved(model)
        x = torch.empty(6, 4, device="cuda", requires_grad=True)
        with saved.hooks():
            h = x.exp()  # saves its result
            y = h.sin() + model(h).sum()  # sin saves h again, the product h and the weight
            x.tan()  # dies at once
        assert saved.total() == nbytes(h)
        assert y.shape == (6, 4)


# --- The walk over the graph ---


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_backward_equals_pytorchs(backend, device):
    block = SuperTokenBlock(16, (4, 4), num_heads=2, layerscale=True, init_values=0.5, drop_path=0.5, backend=backend)
    model = nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).double().to(device)
    with wide_programs(device):
        loss = model(torch.randn(4, 16, 8, 8, dtype=torch.float64, device=device)).square().sum()
        expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        with torch.no_grad():
            found = backward(loss)
    assert len(found) == len(expected)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-12, atol=1e-12)


def test_backward_reduces_and_casts_gradients_as_pytorch_does():
    x = torch.randn(3, 4, requires_grad=True)
    bias = torch.randn(4, dtype=torch.bfloat16, requires_grad=True)
    loss = (F.linear(x, x) + (x * bias).sum(1)).square().mean()
    expected = torch.autograd.grad(loss, [x, bias], retain_graph=True)
    found = backward(loss)
    for leaf, gradient in zip((x, bias), expected, strict=True):
        assert found[leaf].dtype == gradient.dtype
        torch.testing.assert_close(found[leaf], gradient)


def test_autocast_is_cudas():
    """LayerNorm answers in float32 there, products in 16 bits; on the CPU, LayerNorm would not."""
    with fake_gpu(), cuda_autocast(torch.bfloat16):
        x = torch.empty(6, 4, device="cuda")
        assert F.linear(x, x).dtype == torch.bfloat16
        assert F.layer_norm(x.bfloat16(), (4,)).dtype == torch.float32
    assert not torch.is_autocast_enabled("cuda")


# --- Whole steps ---


def step(name, build, batch, **options):
    return count(build, batch, 64, torch.bfloat16, channels_last=name != "authors", **options)


@needs_cuda_build
@pytest.mark.parametrize("name", ["authors", "reference"])
def test_traffic_grows_linearly_with_the_batch(name):
    """What is left for a batch of none are the weights: each is read twice, its gradient is written."""

    def build():
        return authors_model("stvit_tiny") if name == "authors" else stvit.stvit_tiny(backend="reference")

    weights = sum(p.numel() for p in build().parameters())
    two, four, six = (step(name, build, batch) for batch in (2, 4, 6))
    assert six.total().moved - four.total().moved == four.total().moved - two.total().moved
    assert six.saved - four.saved == four.saved - two.saved
    of_weights = 2 * two.total().moved - four.total().moved
    assert of_weights == pytest.approx(3 * 2 * weights, rel=0.05)
    assert six.total().kernels == two.total().kernels


@needs_cuda_build
def test_ours_moves_nearly_the_same_an_image_whatever_the_batch():
    """Not exactly: the runs of tiles that a program walks are longer when there are more images."""
    small, large = (step("ours", lambda: stvit.stvit_tiny(backend="triton"), batch) for batch in (64, 128))
    assert large.total().moved / 128 == pytest.approx(small.total().moved / 64, rel=0.05)


@needs_cuda_build
def test_every_row_has_a_known_category_and_every_block_is_counted():
    rows = step("ours", lambda: stvit.stvit_tiny(backend="triton", drop_path_rate=0.1), 2).rows
    assert {key.category for key in rows} <= set(CATEGORIES)
    assert {key.phase for key in rows} == {"forward", "backward"}
    for phase in ("forward", "backward"):
        blocks = {key.block for key in rows if key.phase == phase}
        assert blocks == {line.block for line in floor("stvit_tiny", 64)}


@needs_cuda_build
def test_ours_stays_below_the_recorded_ceiling():
    recorded = json.loads(traffic.CEILING.read_text())
    settings = ("model", "batch", "size", "dtype", "backend")
    args = traffic.parse([f"--{name.replace('_', '-')}={recorded[name]}" for name in settings])
    assert (args.model, args.size) == ("stvit_small", 224)
    ours = traffic.ceilings(args)
    for name, figures in recorded["ceilings"].items():
        for figure, most in figures.items():
            assert ours[name][figure] <= most, f"{name} {figure}: if meant, python -m bench.traffic --record"
    authors = traffic.examine("authors", args)
    lowest = traffic.examine("floor", args)
    megabytes = authors.bytes() / args.batch / 1e6, lowest.bytes() / args.batch / 1e6
    assert megabytes[0] > ours["activations"]["moved_mb"] > megabytes[1]
    # The table of docs/traffic.md.
    told = {cells[0]: cells[1:] for cells in table(DOCUMENT.read_text()) if len(cells) == 3}
    for category in CATEGORIES[:-2]:
        found = [f"{s.bytes(category=category) / args.batch / 1e6:.1f}" for s in (authors, lowest)]
        assert told[category] == found, category
    assert told["total"] == [f"{value:.1f}" for value in megabytes]


@needs_cuda_build
def test_the_extension_moves_less_than_triton():
    found = []
    for backend in ("cuda", "triton"):
        args = traffic.parse(["--backend", backend])
        found.append(traffic.examine("ours", args).bytes(category="super token ops") / args.batch / 1e6)
    assert "{:.1f} MB for super token ops instead of {:.1f} with Triton".format(*found) in DOCUMENT.read_text()


def table(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


# --- The floor ---


@pytest.mark.parametrize("name", ["stvit_tiny", "stvit_small", "stvit_base", "stvit_large"])
def test_the_floor_knows_every_weight(name):
    with torch.device("meta"):
        model = getattr(stvit, name)()
    assert sum(line.weights for line in floor(name, 224)) == sum(p.numel() for p in model.parameters())


def test_the_floor_of_a_block_by_hand():
    """Block 1 of stage 3 of stvit_small: X = 320 x 14 x 14, no sampling; 90 X and the weights."""
    lines = [line for line in floor("stvit_small", 224) if line.block == "layers.2.blocks.1"]
    x = 320 * 14 * 14
    assert sum(line.forward for line in lines) == (2 + 2 + 4 + 4 + 3 + 2 + 5 + 8 + 6) * x
    assert sum(line.backward for line in lines) == (3 + 4 + 5 + 8 + 3 + 4 + 6 + 12 + 9) * x
    assert sum(line.saved for line in lines) == (1 + 1 + 1 + 3 + 1 + 1 + 1 + 4 + 4) * x
    moved = [line.bytes(batch=10, width=2) for line in lines]
    assert sum(map(sum, moved)) == 2 * (10 * 90 * x + 3 * sum(line.weights for line in lines))


def test_the_floor_of_a_block_with_super_tokens_by_hand():
    """Block 1 of stage 2 of stvit_small: X = 128 x 28 x 28, tiles of 4 x 4: 68 X + 4 A + 30 T."""
    lines = [line for line in floor("stvit_small", 224) if line.block == "layers.1.blocks.1"]
    moved = sum(line.forward + line.backward for line in lines)
    assert moved == 68 * 128 * 28 * 28 + 4 * 9 * 28 * 28 + 30 * 128 * 7 * 7


def test_the_floor_of_odd_sizes():
    by_what = {(line.block, line.what): line for line in floor("stvit_small", 200)}
    assert by_what["layers.0.blocks.0", "LayerNorm"].forward == 2 * 64 * 50 * 50
    assert by_what["layers.1.blocks.0", "LayerNorm"].forward == 2 * 128 * 25 * 25
    tokens = 64 * math.ceil(50 / 8) ** 2
    assert by_what["layers.0.blocks.0", "attention"].forward == 4 * tokens
    assert by_what["layers.2.blocks.0", "attention"].forward == 4 * 320 * 13 * 13


# --- The program ---


@needs_cuda_build
def test_the_program_writes_every_row(tmp_path, capsys):
    out = tmp_path / "traffic.json"
    assert traffic.main(["--quick", "--what", "authors,reference,ours,floor", "--by", "op", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "stvit_tiny, batch 2, 64 x 64, bfloat16 activations" in printed
    assert "stvit::residual_depthwise_backward" in printed
    content = json.loads(out.read_text())
    assert content["settings"]["model"] == "stvit_tiny" and content["environment"]["device"] == "cpu"
    totals = {what: sum(row["bytes"] for row in content["rows"] if row["what"] == what) for what in content["saved"]}
    assert totals["reference"] > totals["ours"] > totals["floor"] > 0
    assert all(saved > 0 for saved in content["saved"].values())


@needs_cuda_build
def test_the_table_adds_up(capsys):
    by = "block"
    assert traffic.main(["--quick", "--autocast", "--by", by, "--what", "ours,floor"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    start, end = (next(i for i, row in enumerate(rows) if row and row[0].startswith(word)) for word in (by, "total"))
    columns = list(zip(*[row[1:] for row in rows[start + 2 : end]], strict=True))
    for cells, total in zip(columns, rows[end][1:], strict=True):
        assert sum(map(float, cells)) == pytest.approx(float(total), abs=0.05 * len(cells))


@needs_cuda_build
def test_record_writes_the_ceiling(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(traffic, "CEILING", tmp_path / "ceiling.json")
    assert traffic.main(["--quick", "--record"]) == 0
    recorded = json.loads(traffic.CEILING.read_text())
    assert recorded["model"] == "stvit_tiny" and set(recorded["ceilings"]) == {"activations", "autocast"}
    assert "none -> " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--what", "nobody"], "expected some of authors, reference, ours, optimized, floor; got 'nobody'"),
        (["--batch", "0"], "--batch"),
        (["--size", "big"], "--size: expected a whole number, at least 1, got 'big'"),
        (["--dtype", "float32", "--autocast"], "16-bit"),
        (["--dtype", "float32", "--backend", "cuda"], "cuda is counted in 16 bits"),
        (["--inference", "--what", "floor"], "those of a training step"),
        (["--what", "optimized"], "expected --inference"),
        (["--batch", "1", "--size", "32"], "more than one pixel"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(arguments, told, capsys):
    with pytest.raises(SystemExit) as exit_:
        traffic.main(arguments)
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err


def documented_forwards() -> dict[str, list[float]]:
    rows = re.findall(r"^\| (stvit_\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", ACCELERATE.read_text(), re.MULTILINE)
    return {model: list(map(float, figures)) for model, *figures in rows}


@needs_cuda_build
@pytest.mark.parametrize("model", ["stvit_small", "stvit_base", "stvit_large"])
def test_the_documented_traffic_of_a_forward_pass(model):
    args = traffic.parse(["--inference", "--model", model])
    subjects = [traffic.examine(what, args) for what in ("authors", "ours", "optimized")]
    assert [round(subject.bytes() / args.batch / 1e6, 1) for subject in subjects] == documented_forwards()[model]
    assert {row.phase for subject in subjects for row in subject.rows} == {"forward"}
