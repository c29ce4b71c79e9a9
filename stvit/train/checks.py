"""Which values of the flags make sense, before anything else looks at them."""

from __future__ import annotations

import argparse
import math

from stvit.train.errors import UserError

COUNTS = {  # flag: the least whole number
    "batch_size": 1,
    "input_size": 1,
    "epochs": 1,
    "num_workers": 0,
    "start_epoch": 0,
    "max_steps": 1,
    "threads": 1,
    "save_every": 0,
    "max_bad_images": 0,
    "throughput": 0,
    "num_classes": 1,
    "train_num_samples": 1,
    "val_num_samples": 1,
    "processes": 1,
    "grad_accum_steps": 1,
    "recount": 1,
    "warmup_epochs": 0,
    "cooldown_epochs": 0,
    "patience_epochs": 0,
    "world_size": 1,
}
MOST = {  # more would end the machine, or PyTorch in a crash
    "threads": 1024,
    "num_workers": 1024,
    "processes": 1024,
    "input_size": 2**14,
    "batch_size": 2**20,
    "grad_accum_steps": 2**20,
    "num_classes": 2**24,
}
INF = math.inf
# flag: (low, high, whether low itself is allowed, whether high is). Lists: every element.
RANGES = {
    "drop": (0, 1, True, False),
    "drop_path": (0, 1, True, False),
    "model_ema_decay": (0, 1, True, True),
    "layer_decay": (0, 1, False, True),
    "lr": (0, INF, True, False),
    "min_lr": (0, INF, True, False),
    "warmup_lr": (0, INF, True, False),
    "opt_eps": (0, INF, True, False),
    "opt_betas": (0, 1, True, False),
    "momentum": (0, 1, True, False),
    "weight_decay": (0, INF, True, False),
    "clip_grad": (0, INF, False, False),
    "lr_noise": (0, 1, True, True),
    "lr_noise_pct": (0, INF, True, False),
    "lr_noise_std": (0, INF, True, False),
    "decay_epochs": (0, INF, False, False),
    "decay_rate": (0, INF, False, False),
    "color_jitter": (0, INF, True, False),
    "smoothing": (0, 1, True, False),
    "scale": (0, INF, False, False),
    "ratio": (0, INF, False, False),
    "hflip": (0, 1, True, True),
    "crop_pct": (0, 1, False, True),
    "reprob": (0, 1, True, True),
    "mixup": (0, INF, True, False),
    "cutmix": (0, INF, True, False),
    "cutmix_minmax": (0, 1, True, True),
    "mixup_prob": (0, 1, True, True),
    "mixup_switch_prob": (0, 1, True, True),
    "distillation_alpha": (0, 1, True, True),
    "distillation_tau": (0, INF, False, False),
}
PAIRS = ("scale", "ratio", "cutmix_minmax")  # MIN MAX


def check(args: argparse.Namespace) -> None:
    """Look at every flag alone, then at those that go together.

    Raises:
        UserError: for the first that makes no sense, with what was expected.
    """
    for name, least in COUNTS.items():
        number = getattr(args, name)
        if number is not None and number < least:
            raise UserError(f"{_flag(name)} must be at least {least}, not {number}")
        if number is not None and number > MOST.get(name, number):
            raise UserError(f"{_flag(name)} must be at most {MOST[name]}, not {number}")
    for name, limits in RANGES.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not _within(value, *limits):
                raise UserError(f"{_flag(name)} must be {_described(*limits)}, not {value:g}")
    for name in PAIRS:
        pair = getattr(args, name)
        if pair is not None and pair[0] > pair[1]:
            raise UserError(f"{_flag(name)} must be MIN MAX with MIN <= MAX, not {pair[0]:g} {pair[1]:g}")
    args.drop_path_rates = drop_path_rates(args.drop_path_schedule)
    if args.drop_path_rates:
        args.drop_path = max(rate for _, rate in args.drop_path_rates)
    _check_combinations(args)


def drop_path_rates(text: str) -> list[tuple[int, float]]:
    """[(first epoch, rate), ...] of "EPOCH:P,EPOCH:P", in order.

    Raises:
        UserError: for another form.
    """
    try:
        pairs = [part.split(":") for part in text.split(",") if part]
        rates = [(int(epoch), float(rate)) for epoch, rate in pairs]
    except ValueError:
        rates = [(-1, 0.0)]
    epochs = [epoch for epoch, _ in rates]
    if rates and (epochs[0] != 0 or epochs != sorted(set(epochs)) or not all(0 <= rate < 1 for _, rate in rates)):
        raise UserError(
            f"--drop-path-schedule {text}: expected EPOCH:P,EPOCH:P,... from epoch 0 on, each P at least 0 and below 1"
        )
    return rates


def _check_combinations(args: argparse.Namespace) -> None:
    if (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax) and args.batch_size % 2:
        raise UserError(
            f"mixup and cutmix need an even --batch-size, not {args.batch_size}; or turn them off with "
            "--mixup 0 --cutmix 0"
        )
    if not (args.output_dir or args.eval or args.throughput):
        for flag, given in (("--tensorboard", args.tensorboard), ("--save-every", args.save_every)):
            if given:
                raise UserError(f"{flag} writes into --output_dir DIR, which is not given")
    if args.distillation_type != "none" and not args.teacher_path:
        raise UserError("--distillation-type needs --teacher-path, the teacher's checkpoint")
    if args.distillation_type != "none" and args.finetune and not args.eval:
        raise UserError("--finetune and --distillation-type don't go together")
    if args.eval_ema and not args.model_ema:
        raise UserError("--eval-ema needs --model-ema")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _within(value: float, low: float, high: float, with_low: bool, with_high: bool) -> bool:
    above = value >= low if with_low else value > low
    return above and (value <= high if with_high else value < high)


def _described(low: float, high: float, with_low: bool, with_high: bool) -> str:
    least = f"at least {low:g}" if with_low else f"above {low:g}"
    if high == INF:
        return f"{least} and finite"
    return f"{least} and {'at most' if with_high else 'below'} {high:g}"
