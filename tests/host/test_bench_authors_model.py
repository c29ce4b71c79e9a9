"""bench.baselines.model: the baseline's numbers are our reference's, its operations are not ours."""

import pytest
import torch

import stvit
from bench.baselines.model import authors_model


@pytest.mark.parametrize("size", [(32, 64), (40, 56)])  # the second one needs padding in both stages
def test_authors_model_equals_the_reference_in_float64(size):
    options = {"num_classes": 5, "layerscale": (False, True, False, True), "init_values": 0.5}
    ours = stvit.stvit_tiny(backend="reference", **options).double()
    authors = authors_model("stvit_tiny", **options).double()
    assert list(authors.state_dict()) == list(ours.state_dict())
    authors.load_state_dict(ours.state_dict(), strict=True)
    outcomes = []
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(2, 5, dtype=torch.float64)
    for model in (ours, authors):
        x = images.clone().requires_grad_()
        y = model(x)
        (y * weight).sum().backward()
        outcomes.append([y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())])
    for expected, found in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_authors_model_draws_drop_path_as_ours_does():
    ours = stvit.stvit_tiny(backend="reference", drop_path_rate=0.5)
    authors = authors_model("stvit_tiny", drop_path_rate=0.5)
    authors.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 32, 32)
    outputs = []
    for model in (ours, authors):
        torch.manual_seed(1)
        outputs.append(model(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def test_authors_model_runs_none_of_our_ops(monkeypatch):
    ours = "super_token_sampling", "token_upsampling", "residual_depthwise", "channel_layer_norm", "residual_branch"
    for name in ours:
        monkeypatch.delattr(stvit.functional, name)
    model = authors_model("stvit_tiny", num_classes=5)
    assert all(p.is_contiguous() for p in model.parameters())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(("name", "options"), [("stvit_huge", {}), ("stvit_tiny", {"backend": "triton"})])
def test_authors_model_refuses_what_it_does_not_have(name, options):
    with pytest.raises(ValueError, match="name: expected one of|backend: the authors' formulation"):
        authors_model(name, **options)
