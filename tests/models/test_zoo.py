"""Check discovery, loading and example inputs of the zoo."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from effcompile.core.errors import EffError
from effcompile.models import zoo

TINY = tuple(item.name for item in zoo.entries() if "-tiny" in item.name)
REQUIRED = (
    *("llama-tiny", "encoder-tiny", "vit-tiny", "mixtral-tiny", "dit-tiny", "dit-4k", "seq2seq-tiny"),
    *("nanogpt-tiny", "nanogpt", "smollm2-135m", "minilm-l6", "dinov2-s"),
)


def test_names_are_sorted_and_complete() -> None:
    assert list(zoo.names()) == sorted(zoo.names())
    assert set(REQUIRED) <= set(zoo.names())


def test_unknown_name_offers_near_matches() -> None:
    with pytest.raises(EffError, match="llama-tiny") as caught:
        zoo.load("zoo:lama-tiny")
    assert caught.value.code == "EFF-U101"


def test_unlike_name_lists_what_is_known() -> None:
    with pytest.raises(EffError, match=r"known: .*vit-tiny") as caught:
        zoo.load("qqqqqqqq")
    assert caught.value.code == "EFF-U101"


def test_discovery_imports_nothing_heavy() -> None:
    code = (
        "import sys; from effcompile.models import zoo; zoo.names();"
        "print([m for m in ('transformers', 'onnx', 'gguf', 'tokenizers', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", TINY)
def test_weights_are_seeded_and_leave_the_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    first = zoo.load(name).model.state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    second = zoo.load(f"zoo:{name}").model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_finite_and_in_the_dtype(name: str, dtype: torch.dtype) -> None:
    loaded = zoo.load(name, dtype=dtype)
    assert not loaded.model.training
    args, kwargs = loaded.example_inputs(2, 16)
    with torch.no_grad():
        out = loaded.model(*args, **kwargs)
    assert out.dtype == dtype
    assert out.shape[0] == 2
    assert out.isfinite().all()
    assert out.std() > 1e-3, "a constant output would hide every wrong rewrite"


@pytest.mark.parametrize("name", [name for name in zoo.names() if name != "nanogpt"])
def test_meta_model_holds_no_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if zoo.find(name).trained:
        pytest.importorskip("transformers")
    monkeypatch.setenv("EFF_CACHE", "/dev/null/no-such-place")  # a read of the cache would raise
    loaded = zoo.load(name, meta=True, dtype=torch.float16)
    tensors = [*loaded.model.parameters(), *loaded.model.buffers()]
    assert tensors
    assert all(value.is_meta for value in tensors)
    assert all(value.dtype == torch.float16 for value in loaded.model.parameters())
    args, kwargs = loaded.example_inputs(1)
    given = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor)]
    assert given
    assert all(value.is_meta for value in given)
    assert loaded.tokenizer is None


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_export(name: str) -> None:
    loaded = zoo.load(name)
    args, kwargs = loaded.example_inputs(2, 16)
    program = torch.export.export(loaded.model, args, kwargs, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*args, **kwargs), loaded.model(*args, **kwargs))


@pytest.mark.parametrize(("batch", "seq"), [(0, 8), (1, 0), (1, 129)])
def test_inputs_that_do_not_fit_are_refused(batch: int, seq: int) -> None:
    with pytest.raises(EffError, match="llama-tiny") as caught:
        zoo.load("llama-tiny").example_inputs(batch, seq)
    assert caught.value.code == "EFF-U103"


def test_fixed_token_counts_are_declared() -> None:
    assert zoo.find("dit-4k").fixed_seq == 4096
    assert zoo.find("dinov2-s").fixed_seq == 257
    assert zoo.find("llama-tiny").fixed_seq is None


def test_dit_4k_has_the_bench_sizes() -> None:
    model: nn.Module = zoo.load("dit-4k", meta=True).model
    config = model.config
    assert (config.width, config.heads, config.layers, config.latent, config.patch) == (1152, 16, 2, 128, 2)
