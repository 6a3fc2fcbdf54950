"""The latent classifier's shape as the paper gives it, the pixel classifier on real digits."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from functa.models.config import ClassifierConfig
from functa.models.latents.classifier import build_classifier, build_pixel_classifier, classification_loss, decay_groups


@pytest.mark.parametrize(
    ("config", "latent_shape", "classes", "millions"),
    [
        # App. C.3; the 64M of the paper's table do not follow from it
        (ClassifierConfig(width=768, depth=18, heads=16, dropout=0.2), (16, 16, 128), 1000, 86.15),
        # Table 5, from the top
        (ClassifierConfig(width=128, depth=12, heads=16), (8, 8, 16), 10, 1.60),
        (ClassifierConfig(width=384, depth=12, heads=16), (4, 4, 64), 10, 14.24),
        (ClassifierConfig(width=384, depth=16, heads=16), (4, 4, 64), 10, 18.98),
    ],
)
def test_parameter_counts_are_those_of_the_written_hyperparameters(config, latent_shape, classes, millions) -> None:
    with torch.device("meta"):
        model = build_classifier(config, latent_shape, classes)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == millions


def small(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    return build_classifier(ClassifierConfig(width=16, depth=2, heads=4, dropout=dropout), (4, 4, 6), 7)


def test_the_mlp_of_vectors_is_hidden_layers_with_silu_and_dropout() -> None:
    """B.1: width 1024, depth 3, dropout 0.2, on 512 numbers."""
    config = ClassifierConfig(kind="mlp", width=1024, depth=3, dropout=0.2)
    with torch.device("meta"):
        model = build_classifier(config, (1, 1, 512), 10)
    kinds = [type(layer).__name__ for layer in model.children()]
    assert kinds == ["Flatten", *["Linear", "SiLU", "Dropout"] * 3, "Linear"]
    sizes = [(layer.in_features, layer.out_features) for layer in model.children() if isinstance(layer, nn.Linear)]
    assert sizes == [(512, 1024), (1024, 1024), (1024, 1024), (1024, 10)]
    assert {layer.p for layer in model.children() if isinstance(layer, nn.Dropout)} == {0.2}


def test_a_vector_is_cut_into_tokens_in_order() -> None:
    config = ClassifierConfig(width=16, depth=1, heads=4, token_channels=3, dropout=0)
    torch.manual_seed(0)
    model = build_classifier(config, (1, 1, 12), 7)
    assert model.network.pos_embed.shape == (1, 4, 16)  # type: ignore[union-attr]
    seen: list[torch.Tensor] = []
    model.network.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    z = torch.arange(24.0).reshape(2, 1, 1, 12)
    assert model(z).shape == (2, 7)
    assert torch.equal(seen[0].permute(0, 2, 3, 1).reshape(2, 4, 3), z.reshape(2, 4, 3))


def test_tokens_that_do_not_divide_a_position_are_refused() -> None:
    with pytest.raises(ValueError, match="12 numbers cannot be cut into tokens of 5: choose a divisor"):
        build_classifier(ClassifierConfig(token_channels=5), (1, 1, 12), 7)


def test_latents_become_logits() -> None:
    assert small()(torch.randn(3, 4, 4, 6)).shape == (3, 7)


def test_positions_matter_and_channels_are_last() -> None:
    model, z = small().eval(), torch.randn(2, 4, 4, 6)
    assert not torch.allclose(model(z), model(z.flip(1)), atol=1e-6)


def test_there_is_exactly_one_dropout_and_it_is_before_the_head() -> None:
    model = small(0.2)
    active = [name for name, part in model.named_modules() if isinstance(part, nn.Dropout) and part.p > 0]
    assert active == ["network.head_drop"]


def test_decay_spares_norms_biases_and_positions() -> None:
    model = small()
    decayed, free = decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(names[id(p)].endswith(".weight") and p.ndim >= 2 for p in decayed["params"])
    assert "network.pos_embed" in {names[id(p)] for p in free["params"]}
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_smoothed_loss_equals_its_closed_form() -> None:
    logits, labels, smoothing = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 2]), 0.1
    target = torch.full((5, 4), smoothing / 4, dtype=torch.float64)
    target[range(5), labels] += 1 - smoothing
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert classification_loss(logits, labels, smoothing).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("resolution", "channels"), [(8, 1), (28, 1), (32, 3)])
def test_pixel_classifier_fits_any_square_image_and_ignores_the_rest_of_the_batch(resolution, channels) -> None:
    model = build_pixel_classifier(8, 12, channels, resolution, 5)
    images = torch.rand(6, resolution, resolution, channels)
    features = model.features(images)
    assert features.shape == (6, 12)
    assert model(images).shape == (6, 5)
    torch.testing.assert_close(model.features(images[2:3]), features[2:3], rtol=1e-5, atol=1e-6)


def test_pixel_classifier_learns_the_digits_in_400_steps() -> None:
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]
    split = train_test_split(images, digits.target, test_size=300, stratify=digits.target, random_state=0)
    train, test, labels, test_labels = map(torch.from_numpy, split)
    torch.manual_seed(0)
    model = build_pixel_classifier(32, 64, 1, 8, 10)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.0), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=400)
    for _ in range(400):
        rows = torch.randint(len(train), (128,))
        optimizer.zero_grad()
        classification_loss(model(train[rows]), labels[rows], 0.0).backward()
        optimizer.step()
        schedule.step()
    assert (model(test).argmax(1) == test_labels).float().mean() > 0.965  # 98-99 % over seeds
