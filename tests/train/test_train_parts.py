"""Parts of the training program by themselves: flags, data sets, samplers, losses, log lines."""

import io
import json
import re
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler
from torch.nn import functional as F
from torch.utils.data import DistributedSampler

from stvit.train import listed
from stvit.train.cli import parse_args
from stvit.train.data import build_sets, build_transform
from stvit.train.distributed import Process
from stvit.train.errors import UserError
from stvit.train.flags import build_parser
from stvit.train.folders import Folder, INaturalist, find_classes
from stvit.train.images import read_image
from stvit.train.loader import Order, ShardSampler
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


@pytest.mark.parametrize("kind", [RepeatAugSampler, DistributedSampler])
def test_seed_and_epoch_order_the_images(kind):
    """With repeated augmentation too; a resumed epoch is the rest of the whole one."""

    def order(seed, epoch, skip=0):
        ordered = Order(kind(range(300), 2, 1), seed, Process(1, 2, torch.device("cpu")))
        ordered.start(epoch, skip)
        return list(ordered)

    assert order(0, 0) == order(0, 0) and order(0, 0, 40) == order(0, 0)[40:]
    for other in (order(1, 0), order(0, 1)):
        assert [index for _, _, index in other] != [index for _, _, index in order(0, 0)]
    assert [place for _, place, _ in order(0, 0)][:3] == [1, 3, 5]


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


def test_hidden_files_are_no_images(tmp_path):
    """What other programs leave beside images, at every level."""
    for name in ("blue/0.png", "blue/._0.png", "blue/.ipynb_checkpoints/0.png", ".hidden/0.png", "blue/deep/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("blue/Thumbs.db", "blue/.DS_Store", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "..data").symlink_to(tmp_path)
    classes = find_classes(tmp_path)
    files = [path for path, _ in Folder(tmp_path, classes, None).samples]
    assert list(classes) == ["blue"]
    assert [Path(file).relative_to(tmp_path).as_posix() for file in files] == ["blue/0.png", "blue/deep/1.png"]


def test_a_folder_below_a_hidden_one_is_read(tmp_path):
    """Only names from the data set's folder on count."""
    root = tmp_path / ".cache" / "photos"
    (root / "blue").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "blue" / "0.png")
    assert len(Folder(root, find_classes(root), None)) == 1


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    wide = np.array([[0, 128, 129, 257, 1000, 4000, 65407, 65535]], dtype=np.uint16)
    for name in ("grey.png", "grey.tiff", "grey.pgm"):
        Image.fromarray(wide).save(tmp_path / name)
        read = np.asarray(read_image(tmp_path / name))
        assert read.shape == (1, 8, 3)
        assert read[0, :, 0].tolist() == [0, 0, 1, 1, 4, 16, 255, 255]


@pytest.mark.parametrize("dtype, mode", [("int32", "I"), ("float32", "F")])
def test_values_without_a_range_are_refused(tmp_path, dtype, mode):
    Image.fromarray(np.ones((4, 4), dtype=dtype)).save(tmp_path / "odd.tiff")
    with pytest.raises(UserError, match=rf"odd\.tiff: not a readable image \(mode {mode}, 32-bit"):
        read_image(tmp_path / "odd.tiff")


