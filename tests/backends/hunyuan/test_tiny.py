import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avatar_core import weights
from avatar_core.backends.hunyuan.audio import WhisperEncoder
from avatar_core.backends.hunyuan.name_map import transformer_name_map
from avatar_core.backends.hunyuan.official import convert, load_transformer, load_vae, read_config
from avatar_core.backends.hunyuan.sampling import ClipConditions, SamplerSettings, denoise
from avatar_core.backends.hunyuan.text import CROP_START, TEMPLATE, TextEncoder
from avatar_core.backends.hunyuan.tiny import TRANSFORMER, write_tiny_checkpoint
from avatar_core.backends.hunyuan.transformer import (
    HunyuanAvatarTransformer,
    TextConditions,
    TransformerConfig,
    parameter_dtype,
)
from avatar_core.backends.hunyuan.vae import decode_frames, encode_reference
from avatar_core.checkpoint import load_strict, read_checkpoint, rename
from avatar_core.errors import WeightsError

VIDEO = "ckpts/hunyuan-video-t2v-720p"
WIDTH, HEIGHT = 64, 64
PROMPT, OTHER_PROMPT = "A girl speaks in a sunny garden.", "A man sings in a dark studio."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "hunyuan-tiny"
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one's own, found by the name `hunyuan-tiny`."""
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "hunyuan-tiny")
    return tmp_path / "hunyuan-tiny"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def state_equal(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    same = [one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one]
    return one.keys() == other.keys() and all(same)


def test_every_part_of_the_registry_is_there(checkpoint: Path) -> None:
    assert weights.present("hunyuan-tiny")
    for name in weights.part_names("hunyuan-tiny"):
        assert weights.present(name)
        assert len(weights.fingerprint(name)) == 64
    assert weights.verify("hunyuan-tiny") == []


def test_the_same_seed_gives_the_same_bytes_anywhere(tiny: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tiny)
    write_tiny_checkpoint(tmp_path / "other", seed=1)
    name = f"{VIDEO}/transformers/mp_rank_00_model_states.pt"
    assert contents(tmp_path / "other")[name] != contents(tiny)[name]


def test_the_detector_does_not_tell_where_its_source_lies(tiny: Path) -> None:
    """Else its bytes, and with them keys, would differ between two checkouts."""
    (path,) = tiny.rglob("detface.pt")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    assert any(name.endswith("hunyuan/tiny.py") for name in names)
    assert not [name for name in names if name.endswith((".debug_pkl", "serialization_id"))]


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    write_tiny_checkpoint(tmp_path / "a")
    assert torch.equal(torch.rand(3), expected)


def test_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("work of years")
    with pytest.raises(WeightsError, match="holds other files"):
        write_tiny_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_official_weights_are_left_alone(tmp_path: Path) -> None:
    official = tmp_path / VIDEO / "transformers/mp_rank_00_model_states.pt"
    official.parent.mkdir(parents=True)
    official.write_bytes(b"26 GB")
    with pytest.raises(WeightsError, match="holds other files"):
        write_tiny_checkpoint(tmp_path)
    assert official.read_bytes() == b"26 GB"


def test_writing_again_replaces_an_earlier_call(checkpoint: Path, tiny: Path) -> None:
    assert weights.verify("hunyuan-tiny") == []
    convert("hunyuan-tiny/transformer")
    (checkpoint / f"{VIDEO}/vae/config.json").write_text("{}")
    write_tiny_checkpoint(checkpoint)
    assert contents(checkpoint / "ckpts") == contents(tiny / "ckpts")
    assert weights.converted("hunyuan-tiny/transformer") is None


def test_transformer_file_has_the_official_names(tiny: Path) -> None:
    folder = tiny / VIDEO / "transformers"
    state = read_checkpoint(folder / "mp_rank_00_model_states.pt", key="module")
    assert state["double_blocks.0.img_attn_qkv.weight"].shape == (192, 64)
    assert state["single_blocks.1.linear1.weight"].shape == (192 + 256, 64)
    assert state["audio_adapter_blocks.0.to_kv.weight"].dtype == torch.float32
    assert state["txt_in.input_embedder.weight"].dtype == torch.bfloat16
    assert read_config(folder) == TRANSFORMER
    assert read_config(tiny / "ckpts/det_align") == TransformerConfig()


def test_whole_transformer_loads_in_the_dtypes_of_its_use(checkpoint: Path) -> None:
    model = load_transformer("hunyuan-tiny/transformer", "cpu")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert all(dtypes[name] == parameter_dtype(name, torch.bfloat16) for name in dtypes)
    assert {torch.float32, torch.bfloat16} == set(dtypes.values())
    whole = load_transformer("hunyuan-tiny/transformer", "cpu", torch.float32)
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in whole.parameters())


