"""Cases of Ditto's registration, speech windows, motion and putback."""

import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from avatar_core.backends.ditto import audio, putback
from avatar_core.backends.ditto.chaining import (
    ChainSettings,
    ClipChain,
    OnlineMotion,
    Sample,
    offline_motion,
    smoothed,
)
from avatar_core.backends.ditto.condition import Condition, emotion_weights
from avatar_core.backends.ditto.crop import (
    CropMatrices,
    crop_matrices,
    fitted_size,
    mapped,
    network_input,
    outline,
)
from avatar_core.backends.ditto.eyes import eye_ball, eye_open
from avatar_core.backends.ditto.motion_stitch import MotionStitch, StitchSettings, blink_schedule, fades
from avatar_core.backends.ditto.motion_vector import (
    WIDTHS,
    degrees,
    frame,
    keypoints,
    mirror_index,
    pack,
    rotation,
    smooth_motion,
    unpack,
)
from avatar_core.backends.ditto.sampling import ClipSampler
from avatar_core.backends.ditto.stitching import StitchingConfig, StitchingNetwork
from avatar_core.media import landmarks, scrfd
from avatar_core.media.affine import warp_square
from tests.parity.ditto import recipe
from tests.parity.golden import Golden, Values

Array = NDArray[np.float32]

GUIDANCE = 2.0
RECORD = WIDTHS | {"kp": 63}
PIECE_SAMPLES = 1111  # in which streamed speech arrives


