"""STViT with Hugging Face's ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``; needs huggingface_hub.

    model = stvit.hub.STViT(**stvit.model.CONFIGS["stvit_small"], num_classes=10)
    model.save_pretrained("folder")  # config.json, with the arguments above, and model.safetensors
    same = stvit.hub.STViT.from_pretrained("folder")  # or the name of a repository of the Hub

``import stvit`` doesn't import this module. timm's folders and repositories are another door: ``stvit.timm_models``.
"""

from __future__ import annotations

from huggingface_hub import PyTorchModelHubMixin

from . import model


class STViT(
    model.STViT,
    PyTorchModelHubMixin,
    library_name="stvit",
    license="mit",
    tags=["image-classification", "super-token"],
    paper_url="https://arxiv.org/abs/2211.11167",
):
    """`stvit.STViT`, with the same arguments and state dict, that Hugging Face's Hub knows."""
