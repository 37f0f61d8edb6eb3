"""Small ONNX files with the inputs and outputs of Ditto's face and speech models.

The face models answer with a plain face in the middle, moved a little by the colours of the picture; the
speech model is a random one that hears as HuBERT does.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from avatar_core.media.face_mesh import BLAZE_SIDE, MESH_SIDE, anchors
from avatar_core.media.landmarks import SIDE_106, SIDE_203
from avatar_core.media.scrfd import SIDE, STRIDES

Constants = dict[str, NDArray[Any]]
Shape = Sequence[int | str]

_OPSET, _IR_VERSION = 17, 8  # old enough for every onnxruntime that is allowed

_SPEECH_FEATURES, _SPEECH_WIDTH = 1024, 8
_SPEECH_LAYERS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))  # kernel and stride of HuBERT's
_SPEECH_GAIN, _LAYER_GAIN = 8.0, 1.6

# A face whose outline reaches from -1 to 1; x to the right, y down.
_EYES, _MOUTH = ((-0.42, -0.3), (0.42, -0.3)), ((-0.3, 0.45), (0.3, 0.45))
_EYE_SIZE = (0.18, 0.06)  # half of it
_GAZE = (0.05, 0.01)
_OFFSETS = {"outer": (-1, 0), "inner": (1, 0), "upper": (0, -1), "lower": (0, 1)}

# Landmarks of both eyes, by where they are, and of the corners of the mouth.
_EYES_106 = [{"outer": [35], "inner": [39], "upper": [33], "lower": [40]}]
_EYES_106 += [{"outer": [93], "inner": [89], "upper": [87], "lower": [94]}]
_EYES_203 = [{"outer": [0], "inner": [12], "upper": [6], "lower": [18]}]
_EYES_203 += [{"outer": [36], "inner": [24], "upper": [30], "lower": [42]}]
_EYES_478 = [
    {"outer": [33], "inner": [133], "upper": [159, 160, 158], "lower": [145, 144, 153], "iris": [468]}
]
_EYES_478 += [
    {"outer": [263], "inner": [362], "upper": [386, 387, 385], "lower": [374, 373, 380], "iris": [473]}
]

_CENTRE, _HALF = (0.5, 0.45), (0.2, 0.24)  # of the face: by the picture's sides, by the shorter one
_IN_BOX, _IN_CROP = 2 / 3, 1 / 3  # half a face by half of what 106, by the whole of what 203 landmarks see
_CROP_SHIFT = 0.1
_IN_SQUARE, _SQUARE_SHIFT = 0.5 / 2.3, 0.125  # of the registered crop
_COLOUR_GAIN = 0.015


def write_speech_model(path: Path, generator: np.random.Generator) -> None:
    """`input_values` [1, samples] -> [time, 1024], 50 a second."""
    constants: Constants = {"one": np.array([1]), "zero": np.array([0])}
    nodes = [_node("Unsqueeze", ["input_values", "one"], "layer_0")]
    channels = 1
    for number, (kernel, stride) in enumerate(_SPEECH_LAYERS, start=1):
        gain = _LAYER_GAIN if number > 1 else _SPEECH_GAIN
        weight = generator.standard_normal((_SPEECH_WIDTH, channels, kernel))
        constants[f"conv_{number}"] = _float(gain * weight / np.sqrt(channels * kernel))
        nodes.append(
            _node("Conv", [f"layer_{number - 1}", f"conv_{number}"], f"conv_out_{number}", strides=[stride])
        )
        nodes.append(_node("Tanh", [f"conv_out_{number}"], f"layer_{number}"))
        channels = _SPEECH_WIDTH
    constants["project"] = _float(generator.standard_normal((_SPEECH_WIDTH, _SPEECH_FEATURES)))
    nodes += [
        _node("Squeeze", [f"layer_{len(_SPEECH_LAYERS)}", "zero"], "by_channel"),
        _node("Transpose", ["by_channel"], "by_time", perm=[1, 0]),
        _node("MatMul", ["by_time", "project"], "encoding_out"),
    ]
    outputs = {"encoding_out": ("time", _SPEECH_FEATURES)}
    _save(path, nodes, constants, ("input_values", (1, "samples")), outputs)


def write_detector(path: Path) -> None:
    """`input.1` [1, 3, 512, 512] -> scores, distances and points for each stride: one face in the picture,
    which lies in the upper left of the square."""
    stride = STRIDES[-1]
    nodes, constants = _picture_size("input.1")
    points = np.array([*_EYES, (0, 0.1), *_MOUTH]) * _HALF
    found = {
        "box": (np.concatenate([-np.array(_CENTRE), _CENTRE]), np.tile(_HALF, 2)),
        "points": (np.tile(_CENTRE, 5), points.reshape(-1)),
    }
    for kind, (of_sides, of_shorter) in found.items():
        constants |= {
            f"{kind}_of_sides": _float(of_sides / stride),
            f"{kind}_of_shorter": _float(of_shorter / stride),
        }
        nodes += [
            _node("Concat", ["sides"] * (len(of_sides) // 2), f"{kind}_sides", axis=0),
            _node("Mul", [f"{kind}_sides", f"{kind}_of_sides"], f"{kind}_centre"),
            _node("Mul", ["shorter", f"{kind}_of_shorter"], f"{kind}_extent"),
            _node("Add", [f"{kind}_centre", f"{kind}_extent"], f"{kind}_values"),
            _node("Unsqueeze", [f"{kind}_values", "zero"], f"{kind}_row"),
        ]
    constants["score_row"] = _float([[0.9]])
    outputs: dict[str, Shape] = {}
    for kind, width in (("score", 1), ("box", 4), ("points", 10)):
        for each in STRIDES:
            name, rows = f"{kind}_{each}", 2 * (SIDE // each) ** 2
            outputs[name] = (rows, width)
            first = [f"{kind}_row"] if each == stride else []
            constants[f"{name}_none"] = np.array([rows - len(first), width])
            nodes.append(_node("ConstantOfShape", [f"{name}_none"], f"{name}_rest"))
            nodes.append(_node("Concat", [*first, f"{name}_rest"], name, axis=0))
    _save(path, nodes, constants, ("input.1", (1, 3, SIDE, SIDE)), outputs)


def write_landmark106(path: Path, generator: np.random.Generator) -> None:
    """`data` [1, 3, 192, 192], 0..255 -> [1, 212], -1..1."""
    points = _face(106, _EYES_106, (52, 61)) * _IN_BOX
    answers = {"fc1": points.reshape(1, -1)}
    _save_answers(
        path, ("data", (1, 3, SIDE_106, SIDE_106)), answers, generator, colour_gain=_COLOUR_GAIN / 255
    )


def write_landmark203(path: Path, generator: np.random.Generator) -> None:
    """`input` [1, 3, 224, 224], 0..1 -> three outputs, of which the last [1, 406] are the landmarks, 0..1."""
    points = 0.5 + _face(203, _EYES_203, (48, 66)) * _IN_CROP + (0, _CROP_SHIFT)
    answers = {"hidden_1": np.zeros((1, 8)), "hidden_2": np.zeros((1, 8)), "landmarks": points.reshape(1, -1)}
    _save_answers(path, ("input", (1, 3, SIDE_203, SIDE_203)), answers, generator)


def write_blaze_face(path: Path, generator: np.random.Generator) -> None:
    """`input` [1, 128, 128, 3], -1..1 -> `regressors` [1, 896, 16], `classificators` [1, 896, 1]."""
    centres = anchors()
    middle = np.array([0.5, 0.5 + _SQUARE_SHIFT])
    points = middle + np.array([*_EYES, (0, 0.1), (0, 0.5), (-1, 0), (1, 0)]) * _IN_SQUARE
    values = np.zeros((1, len(centres), 8, 2))
    values[0, :, 0], values[0, :, 1] = middle - centres, 2 * _IN_SQUARE
    values[0, :, 2:] = points - centres[:, None]
    logits = np.full((1, len(centres), 1), -10.0)
    logits[0, 0] = 6.0
    regressors = BLAZE_SIDE * values.reshape(1, len(centres), 16)
    answers = {"regressors": regressors, "classificators": logits}
    _save_answers(path, ("input", (1, BLAZE_SIDE, BLAZE_SIDE, 3)), answers, generator)


def write_face_mesh(path: Path, generator: np.random.Generator) -> None:
    """`input` [1, 256, 256, 3], 0..1 -> `Identity` [1, 1, 1, 1434], pixels, with two scores."""
    points = _face(478, _EYES_478, (61, 291)) * _IN_BOX / 2 + 0.5
    depths = 0.05 * np.cos(np.arange(len(points)))[:, None]
    pixels = MESH_SIDE * np.concatenate([points, depths], axis=1)
    scores = {name: np.full((1, 1, 1, 1), 4.0) for name in ("Identity_1", "Identity_2")}
    answers = {"Identity": pixels.reshape(1, 1, 1, -1), **scores}
    _save_answers(path, ("input", (1, MESH_SIDE, MESH_SIDE, 3)), answers, generator, colour_gain=0.5)


def _face(
    count: int, eyes: Sequence[Mapping[str, Sequence[int]]], mouth: tuple[int, int]
) -> NDArray[np.float64]:
    """[count, 2] landmarks: an oval but for eyes and mouth."""
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points[list(mouth)] = _MOUTH
    for eye, side, centre in zip(eyes, (1, -1), _EYES, strict=True):
        for where, indices in eye.items():
            offset = np.array(_OFFSETS[where]) * _EYE_SIZE * (side, 1) if where != "iris" else _GAZE
            points[list(indices)] = np.array(centre) + offset
    return points


def _picture_size(picture: str) -> tuple[list[NodeProto], Constants]:
    """Nodes that give `sides` [2], width and height of what is not border, and the `shorter` [1] of them."""
    constants: Constants = {"border": _float((0.5 - 127.5) / 128), "zero": np.array([0])}
    nodes = [
        _node("Greater", [picture, "border"], "inside"),
        _node("Cast", ["inside"], "covered", to=onnx.TensorProto.FLOAT),
    ]
    for side, axes in (("width", [0, 1, 2]), ("height", [0, 1, 3])):
        nodes.append(_node("ReduceMax", ["covered"], f"along_{side}", axes=axes, keepdims=0))
        nodes.append(_node("ReduceSum", [f"along_{side}"], side, keepdims=1))
    nodes.append(_node("Concat", ["width", "height"], "sides", axis=0))
    nodes.append(_node("Min", ["width", "height"], "shorter"))
    return nodes, constants


def _save_answers(
    path: Path,
    picture: tuple[str, Shape],
    answers: Mapping[str, NDArray[np.float64]],
    generator: np.random.Generator,
    *,
    colour_gain: float = _COLOUR_GAIN,
) -> None:
    """A model that gives the answers, moved by the mean colour."""
    name, shape = picture
    spatial = [2, 3] if shape[1] == 3 else [1, 2]
    nodes = [_node("ReduceMean", [name], "colour", axes=spatial, keepdims=0)]
    constants: Constants = {}
    for output, answer in answers.items():
        constants[f"{output}_weight"] = _float(colour_gain * generator.standard_normal((3, answer.size)))
        constants[f"{output}_shape"] = np.array(answer.shape)
        constants[f"{output}_still"] = _float(answer)
        nodes += [
            _node("MatMul", ["colour", f"{output}_weight"], f"{output}_flat"),
            _node("Reshape", [f"{output}_flat", f"{output}_shape"], f"{output}_change"),
            _node("Add", [f"{output}_still", f"{output}_change"], output),
        ]
    _save(path, nodes, constants, picture, {output: answer.shape for output, answer in answers.items()})


def _node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, inputs, [output], name=output, **attributes)


def _float(values: Any) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


def _save(
    path: Path,
    nodes: Sequence[NodeProto],
    constants: Constants,
    picture: tuple[str, Shape],
    outputs: Mapping[str, Shape],
) -> None:
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        path.stem,
        [_described(*picture)],
        [_described(*output) for output in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used],
    )
    opset = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _described(name: str, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
