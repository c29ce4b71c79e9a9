"""Parts of the training program by themselves: flags, data sets, samplers, losses, log lines."""

import json

import torch
from PIL import Image
from torch.nn import functional as F

from stvit.train.cli import build_parser, parse_args
from stvit.train.data import ShardSampler, build_transform
from stvit.train.distributed import Process
from stvit.train.folders import Folder, INaturalist, find_classes
from stvit.train.log import JsonLines
from stvit.train.losses import DistillationLoss

# The published script's flags; --epoch is how its own command lines abbreviate --epochs.
PUBLISHED = """--early-conv --conv-pos --use-ortho --batch-size --epochs --epoch --model --input-size --drop --drop-path
--model-ema --no-model-ema --model-ema-decay --model-ema-force-cpu --opt --opt-eps --opt-betas --clip-grad --momentum
--weight-decay --sched --lr --lr-noise --lr-noise-pct --lr-noise-std --warmup-lr --min-lr --decay-epochs --warmup-epochs
--cooldown-epochs --patience-epochs --decay-rate --dr --color-jitter --aa --smoothing --train-interpolation
--repeated-aug --no-repeated-aug --reprob --remode --recount --resplit --mixup --cutmix --cutmix-minmax --mixup-prob
--mixup-switch-prob --mixup-mode --teacher-model --teacher-path --distillation-type --distillation-alpha
--distillation-tau --finetune --data-path --data-set --inat-category --output_dir --device --seed --resume
--start_epoch --eval --dist-eval --num_workers --pin-mem --no-pin-mem --world_size --dist_url""".split()


def test_shares_of_the_test_set_are_disjoint_and_whole():
    shares = [list(ShardSampler(range(13), Process(rank, 3, torch.device("cpu")))) for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(13))


def test_distillation_loss():
    torch.manual_seed(0)
    outputs, taught, targets = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    base = F.cross_entropy(outputs, targets)

    def loss(kind):
        return DistillationLoss(torch.nn.CrossEntropyLoss(), lambda _: taught, kind, 0.25, 2.0)(None, outputs, targets)

    student, teacher = (outputs / 2).softmax(1), (taught / 2).softmax(1)
    divergence = (teacher * (teacher / student).log()).sum() * 4 / outputs.numel()
    torch.testing.assert_close(loss("soft"), 0.75 * base + 0.25 * divergence)
    torch.testing.assert_close(loss("hard"), 0.75 * base + 0.25 * F.cross_entropy(outputs, taught.argmax(1)))


def test_a_class_without_test_images_keeps_the_training_indices(tmp_path):
    for name in ("train/blue/0.png", "train/green/0.png", "train/red/0.png", "val/red/0.png", "val/red/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    classes = find_classes(tmp_path / "train")
    assert Folder(tmp_path / "val", classes, None).targets == [2, 2]


def test_every_augmentation_runs_at_its_strongest():
    """timm asks Pillow for 0 bits of colour here, which Pillow 13 refuses: a run would end at a random step."""
    args = parse_args(["--aa", "rand-m10-n15-mstd0-inc1-p1.0", "--input-size", "32"])
    augment = build_transform(args, True)
    for _ in range(40):
        assert augment(Image.new("RGB", (40, 40), (10, 200, 90))).shape == (3, 32, 32)


def test_inaturalist(tmp_path):
    (tmp_path / "categories.json").write_text(
        json.dumps(
            [
                {"name": "oak", "kingdom": "plants"},
                {"name": "elm", "kingdom": "plants"},
                {"name": "fox", "kingdom": "animals"},
            ]
        )
    )
    for part, kinds in (("train", [2, 0, 1]), ("val", [1, 2])):
        files = [f"{part}_val2019/Any/{kind}/{part}{i}.png" for i, kind in enumerate(kinds)]
        listing = {
            "images": [{"file_name": file} for file in files],
            "annotations": [{"category_id": kind} for kind in kinds],
        }
        (tmp_path / f"{part}2019.json").write_text(json.dumps(listing))
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / file)
    species = INaturalist(tmp_path, False, 2019, "name", lambda image: image.size)
    assert species.num_classes == 3 and [species[i] for i in range(2)] == [((8, 8), 2), ((8, 8), 0)]
    kingdoms = INaturalist(tmp_path, True, 2019, "kingdom", lambda image: image.size)
    assert kingdoms.num_classes == 2 and [label for _, label in kingdoms.samples] == [0, 1, 1]


def test_help(run_python):
    child = run_python("main.py", "--help")
    assert child.stderr == ""
    for text in ("examples:", "exit codes:", "data:", "distillation:", "torchrun", *PUBLISHED):
        assert text in child.stdout


def test_every_published_flag_is_taken():
    parser = build_parser()
    for flag in PUBLISHED:
        actions = [a for option, a in parser._option_string_actions.items() if option.startswith(flag)]
        assert actions, flag


def test_the_published_command_lines_parse():
    args = parse_args(
        "--model stvit_small --data-path imagenet --batch-size 128 --drop-path 0.3 --epoch 300 --dist-eval "
        "--output_dir ckpt --input-size 224".split()
    )
    assert (args.data_set, args.epochs, args.lr, args.mixup, args.model_ema) == ("IMNET", 300, 5e-4, 0.8, True)
    assert args.preset == {}


def test_a_flag_replaces_the_preset():
    args = parse_args(["--lr", "0.5", "--epochs", "3"])
    assert (args.data_set, args.model, args.lr, args.epochs, args.mixup) == ("DIGITS", "stvit_tiny", 0.5, 3, 0.0)
    assert "lr" not in args.preset and "mixup" in args.preset


def test_log_lines_survive_a_cut(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text('{"epoch": 0}\n{"epoch": 1}\nnull\n{"epo')
    lines = JsonLines(path, lambda row: row["epoch"] < 1)
    lines.append({"epoch": 1, "loss": 2.5})
    assert (
        [json.loads(line) for line in path.read_text().splitlines()]
        == lines.rows
        == [{"epoch": 0}, {"epoch": 1, "loss": 2.5}]
    )
