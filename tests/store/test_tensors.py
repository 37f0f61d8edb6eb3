import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from avatar_core.errors import StoreError
from avatar_core.store.tensors import TensorFile, open_item, pack

arrays = hnp.arrays(
    st.sampled_from(["float32", "float64", "float16", "int64", "int8", "uint8", "bool", ">f4", ">i8"]),
    hnp.array_shapes(min_dims=0, min_side=0, max_side=4),
)
names = st.text("abc.-/", min_size=1, max_size=6)
items = st.dictionaries(st.text("0123456789abcdef", min_size=1, max_size=6), st.dictionaries(names, arrays))


@given(items)
def test_every_tensor_comes_back(tmp_path_factory, packed):
    path = tmp_path_factory.mktemp("tensors") / "shard.safetensors"
    path.write_bytes(pack(packed))
    for key, tensors in packed.items():
        item = open_item(path, key)
        assert set(item) == set(tensors)
        for name, tensor in tensors.items():
            assert item[name].shape == tensor.shape
            assert item[name].dtype == tensor.dtype.newbyteorder("=")
            np.testing.assert_array_equal(item[name], tensor)


@given(items)
def test_the_same_tensors_give_the_same_bytes(packed):
    turned = {
        key: {name: np.asarray(tensor, order="F") for name, tensor in reversed(tensors.items())}
        for key, tensors in reversed(packed.items())
    }
    assert pack(turned) == pack(packed)


def test_a_strided_view_is_stored_as_it_reads(tmp_path):
    view = np.arange(24, dtype=np.float32).reshape(4, 6).T[::2, ::-1]
    (tmp_path / "a").write_bytes(pack({"k": {"view": view}}))
    np.testing.assert_array_equal(open_item(tmp_path / "a", "k")["view"], view)


def test_names_are_known_before_any_tensor_is_read(tmp_path):
    path = tmp_path / "shard.safetensors"
    path.write_bytes(pack({"k": {"a": np.zeros(3), "b": np.ones(2)}, "l": {"c": np.zeros(1)}}))
    assert TensorFile(path).keys() == ["k", "l"]
    assert list(open_item(path, "k")) == ["a", "b"]
    assert len(open_item(path, "unknown")) == 0
    with pytest.raises(KeyError):
        open_item(path, "k")["c"]


def test_a_replaced_file_is_opened_anew(tmp_path):
    path = tmp_path / "shard.safetensors"
    path.write_bytes(pack({"k": {"a": np.zeros(3)}}))
    assert open_item(path, "k")["a"].shape == (3,)
    path.unlink()
    path.write_bytes(pack({"k": {"a": np.zeros(5)}}))
    assert open_item(path, "k")["a"].shape == (5,)


@pytest.mark.parametrize("key", ["", "a/b"])
def test_an_item_key_has_no_slash(key):
    with pytest.raises(StoreError, match="slash"):
        pack({key: {"a": np.zeros(1)}})


@pytest.mark.parametrize("dtype", ["U1", "O", "datetime64[s]"])
def test_types_that_safetensors_lacks_are_refused(dtype):
    tensor = np.zeros(1, dtype)
    with pytest.raises(StoreError, match=re.escape(str(tensor.dtype))):
        pack({"k": {"a": tensor}})


def test_a_damaged_or_missing_file_is_a_store_error(tmp_path):
    whole = pack({"k": {"a": np.zeros(100)}})
    for name, data in {"short": whole[:200], "empty": b"", "garbage": b"\xff" * 64}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(StoreError, match=f"{name} is not a readable safetensors file"):
            open_item(tmp_path / name, "k")
    with pytest.raises(StoreError, match="absent"):
        open_item(tmp_path / "absent", "k")
