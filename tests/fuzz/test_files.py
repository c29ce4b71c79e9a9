"""Damaged and foreign files: checkpoints load as they are or not at all, images are read or named."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import stvit
from stvit.train.errors import UserError
from stvit.train.images import read_image
from tests.support.cases import PHASES

Change = Callable[[bytes], bytes]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """What may happen to a file: bytes flipped, cut, doubled, blanked or put in, more often near its ends."""
    kind = draw(st.sampled_from(["flip", "cut", "blank", "insert", "double"]))
    near, at = draw(st.sampled_from(["start", "end", "anywhere"])), draw(st.floats(0, 1, exclude_max=True))
    count, junk = draw(st.integers(1, 8)), draw(st.binary(min_size=1, max_size=16))

    def change(data: bytes) -> bytes:
        span = min(len(data), 200) if near != "anywhere" else len(data)
        place = int(at * span) + (len(data) - span if near == "end" else 0)
        if kind == "cut":
            return data[:place]
        if kind == "insert":
            return data[:place] + junk + data[place:]
        if kind == "double":
            return data[: place + count] + data[place:]
        middle = bytes(count) if kind == "blank" else junk
        return data[:place] + middle + data[place + len(middle) :]

    return change


class Net(nn.Module):
    """A few parameters and buffers of several dtypes: what the loader does doesn't depend on the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(2, 3, 1), nn.Linear(3, 2)
        self.register_buffer("count", torch.tensor(5))


def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return Net().state_dict()


def written(kind: str, contents: Any) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file, _use_new_zipfile_serialization=kind != "legacy.pth")
    return file.getvalue()


FILES: dict[str, bytes] = {
    "zip.pth": written("zip.pth", {"model": state(), "epoch": 3, "args": {"lr": 0.1}}),
    "legacy.pth": written("legacy.pth", {"model": state(), "epoch": 3}),
    "plain.safetensors": safetensors.torch.save(state()),
}


def load(path: Path, **options: Any) -> Net:
    """The model as loaded; where the loader raises, it must be one line about the file, and the model untouched."""
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        return stvit.load_checkpoint(model, path, **options)
    except stvit.CheckpointError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1, repr(error)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        raise


@settings(max_examples=60, phases=PHASES)
@given(name=st.sampled_from(sorted(FILES)), how=st.lists(changes(), min_size=1, max_size=3), other=st.booleans())
def test_damaged_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, name: str, how: list[Change], other: bool
) -> None:
    data = FILES[name]
    for change in how:
        data = change(data)
    suffix = {".pth": ".safetensors", ".safetensors": ".pth"}[Path(name).suffix] if other else Path(name).suffix
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    path.write_bytes(data)
    try:
        load(path)
    except stvit.CheckpointError:
        pass


def tensors(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Tensors that are or aren't what a parameter of this shape can be copied from."""
    kinds: list[Callable[[Tensor], Any]] = [
        lambda x: x,
        lambda x: x.double(),
        lambda x: x.half(),
        lambda x: x.to(torch.float8_e4m3fn),
        lambda x: x.long(),
        lambda x: x > 0,
        lambda x: x.cfloat(),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse() if x.dim() else x,
        lambda x: torch.quantize_per_tensor(x, 0.1, 3, torch.qint8),
        lambda x: nn.Parameter(x),
        lambda x: x[None],
        lambda x: x.flatten()[:-1],
        lambda x: x.expand(2, *x.shape)[0],
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: torch.nested.nested_tensor([x]),
        lambda x: torch.complex(x * 0, -x).conj().imag,
    ]
    return st.sampled_from(kinds).map(lambda kind: kind(torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape)))