def test_float8_file_is_the_same_model_rounded(checkpoint: Path) -> None:
    exact = load_transformer("hunyuan-tiny/transformer", "cpu").state_dict()
    model = load_transformer("hunyuan-tiny/transformer-fp8", "cpu")
    layer: Any = model.single_transformer_blocks[0].proj_mlp
    weight = exact["single_transformer_blocks.0.proj_mlp.weight"].float()
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert (layer.dequantized_weight().float() - weight).abs().max() < 0.07 * weight.abs().max()
    assert torch.equal(model.proj_out.weight, exact["proj_out.weight"])


def test_changed_configuration_is_told_by_shape(checkpoint: Path) -> None:
    path = checkpoint / VIDEO / "transformers/config.json"
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(TRANSFORMER, audio_inner_dim=48))))
    with pytest.raises(WeightsError, match=r"mis-shaped: .*audio_proj\.proj1\.bias is \(32,\)"):
        load_transformer("hunyuan-tiny/transformer", "cpu")
    path.write_text('{"depth": 3}')
    with pytest.raises(WeightsError, match=r"config\.json does not describe this transformer"):
        load_transformer("hunyuan-tiny/transformer", "cpu")


@pytest.mark.parametrize("part", ["transformer", "transformer-fp8"])
def test_converted_copy_is_the_same_model_under_the_same_key(checkpoint: Path, part: str) -> None:
    name = f"hunyuan-tiny/{part}"
    before, key = load_transformer(name, "cpu"), weights.fingerprint(name)
    copy = convert(name)
    assert weights.converted(name) == copy
    for path in (checkpoint / VIDEO / "transformers").glob("*.pt"):
        path.unlink()
    assert weights.present(name)
    assert weights.locate(name) == copy
    assert weights.verify(name) == []
    assert weights.fingerprint(name) == key
    assert state_equal(load_transformer(name, "cpu"), before)
    with pytest.raises(WeightsError, match="only their copy is left"):
        convert(name)


def test_cast_copy_has_another_key_and_keeps_what_stays_float32(checkpoint: Path) -> None:
    name = "hunyuan-tiny/transformer"
    key = weights.fingerprint(name)
    state = read_checkpoint(convert(name, "float16"))
    assert weights.fingerprint(name) != key
    assert state["x_embedder.proj.weight"].dtype == torch.float16
    assert state["proj_out.weight"].dtype == torch.float32
    with pytest.raises(WeightsError, match="got dtype 'int8', allowed are: bfloat16"):
        convert(name, "int8")
    with pytest.raises(WeightsError, match="need no conversion"):
        convert("hunyuan-tiny/vae")


def test_copy_of_weights_that_have_changed_is_not_used(checkpoint: Path) -> None:
    name = "hunyuan-tiny/transformer"
    convert(name)
    path = checkpoint / VIDEO / "transformers/mp_rank_00_model_states.pt"
    doubled = {n: 2 * t for n, t in read_checkpoint(path, key="module").items()}
    torch.save({"module": doubled}, path)
    assert weights.converted(name) is None
    model = load_transformer(name, "cpu")
    assert torch.equal(model.proj_out.bias, doubled["final_layer.linear.bias"].float())


def test_altered_copy_is_refused(checkpoint: Path) -> None:
    name = "hunyuan-tiny/transformer"
    (shard,) = convert(name).glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(WeightsError, match="is not the registered file"):
        weights.fingerprint(name)
    assert "is not the registered file" in weights.verify(name)[0]


def test_official_size_is_covered_name_by_name() -> None:
    """Every tensor of the model at full size comes from the name map, once."""
    config = TransformerConfig()
    with torch.device("meta"):
        model = HunyuanAvatarTransformer(config)
        wanted = model.state_dict()
        name_map = transformer_name_map(config)
        rows: dict[str, int] = {}
        for entry in name_map:
            rows[entry.source] = rows.get(entry.source, 0) + wanted[entry.target].shape[0]
        shapes = {entry.source: wanted[entry.target].shape[1:] for entry in name_map}
        official = {name: torch.empty(rows[name], *shapes[name]) for name in rows}
    assert len(official) == 946
    renamed = rename(official, name_map)
    assert {name: tensor.shape for name, tensor in renamed.items()} == {
        name: tensor.shape for name, tensor in wanted.items()
    }


