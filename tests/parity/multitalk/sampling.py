"""From noise to video: the steps, guidance, the cache of steps, and whole runs of several windows."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from avatar_core.backends.multitalk.colour import match_colour
from avatar_core.backends.multitalk.config import DenoiseConfig
from avatar_core.backends.multitalk.guidance import Direction
from avatar_core.backends.multitalk.picture import cover, masks_within, nearest_size
from avatar_core.backends.multitalk.sampling import (
    ClipInputs,
    GuidedVelocity,
    SamplerSettings,
    add_noise,
    euler_step,
    timesteps,
)
from avatar_core.backends.multitalk.teacache import (
    WARM_UP_STEPS,
    coefficients,
    relative_change,
)
from avatar_core.backends.multitalk.window_decoder import WindowDecoder, as_frame
from avatar_core.backends.multitalk.window_denoiser import WindowDenoiser
from avatar_core.backends.multitalk.windows import num_video_frames, num_windows
from tests.parity.golden import Golden, Values
from tests.parity.multitalk.models import CLIP, TRANSFORMER, VAE, load_clip, load_transformer, load_vae

DEVICE = "cpu"


def scheduler(golden: Golden) -> Values:
    inputs = golden.inputs
    values = {}
    for case in golden.settings["cases"]:
        key, times = case["key"], timesteps(case["steps"], case["shift"])
        values[f"{key}.timesteps"] = times
        latents = inputs.get(f"{key}.latent0")
        for step in range(sum(name.startswith(f"{key}.model_out") for name in inputs)):
            latents = euler_step(latents, inputs[f"{key}.model_out{step}"], times[step], times[step + 1])
            values[f"{key}.latent{step + 1}"] = latents
    noisy = ("original", "noise", "timestep")
    values["add_noise.out"] = add_noise(*(inputs[f"add_noise.in.{name}"] for name in noisy))
    return values


def apg(golden: Golden) -> Values:
    settings, inputs = golden.settings, golden.inputs
    direction = Direction(settings["momentum"], settings["norm_threshold"])
    values: dict[str, Any] = {}
    steps = sum(name.endswith(".in.diff") for name in inputs)
    given = [(inputs[f"step{step}.in.diff"], inputs[f"step{step}.in.pred_cond"]) for step in range(steps)]
    for step, (difference, conditional) in enumerate(given):
        values[f"step{step}.out"] = direction(difference, conditional)
        values[f"step{step}.running_average"] = direction.average
    return values | {"nomomentum.out": Direction(0.0, 0.0)(*given[0])}


class Calls:
    """What a transformer was given and gave, call by call."""

    def __init__(self, transformer: nn.Module) -> None:
        self.latents: list[Tensor] = []
        self.answers: list[Tensor] = []
        self.computed: list[bool] = []
        transformer.register_forward_pre_hook(self._before)
        transformer.register_forward_hook(self._after)
        blocks: Any = transformer.get_submodule("blocks")
        blocks[0].register_forward_hook(self._block)

    def _before(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.latents.append(arguments[0][0])
        self.computed.append(False)

    def _block(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.computed[-1] = True

    def _after(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self.answers.append(output[0])


@torch.no_grad()
def teacache(golden: Golden) -> Values:
    settings, inputs = golden.settings, golden.inputs
    weights = golden.sibling(TRANSFORMER)
    scaled = {"time_embedding.0.weight": inputs["time_embedding.0.weight_scaled"]}
    transformer = load_transformer(weights, {**weights.weights, **scaled})
    sampler = SamplerSettings(
        num_inference_steps=settings["steps"],
        flow_shift=settings["shift"],
        text_guidance_scale=settings["text_guide_scale"],
        audio_guidance_scale=settings["audio_guide_scale"],
        cache_threshold=settings["thresh"],
        image_size=image_size(settings["size"]),
    )
    velocity = GuidedVelocity(transformer, window_of(inputs), sampler)
    times, latents, calls = timesteps(settings["steps"], settings["shift"]), inputs["x"], Calls(transformer)
    values: dict[str, Any] = {}
    before = []
    for step in range(settings["steps"]):
        before.append(latents)
        latents = euler_step(latents, velocity(latents, times[step]), times[step], times[step + 1])
        for kind, cache in enumerate(velocity.caches):
            call = f"log.{step * len(velocity.caches) + kind}"
            values |= {f"{call}.computed": cache.computed[-1], f"{call}.accumulated": cache.moved}
    moments = [transformer.time(time[None])[1] for time in times[:-1]]
    changes = [relative_change(*pair) for pair in zip(moments[1:], moments[:-1], strict=True)]
    powers = coefficients(sampler.image_size)
    return values | {
        "out.calls": torch.stack(calls.answers),
        "out.latents_before_step": torch.stack(before),
        "out.final_latent": latents,
        "rel_l1_between_consecutive_steps": changes,
        "poly_of_rel_l1": [float(np.polyval(powers, change)) for change in changes],
        "coefficients": list(powers),
        "ret_calls": WARM_UP_STEPS * len(velocity.caches),
        "num_calls": len(calls.answers),
    }


def image_size(size: str) -> int:
    return int(size.rpartition("-")[2])


def window_of(inputs: Mapping[str, Tensor]) -> ClipInputs:
    return ClipInputs(
        prompt_embeds=inputs["context"],
        negative_prompt_embeds=inputs["context_null"],
        clip_features=inputs["clip_fea"],
        condition=inputs["y"],
        audio=inputs["audio"],
        speaker_masks=inputs["ref_target_masks"],
    )


class Draws(TorchFunctionMode):
    """Records all noise that is drawn within."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.randn:
            self.drawn.append(result)
        return result


