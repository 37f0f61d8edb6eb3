import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avatar_core import weights
from avatar_core.backends.multitalk.official import (
    convert,
    load_clip,
    load_text_encoder,
    load_transformer,
    load_vae,
    read_config,
)
from avatar_core.backends.multitalk.quantised import DTYPES, SCALE
from avatar_core.backends.multitalk.tiny import TRANSFORMER, write_tiny_checkpoint
from avatar_core.checkpoint import read_checkpoint
from avatar_core.errors import WeightsError

WAN, ADDED = "Wan2.1-I2V-14B-480P", "MeiGen-MultiTalk"
NAME = "multitalk-tiny/transformer"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "multitalk-tiny"
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one's own, found by the name `multitalk-tiny`."""
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "multitalk-tiny")
    return tmp_path / "multitalk-tiny"


def contents(folder: Path) -> dict[str, bytes]:
    """But for the hashes that were taken of them."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "sha256.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def state_equal(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    same = [one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one]
    return one.keys() == other.keys() and all(same)


def values(model: nn.Module) -> dict[str, Tensor]:
    """Its tensors, with those multiplied out that are stored with scales."""
    state = model.state_dict()
    scales = {name.removesuffix(SCALE) + ".weight": state[name] for name in state if name.endswith(SCALE)}
    return {n: t.float() * scales.get(n, 1) for n, t in state.items() if not n.endswith(SCALE)}


def spread(first: nn.Module, second: nn.Module) -> dict[str, float]:
    """Largest difference of each tensor that differs, as part of the largest entry."""
    one, other = values(first), values(second)
    assert one.keys() == other.keys()
    off = {name: float((one[name] - other[name]).abs().max() / other[name].abs().max()) for name in one}
    return {name: value for name, value in off.items() if value > 0}


def test_every_part_of_the_registry_is_there(checkpoint: Path) -> None:
    for name in weights.part_names("multitalk-tiny"):
        assert weights.present(name), name
        assert len(weights.fingerprint(name)) == 64
    assert weights.verify("multitalk-tiny") == []


def test_the_same_seed_gives_the_same_bytes_anywhere(tiny: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tiny)
    write_tiny_checkpoint(tmp_path / "other", seed=1)
    name = f"{ADDED}/multitalk.safetensors"
    assert contents(tmp_path / "other")[name] != contents(tiny)[name]


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    write_tiny_checkpoint(tmp_path / "a")
    assert torch.equal(torch.rand(3), expected)


def test_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    official = tmp_path / WAN / "diffusion_pytorch_model-00001-of-00007.safetensors"
    official.parent.mkdir(parents=True)
    official.write_bytes(b"10 GB")
    with pytest.raises(WeightsError, match="holds other files"):
        write_tiny_checkpoint(tmp_path)
    assert official.read_bytes() == b"10 GB"


def test_writing_again_replaces_an_earlier_call(checkpoint: Path, tiny: Path) -> None:
    convert(NAME)
    (checkpoint / WAN / "config.json").write_text("{}")
    write_tiny_checkpoint(checkpoint)
    assert contents(checkpoint) == contents(tiny)
    assert weights.converted(NAME) is None


def test_names_are_the_official_ones_in_the_official_files(tiny: Path) -> None:
    base = read_checkpoint(tiny / WAN)
    added = load_file(tiny / ADDED / "multitalk.safetensors")
    assert len(added) == 8 * TRANSFORMER.num_layers + 10
    assert "blocks.1.audio_cross_attn.kv_linear.weight" in added
    assert "blocks.1.cross_attn.k_img.weight" in base
    assert not base.keys() & added.keys()
    assert read_config(tiny) == TRANSFORMER


def test_whole_checkpoint_loads(checkpoint: Path) -> None:
    transformer = load_transformer(NAME, "cpu", torch.float32)
    assert transformer.config == TRANSFORMER
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert {p.dtype for p in load_transformer(NAME, "cpu").parameters()} <= {torch.bfloat16, torch.float32}
    folder = checkpoint / WAN
    for model in (load_clip(folder, "cpu", torch.float32), load_vae(folder, "cpu")):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not [n for n, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    text = load_text_encoder("multitalk-tiny/text", "cpu", torch.float32)
    rounded = load_text_encoder("multitalk-tiny/text-int8", "cpu", torch.float32)
    assert 0 < max(spread(rounded, text).values()) < 0.01


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        (f"{ADDED}/multitalk.safetensors", "blocks.0.norm_x.bias"),
        (f"{ADDED}/multitalk.safetensors", "audio_proj.proj1_vf.weight"),
    ],
)
def test_audio_weights_that_lack_are_named(checkpoint: Path, file: str, tensor: str) -> None:
    state = load_file(checkpoint / file)
    del state[tensor]
    save_file(state, checkpoint / file)
    with pytest.raises(WeightsError, match=rf"missing: {tensor}"):
        load_transformer(NAME, "cpu")


def test_an_index_that_names_the_added_file_is_read_too(checkpoint: Path) -> None:
    """As the authors of MultiTalk have it installed."""
    expected = load_transformer(NAME, "cpu")
    index = checkpoint / WAN / "diffusion_pytorch_model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    added = checkpoint / ADDED / "multitalk.safetensors"
    places |= dict.fromkeys(load_file(added), added.name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (checkpoint / WAN / added.name).symlink_to(added)
    assert state_equal(load_transformer(NAME, "cpu"), expected)


def test_changed_configuration_is_told_by_shape(checkpoint: Path) -> None:
    path = checkpoint / WAN / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"ffn_dim": 48}))
    with pytest.raises(WeightsError, match=r"mis-shaped: .* is \(64, 96\), the model has \(64, 48\)"):
        load_transformer(NAME, "cpu")
    path.write_text('{"depth": 3}')
    with pytest.raises(WeightsError, match=r"config\.json does not describe this transformer"):
        load_transformer(NAME, "cpu")


def test_converted_copy_is_the_same_model_under_the_same_key(checkpoint: Path) -> None:
    before, key = load_transformer(NAME, "cpu"), weights.fingerprint(NAME)
    copy = convert(NAME)
    assert weights.converted(NAME) == copy
    for path in [
        *(checkpoint / WAN).glob("diffusion*.safetensors"),
        checkpoint / ADDED / "multitalk.safetensors",
    ]:
        path.unlink()
    assert weights.present(NAME)
    assert weights.verify(NAME) == []
    assert weights.fingerprint(NAME) == key
    assert state_equal(load_transformer(NAME, "cpu"), before)
    with pytest.raises(WeightsError, match="only their copy is left"):
        convert(NAME)


def test_cast_copy_has_another_key(checkpoint: Path) -> None:
    key = weights.fingerprint(NAME)
    state = read_checkpoint(convert(NAME, "bfloat16"))
    assert weights.fingerprint(NAME) != key
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    with pytest.raises(WeightsError, match="got dtype 'int8', allowed are: bfloat16"):
        convert(NAME, "int8")
    with pytest.raises(WeightsError, match="need no conversion"):
        convert("multitalk-tiny/vae")


def test_lora_is_merged_into_official_and_converted_weights(checkpoint: Path) -> None:
    def merged(**options: object) -> nn.Module:
        return load_transformer(NAME, "cpu", torch.float32, lora="multitalk-tiny/lora-fusionx", **options)

    plain = load_transformer(NAME, "cpu", torch.float32)
    once = merged()
    changed = spread(once, plain)
    assert changed
    assert all(any(part in name for part in ("attn1", "self_attn", "ffn")) for name in changed)
    doubled = spread(merged(lora_scale=2.0), plain)
    assert doubled.keys() == changed.keys()
    assert all(doubled[name] == pytest.approx(2 * changed[name], rel=0.02) for name in changed)
    as_published = spread(merged(parity=True), plain)
    assert as_published.keys() == changed.keys()
    convert(NAME)
    assert state_equal(merged(), once)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_files_are_the_same_model_rounded(checkpoint: Path, kind: str) -> None:
    plain = load_transformer(NAME, "cpu", torch.float32)
    off = spread(load_transformer(f"{NAME}-{kind}", "cpu", torch.float32), plain)
    linears = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert {name.removesuffix(".weight") for name in off} == linears
    assert max(off.values()) < (0.01 if kind == "int8" else 0.07)


def test_the_quantised_file_with_a_lora_has_it_merged(checkpoint: Path) -> None:
    merged = load_transformer(NAME, "cpu", torch.float32, lora="multitalk-tiny/lora-fusionx", parity=True)
    off = spread(load_transformer(f"{NAME}-int8-fusionx", "cpu", torch.float32), merged)
    assert max(off.values()) < 0.01


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_of_the_blocks_can_be_cast_on_loading(checkpoint: Path, kind: str) -> None:
    plain = load_transformer(NAME, "cpu", torch.float32)
    model: Any = load_transformer(NAME, "cpu", torch.float32, cast=kind)
    off = spread(model, plain)
    assert off
    assert all(name.startswith("blocks.") for name in off)
    assert max(off.values()) < (0.01 if kind == "int8" else 0.07)
    assert model.blocks[1].ffn.net[2].weight.dtype == DTYPES[kind]


def test_a_map_of_another_kind_is_refused(checkpoint: Path) -> None:
    path = checkpoint / ADDED / "quant_models/dit_model_map_int8.json"
    text = path.read_text()
    path.write_text(text.replace('"qint8"', '"qint4"', 1))
    with pytest.raises(WeightsError, match=r"is quantised as .*qint4.*; allowed are"):
        load_transformer(f"{NAME}-int8", "cpu")
    path.write_text(json.dumps(json.loads(text) | {"blocks.7.ffn.0": {"weights": "qint8"}}))
    with pytest.raises(WeightsError, match=r"lacks 'blocks\.7\.ffn\.0\.weight\._data'"):
        load_transformer(f"{NAME}-int8", "cpu")


def test_official_size_has_every_official_tensor(tiny: Path) -> None:
    """Names and shapes of 1633 tensors, 330 of which MultiTalk adds."""
    from accelerate import init_empty_weights

    from avatar_core.backends.multitalk.name_map import transformer_name_map
    from avatar_core.backends.multitalk.transformer import MultiTalkTransformer, TransformerConfig
    from avatar_core.checkpoint import undo_rename

    with init_empty_weights():
        model = MultiTalkTransformer(TransformerConfig())
    official = undo_rename(model.state_dict(), transformer_name_map(TransformerConfig()))
    assert len(official) == 1633
    added = [
        n for n in official if ".audio_cross_attn." in n or ".norm_x." in n or n.startswith("audio_proj.")
    ]
    assert len(added) == 330
    assert sum(official[name].numel() for name in added) == 2_487_168_000
    assert sum(t.numel() for t in official.values()) == 16_394_878_784 + 2_487_168_000
