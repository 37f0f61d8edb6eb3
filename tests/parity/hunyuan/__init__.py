"""HunyuanVideo-Avatar: what a golden folder must hold, what counts as input, and how near is right.

The one table of required prefixes and tolerances (float32 on a CPU, largest error of any entry). A loop whose
latents are rounded to bfloat16 after every step may flip single entries by one unit in the last place, so it
is judged by its mean error.
"""

from tests.parity.golden import EXACT, Case, Tolerance

PARTS = ("transformer", "encoders", "sampling")
"""Modules of this package; each has `CASES`, from a prefix to a function from `Golden` to `Values`. More than
one may give values of a file."""

CLOSE = Tolerance(5e-6)

TABLE = (
    Case("transformer_weights", weights=("*",), compared=False),
    Case("transformer_forward", {"*": CLOSE}),
    Case("transformer_cache_steps", {"*": CLOSE}, inputs=("in.*", "*.x", "*.t", "*.text_states_2")),
    Case("audio_modules", {"*": CLOSE}, inputs=("audio_proj.in", "adapter*.in_*")),
    Case("fp8_linear", {"*": EXACT}, inputs=("weight_f8_as_u8", "scale", "bias", "x")),
    Case("rope", {"*": Tolerance(1e-6)}),
    Case("scheduler", {"*": Tolerance(1e-6)}, inputs=("*.x0", "*.v?")),
    Case(
        "loop_",
        {
            "*:sched.*": Tolerance(1e-6),
            "*:mid.guidance_scale": Tolerance(1e-6),
            "*:mid.is_cache": EXACT,
            "*_noround:*": Tolerance(2e-5),
            "*": Tolerance(0.07, mean_abs=1e-4),
        },
    ),
    Case("image_sizes", {"*": EXACT}, recorded=("rows.*.out_?",)),
    Case(
        "image_pixels",
        {"*llava*": Tolerance(2e-3), "*": EXACT},
        inputs=("image_in",),
        recorded=("text_prompt_used", "motion_bucket_*"),
    ),
    Case(
        "audio_windows",
        {"*_sums": Tolerance(1e-5), "*": EXACT},
        inputs=("hidden_states",),
        recorded=("cases.*.shape",),
    ),
    Case(
        "whisper_mel",
        {"*:mel_f16": Tolerance(2e-3), "*:tail_value": Tolerance(2e-3), "*": EXACT},
        inputs=("wave",),
        recorded=("mel_shape", "audio_len_frames", "tail_value"),
    ),
    Case(
        "predict_glue",  # but for its second encode and its full length of silence, of which nothing is used
        {"*_sums": Tolerance(1e-5), "*": EXACT},
        inputs=("hidden_states", "pixel_value_ref"),
        recorded=(
            "audio_prompts_shape",
            "face_masks_shape",
            "pixel_value_llava_shape",
            "ref_latents_shape",
            "height",
            "width",
            "frame",
            "n_tokens",
            "negative_prompt",
            "motion_*",
        ),
    ),
    Case("face_masks", {"*": EXACT}, recorded=("cases.*.mask_*",)),
    Case(
        "face_detector_post",
        {"*_shape*": EXACT, "*": Tolerance(1e-4)},
        inputs=("raw",),
        recorded=("net_input_shape", "grid_shapes"),
    ),
    Case(
        "llava_merge",
        {"*:mask_*": EXACT, "*": Tolerance(1e-5)},
        inputs=("input_ids", "tokenizer_mask", "pixel_values"),
    ),
    Case("vae_tiny", {"*": Tolerance(5e-5)}, inputs=("x", "z")),
)