def config_of(settings: Mapping[str, Any]) -> DenoiseConfig:
    return DenoiseConfig(
        mode="parity",
        num_inference_steps=settings["sampling_steps"],
        flow_shift=settings["shift"],
        text_guidance_scale=settings["text_guide_scale"],
        audio_guidance_scale=settings["audio_guide_scale"],
        apg=settings["use_apg"],
        apg_momentum=settings["apg_momentum"],
        apg_norm_threshold=settings["apg_norm_threshold"],
        step_cache="teacache" if settings["use_teacache"] else "off",
        cache_threshold=settings["teacache_thresh"] or DenoiseConfig.cache_threshold,
        window_frames=settings["frame_num"],
        motion_frames=settings["motion_frame"],
        max_windows=1 if settings["mode"] == "clip" else 0,
        colour_correction=settings["color_correction_strength"],
    )


def reference_of(golden: Golden) -> dict[str, Any]:
    """Picture and masks as the reference stage stores them. Boxes were recorded as rows and columns."""
    picture, settings = golden.inputs["image_uint8"].numpy(), golden.settings
    height, width = picture.shape[:2]
    buckets = {float(ratio): tuple(size) for ratio, (size, _) in settings["buckets"].items()}
    target = nearest_size(height / width, buckets)
    boxes = [(x0, y0, x1, y1) for y0, x0, y1, x1 in settings["bbox"] or []]
    masks = masks_within(target, width, height, boxes or None, settings["persons"])
    return {"picture": cover(picture, target), "speaker_masks": masks}


