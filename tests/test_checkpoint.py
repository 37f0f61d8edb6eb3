import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from avatar_core.checkpoint import (
    INDEX,
    Rename,
    load_strict,
    read_checkpoint,
    read_metadata,
    rename,
    undo_rename,
    write_shards,
)
from avatar_core.errors import WeightsError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.key = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


FUSED = [
    Rename("qkv.weight", "query.weight", rows=slice(0, 4)),
    Rename("qkv.weight", "key.weight", rows=slice(4, 8)),
    Rename("qkv.bias", "query.bias", rows=slice(0, 4)),
    Rename("qkv.bias", "key.bias", rows=slice(4, 8)),
    Rename("ln.weight", "norm.weight"),
    Rename("ln.bias", "norm.bias", swap_halves=True),
]


def fused() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"qkv.weight": (8, 4), "qkv.bias": (8,), "ln.weight": (4,), "ln.bias": (4,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_rename_splits_rows_and_swaps_halves() -> None:
    state = fused()
    renamed = rename(state, FUSED)
    assert torch.equal(renamed["key.weight"], state["qkv.weight"][4:])
    assert torch.equal(renamed["norm.weight"], state["ln.weight"])
    assert renamed["norm.bias"].tolist() == state["ln.bias"][[2, 3, 0, 1]].tolist()


def test_rename_does_not_copy() -> None:
    state = fused()
    weight = rename(state, FUSED)["key.weight"]
    assert weight.untyped_storage().data_ptr() == state["qkv.weight"].untyped_storage().data_ptr()


def test_rename_lists_missing_and_unexpected_names() -> None:
    state = fused()
    del state["ln.bias"]
    state |= {f"extra.{k}": torch.zeros(1) for k in range(9)}
    with pytest.raises(WeightsError, match=r"missing: ln\.bias; unexpected: extra\.0, .* \(9 in all\)"):
        rename(state, FUSED)


def test_model_on_meta_takes_the_tensors_as_they_are() -> None:
    model, state = on_meta(), rename(fused(), FUSED)
    state["norm.weight"] = state["norm.weight"].to(torch.float16)
    load_strict(model, state)
    assert model.norm.weight.dtype == torch.float16
    assert model.query.weight.data_ptr() == state["query.weight"].data_ptr()
    x = torch.randn(2, 4)
    assert torch.equal(model.query(x), x @ state["query.weight"].T + state["query.bias"])


def test_strict_load_lists_everything_that_does_not_fit() -> None:
    state = rename(fused(), FUSED)
    state["query.bias"] = torch.zeros(3)
    state["head.bias"] = state.pop("key.bias")
    with pytest.raises(WeightsError) as caught:
        load_strict(on_meta(), state)
    assert str(caught.value) == (
        "the checkpoint does not fit Net; missing: key.bias; unexpected: head.bias; "
        "mis-shaped: query.bias is (3,), the model has (4,)"
    )


def test_names_are_ignored_by_pattern_only() -> None:
    state = rename(fused(), FUSED) | {"ema.decay": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"unexpected: ema\.decay"):
        load_strict(on_meta(), state, ignored={"decay": "of training"})
    model = on_meta()
    load_strict(model, state, ignored={"ema.*": "of training"})
    assert torch.equal(model.norm.weight, state["norm.weight"])


def test_buffer_that_no_checkpoint_holds_is_named() -> None:
    class WithTable(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(3), persistent=False)

    with torch.device("meta"):
        model = WithTable()
    with pytest.raises(WeightsError, match="without values: table"):
        load_strict(model, rename(fused(), FUSED))


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read(tmp_path: Path, zipped: bool) -> None:
    state, path = fused(), tmp_path / "model.pt"
    torch.save({"module": state, "step": 3}, path, _use_new_zipfile_serialization=zipped)
    assert same(read_checkpoint(path, key="module"), state)
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert same(read_checkpoint(path, key="module"), state)


def test_torch_file_without_its_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"module": fused(), "step": 3}, path)
    with pytest.raises(WeightsError, match=r"holds entries that are no tensors; found: module"):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(WeightsError, match="holds list, expected a state dict"):
        read_checkpoint(path)


def test_numbers_count_as_tensors(tmp_path: Path) -> None:
    torch.save({"module": {"a": 0.5, "b": torch.tensor(2.0)}}, tmp_path / "map.pt")
    assert read_checkpoint(tmp_path / "map.pt", key="module") == {"a": 0.5, "b": 2.0}