def recorded_shapes(golden: Golden) -> dict[str, tuple[int, ...]]:
    """Names and shapes, which say what a case is about where its sidecar does not; no values."""
    with safe_open(golden.folder / f"{golden.name}.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def record(rows: Array) -> dict[str, Array]:
    """Packed rows: with the true scale, of a source with its key points."""
    starts = np.cumsum([0, *RECORD.values()])
    parts = zip(RECORD.items(), starts, strict=False)
    return {key: rows[:, start : start + width] for (key, width), start in parts if start < rows.shape[1]}


def packed(motion: Mapping[str, Array]) -> Tensor:
    return torch.from_numpy(np.concatenate([motion[key] for key in RECORD if key in motion], axis=1))


def number(golden: Golden, name: str) -> NDArray[Any]:
    return golden.inputs[name].numpy()


def stub_hubert(window: Array) -> Array:
    means = np.array([window[320 * i : 320 * i + 400].mean() for i in range(20)], np.float32)
    return means[:, None] * np.arange(1, audio.FEATURE_DIM + 1, dtype=np.float32) / audio.FEATURE_DIM


def start_of(window: Array) -> int:
    """Where a window of the ramp (i + 1) / 1000 begins; silence is zero."""
    first = int(np.flatnonzero(window)[0])
    return round(float(window[first]) * 1000) - 1 - first


def audio_windows(golden: Golden) -> Values:
    values: dict[str, Any] = {}
    for length in map(int, golden.settings["offline"]):
        ramp = np.arange(1, length + 1, dtype=np.float32) / 1000
        frames = audio.num_frames(length, parity=True)
        windows = list(audio.offline_windows(ramp, frames))
        features = audio.encode(ramp, stub_hubert, parity=True)
        values |= {
            f"offline.{length}.num_frames": len(features),
            f"offline.{length}.windows": len(windows),
            f"offline.{length}.window_len": [len(windows[i]) for i in sorted({0, len(windows) - 1})],
            f"offline.{length}.starts": [start_of(window) for window in windows],
            f"offline_L{length}.feat_c1023": torch.from_numpy(features[:, -1]),
        }
    for length in map(int, golden.settings["online"]):
        ramp = np.arange(1, length + 1, dtype=np.float32) / 1000
        windows = list(streamed(ramp))
        features = np.concatenate([audio.chunk_features(stub_hubert(window)) for window in windows])
        values |= {
            f"online.{length}.num_frames": len(features),
            f"online.{length}.windows": len(windows),
            f"online.{length}.starts": [start_of(window) for window in windows],
            f"online.{length}.video_frames_expected": audio.num_frames(length, parity=True),
            f"online_L{length}.feat_c1023": torch.from_numpy(features[:, -1]),
        }
    return values


def streamed(samples: Array) -> Iterator[Array]:
    windows = audio.StreamingWindows()
    for start in range(0, len(samples), PIECE_SAMPLES):
        yield from windows.feed(samples[start : start + PIECE_SAMPLES])
    yield from windows.finish()


def condition_of(golden: Golden, emotion: Any, source_frames: int, eye_f0_mode: bool) -> Condition:
    return Condition(
        emotion_weights(emotion),
        number(golden, "eye_open")[:source_frames],
        number(golden, "eye_ball")[:source_frames],
        number(golden, "sc"),
        eye_f0_mode=eye_f0_mode,
    )


def conditions(golden: Golden) -> Values:
    values = {}
    for name, case in golden.settings["cases"].items():
        emotion = number(golden, "emo_arr") if case["emo"] == "arr" else case["emo"]
        source_frames = 1 if case["source"].startswith("first") else len(golden.inputs["eye_open"])
        condition = condition_of(golden, emotion, source_frames, case["eye_f0_mode"])
        features = np.zeros((case["frames"], audio.FEATURE_DIM), np.float32)
        values[f"{name}.tail79"] = torch.from_numpy(condition.rows(features, case["idx"])[:, -79:])
    return values


def crop_cases(golden: Golden) -> Values:
    picture, values, shapes = number(golden, "image_u8"), {}, recorded_shapes(golden)
    for name in golden.settings["cases"]:
        points = number(golden, f"{name}.lmk")
        for setting in golden.settings["settings"]:
            size, matrices = crop_of(points, golden.settings["settings"], setting)
            prefix = f"{name}.{setting}"
            values |= {
                f"{prefix}.M_o2c": torch.from_numpy(matrices.from_picture),
                f"{prefix}.M_c2o": torch.from_numpy(matrices.to_picture),
                f"{prefix}.pts": torch.from_numpy(mapped(points, matrices.from_picture)),
            }
            square = warp_square(picture, matrices.from_picture, size)
            if f"{prefix}.crop_strided" in shapes:
                step = size // shapes[f"{prefix}.crop_strided"][0]
                values[f"{prefix}.crop_strided"] = torch.from_numpy(square[::step, ::step].copy())
            if setting == "c512" and f"{name}.bchw256_strided" in shapes:
                step = 256 // shapes[f"{name}.bchw256_strided"][2]
                pixels = network_input(square)[..., ::step, ::step]
                values[f"{name}.bchw256_strided"] = torch.from_numpy(pixels.copy())
        values |= geometry(name, *crop_of(points, golden.settings["settings"], "c512"))
    return values


def crop_of(points: Array, settings: Mapping[str, Any], name: str) -> tuple[int, CropMatrices]:
    """The reference never hands on its `vx_ratio`."""
    setting = settings[name.removesuffix("_norot")]
    rotate = setting.get("flag_do_rot", True) and not name.endswith("_norot")
    matrices = crop_matrices(
        outline(points), setting["dsize"], setting["scale"], setting["vy_ratio"], rotate=rotate
    )
    return setting["dsize"], matrices


def geometry(name: str, size: int, matrices: CropMatrices) -> Values:
    back = matrices.to_picture.astype(np.float64)
    return {
        f"cases.{name}.center": (back @ [size / 2, size / 2, 1])[:2].tolist(),
        f"cases.{name}.size": [size * float(np.hypot(*back[:2, 0]))] * 2,
        f"cases.{name}.angle_rad": float(np.arctan2(back[1, 0], back[0, 0])),
    }


def resize_rule(golden: Golden) -> Values:
    values = {}
    rows: Any = golden.settings
    for index, row in enumerate(rows):
        height, width = fitted_size(row["h"], row["w"], row["max_dim"])
        values[f"{index}.out"] = [height, width, (height, width) != (row["h"], row["w"])]
    return values


def detector(golden: Golden) -> Values:
    seed = golden.settings["seed"]
    outputs = [raw_scores(golden, stride) for stride in scrfd.STRIDES]
    sizes = [2 * (scrfd.SIDE // stride) ** 2 for stride in scrfd.STRIDES]
    cells = list(zip(scrfd.STRIDES, sizes, strict=True))
    outputs += [np.abs(recipe.randn(seed, f"det/bbox{s}", (n, 4))) * 2 + 1 for s, n in cells]
    outputs += [recipe.randn(seed, f"det/kps{s}", (n, 10)) for s, n in cells]
    tag, height, width = re.search(r"'(det/img_wide)' (\d+)x(\d+)", golden.settings["note"]).groups()
    wide = rounded(recipe.smooth_field(seed, tag, int(height), int(width)))
    values = {"wide.image_u8": torch.from_numpy(wide[::4, ::4].copy())}
    for name, picture in {"tall": number(golden, "tall.image_u8"), "wide": wide}.items():
        batch, scale = scrfd.network_input(picture)
        finds = scrfd.finds_from_outputs(outputs, scale)
        boxes = np.column_stack([finds.boxes, finds.scores])
        largest = np.argmax(np.prod(finds.boxes[:, 2:] - finds.boxes[:, :2], axis=1))
        values |= {
            f"{name}.det": torch.from_numpy(boxes),
            f"{name}.kps": torch.from_numpy(finds.points),
            f"{name}.blob_strided": torch.from_numpy(batch[..., ::8, ::8]),
            f"{name}.chosen": torch.from_numpy(boxes[largest]),
        }
    return values


def raw_scores(golden: Golden, stride: int) -> Array:
    scores = np.zeros((2 * (scrfd.SIDE // stride) ** 2, 1), np.float32)
    scores[number(golden, f"score_idx_{stride}"), 0] = number(golden, f"score_val_{stride}")
    return scores


def rounded(field: NDArray[np.floating]) -> NDArray[np.uint8]:
    return np.round(field).astype(np.uint8)


def landmark_cases(golden: Golden) -> Values:
    seed = golden.settings["seed"]
    fields = {
        tag: rounded(recipe.smooth_field(seed, tag, int(height), int(width)))
        for tag, height, width in re.findall(r"'([\w/]+)' (\d+)x(\d+)", golden.settings["note"])
    }
    matrix = landmarks.box_matrix(number(golden, "box"))
    points = landmarks.points_203(number(golden, "raw203"))
    return {
        "blob106_strided": torch.from_numpy(
            landmarks.input_106(fields["det/img_tall"], matrix)[..., ::4, ::4].copy()
        ),
        "lmk106": torch.from_numpy(landmarks.points_106(number(golden, "raw106"), matrix)),
        "blob203_strided": torch.from_numpy(landmarks.input_203(fields["lmk203/crop"])[..., ::8, ::8].copy()),
        "lmk203": torch.from_numpy(mapped(points, number(golden, "M_c2o_203"))),
        "lmk203_nocrop": torch.from_numpy(points),
    }


def eye_info(golden: Golden) -> Values:
    faces = number(golden, "lmk478")
    opened = torch.from_numpy(np.stack([eye_open(face) for face in faces]))
    moves = torch.from_numpy(np.stack([eye_ball(face) for face in faces]))
    return {
        "open": opened,
        "open_flat": opened,
        "ball_move": moves.reshape(-1, 3, 2),
        "ball_flat": moves,
    }


def smooth_source(golden: Golden) -> Values:
    return {"out": packed(smooth_motion(record(number(golden, "in")), golden.settings["smo_k"]))}


def keypoint_cases(golden: Golden) -> Values:
    motion = {key: number(golden, key) for key in RECORD}
    angles = {angle: degrees(motion[angle]) for angle in ("pitch", "yaw", "roll")}
    single = [keypoints(frame(motion, i)) for i in range(len(motion["kp"]))]
    return {
        **{f"deg.{angle}": torch.from_numpy(value) for angle, value in angles.items()},
        "rotation": torch.from_numpy(rotation(*angles.values())),
        "keypoints": torch.from_numpy(np.concatenate(single)),
        "keypoints_batched": torch.from_numpy(keypoints(motion)),
        "vector265": torch.from_numpy(pack(motion)),
    }


def schedules(golden: Golden) -> Values:
    values = {}
    for name, (length, *_) in recorded_shapes(golden).items():
        if blink := re.fullmatch(r"blink_N(\d+)_b(\d+)_open(list|-?\d+)", name):
            gap = blink[3]
            gaps = golden.settings["list_open_n"] if gap == "list" else int(gap)
            generator = random.Random(golden.settings["seed"])
            values[name] = torch.from_numpy(blink_schedule(int(blink[1]), int(blink[2]), gaps, generator))
        elif mirror := re.fullmatch(r"mirror_index_size(\d+)", name):
            values[name] = torch.tensor([mirror_index(i, int(mirror[1])) for i in range(length)])
    return values


def fade_controls(golden: Golden) -> Values:
    values = {}
    for name, case in golden.settings.items():
        given = {int(index): control for index, control in case["ctrl_info_in"].items()}
        result = fades(case["N_d"], case["fade_in"], case["fade_out"], given)
        values |= {
            f"{name}.result.{index}.{key}": value
            for index, control in result.items()
            for key, value in control.items()
        }
    return values


def chain_settings(setup: Mapping[str, Any], online: bool) -> ChainSettings:
    dims = setup.get("fix_kp_cond_dim")
    return ChainSettings(
        overlap=setup["overlap_v2"],
        online=online,
        smooth_k=setup.get("smo_k_d", 3),
        fix_kp_cond=setup.get("fix_kp_cond", 0),
        fix_kp_cond_dims=tuple(dims) if dims else None,
    )


def source_vector(golden: Golden) -> Array:
    return pack(record(number(golden.sibling("motion_stitch"), "source")[:1]))


def fuse(golden: Golden) -> Values:
    values: dict[str, Any] = {}
    names = recorded_shapes(golden)
    for name, case in golden.settings["cases"].items():
        settings = chain_settings(case["setup"], case["setup"].get("online_mode", False))
        chain = ClipChain(settings, source_vector(golden))
        followed = []
        for clip in range(case["clips"]):
            followed.append(torch.from_numpy(chain.kp_cond.copy()))
            tag = f"fuse/{name}/pred{clip}"
            chain.append(recipe.randn(golden.settings["seed"], tag, (1, settings.seq_frames, 265)))
        values |= {
            f"{name}.fused": torch.from_numpy(chain.motion),
            f"{name}.kp_conds": torch.cat(followed),
            f"{name}.kp_cond_after": torch.from_numpy(chain.kp_cond),
            f"cases.{name}.length": chain.motion.shape[1],
            f"cases.{name}.fuse_length": settings.fuse_frames,
            f"cases.{name}.valid_clip_len": settings.valid_frames,
        }
        if f"{name}.final_smoothed" in names:
            values[f"{name}.final_smoothed"] = torch.from_numpy(smoothed(chain.motion[0], settings.smooth_k))[
                None
            ]
    limits = np.stack([number(golden, "clip.vmin"), number(golden, "clip.vmax")])
    return values | {"clip.out": packed(unpack(number(golden, "clip.in")[0], limits))}


def e2e_motion(golden: Golden) -> Values:
    values: dict[str, Any] = {}
    for name, case in golden.settings["cases"].items():
        drawn = Draws(golden.settings["seed"], name)
        model = recipe.tiny_lmdm(golden.sibling("lmdm_step_tiny"))
        sample = ClipSampler(model, case["sampling_timesteps"], GUIDANCE, draw=drawn)
        motion, reference = driven(golden, name, sample)
        values |= {
            f"{name}.out": motion,
            f"{name}.frame_idx": torch.tensor(
                [mirror_index(i, case["source_frames"]) for i in range(len(motion))]
            ),
            f"cases.{name}.emitted": len(motion),
            f"cases.{name}.draws": drawn.count,
        }
        if reference is not None:
            values[f"{name}.d0"] = reference[0]
    return values


class Draws:
    """The noises of the recipe, in order."""

    def __init__(self, seed: int, case: str) -> None:
        self.seed, self.case, self.count = seed, case, 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.count += 1
        return torch.from_numpy(recipe.randn(self.seed, f"e2e/{self.case}/draw{self.count - 1}", shape))


def driven(golden: Golden, name: str, sample: Sample) -> tuple[Tensor, Tensor | None]:
    """Every frame with its true scale, and the frame that motion is relative to."""
    case, seed = golden.settings["cases"][name], golden.settings["seed"]
    settings = chain_settings(case["setup"], case["online"])
    condition = condition_of(golden.sibling("condition"), 4, case["source_frames"], False)
    features = recipe.randn(seed, f"e2e/{name}/aud", (case["audio_frames"], audio.FEATURE_DIM))
    source, limits = source_vector(golden), None
    if "v_min_max_for_clip" in case["setup"]:
        least, most = re.findall(r"-?\d+\.?\d*(?=\.\.|>)", case["setup"]["v_min_max_for_clip"])
        limits = np.stack([np.full(265, float(least), np.float32), np.full(265, float(most), np.float32)])
    if not case["online"]:
        return packed(unpack(offline_motion(features, condition, source, sample, settings), limits)), None
    silence = recipe.randn(seed, f"e2e/{name}/silence", (settings.overlap, audio.FEATURE_DIM))
    motion = OnlineMotion(condition, source, sample, settings, silence, parity=True)
    step = case["features_per_put"]
    frames = [f for i in range(0, len(features), step) for f in motion.feed(features[i : i + step])]
    frames += motion.finish()
    assert motion.reference is not None
    return packed(unpack(np.concatenate(frames), limits)), packed(unpack(motion.reference[None], limits))


def motion_stitch(golden: Golden) -> Values:
    network = StitchingNetwork(StitchingConfig()).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    network.load_state_dict(recipe.weights(golden.settings["seed"], shapes))
    values = {}
    for name, scenario in golden.settings["scenarios"].items():
        stitched = scenario["setup"].get("flag_stitching", True)
        x_s, x_d = map(torch.from_numpy, stitched_pairs(golden, scenario))
        with torch.inference_mode():
            values |= {f"{name}.x_s": x_s, f"{name}.x_d": network(x_s, x_d) if stitched else x_d}
    return values


def stitched_pairs(golden: Golden, scenario: Mapping[str, Any]) -> tuple[Array, Array]:
    setup = dict(scenario["setup"])
    given = {
        "is_image": setup.pop("is_image_flag"),
        "num_frames": setup.pop("N_d", -1),
        "start_frame": scenario["start_idx"],
    }
    setup.pop("flag_stitching", None)
    if setup.pop("d0", None):
        given["reference"] = record(number(golden, "d0_given"))
    if setup.pop("delta_eye_arr", None):
        given["delta_eye_arr"] = number(golden, "delta_eye_arr")
    if setup.pop("ch_info", None):
        given["character"] = record(number(golden, "ch_source"))
    source = record(number(golden, "source"))
    stitch = MotionStitch(StitchSettings(**setup, parity=True), source, **given)
    first, end = re.fullmatch(r"source\[(\d+)(:\d+)?\]", scenario["frames_source"]).groups()
    drive = record(number(golden, "drive"))
    pairs = []
    for index, control in enumerate(scenario["per_frame_ctrl"]):
        if "delta_exp" in control:
            control = {**control, "delta_exp": number(golden, "delta_exp")}
        pairs.append(stitch.pair(frame(drive, index), int(first) + (index if end else 0), control))
    x_s, x_d = (np.stack(points) for points in zip(*pairs, strict=True))
    return x_s, x_d


def putback_cases(golden: Golden) -> Values:
    seed, still = golden.settings["seed"], number(golden, "frame_u8")
    tag, side = re.search(r"'(geom/render)', (\d+)x\d+", golden.settings["note"]).groups()
    render = recipe.smooth_field(seed, tag, int(side), int(side)).astype(np.float32)
    mask = torch.from_numpy(putback.blend_mask(int(side), int(side)))
    shapes = recorded_shapes(golden)
    step, (rows, columns) = int(side) // shapes["mask512"][0], shapes["mask512_corner"]
    first = putback.Putback(still, number(golden, "M_c2o"))
    second = putback.Putback(still, number(golden, "M_c2o_b"))
    warped = np.zeros(still.shape[:2], np.float32)
    warped[first.part] = first.mask[..., 0]
    check = int(side) // shapes["render_strided_check"][0]
    return {
        "mask512": mask[::step, ::step],
        "mask512_row256": mask[256],
        "mask512_corner": mask[:rows, :columns],
        "mask_small": torch.from_numpy(putback.blend_mask(*shapes["mask_small"])),
        "mask_warped": torch.from_numpy(warped),
        "render_strided_check": torch.from_numpy(render[::check, ::check].copy()),
        "out_fast": torch.from_numpy(first(render)),
        "out_numpy": torch.from_numpy(first(render)),
        "out_fast_b": torch.from_numpy(second(render)),
    }


CASES = {
    "audio_windows": audio_windows,
    "condition": conditions,
    "crop": crop_cases,
    "detector": detector,
    "e2e_motion": e2e_motion,
    "eye_info": eye_info,
    "fade_ctrl": fade_controls,
    "fuse": fuse,
    "keypoints": keypoint_cases,
    "landmarks": landmark_cases,
    "motion_stitch": motion_stitch,
    "putback": putback_cases,
    "resize_rule": resize_rule,
    "schedules": schedules,
    "smooth_source": smooth_source,
}