def test_pixels_are_taken_as_stored(tmp_path):
    """Alpha and palette transparency are dropped, EXIF orientation not applied, an animation's first frame counts."""
    red, blue = (200, 10, 20), (20, 10, 200)
    Image.new("RGBA", (6, 4), (*red, 0)).save(tmp_path / "alpha.png")
    Image.new("LA", (6, 4), (77, 3)).save(tmp_path / "grey.png")
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, *red])
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 0]))
    palette.save(tmp_path / "colour.png", transparency=1)
    Image.new("CMYK", (6, 4), (0, 255, 255, 0)).save(tmp_path / "print.tiff")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it
    Image.new("RGB", (6, 4), red).save(tmp_path / "turned.png", exif=exif)
    frames = [Image.new("RGB", (6, 4), colour) for colour in (red, blue)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / "pages.tiff", save_all=True, append_images=frames[1:])
    Image.new("1", (6, 4), 1).save(tmp_path / "bits.png")
    expected = {"grey.png": (77, 77, 77), "print.tiff": (255, 0, 0), "bits.png": (255, 255, 255)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in tmp_path.iterdir():
            image = read_image(path)
            assert image.mode == "RGB" and image.size == (6, 4), path
            assert {colour for _, colour in image.getcolors()} == {expected.get(path.name, red)}, path


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


def test_the_page_names_every_flag_and_no_other():
    """docs/training.md, under any of a flag's names; what belongs to torchrun or another program is listed here."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page)) - {"--nproc_per_node", "--max-restarts"}
    named -= {"--checkpoint", "--output", "--data"}  # of stvit.visualize and of the benchmarks
    actions = build_parser()._actions
    assert [action.option_strings for action in actions if named.isdisjoint(action.option_strings)] == []
    assert named - {name for action in actions for name in action.option_strings} == set()


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


def write_tar(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            data = io.BytesIO()
            Image.new("RGB", (8, 8), (len(name), 0, 0)).save(data, "png")
            entry = tarfile.TarInfo(name)
            entry.size = len(data.getvalue())
            tar.addfile(entry, io.BytesIO(data.getvalue()))


def test_lists_and_tars(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "train.csv").write_text("path,class\na.png,oak\nb.png,elm\nc.png,elm\n")
    (tmp_path / "val.csv").write_text("c.png,oak\n")
    arguments = ["--data-set", "FOLDER", "--data-path", str(tmp_path), "--input-size", "8"]
    sets = build_sets(parse_args(arguments), None)
    assert sets.classes == ["elm", "oak"] and [label for _, label in sets.train.samples] == [1, 0, 0]
    assert sets.test[0][1] == 1 and sets.test[0][0].shape == (3, 8, 8)
    (tmp_path / "val.csv").write_text("c.png,ash\n")
    with pytest.raises(UserError, match="class ash"):
        build_sets(parse_args(arguments), None)
    for name in ("train.csv", "val.csv"):
        (tmp_path / name).unlink()
    write_tar(tmp_path / "train.tar", ["oak/1.png", "elm/2.png", "elm/3.png"])
    write_tar(tmp_path / "val.tar", ["oak/4.png"])
    sets = build_sets(parse_args(arguments), None)
    assert sets.classes == ["elm", "oak"] and sets.num_classes == 2 and len(sets.train) == 3
    assert sets.test[0][1] == 1 and sets.test[0][0].dtype == torch.uint8


def test_data_sets_of_timm(tmp_path, monkeypatch):
    for part in ("train", "val"):
        (tmp_path / part / "oak").mkdir(parents=True)
        Image.new("I;16", (8, 8), 65535).save(tmp_path / part / "oak" / "0.png")
    arguments = ["--dataset", "torch/folder", "--data-dir", str(tmp_path / "train"), "--input-size", "8"]
    sets = build_sets(parse_args(arguments), None)
    assert sets.classes == ["oak"] and sets.test[0][0].shape == (3, 8, 8)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name, reason in (("hfds/food101", "atasets"), ("torch/nothing", "nothing")):
        with pytest.raises(UserError, match=reason):
            build_sets(parse_args(["--dataset", name, "--data-dir", str(tmp_path)]), None)


def test_a_reader_of_timm(monkeypatch):
    """As of hfds/: the number of classes comes from a flag, a damaged image is named."""

    class Reader:
        def __getitem__(self, index):
            return io.BytesIO(files[index]), 4

    class Set:
        reader = Reader()

        def __len__(self):
            return len(files)

        def filename(self, index):
            return f"row {index}"

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "png")
    files = [buffer.getvalue(), b"damaged"]
    monkeypatch.setattr(listed, "PACKAGES", {})
    monkeypatch.setattr(listed, "create_dataset", lambda name, **options: Set())
    arguments = ["--dataset", "hfds/birds", "--input-size", "8", "--crop-pct", "1"]
    with pytest.raises(UserError, match="--num-classes"):
        build_sets(parse_args(arguments), None)
    sets = build_sets(parse_args([*arguments, "--num-classes", "9"]), None)
    assert sets.num_classes == 9 and len(sets.train) == 2
    assert sets.test[0][1] == 4 and sets.test[0][0][:, 0, 0].tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="row 1: not a readable image"):
        sets.train[1]
