"""The flags: all of the published STViT training script's, and more of our own."""

from __future__ import annotations

import argparse
import os
from typing import Any, NoReturn

from stvit.train.errors import UserError

EXAMPLES = """\
examples: (after `pip install`, outside a checkout: stvit-train in the place of python main.py)
  python main.py
      train stvit_tiny on scikit-learn's handwritten digits: no download, a minute or two on a CPU
  python main.py --data-set FOLDER --data-path photos --model stvit_small --output_dir runs/photos
      train on any tree photos/{train,val}/CLASS/*.jpg (the second folder may be called test)
  torchrun --nproc_per_node 8 -m stvit.train --model stvit_small --data-path imagenet --batch-size 128 \\
           --drop-path 0.1 --output_dir runs/small
      ImageNet on eight GPUs, the published recipe
  python main.py --data-path imagenet --model stvit_small --eval --resume stvit-small-224.pth
      accuracy of a published checkpoint
  python main.py --data-set FOLDER --data-path photos --model stvit_small --finetune stvit-small-224.pth \\
           --finetune-mode train --lr 1e-4 --epochs 20 --output_dir runs/photos
      fine-tune a published checkpoint on your own classes

exit codes: 0 done, 1 the loss became NaN or infinite, memory or disk ran out, or a process was lost, 2 a flag or a file
is wrong, 130 interrupted, 143 SIGTERM or SIGUSR1 (the state is saved).
docs/training.md says more.
"""

DATA_SETS = ("SYNTHETIC", "DIGITS", "FOLDER", "IMNET", "CIFAR", "INAT", "INAT19")
IGNORED = "accepted and ignored, as in the published script"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line: the usage of a hundred flags would bury them."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows examples as they are written, and each flag's default where its text doesn't name it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "(default" in text or action.default in (None, "", False, argparse.SUPPRESS):
            return text
        value = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{text} (default: {'on' if value is True else value})"


def _cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _data_set(name: str) -> str:
    if name not in DATA_SETS and "/" not in name:
        raise argparse.ArgumentTypeError(f"{name}: expected {', '.join(DATA_SETS)}, or timm's PREFIX/NAME")
    return name


def _switch(group: Any, name: str, default: bool | None, text: str) -> None:
    group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=text)


# fmt: off
def _data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-set", "--dataset", default=None, type=_data_set, metavar="NAME", help="DIGITS: scikit-learn's digits. "
        "FOLDER: DIR/{train,val or test}/CLASS/*.jpg, or train and val as .csv (lines PATH,CLASS) or .tar. IMNET: the "
        "same with 1000 classes. CIFAR: CIFAR-100 as torchvision keeps it. INAT, INAT19: iNaturalist 2018, 2019. "
        "SYNTHETIC: random images. hfds/NAME, torch/NAME, and the streams wds/, tfds/NAME, hfids/NAME: timm's. Only "
        "hfds/ and hfids/ download what they don't find "
        "(default: IMNET with --data-path, otherwise DIGITS)")
    add("--train-split", default="train", metavar="NAME", help="for timm's data sets")
    add("--val-split", default="validation", metavar="NAME", help="for timm's data sets")
    add("--num-classes", default=None, type=int, metavar="N", help="for a data set of timm's that doesn't tell")
    add("--train-num-samples", default=None, type=int, metavar="N", help="training images, for a stream that doesn't "
        "tell")
    add("--val-num-samples", default=None, type=int, metavar="N", help="test images, likewise")
    add("--input-key", default="", metavar="NAME", help="where hfds/, wds/ and the like keep the image "
        "(default: theirs)")
    add("--target-key", default="", metavar="NAME", help="where they keep the label (default: theirs)")
    add("--synthetic", action="store_true", help="short for --data-set SYNTHETIC: random images, to measure or try a "
        "machine without data")
    add("--data-path", "--data-dir", default="", metavar="DIR", help="where the data set lies")
    add("--max-bad-images", default=0, type=int, metavar="N", help="skip and name up to N unreadable images instead of "
        "ending at the first")
    add("--inat-category", default="name", choices=["kingdom", "phylum", "class", "order", "supercategory", "family",
        "genus", "name"], help="level of iNaturalist's tree that makes the classes")


