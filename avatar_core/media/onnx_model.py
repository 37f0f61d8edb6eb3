"""Networks kept as ONNX files."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avatar_core.errors import BackendError, WeightsError


class OnnxModel:
    """One input, named by the file; float32. `device` is `cpu` or `cuda`, `cuda:1`, ..., which needs the
    package onnxruntime-gpu."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(
                f'{path.name} needs onnxruntime; run: pip install "avatar-dataset[ditto]"'
            ) from error
        if not path.is_file():
            raise WeightsError(f"no model file {path}; fetch the weights again")
        options = onnxruntime.SessionOptions()
        # A shard has one thread per library, so that results do not depend on the number of cores.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), options, providers=_providers(device)
            )
        except Exception as error:  # onnxruntime's own errors have no common base
            reason = str(error).strip().partition("\n")[0]
            raise WeightsError(f"{path} cannot be read as an ONNX file: {reason}") from error
        self._path = path
        self._input = self._session.get_inputs()[0].name

    def run(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """All outputs, in the file's order."""
        from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

        try:
            outputs: list[NDArray[np.float32]] = self._session.run(None, {self._input: batch})
        except InvalidArgument as error:
            raise WeightsError(
                f"{self._path} does not take an input of shape {batch.shape}: is it another model's file?"
            ) from error
        return outputs


def _providers(device: str) -> list[Any]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    index = int(device.partition(":")[2] or 0)
    return [("CUDAExecutionProvider", {"device_id": index}), "CPUExecutionProvider"]