def test_prefix_is_taken_off(tmp_path: Path) -> None:
    torch.save({"vae.conv": torch.ones(1), "norm": torch.ones(1)}, tmp_path / "vae.pt")
    assert set(read_checkpoint(tmp_path / "vae.pt", prefix="vae.")) == {"conv", "norm"}


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched"),)


def test_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"module": fused(), "hook": Bomb()}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match="is not opened, since it could run code"):
        read_checkpoint(tmp_path / "model.pt", key="module")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(WeightsError, match="could run code"):
        read_checkpoint(tmp_path / "plain.pt")
    assert not Path("touched").exists()


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content in (b"", b"\x80\x02", b"not a checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=str(path)):
            read_checkpoint(path)
    path.unlink()
    with pytest.raises(WeightsError, match=str(path)):
        read_checkpoint(path)


def test_truncated_torch_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"module": fused()}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint"):
        read_checkpoint(path, key="module")


def test_safetensors_are_read_from_a_file_or_a_folder_of_one(tmp_path: Path) -> None:
    state = fused()
    save_file(state, tmp_path / "model.safetensors")
    assert same(
        dict(sorted(read_checkpoint(tmp_path / "model.safetensors").items())), dict(sorted(state.items()))
    )
    assert set(read_checkpoint(tmp_path)) == set(state)


def test_shards_come_back_equal(tmp_path: Path) -> None:
    state = rename(fused(), FUSED)
    write_shards(state, tmp_path / "out", metadata={"source": "abc"}, shard_bytes=100)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    for where in (tmp_path / "out", tmp_path / "out" / INDEX):
        back = read_checkpoint(where)
        assert same({name: back[name] for name in state}, state)
    assert read_metadata(tmp_path / "out")["source"] == "abc"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_shards_of_a_mapped_file_load_into_a_model_on_meta(tmp_path: Path) -> None:
    torch.save({"module": fused()}, tmp_path / "model.pt")
    state = rename(read_checkpoint(tmp_path / "model.pt", key="module"), FUSED)
    write_shards(state, tmp_path / "out")
    model = on_meta()
    load_strict(model, read_checkpoint(tmp_path / "out"))
    assert same(dict(sorted(model.state_dict().items())), dict(sorted(rename(fused(), FUSED).items())))


def test_shards_are_cast_with_exceptions(tmp_path: Path) -> None:
    state = rename(fused(), FUSED) | {"steps": torch.arange(3)}
    write_shards(state, tmp_path / "out", dtype=torch.bfloat16, keep=("norm.*",))
    back = read_checkpoint(tmp_path / "out")
    assert back["query.weight"].dtype == torch.bfloat16
    assert torch.equal(back["query.weight"], state["query.weight"].bfloat16())
    assert torch.equal(back["norm.bias"], state["norm.bias"])
    assert back["steps"].dtype == torch.int64


def test_one_tensor_of_two_names_is_written_twice(tmp_path: Path) -> None:
    scale = torch.tensor(0.5)
    write_shards({"query.scale": scale, "key.scale": scale}, tmp_path / "out")
    assert read_checkpoint(tmp_path / "out") == {"query.scale": 0.5, "key.scale": 0.5}


def test_undone_rename_gives_the_source() -> None:
    assert same(undo_rename(rename(fused(), FUSED), FUSED), fused())


def test_writing_again_replaces_the_folder(tmp_path: Path) -> None:
    write_shards(fused(), tmp_path / "out", shard_bytes=1)
    write_shards({"only": torch.ones(2)}, tmp_path / "out")
    assert set(read_checkpoint(tmp_path / "out")) == {"only"}
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_link_to_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "out").symlink_to("large-disk")
    for _ in range(2):
        write_shards(fused(), tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert read_checkpoint(tmp_path / "large-disk").keys() == fused().keys()


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="cannot be written to"):
        write_shards(fused(), tmp_path / "file" / "out")


def test_index_that_does_not_fit_its_files_is_refused(tmp_path: Path) -> None:
    write_shards(fused(), tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    index["weight_map"]["lost"] = index["weight_map"]["ln.bias"]
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="does not fit its files; missing: lost"):
        read_checkpoint(tmp_path / "out")
    (tmp_path / "out" / INDEX).write_text("{}")
    with pytest.raises(WeightsError, match="is no index"):
        read_checkpoint(tmp_path / "out")