def _model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default="stvit_small", metavar="NAME", help="stvit_tiny, stvit_small, stvit_base, stvit_large, or "
        "any model of timm (default: stvit_small; stvit_tiny for DIGITS)")
    add("--input-size", default=224, type=int, metavar="PIXELS", help="side of the square input image")
    add("--drop", type=float, default=0.0, metavar="P", help="dropout rate")
    add("--drop-path", type=float, default=0.1, metavar="P", help="stochastic depth rate of the last block")
    add("--drop-path-schedule", default="", metavar="EPOCH:P,...", help="--drop-path from these epochs on, such as "
        "0:0.4,260:0.6")
    add("--backend", default="auto", metavar="NAME", help="super token kernels of the STViT models: auto, "
        "reference, triton or cuda")
    _switch(group, "association-grad", False, "send gradients through the association instead of holding it constant")
    _switch(group, "model-ema", True, "keep an exponential moving average of the weights")
    add("--model-ema-decay", type=float, default=0.99996, metavar="D", help="decay of that average, each step")
    _switch(group, "model-ema-force-cpu", False, "keep the average in host memory")
    _switch(group, "eval-ema", False, "evaluate the averaged weights instead of the trained ones")
    for name in ("--early-conv", "--conv-pos", "--use-ortho"):
        add(name, action="store_true", help=IGNORED)


def _run_flags(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--recipe", default="", metavar="NAME", help="flags of a published command; see --list-recipes. Flags that are "
        "given replace its own")
    add("--list-recipes", action="store_true", help="print the recipes and end")
    add("--config", default="", metavar="FILE", help="flags from a YAML file, such as the OUTPUT_DIR/config.yaml of "
        "another run; flags that are given replace its own")
    add("--output_dir", "--output-dir", default="", metavar="DIR", help="checkpoints, log and curve; a checkpoint.pth "
        "that is already there is resumed (default: nothing is saved; runs/digits for DIGITS)")
    add("--save-every", default=0, type=int, metavar="STEPS", help="also save every STEPS steps, and resume there "
        "(default: after each epoch only)")
    add("--resume", default="", metavar="FILE", help="continue from, or with --eval evaluate, this checkpoint")
    add("--finetune", default="", metavar="FILE", help="start from the weights of this checkpoint")
    add("--finetune-mode", default="eval", choices=["eval", "train"], help="eval, as published: BatchNorm statistics "
        "frozen, dropout and drop-path off")
    add("--eval", action="store_true", help="evaluate only")
    add("--start_epoch", "--start-epoch", default=0, type=int, metavar="N", help="first epoch, if nothing is resumed")
    add("--seed", default=0, type=int, metavar="N", help="seed of weights, order and augmentation")
    add("--tensorboard", action="store_true", help="also write OUTPUT_DIR/tensorboard")
    add("--wandb", default="", metavar="PROJECT", help="also log to this project of Weights & Biases")
    add("--dist-eval", action="store_true", help="accepted: under torchrun the test set is always shared out, exactly")
    add("--world_size", "--world-size", default=1, type=int, metavar="N", help="under SLURM, the number of processes; "
        "torchrun sets it itself")
    add("--processes", default=1, type=int, metavar="N", help="start N processes on this machine, as torchrun "
        "does, but without its report when one fails")
    add("--dist_url", "--dist-url", default="env://", metavar="URL", help="where the processes meet")