@dataclass(frozen=True)
class Run:
    """A clip through the windows of the backend, each from what the one before left."""

    golden: Golden
    config: DenoiseConfig
    reference: Mapping[str, Any]
    transformer: Any
    vae: Any
    denoiser: WindowDenoiser

    @classmethod
    def of(cls, golden: Golden) -> "Run":
        transformer, vae, clip = (
            load(golden.sibling(name))
            for load, name in ((load_transformer, TRANSFORMER), (load_vae, VAE), (load_clip, CLIP))
        )
        config, reference = config_of(golden.settings), reference_of(golden)
        return cls(
            golden, config, reference, transformer, vae, WindowDenoiser(transformer, clip, vae, DEVICE)
        )

    @property
    def text(self) -> dict[str, Any]:
        inputs = self.golden.inputs
        names = {"prompt_embeds": "context", "negative_prompt_embeds": "context_null"}
        return {name: inputs[recorded].numpy() for name, recorded in names.items()}

    @property
    def speech(self) -> Any:
        """[persons, frames, layers, channels]"""
        persons = range(1, self.golden.settings["persons"] + 1)
        return np.stack([self.golden.inputs[f"audio_person{number}"].numpy() for number in persons])

    def windows(self) -> Iterator[tuple[Values, list[bool]]]:
        """What was recorded of each window, and which calls ran the blocks."""
        speech, calls = self.speech, Calls(self.transformer)
        audio = {"embeddings": speech, "num_frames": num_video_frames(speech.shape[1], self.config)}
        decoder = WindowDecoder(self.vae, DEVICE)
        conditions, seed, previous = (self.text, self.reference, audio), self.golden.settings["seed"], None
        for window in range(num_windows(speech.shape[1], self.config)):
            first = len(calls.answers)
            inputs = self.denoiser.inputs(*conditions, self.config, window, previous)
            begin = previous["motion_frames"] if previous else as_frame(self.reference["picture"])[:, None]
            with Draws() as draws:
                tensors = self.denoiser.denoise(
                    *conditions, seed, self.config, lambda *_: None, window, previous
                )
            latents = tensors["latents"]
            values = {
                "clip_in": torch.as_tensor(begin)[None, :, -1:],
                "clip_fea": inputs.clip_features,
                "vae_encode_out": inputs.condition[0, 4:],
                "y": inputs.condition,
                "audio_windows": inputs.audio,
                "ref_target_masks": inputs.speaker_masks,
                "final_latent": torch.from_numpy(latents),
                "vae_decode_out": decoder.pixels(latents, self.reference["picture"], 0.0, parity=True),
                **self._steps(calls, first),
                **noise_of(draws.drawn),
            }
            place = f"clip{window}"
            yield {f"{place}.{n}": v for n, v in values.items()}, calls.computed[first:]
            previous = tensors

    def _steps(self, calls: Calls, first: int) -> Values:
        by_text = not math.isclose(self.config.text_guidance_scale, 1.0)
        kinds = ("cond", "drop_text", "uncond") if by_text else ("cond", "drop_audio")
        values = {}
        for number, (latents, answer) in enumerate(
            zip(calls.latents[first:], calls.answers[first:], strict=True)
        ):
            step, kind = divmod(number, len(kinds))
            values[f"step{step}.{kinds[kind]}"] = answer
            values[f"step{step}.latent"] = latents[: len(answer)]
        return values


def noise_of(drawn: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"noise": drawn[0], **{f"motion_noise{n}": noise for n, noise in enumerate(drawn[1:])}}


@torch.no_grad()
def whole_run(golden: Golden) -> Values:
    run = Run.of(golden)
    picture = as_frame(run.reference["picture"])
    values: dict[str, Any] = {}
    frames, computed = [], []
    for number, (recorded, ran) in enumerate(run.windows()):
        values |= recorded
        computed += ran
        decoded = recorded[f"clip{number}.vae_decode_out"]
        pixels = match_colour(decoded, picture, run.config.colour_correction, parity=True)
        frames.append(pixels if number == 0 else pixels[:, run.config.motion_frames :])
    length = num_video_frames(run.speech.shape[1], run.config)
    video = torch.cat(frames, dim=1)[:, :length]
    return values | {
        "out.video": video,
        "num_clips": len(frames),
        "output_frames": video.shape[1],
        "block_stack_executed_per_call": computed,
    }


CASES: dict[str, Callable[[Golden], Values]] = {
    "scheduler": scheduler,
    "apg": apg,
    "teacache": teacache,
    "stream_": whole_run,
    "clip_1p_cfg2": whole_run,
}