keys = st.sampled_from([*state(), "", "module.", "model", "x.y"]) | st.integers(-1, 1) | st.none() | st.just((1, 2))
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
garbage = st.recursive(
    leaves | tensors((2,)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=6,
)


@st.composite
def contents(draw: st.DrawFn) -> Any:
    """A state dict with some values changed, taken out, added or renamed, alone or among other things; or garbage."""
    weights: dict[Any, Any] = dict(state())
    for name in draw(st.lists(st.sampled_from(sorted(weights)), unique=True, max_size=2)):
        weights[name] = draw(tensors(tuple(weights[name].shape)) | garbage)
    for name in draw(st.lists(st.sampled_from(sorted(weights)), unique=True, max_size=1)) * draw(st.integers(0, 1)):
        del weights[name]
    weights |= draw(st.dictionaries(keys, garbage, max_size=1)) if draw(st.booleans()) else {}
    if prefix := draw(st.sampled_from(["", "", "module.", "_orig_mod.module.", "module"])):
        weights = {f"{prefix}{name}": value for name, value in weights.items()}
    around: list[Any] = [weights, {"model": weights}, {"model": weights, "model_ema": weights, 1: 2}, draw(garbage)]
    return draw(st.sampled_from(around))


OPTIONS = st.fixed_dictionaries({}, optional={"use_ema": st.booleans(), "head": st.just("skip")})


def right(given: Any, own: Tensor) -> bool:
    """Whether a value of a file is a tensor that can be copied into `own` without a change of its kind."""
    plain = isinstance(given, Tensor) and not (given.is_nested or given.is_quantized or given.is_meta)
    return plain and given.layout is torch.strided and given.shape == own.shape


@settings(max_examples=60, phases=PHASES)
@given(given=contents(), options=OPTIONS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore::UserWarning")
def test_foreign_contents(tmp_path_factory: pytest.TempPathFactory, given: Any, options: dict[str, Any]) -> None:
    """What is loaded is what the file holds, value for value."""
    path = tmp_path_factory.getbasetemp() / "foreign.pth"
    try:
        torch.save(given, path)
    except Exception:  # what can't be saved is in no file
        return
    try:
        model = load(path, **options)
    except stvit.CheckpointError:
        return
    weights = given.get("model_ema" if options.get("use_ema") else "model", given)
    for name, value in model.state_dict().items():
        if options.get("head") == "skip" and name.startswith("head."):
            continue
        found = next(weights[key] for key in weights if str(key).endswith(name))
        assert right(found, value) and torch.equal(found.detach().to(value.dtype), value)


ARGUMENTS = st.sampled_from([None, 3, 1.5, b"x.pth", object(), [], "\0", "", "x" * 5000, ".", "no/such.pth"])


@given(model=st.sampled_from([None, 3, {}, Net]), path=ARGUMENTS, head=st.sampled_from(["strict", None, "", 3, []]))
def test_wrong_arguments_of_load_checkpoint(model: Any, path: Any, head: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        stvit.load_checkpoint(model, path, head=head)
    text = str(caught.value)
    about_file = isinstance(caught.value, stvit.CheckpointError) and text.startswith(f"{path}: ")
    assert about_file or re.match("(model|path|head): expected ", text), repr(caught.value)
    assert len(text.splitlines()) == 1


MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "GIF": ["L", "P", "RGB"],
    "BMP": ["1", "L", "P", "RGB"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB"],
    "WEBP": ["RGB", "RGBA"],
    "PPM": ["1", "L", "RGB", "I;16"],
    "TGA": ["L", "LA", "P", "RGB", "RGBA"],
    "ICO": ["RGB", "RGBA"],
    "JPEG2000": ["L", "LA", "RGB", "RGBA"],
}
EXACT = ("PNG", "BMP", "TIFF", "PPM", "TGA")


@st.composite
def images(draw: st.DrawFn) -> tuple[str, Image.Image, bytes]:
    """(format, image, file) of a drawn size, mode and kind of file."""
    kind = draw(st.sampled_from(sorted(MODES)))
    mode = draw(st.sampled_from(MODES[kind]))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    size = (draw(st.integers(16, 24)), draw(st.integers(16, 24))) if kind == "ICO" else (draw(sides), draw(sides))
    if mode in ("I;16", "I", "F"):
        values = random.integers(0, 2**16, size[::-1])
        image = Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    else:
        image = Image.fromarray(random.integers(0, 256, (*size[::-1], 3)).astype(np.uint8)).convert(mode)
    file = io.BytesIO()
    options = {"sizes": [size]} if kind == "ICO" else {}
    image.save(file, kind, **options)
    return kind, image, file.getvalue()


sides = st.integers(1, 20)


def read(data: bytes) -> Image.Image | None:
    """The image, or None where an error names the file in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of what it repairs
        try:
            return read_image(io.BytesIO(data), "folder/photo")
        except UserError as error:
            text = str(error)
            assert text.startswith("folder/photo: not a readable image (") and len(text.splitlines()) == 1, text
            return None


@settings(max_examples=50, phases=PHASES)
@given(drawn=images())
def test_images_of_every_kind(drawn: tuple[str, Image.Image, bytes]) -> None:
    kind, image, data = drawn
    found = read(data)
    if image.mode in ("I", "F"):
        assert found is None
        return
    assert found is not None and found.mode == "RGB" and found.size == image.size
    if kind in EXACT and image.mode == "I;16":
        grey = np.asarray(image).astype(np.float64) / 257
        assert np.abs(np.asarray(found)[..., 0] - grey).max() <= 0.51
    elif kind in EXACT and image.mode != "LAB":
        assert np.array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


@settings(max_examples=80, phases=PHASES)
@given(drawn=images(), how=st.lists(changes(), min_size=1, max_size=3))
def test_damaged_images(drawn: tuple[str, Image.Image, bytes], how: list[Change]) -> None:
    _, _, data = drawn
    for change in how:
        data = change(data)
    found = read(data)
    assert found is None or (found.mode == "RGB" and min(found.size) >= 1)
