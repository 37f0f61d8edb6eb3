"""Single things spoilt on purpose: the cases that they touch must fail, all others must still pass."""

from dataclasses import replace

from tests.parity.golden import Golden
from tests.parity.judge import Perturbation, unchanged

DITTO = "avatar_core.backends.ditto"


def misdirect_weight(golden: Golden) -> Golden:
    """Two heads of one shape, of pitch and yaw, change places."""
    one, other = "detector.fc_pitch.weight", "detector.fc_yaw.weight"
    return replace(golden, wrong_rows={one: other, other: one})


def misdirect_film(golden: Golden) -> Golden:
    """Two layers of one shape in the motion network change places."""
    one, other = (f"seqTransDecoder.stack.0.film{i}.block.1.weight" for i in (1, 2))
    return replace(golden, wrong_rows={one: other, other: one})


PERTURBATIONS: dict[str, Perturbation] = {
    "guidance": Perturbation(
        unchanged,
        touches=("lmdm_step_", "ddim", "e2e_motion"),
        code={"tests.parity.ditto.networks:GUIDANCE": 2.02, "tests.parity.ditto.motion:GUIDANCE": 2.02},
    ),
    "weight_name": Perturbation(misdirect_weight, touches=("nets_tiny", "net_motion")),
    "film_name": Perturbation(misdirect_film, touches=("lmdm_step_", "ddim", "e2e_motion")),
    "rotary": Perturbation(
        unchanged,
        touches=("lmdm_step_", "ddim", "e2e_motion"),
        code={f"{DITTO}.lmdm:_THETA": 5_000},
    ),
    "slope": Perturbation(
        unchanged, touches=("nets_tiny", "net_decoder"), code={f"{DITTO}.spade_decoder:_SLOPE": 0.01}
    ),
    "heat": Perturbation(
        unchanged, touches=("nets_tiny", "net_warp"), code={f"{DITTO}.warp:_VARIANCE": 0.011}
    ),
    "smoothing": Perturbation(  # of the expression too
        unchanged, touches=("fuse", "e2e_motion"), code={f"{DITTO}.chaining:_SMOOTHED": 265}
    ),
    "lip_points": Perturbation(
        unchanged,
        touches=("motion_stitch",),
        code={f"{DITTO}.motion_stitch:LIP_POINTS": (6, 12, 14, 16, 19, 20)},
    ),
    "mask": Perturbation(unchanged, touches=("putback",), code={f"{DITTO}.putback:_SOLID": 0.88}),
}
