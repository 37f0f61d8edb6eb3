"""A service's process up to its first frame; prints the seconds at each mark. Called by bench/ditto.py.

python bench/ditto_first_frame.py DEVICE START     # START: time.time() just before
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from avatar_core.backends.ditto.backend import DittoBackend
from avatar_core.backends.ditto.config import DittoConfig
from avatar_core.backends.ditto.config_reader import read_official_config
from avatar_core.backends.ditto.live import load_stream_models, stream_settings
from avatar_core.backends.ditto.registration import Avatar
from avatar_core.backends.ditto.stages import DittoReference
from avatar_core.backends.ditto.stream import DittoStream


def main() -> None:
    device, start = sys.argv[1], float(sys.argv[2])
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        marks[name] = time.time() - start

    mark("imports")
    backend = DittoBackend(DittoConfig()).resolve()
    config, official = backend.config, read_official_config("ditto")
    with ThreadPoolExecutor(1) as pool:
        reference = DittoReference(backend, config.checkpoint)
        loading = pool.submit(reference.load_models, config.reference, device, None)
        models = load_stream_models(config, official, device)
        registrar = loading.result()
    mark("models")
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 255, (768, 768, 3), np.uint8)
    avatar = Avatar.from_tensors(registrar.register([picture], [], is_image=True))
    mark("registered")
    speech = (0.1 * generator.standard_normal(32_000)).astype(np.float32)
    with DittoStream(avatar, [picture], models, stream_settings(config, official)) as stream:
        next(stream.frames([speech]))
        mark("first frame")
    print(json.dumps(marks))


if __name__ == "__main__":
    main()
