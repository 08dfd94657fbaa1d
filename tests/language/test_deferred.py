"""Models of transformers whose weights stay in their files, beside those that are read at once."""

from pathlib import Path

import pytest
import torch
from checkpoints import KINDS, save_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from litflora.backbones.deferred import deferring, fill
from litflora.language.pretrained import pretrained_model


def read_later(folder: Path) -> tuple[nn.Module, list[str]]:
    """The model in the end, and names of the weights that were taken into memory before."""
    with deferring() as waiting:
        model = pretrained_model(str(folder))
    assert all(parameter.is_meta for parameter in model.parameters())
    sources = waiting.by_name(model)
    fill(model, sources, torch.device("cpu"))
    return model, [name for name, source in sources.items() if source.values is not None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_same_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_checkpoint(kind, tmp_path / "base", max_shard_size="100KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        state = {key: value.to(dtype) for key, value in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    state = torch.random.get_rng_state()
    model, kept = read_later(folder)
    assert kept == []
    assert torch.equal(torch.random.get_rng_state(), state)
    plain = pretrained_model(str(folder))
    for found in ("named_parameters", "named_buffers"):
        own, other = dict(getattr(model, found)()), dict(getattr(plain, found)())
        assert own.keys() == other.keys()
        for name, value in other.items():
            assert value.dtype == own[name].dtype, name
            assert torch.equal(value, own[name]), name
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    assert model.training == plain.training


def test_a_file_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint("llava", tmp_path / "base")
    state = load_file(folder / "model.safetensors")
    lost = next(key for key in state if key.endswith("linear_1.weight"))
    del state[lost]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    told = "cannot read .*base: its files lack .*linear_1.weight"
    with pytest.raises(ValueError, match=told), deferring():
        pretrained_model(str(folder))