def _speed_flags(parser: Parser) -> None:
    group = parser.add_argument_group("device and speed")
    add = group.add_argument
    add("--device", default=None, metavar="DEVICE", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    _switch(group, "amp", None, "mixed precision (default: on with a GPU)")
    add("--amp-dtype", default="auto", metavar="DTYPE", help="bf16, fp16, or auto: bf16 where the GPU has it")
    _switch(group, "channels-last", True, "channels_last memory format, the fast one for STViT")
    _switch(group, "compile", False, "torch.compile the model")
    add("--compile-backend", default="inductor", metavar="NAME", help="that of torch.compile; inductor needs a C++ "
        "compiler on the CPU, aot_eager none")
    _switch(group, "cuda-graph", False, "record a whole training step once and replay it; where that can't be, the "
        "reason is told and steps stay plain")
    _switch(group, "fused", None, "update all parameters in one kernel (default: on with a GPU)")
    add("--matmul-precision", default="highest", choices=["highest", "high", "medium"], help="of float32 "
        "matrix products on the GPU: high uses TF32; mixed precision is not concerned")
    _switch(group, "checkpoint-activations", False, "keep only the input of each block and run it again in the "
        "backward: less memory, more time")
    _switch(group, "sync-bn", False, "BatchNorm over the batches of all processes; GPUs only")
    add("--throughput", default=0, type=int, metavar="STEPS", help="measure images/s of training and inference over "
        "STEPS steps without data, and end")
    add("--detect-anomaly", action="store_true", help="stop at the first layer whose output or gradient is not finite, "
        "and name it; slow")
    add("--threads", default=None, type=int, metavar="N", help="CPU threads of each process, at most one "
        "for each core (default: PyTorch's)")
    add("--num_workers", "--num-workers", default=min(10, _cpus()), type=int, metavar="N", help="processes that load "
        "images, for each training process (default: 10, or the number of CPUs if that is less)")
    _switch(group, "pin-mem", True, "copy batches to the GPU through pinned memory")


def _schedule_flags(parser: Parser) -> None:
    group = parser.add_argument_group("length, optimizer and learning rate")
    add = group.add_argument
    add("--batch-size", default=64, type=int, metavar="N", help="images a step, for each process")
    add("--grad-accum-steps", default=1, type=int, metavar="N", help="batches a step: their gradients are averaged")
    add("--epochs", default=300, type=int, metavar="N", help="length of the run")
    add("--max-steps", default=None, type=int, metavar="N", help="stop after N steps in all, resumed ones included")
    add("--lr", type=float, default=5e-4, metavar="LR", help="learning rate for 512 images a step; the rate used is "
        "LR x batch size x processes / 512")
    add("--opt", default="adamw", metavar="NAME", help="any optimizer of timm")
    add("--opt-eps", default=1e-8, type=float, metavar="EPS", help="its epsilon")
    add("--opt-betas", default=None, type=float, nargs="+", metavar="B", help="its betas (default: its own)")
    add("--momentum", type=float, default=0.9, metavar="M", help="momentum, for SGD")
    add("--weight-decay", type=float, default=0.05, metavar="W", help="weight decay of all but vectors")
    add("--clip-grad", type=float, default=None, metavar="NORM", help="clip the gradient norm (default: off)")
    add("--sched", default="cosine", metavar="NAME", help="any learning rate schedule of timm, or none")
    _switch(group, "sched-on-updates", False, "change the learning rate at each step instead of each epoch")
    add("--lr-noise", type=float, nargs="+", default=None, metavar="PCT", help="parts of the run between which the "
        "rate is noisy (default: off)")
    add("--lr-noise-pct", type=float, default=0.67, metavar="PCT", help="limit of that noise")
    add("--lr-noise-std", type=float, default=1.0, metavar="STD", help="its standard deviation")
    _switch(group, "lag-lr", False, "the rate of an epoch is that of the one before, as in the authors' script: their "
        "first two epochs both run at --warmup-lr")
    add("--layer-decay", type=float, default=None, metavar="X", help="multiply the rate by X for each block away from "
        "the head, for fine-tuning (default: off)")
    add("--warmup-lr", type=float, default=1e-6, metavar="LR", help="rate at the start of the warm-up")
    add("--min-lr", type=float, default=1e-5, metavar="LR", help="rate at the end")
    add("--decay-epochs", type=float, default=30, metavar="N", help="between two decays, for the step schedule")
    add("--warmup-epochs", type=int, default=5, metavar="N", help="length of the warm-up")
    add("--cooldown-epochs", type=int, default=10, metavar="N", help="accepted; training ends after --epochs, as with "
        "the published script")
    add("--patience-epochs", type=int, default=10, metavar="N", help="for the plateau schedule")
    add("--decay-rate", "--dr", type=float, default=0.1, metavar="RATE", help="factor of a decay")


def _augmentation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("augmentation and loss")
    add = group.add_argument
    add("--color-jitter", type=float, default=0.4, metavar="X", help="strength of colour jitter, where --aa is none")
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="AutoAugment policy of timm, or none")
    add("--smoothing", type=float, default=0.1, metavar="X", help="label smoothing")
    add("--train-interpolation", default="bicubic", choices=["random", "bilinear", "bicubic"], help="how the crop is "
        "resized")
    add("--scale", type=float, nargs=2, default=[0.08, 1.0], metavar=("MIN", "MAX"), help="area of the random crop")
    add("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], metavar=("MIN", "MAX"), help="its aspect ratio")
    add("--hflip", type=float, default=0.5, metavar="P", help="probability of a left-right flip")
    add("--crop-pct", type=float, default=None, metavar="X", help="part of a test image's side that is kept (default: "
        "224/256 up to 224 pixels, all of it above)")
    _switch(group, "repeated-aug", True, "show each drawn image three times an epoch, augmented differently")
    add("--reprob", type=float, default=0.25, metavar="P", help="probability of random erasing")
    add("--remode", default="pixel", choices=["const", "rand", "pixel"], help="what is put there: black, a colour, or "
        "noise")
    add("--recount", type=int, default=1, metavar="N", help="erased rectangles an image")
    add("--resplit", action="store_true", help=IGNORED)
    add("--mixup", type=float, default=0.8, metavar="ALPHA", help="0 turns it off")
    add("--cutmix", type=float, default=1.0, metavar="ALPHA", help="0 turns it off")
    add("--cutmix-minmax", type=float, nargs=2, default=None, metavar=("MIN", "MAX"), help="instead of --cutmix "
        "(default: off)")
    add("--mixup-prob", type=float, default=1.0, metavar="P", help="probability of either")
    add("--mixup-switch-prob", type=float, default=0.5, metavar="P", help="of cutmix, where both are on")
    add("--mixup-mode", default="batch", choices=["batch", "pair", "elem"], help="what shares one mix")


def _teacher_flags(parser: Parser) -> None:
    group = parser.add_argument_group("distillation")
    add = group.add_argument
    add("--distillation-type", default="none", choices=["none", "soft", "hard"], help="how the teacher is followed")
    add("--teacher-model", default="regnety_160", metavar="NAME", help="any model of timm")
    add("--teacher-path", default="", metavar="FILE", help="the teacher's checkpoint")
    add("--distillation-alpha", default=0.5, type=float, metavar="X", help="weight of the teacher's part of the loss")
    add("--distillation-tau", default=1.0, type=float, metavar="T", help="temperature of the soft form")
# fmt: on


def build_parser() -> argparse.ArgumentParser:
    """The parser; its defaults are those of the published script where that had one."""
    parser = Parser(
        prog="main.py",
        usage="main.py [flags]",
        description="Train and evaluate Super Token Vision Transformers.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    for add_flags in (
        _data_flags,
        _model_flags,
        _run_flags,
        _speed_flags,
        _schedule_flags,
        _augmentation_flags,
        _teacher_flags,
    ):
        add_flags(parser)
    return parser
