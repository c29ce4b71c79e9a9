"""The picture of super tokens."""

import numpy as np
import torch
from PIL import Image

import stvit
from stvit.visualize import borders, figure, main, mean_colours, owners, super_tokens


def test_owners_by_loops():
    """Against the definition, pixel by pixel, with padding and with weight lying outside the grid."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, 10)
    _, association = stvit.super_token_sampling(x, (3, 4), backend="reference")
    found = owners(association)
    gh, gw = 3, 3
    assert association.mass.shape[-2:] == (gh, gw) and found.shape == (2, 7, 10)
    outside = 0
    for b, row, column in np.ndindex(2, 7, 10):
        weights = association.weights[b, :, row, column]
        places = [(row // 3 + k // 3 - 1, column // 4 + k % 3 - 1) for k in range(9)]
        inside = [k for k, (r, c) in enumerate(places) if 0 <= r < gh and 0 <= c < gw]
        best = max(inside, key=lambda k: float(weights[k]))
        outside += int(weights.argmax()) not in inside
        assert found[b, row, column] == places[best][0] * gw + places[best][1]
    assert outside > 0  # otherwise the rule about the border was not tested


def test_super_tokens_of_a_model():
    model = stvit.stvit_tiny(num_classes=2)
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    blocks = super_tokens(model, torch.randn(3, 64, 96))
    assert [(block.name, block.grid, tuple(block.owner.shape)) for block in blocks] == [
        ("layers.0.blocks.0", (2, 3), (16, 24)),
        ("layers.1.blocks.0", (2, 3), (8, 12)),
    ]
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks  # left as it was


def test_an_image_of_two_colours_is_cut_where_they_meet():
    """With the pixels themselves as features, super tokens follow the edge even off the tile's border."""
    x = torch.zeros(1, 2, 16, 16)
    x[:, 0, :, :10], x[:, 1, :, 10:] = 9.0, 9.0
    _, association = stvit.super_token_sampling(x, 8, n_iter=3, scale=1.0, backend="reference")
    edges = borders(owners(association)[0].numpy())
    assert edges[:, 9].all() and not edges[:, 10:15].any()


def test_colours_and_borders():
    picture = np.arange(12, dtype=float).reshape(2, 2, 3)
    owner = np.array([[0, 0], [0, 2]])
    colours = mean_colours(picture, owner)
    np.testing.assert_allclose(colours[0, 0], picture.reshape(4, 3)[:3].mean(0))
    np.testing.assert_allclose(colours[1, 1], picture[1, 1])
    assert borders(owner).tolist() == [[False, True], [True, False]]


def test_program(tmp_path, capsys):
    stvit.save_checkpoint(
        tmp_path / "tiny.pth", model=stvit.stvit_tiny(num_classes=7).state_dict(), args={"model": "stvit_tiny"}
    )
    random = np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8)
    Image.fromarray(random).save(tmp_path / "photo.png")
    output = tmp_path / "out.png"
    arguments = [str(tmp_path / "photo.png"), "--checkpoint", str(tmp_path / "tiny.pth"), "--input-size", "64"]
    assert main([*arguments, "--output", str(output)]) == 0
    assert "2 blocks of stvit_tiny" in capsys.readouterr().out
    with Image.open(output) as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    assert (abs(pixels - [255, 230, 26]).max(-1) < 30).any()  # outlines are drawn


def test_errors(tmp_path, capsys):
    (tmp_path / "junk.png").write_bytes(b"junk")
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 40)).save(photo)
    for arguments, expected in (
        ([str(tmp_path / "junk.png")], "junk.png"),
        ([str(tmp_path / "none.png")], "none.png"),
        ([str(photo), "--model", "resnet50"], "stvit_small"),
        ([str(photo), "--model", "stvit_tiny", "--backend", "opencl"], "--backend"),
        ([str(photo), "--model", "stvit_tiny", "--checkpoint", str(tmp_path / "junk.png")], "junk.png"),
        (
            [str(photo), "--model", "stvit_tiny", "--input-size", "32", "--output", "/nowhere/out.png"],
            "/nowhere/out.png",
        ),
        ([str(photo), "--input-size", "0"], "--input-size"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and expected in error, error


def test_membership_and_attention_of_one_super_token():
    """Membership is what upsampling would give the super token's own indicator; attention's rows sum to 1."""
    block = super_tokens(stvit.stvit_tiny(num_classes=2), torch.randn(3, 64, 96))[0]
    token = block.token_at((0.9, 0.5))
    assert token == block.owner[14, 12]
    indicator = torch.zeros(1, 1, 2, 3)
    indicator.view(-1)[token] = 1.0
    expected = stvit.token_upsampling(indicator, block.association, backend="reference")[0, 0]
    torch.testing.assert_close(block.membership(token), expected)
    assert block.membership(token).sum() > 0
    torch.testing.assert_close(block.attention.sum(1), torch.ones(6))


def test_attention_weights_are_those_that_attention_uses():
    attention = stvit.StokenAttention(8, 1, num_heads=2, backend="reference").stoken_refine
    x = torch.randn(1, 8, 3, 4)
    weights = attention.weights(x)
    assert weights.shape == (1, 2, 12, 12)
    v = attention.qkv(x).reshape(1, 2, 3, 4, 12)[:, :, 2]  # heads, then q, k, v
    y = (v @ weights.transpose(2, 3)).reshape(1, 8, 3, 4)
    torch.testing.assert_close(attention.proj(y), attention(x))


def test_a_figure_for_notebooks():
    model = stvit.stvit_tiny(num_classes=2)
    for point in (None, (0.5, 0.5)):
        drawn = figure(model, torch.randn(3, 64, 64), point)
        assert sum(bool(panel.get_images()) for panel in drawn.axes) == 5  # the image, and two for each of two blocks


def test_a_folder_and_a_point(tmp_path, capsys):
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (40, 40), "green").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    arguments = [str(tmp_path), "--model", "stvit_tiny", "--input-size", "32", "--output", str(tmp_path / "drawn")]
    assert main([*arguments, "--point", "10", "20"]) == 0
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["a.png", "b.png"]
    capsys.readouterr()
    assert main([*arguments, "--point", "10", "32"]) == 2 and "--point" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2 and "no image in this folder" in capsys.readouterr().err


def test_a_bare_state_dict_asks_for_the_model(tmp_path, capsys):
    stvit.save_checkpoint(tmp_path / "bare.safetensors", model=stvit.stvit_tiny(num_classes=2).state_dict())
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    assert main([str(tmp_path / "photo.png"), "--checkpoint", str(tmp_path / "bare.safetensors")]) == 2
    assert "(name the model with --model)" in capsys.readouterr().err
