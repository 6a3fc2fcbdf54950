"""A compiled step against the plain one, and the message where nothing can be compiled."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from functa.flows.config.load import load_config
from functa.models.compute.compilation import COMPILED, announced, has_compiler
from functa.models.compute.compiled_function import graphed
from functa.models.config import ClassifierConfig, DenoiserConfig, DiffusionConfig
from functa.models.latents.classifier import build_classifier, classification_loss
from functa.models.latents.denoiser import build_denoiser
from functa.models.latents.diffusion import Draw, diffusion_loss, draw, training_process
from functa.tasks.training.diffusion import diffusion_learner
from functa.tasks.training.ranks import Ranks
from functa.tasks.training.step import parts

CPU = torch.device("cpu")


def test_without_a_compiler_on_is_refused_and_auto_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("functa.models.compute.compilation.missing", lambda device: {"C++ compiler": "g++"})
    with pytest.raises(ValueError, match=r"^diffusion.compile=on needs C\+\+ compiler: apt-get install g\+\+"):
        graphed(torch.sin, "float32", "graphs", 1.0, CPU, "diffusion.compile")
    function, why = graphed(torch.sin, "float32", "auto", 1e15, CPU, "diffusion.compile")
    assert why.startswith("eager: no C++ compiler")
    assert torch.equal(function(torch.ones(2)), torch.ones(2).sin())


def test_half_precision_is_of_matmuls_alone() -> None:
    layer = nn.Linear(64, 64)
    function, _ = graphed(lambda x: layer(x), "bf16", "off", 0.0, CPU, "k")
    x = torch.randn(8, 64)
    assert function(x).dtype == torch.bfloat16
    function(x).float().square().mean().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.skipif(not has_compiler(CPU), reason="no C++ compiler here")
@pytest.mark.slow
@pytest.mark.parametrize("process", [{"timestep_ratio": 3, "weighted": True}, {"kind": "edm"}, {"kind": "flow"}])
def test_one_graph_gives_the_loss_and_gradients_of_the_plain_step(process: dict[str, Any]) -> None:
    """fullgraph: a break would raise."""
    config = DiffusionConfig.model_validate(process)
    torch.manual_seed(0)
    model = build_denoiser(DenoiserConfig(channels=32, multipliers=(1,), groups=4, head_channels=32), (2, 2, 4), 3)
    for parameter in model.parameters():  # what starts at zero hides what is wrong
        parameter.data += 0.05 * torch.randn_like(parameter)
    tables = training_process(config, "cpu")

    def loss(x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor, dropped: Tensor) -> Tensor:
        return diffusion_loss(model, tables, x0, labels, Draw(t, noise, dropped), 3)

    compiled, why = graphed(loss, "float32", "on", 0.0, CPU, "k")
    assert why == "compiled with torch.compile"
    x0, labels = torch.randn(6, 2, 2, 4), torch.arange(6) % 3
    drawn = draw(config, x0.shape, torch.Generator().manual_seed(1))
    gradients = []
    for function in (loss, compiled):
        model.zero_grad()
        value = function(x0, labels, *drawn)
        value.backward()
        gradients.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)


def test_on_a_cpu_attention_is_written_out_and_gives_what_the_fused_one_gives() -> None:
    """The fused one is slow backwards there."""
    torch.manual_seed(0)
    model = build_classifier(ClassifierConfig(width=32, depth=2, heads=2, dropout=0), (4, 4, 8), 10)
    z, labels = torch.randn(6, 4, 4, 8), torch.arange(6)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return classification_loss(model(x), y, 0.1)

    gradients, called = [], []
    graphs = [graphed(loss, "float32", "off", 0.0, CPU, "k", tokens)[0] for tokens in (256, 16)]
    for function in graphs:
        model.zero_grad()
        with torch.profiler.profile() as profile:
            function(z, labels).backward()
        called.append(any("flash_attention" in event.key for event in profile.key_averages()))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert called == [True, False]
    for fused, written in zip(*gradients, strict=True):
        torch.testing.assert_close(written, fused, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not has_compiler(CPU), reason="no C++ compiler here")
@pytest.mark.slow
def test_a_graph_drops_what_the_plain_step_drops() -> None:
    torch.manual_seed(0)
    model = build_classifier(ClassifierConfig(kind="mlp", width=64, depth=2, dropout=0.3), (1, 1, 32), 10)
    compiled, _ = graphed(lambda x: model(x), "float32", "on", 0.0, CPU, "k")
    z, outputs = torch.randn(16, 1, 1, 32), []
    for function in (model, compiled):
        torch.manual_seed(3)
        outputs.append(function(z))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(model(z), outputs[0])


@given(count=st.integers(1, 300), most=st.integers(1, 300))
def test_parts_are_the_whole_and_of_two_sizes_at_most(count: int, most: int) -> None:
    some = parts(count, most)
    assert [i for part in some for i in range(part.start, part.stop)] == list(range(count))
    sizes = {part.stop - part.start for part in some}
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert parts(count, None) == [slice(0, count)]


@pytest.mark.parametrize(("channels", "compiled"), [(32, True), (128, False)])
def test_a_wide_unet_is_not_compiled_for_a_cpu_unless_asked(channels: int, compiled: bool) -> None:
    model = ["channels=" + str(channels), "multipliers=[1,2,2]", "blocks=2", "groups=32", "head_channels=32"]
    config = load_config("cifar10_quick", [*(f"diffusion.model.{key}" for key in model), "diffusion.steps=10000000"])
    assert config.diffusion is not None
    batches = lambda step: (torch.randn(2, 8, 8, 16), torch.zeros(2, dtype=torch.int64))  # noqa: E731
    for mode, expected in (("auto", compiled and has_compiler(CPU)), ("off", False)):
        asked = config.diffusion.model_copy(update={"compile": mode, "batch": 2})
        learner = diffusion_learner(asked, (8, 8, 16), 10, batches, Ranks(), seed=0)
        assert learner.mode.startswith("compiled" if expected else "eager: "), learner.mode


def test_compiling_is_announced_as_something_to_come_and_other_modes_as_they_are() -> None:
    assert announced(f"{COMPILED}, CUDA graphs").startswith(
        "compiling with torch.compile, CUDA graphs: before the first"
    )
    assert announced("eager: compile=off") == "eager: compile=off"