def test_header_is_as_long_as_the_official_one(tiny: Path) -> None:
    from avatar_core.backends.hunyuan.pretrained import load_tokenizer

    tokenizer = load_tokenizer(tiny / "ckpts/llava_llama_image")
    assert len(tokenizer(TEMPLATE.split("{}")[0]).input_ids) == CROP_START
    text = "Zoë 東京 🙂\n\ttab"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    clip = load_tokenizer(tiny / "ckpts/text_encoder_2")
    ids = clip("東京 girl", padding="max_length", max_length=77, truncation=True).input_ids
    assert len(ids) == 77
    assert ids[-1] == max(ids) == len(clip) - 1


def test_detector_finds_one_central_face(tiny: Path) -> None:
    detector = torch.jit.load(tiny / "ckpts/det_align/detface.pt")
    grids = [torch.zeros(1, 1, 416 // stride, 576 // stride, 2) for stride in (8, 16, 32)]
    found = detector(torch.zeros(1, 3, 416, 576), grids)
    assert found.shape == (1, 52 * 72 + 26 * 36 + 13 * 18, 16)
    faces = found[0, found[0, :, 4] > 0.5]
    assert len(faces) == 1
    assert faces[0, 0] == 576 / 2


class Clip:
    """A short clip of 64 pixels from its texts to its frames."""

    def __init__(self, folder: Path) -> None:
        ckpts = folder / "ckpts"
        self.vae = load_vae(ckpts / "hunyuan-video-t2v-720p/vae", "cpu", torch.float32)
        self.text = TextEncoder(ckpts, "cpu", torch.float32)
        self.whisper = WhisperEncoder(ckpts / "whisper-tiny", "cpu")
        self.picture = self._picture(0)

    def _picture(self, seed: int) -> np.ndarray:
        pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        return np.kron(pixels, np.ones((8, 8, 1), np.uint8))

    def _sound(self, frequency: float) -> Tensor:
        time = np.arange(3 * 16_000) / 16_000
        wave = np.sin(2 * np.pi * frequency * time) * np.sin(2 * np.pi * 3 * time)
        states = self.whisper.hidden_states(wave.astype(np.float32))
        return torch.from_numpy(np.stack([states[2 * f : 2 * f + 10] for f in range(129)]))[None].float()

    def _text(self, prompt: str) -> TextConditions:
        return TextConditions(**self.text.encode(prompt, self.picture))

    def frames(
        self,
        model: HunyuanAvatarTransformer,
        *,
        prompt: str = PROMPT,
        picture: int = 0,
        frequency: float = 200.0,
        seed: int = 0,
    ) -> np.ndarray:
        self.picture = self._picture(picture)
        ones = torch.ones(1, 4)
        conditions = ClipConditions(
            prompt=self._text(prompt),
            negative_prompt=self._text("low quality"),
            ref_latents=encode_reference(self.vae, self.picture, torch.Generator().manual_seed(0)),
            audio=self._sound(frequency),
            face_mask=torch.ones(1, 1, 1, HEIGHT // 8, WIDTH // 8),
            motion_exp=30 * ones,
            motion_pose=25 * ones,
            fps=torch.tensor([25.0]),
        )
        noise = torch.randn(1, 16, 33, 8, 8, generator=torch.Generator().manual_seed(seed))
        settings = SamplerSettings(num_inference_steps=2)
        latents = denoise(model, conditions, noise, settings, lambda done, total: None)
        return np.stack(list(decode_frames(self.vae, latents, 17))).astype(float)


@pytest.mark.drill
def test_everything_shows_in_the_frames(checkpoint: Path) -> None:
    clip = Clip(checkpoint)
    model = load_transformer("hunyuan-tiny/transformer", "cpu", torch.float32)
    frames = clip.frames(model)
    assert frames.shape == (17, HEIGHT, WIDTH, 3)
    assert frames.std() > 20
    assert np.array_equal(clip.frames(model), frames)
    changes: dict[str, Callable[[], np.ndarray]] = {
        "picture": lambda: clip.frames(model, picture=1),
        "sound": lambda: clip.frames(model, frequency=900.0),
        "prompt": lambda: clip.frames(model, prompt=OTHER_PROMPT),
        "seed": lambda: clip.frames(model, seed=1),
    }
    for name, render in changes.items():
        assert np.std(render() - frames) > 3, name
    for name in ("x_embedder.proj.weight", "transformer_blocks.1.ff.net.2.weight", "proj_out.bias"):
        state = {n: (2 * t if n == name else t) for n, t in model.state_dict().items()}
        changed = HunyuanAvatarTransformer(TRANSFORMER)
        load_strict(changed, state)
        assert np.std(clip.frames(changed) - frames) > 0.5, name
