"""Ditto: what a golden folder must hold, what counts as input, and how near is right.

The one table of required prefixes and tolerances (float32 on a CPU, largest error of any entry).
"""

from tests.parity.golden import EXACT, Case, Tolerance

PARTS = ("networks", "motion")
"""Modules of this package; each has `CASES`, from a prefix to a function from `Golden` to `Values`. More than
one may give values of a file."""

KEY_POINTS = ("kp_source", "kp_driving")

TABLE = (
    Case(
        "nets_tiny",
        {"*": Tolerance(2e-5)},
        inputs=("appearance.image", "warp.feature_3d", "decoder.feature", "*.kp_source", "*.kp_driving"),
    ),
    Case("net_appearance", {"*": Tolerance(5e-5)}, inputs=("image_u8",)),
    Case("net_motion", {"*": Tolerance(5e-5)}, inputs=("image_u8",)),
    Case("net_warp", {"*": Tolerance(2e-4)}, inputs=KEY_POINTS),
    Case("net_decoder", {"*": Tolerance(5e-5)}),
    Case("net_stitch", {"*": Tolerance(1e-5)}, inputs=KEY_POINTS),
    Case(
        "lmdm_step_",
        {"*:pred_noise*": Tolerance(1e-3), "*": Tolerance(2e-4)},
        inputs=("x", "cond_frame", "probe_rotary_in"),
    ),
    Case(
        "ddim",
        {
            "*:schedules.*": EXACT,
            "*.out": Tolerance(1e-3),
            "*.traj_inputs": Tolerance(1e-3),
            "*": Tolerance(1e-6),
        },
        recorded=("schedules.*",),
    ),
    Case(
        "audio_windows",
        {"*.feat_*": Tolerance(5e-4), "*": EXACT},
        recorded=("*.num_frames", "*.windows", "*.window_len", "*.starts", "*.video_frames_expected"),
    ),
    Case("condition", {"*": Tolerance(1e-6)}, inputs=("sc", "eye_open", "eye_ball", "emo_arr")),
    Case(
        "crop",
        {
            "*.crop_strided": Tolerance(3, mean_abs=0.5),
            "*.bchw256_strided": Tolerance(3 / 255, mean_abs=0.5 / 255),
            "*": Tolerance(1e-3),
        },
        inputs=("image_u8", "*.lmk"),
        recorded=("cases.*.center", "cases.*.size", "cases.*.angle_rad"),
    ),
    Case(
        "detector",
        {"*.blob_*": Tolerance(1e-2), "*.image_u8": EXACT, "*": Tolerance(1e-3)},
        inputs=("score_*", "tall.image_u8"),
    ),
    Case(
        "e2e_motion",
        {"*.frame_idx": EXACT, "*:cases.*": EXACT, "*": Tolerance(2e-3)},
        recorded=("cases.*.emitted", "cases.*.draws"),
    ),
    Case("eye_info", {"*": Tolerance(1e-5)}, inputs=("lmk478",)),
    Case("fade_ctrl", {"*": Tolerance(1e-12)}, recorded=("*.result.*",)),
    Case(
        "fuse",
        {"*:cases.*": EXACT, "*": Tolerance(1e-5)},
        inputs=("clip.in", "clip.v*"),
        recorded=("cases.*.length", "cases.*.fuse_length", "cases.*.valid_clip_len"),
    ),
    Case("keypoints", {"*:deg.*": Tolerance(1e-4), "*": Tolerance(1e-5)}),
    Case(
        "landmarks",
        {"*:blob106*": Tolerance(1), "*:blob203*": Tolerance(1 / 255), "*": Tolerance(1e-3)},
        inputs=("box", "raw*", "M_c2o_203"),
    ),
    Case(
        "motion_stitch",
        {"*": Tolerance(2e-5)},
        inputs=("source", "drive", "d0_given", "delta_*", "ch_source"),
    ),
    Case(
        "putback",
        {
            "*:mask_warped": Tolerance(2e-3),
            "*:out_*": Tolerance(2, mean_abs=0.2),
            "*:render_*": Tolerance(1e-4),
            "*": Tolerance(1e-6),
        },
        inputs=("frame_u8", "M_c2o*"),
    ),
    Case("resize_rule", {"*": EXACT}, recorded=("*.out",)),
    Case("schedules", {"*": EXACT}),
    Case("smooth_source", {"*": Tolerance(1e-6)}, inputs=("in",)),
)
