"""Sets of flag values: what a data set implies, the published recipes, and a run's config.yaml."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stvit.checkpoint import whole_file
from stvit.train.errors import UserError

# What a data set implies for flags that were not given. The other sets keep the published recipe.
PRESETS: dict[str, dict[str, Any]] = {
    "DIGITS": {
        "model": "stvit_tiny",
        "output_dir": "runs/digits",
        "input_size": 64,
        "batch_size": 64,
        "epochs": 8,
        "lr": 8e-3,
        "min_lr": 1e-5,
        "warmup_epochs": 1,
        "cooldown_epochs": 0,
        "sched_on_updates": True,
        "drop_path": 0.0,
        "model_ema": False,
        "aa": "none",
        "color_jitter": 0.0,
        "reprob": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "repeated_aug": False,
        "hflip": 0.0,
        "scale": [0.6, 1.0],
        "ratio": [0.8, 1.25],
        "crop_pct": 1.0,
        "num_workers": 0,
        "threads": 1,  # so small a model gains little from two threads, and loses much where the CPU is shared
    },
}

_TRAIN = {"batch_size": 128, "input_size": 224, "epochs": 300}
_FINETUNE = {
    "batch_size": 64,
    "input_size": 384,
    "epochs": 30,
    "lr": 5e-6,
    "min_lr": 5e-6,
    "warmup_epochs": 0,
    "weight_decay": 1e-8,
}
# The authors' commands, for 8 processes: with another number --lr, which is for 512 images a step, scales by itself.
RECIPES: dict[str, dict[str, Any]] = {
    "small-224": {"model": "stvit_small", "drop_path": 0.1, **_TRAIN},
    "base-224": {"model": "stvit_base", "drop_path": 0.4, **_TRAIN},
    "large-224": {"model": "stvit_large", "drop_path": 0.6, **_TRAIN},
    "large-224-schedule": {"model": "stvit_large", "drop_path_schedule": "0:0.4,260:0.6", **_TRAIN},
    "small-384": {"model": "stvit_small", "drop_path": 0.1, **_FINETUNE},
    "base-384": {"model": "stvit_base", "drop_path": 0.4, **_FINETUNE},
    "large-384": {"model": "stvit_large", "drop_path": 0.6, **_FINETUNE},
}
# What belongs to one run and not to its recipe.
OF_ONE_RUN = (
    "preset",
    "drop_path_rates",
    "recipe",
    "list_recipes",
    "config",
    "output_dir",
    "resume",
    "eval",
    "start_epoch",
)


def flag(name: str, value: Any) -> list[str]:
    """The command line that sets ``name`` to ``value``; empty where the default says the same."""
    dashed = "--" + (name if name == "output_dir" else name.replace("_", "-"))
    if isinstance(value, bool):
        return [dashed] if value else [f"--no-{dashed[2:]}"]
    values = value if isinstance(value, list) else [value]
    return [dashed, *map(str, values)]


def command_line(values: dict[str, Any], parser: argparse.ArgumentParser, source: str) -> list[str]:
    """Flags that say what ``values`` says, for the parser to check like any others.

    Raises:
        UserError: for a name that is no flag.
    """
    actions = {action.dest: action for action in parser._actions}
    words: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in actions or name in OF_ONE_RUN:
            raise UserError(f"{source}: {key} is no flag for it (--help lists the flags)")
        plain_switch = isinstance(actions[name], argparse._StoreTrueAction)
        if value is None or (plain_switch and value is False):
            continue
        words += flag(name, value)
    return words


def recipe(name: str) -> dict[str, Any]:
    """The values of a recipe.

    Raises:
        UserError: for an unknown name.
    """
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def listing() -> str:
    """All recipes, as flags."""
    lines = [
        f"{name:<20} {' '.join(w for key, v in values.items() for w in flag(key, v))}"
        for name, values in RECIPES.items()
    ]
    return "\n".join([*lines, "", "The 384 recipes fine-tune: name the checkpoint with --finetune."])


def read_config(path: str) -> dict[str, Any]:
    """What a YAML file says, {flag: value}.

    Raises:
        UserError: where it can't be read, or is no mapping.
    """
    import yaml  # timm needs it too

    try:
        values = yaml.safe_load(Path(path).expanduser().read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not a YAML file ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected lines such as 'lr: 0.001'")
    return values


def write_config(path: Path, args: argparse.Namespace) -> None:
    """Save the flags in force, for `read_config`.

    Raises:
        OSError: naming the file.
    """
    import yaml

    values = {name: value for name, value in vars(args).items() if name not in OF_ONE_RUN}
    with whole_file(path) as partial:
        partial.write_text(yaml.safe_dump(values, sort_keys=True))
