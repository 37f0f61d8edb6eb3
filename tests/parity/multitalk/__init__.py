"""MultiTalk: what a golden folder must hold, what counts as input, and how near is right.

The one table of required prefixes and tolerances (float32 on a CPU, largest error of any entry). Latents and
frames of whole runs are judged more mildly from clip to clip: a random autoencoder of this size enlarges what
one clip hands to the next.
"""

from tests.parity.golden import EXACT, Case, Tolerance

PARTS = ("transformer", "encoders", "sampling")
"""Modules of this package; each has `CASES`, from a prefix to a function from `Golden` to `Values`. More than
one may give values of a file."""

CLOSE = Tolerance(2e-5)
ALONE = Tolerance(1e-5)

_RUN = {
    "*:num_clips": EXACT,
    "*:output_frames": EXACT,
    "*:block_stack_executed_per_call": EXACT,
    "*noise*": EXACT,
    "*:*audio_windows": EXACT,
    "*:*ref_target_masks": EXACT,
    "*:clip0.vae_decode_out": Tolerance(2e-4),
    "*:clip0.*": Tolerance(1e-4),
    "*:*vae_decode_out": Tolerance(3e-3),
    "*:*": Tolerance(1e-3),
}
_RECORDED_OF_RUN = ("num_clips", "output_frames", "block_stack_executed_per_call")

TABLE = (
    Case("transformer_weights", weights=("*",), compared=False),
    Case("transformer_1p", {"*": CLOSE}),
    Case("transformer_2p", {"*": CLOSE}),
    Case(
        "teacache",
        {
            "*computed": EXACT,
            "*:out.*": Tolerance(2e-4),
            "*_calls": EXACT,
            "*:coefficients": EXACT,
            "*": Tolerance(1e-2),
        },
        recorded=(
            "log.*.computed",
            "log.*.accumulated",
            "rel_l1_between_consecutive_steps",
            "poly_of_rel_l1",
            "coefficients",
            "ret_calls",
            "num_calls",
        ),
    ),
    Case("audio_proj", {"*": ALONE}),
    Case("audio_windows", {"*": EXACT}, inputs=("case*.in.*",)),
    Case(
        "lrope",
        {"*": ALONE},
        inputs=("rope1d.in.*", "attn.in.*", "map.in.*"),
        weights=("attn.weight.*",),
    ),
    Case("apg", {"*": Tolerance(1e-5)}, inputs=("*.in.*",)),
    Case(
        "scheduler",
        {"*.timesteps": Tolerance(1e-4), "*": Tolerance(1e-6)},
        inputs=("*.latent0", "*.model_out*", "add_noise.in.*"),
    ),
    Case("lora", {"*": ALONE}, inputs=("lora.*",)),
    Case(
        "quant",
        {"*:maps.*": EXACT, "*.dequantised.*": ALONE, "*": Tolerance(1e-3)},
        inputs=("*._data", "*._scale", "*.bias", "*.input_scale", "*.output_scale"),
        recorded=("maps.*",),
    ),
    Case("stream_", _RUN, recorded=_RECORDED_OF_RUN),
    Case("clip_1p_cfg2", _RUN, recorded=_RECORDED_OF_RUN),
    Case("clip_visual", {"*": CLOSE}),
    Case(
        "vae", {"*:out.decoded": Tolerance(5e-5), "*:latents_*": EXACT, "*": CLOSE}, recorded=("latents_*",)
    ),
    Case("t5_encoder", {"*:valid_lengths": EXACT, "*": CLOSE}, recorded=("valid_lengths",)),
    Case(
        "wav2vec2",
        {"*frames": EXACT, "*:n_hidden_states": EXACT, "*": ALONE},
        recorded=("frames", "conv_frames", "n_hidden_states"),
    ),
    Case("color_match", {"*": ALONE}),
    Case(
        "loudness",
        {"*:samples_to_frames": EXACT, "*": Tolerance(1e-4)},
        recorded=("measured_lufs", "gain", "target", "silence_lufs", "samples_to_frames"),
    ),
    Case(
        "image_and_masks",
        {"*normalised": Tolerance(1e-6), "*": EXACT},
        inputs=("image?.in",),
        recorded=tuple(
            f"bucket_table.*.{name}"
            for name in ("bucket", "target_h", "target_w", "resized_h", "resized_w", "crop_top", "crop_left")
        ),
    ),
)
