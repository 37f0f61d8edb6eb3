"""What goes into the transformer: picture, face, speech and prompt, each from the recorded raw material."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import WhisperFeatureExtractor

from avatar_core.backends.hunyuan.audio import (
    PARITY_FPS,
    PARITY_HEARD_FRAMES,
    SAMPLE_RATE,
    audio_windows,
    log_mel,
    pad_windows,
    parity_audio_len,
    parity_num_frames,
    whisper_samples,
)
from avatar_core.backends.hunyuan.config import NEGATIVE_PROMPT, PROMPT_PREFIX
from avatar_core.backends.hunyuan.picture import face_mask, fit_picture, latent_mask, llava_pixels, video_size
from avatar_core.backends.hunyuan.pretrained import load_llava
from avatar_core.backends.hunyuan.text import handed_on_mask, picture_text_states
from avatar_core.media.face import Face, choose
from avatar_core.media.face_torchscript import finds_from_output, grids, network_size
from tests.parity.golden import Golden, Values

RECORDED_COLUMNS = 256  # of the spectrogram
PIXEL_STEP = 3  # every third pixel of LLaVA's picture is recorded
FRAME_SAMPLES = 640  # a frame of the reference, at 16 kHz


def image_sizes(golden: Golden) -> Values:
    values = {}
    for index, row in enumerate(golden.settings["rows"]):
        width, height = video_size(row["in_w"], row["in_h"], row["image_size"])
        values |= {f"rows.{index}.out_w": width, f"rows.{index}.out_h": height}
    return values


def image_pixels(golden: Golden) -> Values:
    picture = fit_picture(golden.inputs["image_in"].numpy(), golden.settings["image_size"])
    llava = llava_pixels(picture)[..., ::PIXEL_STEP, ::PIXEL_STEP]
    return {
        "pixel_value_ref": torch.from_numpy(picture).permute(2, 0, 1)[None],
        "pixel_value_ref_llava_every_3rd": torch.from_numpy(llava),
        "text_prompt_used": PROMPT_PREFIX + golden.settings["text_prompt_given"],
    }


def face_masks(golden: Golden) -> Values:
    values = {}
    for case in golden.settings["cases"]:
        pixels = face_mask(corners(case["box_xywh"]), golden.settings["W"], golden.settings["H"])
        latents = torch.from_numpy(latent_mask(pixels))
        rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
        index = case["index"]
        values |= {
            f"{index}.pixel_mask": torch.from_numpy(pixels),
            f"{index}.latent_mask": latents,
            f"{index}.token_mask": latents[..., ::2, ::2],
            f"cases.{index}.mask_rows": [int(rows[0]), int(rows[-1]) + 1],
            f"cases.{index}.mask_cols": [int(columns[0]), int(columns[-1]) + 1],
        }
    return values


def corners(box: list[float] | None) -> list[float] | None:
    """From x, y, width, height."""
    return box and [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def face_detector_post(golden: Golden) -> Values:
    width, height = golden.settings["W"], golden.settings["H"]
    size = network_size(width, height)
    finds = finds_from_output(golden.inputs["raw"][0].numpy(), (width, height), size)
    boxes = np.concatenate([finds.boxes[:, :2], finds.boxes[:, 2:] - finds.boxes[:, :2]], axis=1)
    faces = [Face(*find) for find in zip(finds.boxes, finds.scores, finds.points, strict=True)]
    left_to_right = sorted(faces, key=lambda face: face.box[0])
    (chosen,) = choose(left_to_right, "reference")
    return {
        "boxes_xywh": torch.from_numpy(boxes),
        "keypoints": torch.from_numpy(finds.points),
        "scores": torch.from_numpy(finds.scores),
        "chosen_box": torch.from_numpy(boxes[next(i for i, face in enumerate(faces) if face is chosen)]),
        "net_input_shape": [1, 3, size[1], size[0]],
        "grid_shapes": [list(grid.shape) for grid in grids(*size)],
    }


def whisper_mel(golden: Golden) -> Values:
    samples = whisper_samples(golden.inputs["wave"].numpy(), golden.settings["sample_rate"])
    mel = torch.from_numpy(log_mel(samples, WhisperFeatureExtractor()))[None]
    return {
        "mel_f16": mel[..., :RECORDED_COLUMNS],
        "mel_shape": list(mel.shape),
        "tail_value": float(mel[0, 0, -1]),
        "audio_len_frames": parity_audio_len(len(samples)),
    }


def windows_of(states: Tensor, audio_len: int, fps: float) -> Tensor:
    """[1, frames, 10, states, channels] of states recorded as [states, rows, channels]."""
    num_frames = parity_num_frames(audio_len * FRAME_SAMPLES / SAMPLE_RATE, fps)
    heard = min(num_frames, PARITY_HEARD_FRAMES)
    return torch.from_numpy(audio_windows(states.permute(1, 0, 2).numpy(), fps, heard))[None]


def frame_sums(windows: Tensor) -> Tensor:
    return windows[0].double().sum(dim=(1, 2, 3))


def audio_window_cases(golden: Golden) -> Values:
    values = {}
    for case in golden.settings["cases"]:
        windows = windows_of(golden.inputs["hidden_states"], case["num_frames"], case["fps"])
        index = case["index"]
        values |= {
            f"{index}.first3": windows[:, :3],
            f"{index}.last3": windows[:, -3:],
            f"{index}.frame_sums": frame_sums(windows),
            f"cases.{index}.shape": list(windows.shape),
        }
    return values


def predict_glue(golden: Golden) -> Values:
    settings = golden.settings
    windows = windows_of(golden.inputs["hidden_states"], settings["audio_len"], PARITY_FPS[0])
    padded = torch.from_numpy(pad_windows(windows[0].numpy()))[None]
    masks = latent_mask(face_mask(corners(settings["face_box_xywh"]), settings["W"], settings["H"]))
    picture = golden.inputs["pixel_value_ref"][0, 0].permute(1, 2, 0).to(torch.uint8).numpy()
    return {
        "audio_prompts.first3": padded[:, :3],
        "audio_prompts.frame_sums": frame_sums(padded),
        "audio_prompts_shape": list(padded.shape),
        "face_masks": torch.from_numpy(masks),
        "face_masks_shape": list(masks.shape),
        "height": picture.shape[0],
        "width": picture.shape[1],
        "pixel_value_llava_shape": list(llava_pixels(picture).shape),
        "negative_prompt": NEGATIVE_PROMPT,
    }


def llava_merge(golden: Golden) -> Values:
    mask, crop_start = golden.inputs["tokenizer_mask"], golden.settings["crop_start"]
    with TemporaryDirectory() as folder:
        write_llava(golden, Path(folder))
        llava = load_llava(Path(folder), "cpu", torch.float32)
    states = picture_text_states(llava, golden.inputs["input_ids"], mask, golden.inputs["pixel_values"])
    return {
        "hidden_m3_uncropped": states,
        "hidden_m3_cropped": states[:, crop_start:],
        "mask_handed_on": handed_on_mask(mask, states.shape[1] - mask.shape[1] + 1, crop_start),
    }


def write_llava(golden: Golden, folder: Path) -> None:
    """The recorded weights as a checkpoint folder like the official one."""
    settings = golden.settings
    config = {
        "model_type": "llava",
        "image_token_index": settings["image_token"],
        "pad_token_id": settings["pad_token"],
        "vision_feature_layer": settings["vision_feature_layer"],
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "llama", **settings["text_config"]},
        "vision_config": {"model_type": "clip_vision_model", **settings["vision_config"]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(golden.weights), folder / "model.safetensors", metadata={"format": "pt"})


CASES = {
    "image_sizes": image_sizes,
    "image_pixels": image_pixels,
    "face_masks": face_masks,
    "face_detector_post": face_detector_post,
    "whisper_mel": whisper_mel,
    "audio_windows": audio_window_cases,
    "predict_glue": predict_glue,
    "llava_merge": llava_merge,
}
